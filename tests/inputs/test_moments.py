"""What second moments make of a gradient, against the steps that Keras's optimizers take."""

import keras
import numpy as np
import pytest

from tracin_beam.errors import InputError
from tracin_beam.inputs import moments
from tracin_beam.inputs.callback import TracInCheckpoint, save_checkpoint
from tracin_beam.inputs.checkpoints import moments_of, read_notes
from tracin_beam.inputs.weights import WeightsLoader

optimizers = keras.optimizers


class OwnAdam(optimizers.Adam):
    """An optimizer of a user's."""


# Without momentum each step is the last gradient, times what is tested.
OPTIMIZERS = {
    "adam": lambda: optimizers.Adam(0.1, beta_1=0.0, beta_2=0.9, epsilon=1e-2),
    "amsgrad": lambda: optimizers.Adam(0.1, beta_1=0.0, beta_2=0.1, epsilon=1e-2, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(0.1, weight_decay=0.0, beta_1=0.0, epsilon=1e-2),
    "derived": lambda: OwnAdam(0.1, beta_1=0.0, epsilon=1e-2),
    "nadam": lambda: optimizers.Nadam(0.1, beta_1=0.0, beta_2=0.9, epsilon=1e-2),
    "adamax": lambda: optimizers.Adamax(0.1, beta_1=0.0, epsilon=1e-2),
    "rmsprop": lambda: optimizers.RMSprop(0.1, epsilon=1e-2),
    "centered": lambda: optimizers.RMSprop(0.1, epsilon=1e-2, centered=True),
    "accumulating": lambda: optimizers.Adam(
        0.1, beta_1=0.0, beta_2=0.9, epsilon=1e-2, gradient_accumulation_steps=2
    ),
    "scaled": lambda: optimizers.LossScaleOptimizer(
        optimizers.Adam(0.1, beta_1=0.0, beta_2=0.9, epsilon=1e-2), initial_scale=1.0
    ),
}


def build():
    # Layers that have the same shapes, in another order than the optimizer is given.
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, name="first"),
            keras.layers.Dense(2, name="second"),
        ]
    )
    model.get_layer("first").bias.assign([3.0, 4.0])
    return model


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_it_is_what_a_step_multiplies_the_gradient_by(tmp_path, name):
    model, optimizer = build(), OPTIMIZERS[name]()
    trained = list(reversed(model.trainable_variables))
    optimizer.build(trained)
    rng = np.random.default_rng(0)
    for _ in range(4):
        before = [np.array(v) for v in trained]
        gradient = [rng.normal(size=v.shape).astype(np.float32) for v in trained]
        for part in gradient:
            part[..., 0] = 0  # a number that no step moves
        for _ in range(2 if name == "accumulating" else 1):
            optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradient])
    steps = [b - np.array(v) for b, v in zip(before, trained, strict=True)]
    path = save_checkpoint(tmp_path, model, 4, 0.1, optimizer=optimizer)
    loaded = build()
    WeightsLoader(loaded).load(moments_of(path))
    notes = read_notes(moments_of(path))
    for variable, step, g in zip(
        reversed(loaded.trainable_variables), steps, gradient, strict=True
    ):
        scale = moments.scale(np.asarray(variable.value), notes)
        assert (scale[..., 0] == 0).all()
        np.testing.assert_allclose(0.1 * scale * g, step, rtol=1e-3, atol=1e-6)


def test_what_is_not_trained_has_none(tmp_path):
    model, optimizer = build(), optimizers.Adam()
    layer = model.get_layer("second")
    optimizer.build(layer.trainable_variables)
    optimizer.apply([keras.ops.ones(v.shape) for v in layer.trainable_variables])
    path = save_checkpoint(tmp_path, model, 1, 0.1, optimizer=optimizer)
    loaded, notes = build(), read_notes(moments_of(path))
    WeightsLoader(loaded).load(moments_of(path))
    found = [moments.scale(np.asarray(v.value), notes) for v in loaded.trainable_variables]
    assert [x is None for x in found] == [True, True, False, False]


def test_misuse(tmp_path):
    model = build()
    with pytest.raises(InputError, match="Adam, has taken no step"):
        save_checkpoint(tmp_path / "adam", model, 1, 0.1, optimizer=optimizers.Adam())
    for optimizer in (optimizers.SGD(), optimizers.Adagrad()):
        said = f"the optimizer is {type(optimizer).__name__}, .* Adam, AdamW, Nadam"
        with pytest.raises(InputError, match=said):
            save_checkpoint(tmp_path / optimizer.name, model, 1, 0.1, optimizer=optimizer)
    model.compile("sgd", "mse")
    saving = TracInCheckpoint(tmp_path / "fit", optimizer_state=True)
    with pytest.raises(InputError, match="the optimizer is SGD"):  # before the first step
        model.fit(np.zeros((2, 2)), np.zeros((2, 2)), verbose=0, callbacks=[saving])
    assert not (tmp_path / "fit").exists()
