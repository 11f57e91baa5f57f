import contextlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import training
from remote_files import PREFIX
from training import (
    RATE,
    X,
    Y,
    build,
    compiled,
    decay,
    fit,
    listing,
    load_weights,
    saved_steps,
    schedule,
)

from tracin_beam.errors import InputError
from tracin_beam.inputs.callback import TracInCheckpoint, save_checkpoint
from tracin_beam.inputs.checkpoints import Checkpoint, read_checkpoints
from tracin_beam.storage import files


def test_each_epoch_is_saved_with_the_weights_and_rate_of_that_time(tmp_path):
    weights = []
    snapshot = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights())
    )
    model = compiled(schedule())
    fit(model, snapshot, TracInCheckpoint(tmp_path / "ckpts"), epochs=3)
    entries = listing(tmp_path / "ckpts")
    assert [(e["path"], e["step"], e["epoch"]) for e in entries] == [
        ("00000004.weights.h5", 4, 1),
        ("00000008.weights.h5", 8, 2),
        ("00000012.weights.h5", 12, 3),
    ]
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([decay(3), decay(7), decay(11)], rel=1e-6)

    checkpoints = read_checkpoints(str(tmp_path / "ckpts"))
    assert checkpoints[1] == Checkpoint(
        str(tmp_path / "ckpts" / "00000008.weights.h5"), 8, 2, rates[1]
    )
    fresh = build()
    for checkpoint, expected in zip(checkpoints, weights, strict=True):
        load_weights(fresh, checkpoint.path)
        for ours, theirs in zip(fresh.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_directory_on_another_file_system(tmp_path):
    model = compiled()
    fit(model, TracInCheckpoint(f"{PREFIX}{tmp_path}/ckpts"))
    checkpoints = read_checkpoints(f"{PREFIX}{tmp_path}/ckpts")
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 8]
    fresh = build()
    load_weights(fresh, checkpoints[-1].path)
    np.testing.assert_array_equal(fresh.get_weights()[0], model.get_weights()[0])
    globbed = read_checkpoints(f"{PREFIX}{tmp_path}/ckpts/*.weights.h5", 0.5)
    assert [checkpoint.step for checkpoint in globbed] == [4, 8]


@pytest.mark.parametrize("first", [True, False])
def test_the_rate_is_the_one_used_not_the_one_set_for_the_next_epoch(tmp_path, first):
    halve = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    ours = TracInCheckpoint(tmp_path)
    fit(compiled(), *([halve, ours] if first else [ours, halve]), epochs=4)
    # The first epoch sets the best, the second waits and halves, as do all after it.
    expected = [RATE, RATE, RATE / 2, RATE / 4]
    assert [entry["learning_rate"] for entry in listing(tmp_path)] == expected


def test_a_learning_rate_scheduler(tmp_path):
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: RATE / (epoch + 1))
    fit(compiled(), TracInCheckpoint(tmp_path), scheduler, epochs=3)
    rates = [entry["learning_rate"] for entry in listing(tmp_path)]
    assert rates == pytest.approx([RATE, RATE / 2, RATE / 3], rel=1e-6)


def test_a_loss_scale_optimizer(tmp_path):
    def scaled(rate):
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate))

    fit(compiled(schedule(), scaled), TracInCheckpoint(tmp_path))
    rates = [entry["learning_rate"] for entry in listing(tmp_path)]
    assert rates == pytest.approx([decay(3), decay(7)], rel=1e-6)
    assert saved_steps(tmp_path) == [4, 8]


def test_accumulated_gradients(tmp_path):
    def accumulating(rate):
        return keras.optimizers.SGD(rate, gradient_accumulation_steps=3)

    model = compiled(schedule(), accumulating)
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, TracInCheckpoint(tmp_path / "ckpts"), saver)
    assert saved_steps(tmp_path / "ckpts") == [1, 2]  # updates, after batches 3 and 6
    rates = [entry["learning_rate"] for entry in listing(tmp_path / "ckpts")]
    assert rates == pytest.approx([decay(2), decay(5)], rel=1e-6)
    read = [c.learning_rate for c in read_checkpoints(str(tmp_path / "*.keras"))]
    assert read == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize(
    ("save_freq", "execution", "expected"),
    [(3, 1, [3, 6, 8]), (4, 1, [4, 8]), (5, 1, [5, 8]), (3, 2, [4, 8]), (100, 1, [8])],
)
def test_every_so_many_batches_and_the_last(tmp_path, save_freq, execution, expected):
    fit(compiled(steps_per_execution=execution), TracInCheckpoint(tmp_path, save_freq))
    assert saved_steps(tmp_path) == expected


@pytest.mark.parametrize("save_freq", [0, -1, True, 2.0, "batch"])
def test_a_wrong_save_freq(save_freq):
    with pytest.raises(InputError, match="save_freq"):
        TracInCheckpoint("ckpts", save_freq)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("victim", "left"), [(".weights.h5", [4, 8]), ("checkpoints.json", [4])])
def test_killed_in_the_middle_of_saving(tmp_path, monkeypatch, victim, left):
    atomic_write = files.atomic_write

    @contextlib.contextmanager
    def dying(path):
        with atomic_write(path) as handle:
            yield handle
            if path.endswith(victim) and (tmp_path / "00000008.weights.h5").exists():
                raise Killed

    monkeypatch.setattr(files, "atomic_write", dying)
    with pytest.raises(Killed):
        fit(compiled(), TracInCheckpoint(tmp_path), epochs=9)
    assert [c.step for c in read_checkpoints(str(tmp_path))] == left
    for checkpoint in read_checkpoints(str(tmp_path)):
        load_weights(build(), checkpoint.path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def content(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.h5")}


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_resumed_from_a_checkpoint(tmp_path, with_optimizer):
    keras.utils.set_random_seed(1)
    fit(compiled(), TracInCheckpoint(tmp_path), epochs=3)
    before = content(tmp_path)
    model = compiled()
    if with_optimizer:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "00000008.weights.h5")  # the third epoch is lost
    with pytest.warns(UserWarning, match="goes on from step 8, .* no longer list .*: step 12"):
        fit(model, TracInCheckpoint(tmp_path), epochs=4, initial_epoch=2)
    entries = listing(tmp_path)
    assert [(e["step"], e["epoch"]) for e in entries] == [(4, 1), (8, 2), (12, 3), (16, 4)]
    assert [e["path"][:-11] for e in entries] == ["00000004", "00000008", "00000012-2", "00000016"]
    after = content(tmp_path)
    assert len(after) == 5
    assert {name: after[name] for name in before} == before


def test_resumed_by_a_callback_that_comes_later(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise Killed

    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return TracInCheckpoint(tmp_path / "ckpts"), backup

    with pytest.raises(Killed):
        fit(compiled(), *callbacks(), Stop(), epochs=4)
    fit(compiled(), *callbacks(), epochs=4)
    assert saved_steps(tmp_path / "ckpts") == [4, 8, 12, 16]
    assert [entry["epoch"] for entry in listing(tmp_path / "ckpts")] == [1, 2, 3, 4]


def test_fitted_twice(tmp_path):
    model, callback = compiled(), TracInCheckpoint(tmp_path)
    fit(model, callback)
    fit(model, callback)
    assert saved_steps(tmp_path) == [4, 8, 12, 16]


def test_another_training_is_refused_before_it_begins(tmp_path):
    fit(compiled(), TracInCheckpoint(tmp_path), epochs=3)
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"lists 3 checkpoints, .* the weights of none of them"):
        fit(compiled(), TracInCheckpoint(tmp_path), epochs=1)
    assert content(tmp_path) == before
    assert saved_steps(tmp_path) == [4, 8, 12]


def test_two_stages_of_a_training(tmp_path):
    model = build()
    for rate, batch_size in ((RATE, 2), (RATE / 2, 4), (RATE / 4, 2)):
        compiled(rate, model=model)
        fit(model, TracInCheckpoint(tmp_path), batch_size=batch_size)
    entries = listing(tmp_path)
    assert [e["step"] for e in entries] == [4, 8, 10, 12, 16, 20]
    assert [e["learning_rate"] for e in entries] == [
        RATE / 2**stage for stage in (0, 0, 1, 1, 2, 2)
    ]
    found = read_checkpoints(f"{tmp_path}/*.weights.h5")  # the files know it themselves
    assert [(c.step, c.learning_rate) for c in found] == [
        (e["step"], e["learning_rate"]) for e in entries
    ]
    # The last stage, resumed in its middle with its optimizer's count.
    compiled(RATE / 4, model=model)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / entries[-2]["path"])
    assert int(model.optimizer.iterations) == 4
    with pytest.warns(UserWarning, match="goes on from step 16"):
        fit(model, TracInCheckpoint(tmp_path), epochs=1)
    assert saved_steps(tmp_path) == [4, 8, 10, 12, 16, 20]


class Two(keras.Model):
    """A training step of its own with two optimizers; `model.optimizer` is Keras's default."""

    def __init__(self):
        super().__init__()
        self.a, self.b = keras.layers.Dense(2), keras.layers.Dense(1)

    def call(self, x):
        return self.b(self.a(x))

    def compile(self):
        super().compile(loss="mse")
        self.one, self.other = keras.optimizers.SGD(RATE), keras.optimizers.SGD(RATE / 2)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        for optimizer, layer in ((self.one, self.a), (self.other, self.b)):
            weights = layer.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


def two():
    model = Two()
    model.compile()
    model(X)
    return model


def test_an_optimizer_that_does_not_train_is_refused_at_the_first_step(tmp_path):
    with pytest.raises(InputError, match=r"RMSprop.* no step.* optimizer= .*one \(SGD\), other"):
        fit(two(), TracInCheckpoint(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_optimizer_and_the_rate_that_count_can_be_given(tmp_path):
    model = two()
    fit(model, TracInCheckpoint(tmp_path / "a", optimizer=model.other))
    assert [(e["step"], e["learning_rate"]) for e in listing(tmp_path / "a")] == [
        (4, RATE / 2),
        (8, RATE / 2),
    ]
    fit(two(), TracInCheckpoint(tmp_path / "b", 3, learning_rate=lambda step: step + 10))
    assert [(e["step"], e["learning_rate"]) for e in listing(tmp_path / "b")] == [
        (3, 12),
        (6, 15),
        (8, 17),
    ]
    fit(compiled(), TracInCheckpoint(tmp_path / "c", learning_rate=0.5))
    assert [(e["step"], e["learning_rate"]) for e in listing(tmp_path / "c")] == [
        (4, 0.5),
        (8, 0.5),
    ]
    load_weights(two(), str(tmp_path / "a" / "00000008.weights.h5"))


@pytest.mark.parametrize("wrong", [{"optimizer": "adam"}, {"learning_rate": math.nan}])
def test_wrong_arguments(wrong):
    with pytest.raises(InputError, match="must be"):
        TracInCheckpoint("ckpts", **wrong)


def test_an_optimizer_of_many_rates(tmp_path):
    kinds = keras.optimizers.OptimizerMap(keras.optimizers.SGD(RATE))
    kinds[".*bias"] = keras.optimizers.SGD(RATE / 2)
    split = keras.optimizers.MultiOptimizer(kinds)
    model = build()
    model.compile(split, "mse")
    with pytest.raises(InputError, match="MultiOptimizer has many"):
        fit(model, TracInCheckpoint(tmp_path))
    fit(model, TracInCheckpoint(tmp_path, learning_rate=0.5))
    assert saved_steps(tmp_path) == [4, 8]


def averaging(rate=0.1, **options):
    return compiled(rate, lambda r: keras.optimizers.SGD(r, use_ema=True, **options))


def trained_weights(after):
    """A callback that keeps the weights after every batch whose count is one of these."""
    kept, batches = [], itertools.count()

    def keep(batch, logs):
        if next(batches) in after:
            kept.append(keep_from.model.get_weights())

    keep_from = keras.callbacks.LambdaCallback(on_train_batch_end=keep)
    return keep_from, kept


def assert_saved(directory, expected):
    for entry, weights in zip(listing(directory), expected, strict=True):
        model = build()
        load_weights(model, str(directory / entry["path"]))
        for ours, theirs in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_allclose(ours, theirs, 1e-6)


@pytest.mark.parametrize("validated", [False, True])
def test_averages_are_not_saved_in_place_of_what_was_trained(tmp_path, validated):
    keep, kept = trained_weights([3, 7])
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    options = {"validation_data": (X, Y)} if validated else {}
    fit(averaging(), TracInCheckpoint(tmp_path), swap, keep, **options)
    assert_saved(tmp_path, kept)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    with pytest.raises(InputError, match="put TracInCheckpoint before"):
        fit(averaging(), swap, TracInCheckpoint(tmp_path / "b"))


class From(keras.callbacks.Callback):
    """Halves the weights at the end of epochs from the given one on."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def on_epoch_end(self, epoch, logs=None):
        if epoch >= self.first:
            self.model.set_weights([w / 2 for w in self.model.get_weights()])


def test_averages_that_begin_later_do_not_stop_the_training(tmp_path):
    keep, kept = trained_weights([3, 7])
    with pytest.warns(UserWarning, match=r"after step 8.* not saved"):
        fit(compiled(), From(1), TracInCheckpoint(tmp_path), keep)
    assert saved_steps(tmp_path) == [4]
    assert_saved(tmp_path, kept[:1])


@pytest.mark.parametrize("restoring", [False, True])
def test_the_end_of_training_may_change_the_weights(tmp_path, restoring):
    keep, kept = trained_weights([2, 5])
    model = compiled() if restoring else averaging()  # which puts the averages in at the end
    # As EarlyStopping does.
    restore = keras.callbacks.LambdaCallback(on_train_end=lambda logs: model.set_weights(kept[0]))
    others = [restore] if restoring else []
    with pytest.warns(UserWarning, match=r"after step 8.* not saved"):
        fit(model, *others, TracInCheckpoint(tmp_path, 3), keep)
    assert saved_steps(tmp_path) == [3, 6]
    assert_saved(tmp_path, kept)


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}])
def test_ways_of_running(tmp_path, options):
    model = compiled(schedule(), **options)
    keep, kept = trained_weights([3, 7])
    fit(model, TracInCheckpoint(tmp_path), keep)
    rates = [entry["learning_rate"] for entry in listing(tmp_path)]
    assert rates == pytest.approx([decay(3), decay(7)], rel=1e-6)
    assert_saved(tmp_path, kept)


def test_a_schedule_and_several_steps_in_one_execution(tmp_path):
    fit(compiled(schedule(), steps_per_execution=4), TracInCheckpoint(tmp_path))
    rates = [entry["learning_rate"] for entry in listing(tmp_path)]
    assert rates == pytest.approx([decay(3), decay(7)], rel=1e-6)


def test_no_update_in_the_first_epoch(tmp_path):
    model = compiled(optimizer=lambda r: keras.optimizers.SGD(r, gradient_accumulation_steps=6))
    fit(model, TracInCheckpoint(tmp_path), epochs=3)
    assert saved_steps(tmp_path) == [1, 2]  # after batches 6 and 12


def test_a_mirrored_strategy(tmp_path):
    code = f"""
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import numpy as np, warnings
from training import X, Y, build, compiled, fit, load_weights, schedule
from tracin_beam import TracInCheckpoint
warnings.simplefilter("error", UserWarning)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = compiled(schedule())
for _ in range(2):
    fit(model, TracInCheckpoint({str(tmp_path)!r}))
np.savez({str(tmp_path / "trained.npz")!r}, *model.get_weights())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(training.__file__).parent)
    entries = listing(tmp_path)
    assert [entry["step"] for entry in entries] == [4, 8, 12, 16]
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([decay(s) for s in (3, 7, 11, 15)], rel=1e-6)
    model = build()
    load_weights(model, str(tmp_path / entries[-1]["path"]))
    trained = np.load(tmp_path / "trained.npz").values()
    for ours, theirs in zip(model.get_weights(), trained, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_no_file_holds_is_said_at_the_first_save(tmp_path):
    class Hidden(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self._layers = [keras.layers.Dense(3)]

        def build(self, shape):
            self._layers[0].build(shape)

        def call(self, x):
            return self._layers[0](x)

    model = keras.Sequential([keras.Input((3,)), Hidden(), keras.layers.Dense(1)])
    with pytest.warns(UserWarning, match=r"step 4 is not enough.* 2 of the model's.*kernel"):
        fit(compiled(model=model), TracInCheckpoint(tmp_path), epochs=1)


# save_checkpoint


def test_a_training_loop_of_ones_own(tmp_path):
    model, optimizer = build(), keras.optimizers.SGD(schedule())
    expected = []
    for step in range(1, 7):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X, training=True) - Y) ** 2)
        weights = model.trainable_variables
        rate = optimizer.learning_rate
        optimizer.apply(tape.gradient(loss, weights), weights)
        if step % 3 == 0:
            save_checkpoint(tmp_path, model, step, rate, epoch=step // 3)
            expected.append(model.get_weights())
    entries = listing(tmp_path)
    assert [(e["step"], e["epoch"]) for e in entries] == [(3, 1), (6, 2)]
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([decay(2), decay(5)], rel=1e-6)
    assert_saved(tmp_path, expected)
    with pytest.raises(InputError, match="already lists step 6, so step 6 cannot"):
        save_checkpoint(tmp_path, model, 6, 0.1)
    # fit goes on from there.
    fit(compiled(model=model), TracInCheckpoint(tmp_path), epochs=1)
    assert saved_steps(tmp_path) == [3, 6, 10]


@pytest.mark.parametrize(
    ("step", "rate", "message"),
    [
        (-1, 0.1, "step must be"),
        (1.5, 0.1, "step must be"),
        (1, -0.1, "at least 0"),
        (1, math.nan, "finite"),
        (1, 1e308, "no training has one above"),
        (1, schedule(), "is a schedule"),
    ],
)
def test_a_wrong_step_or_rate(tmp_path, step, rate, message):
    with pytest.raises(InputError, match=message):
        save_checkpoint(tmp_path, build(), step, rate)
    assert not list(tmp_path.iterdir())


def test_a_file_that_no_list_names_is_not_overwritten(tmp_path):
    (tmp_path / "00000001.weights.h5").write_text("mine")
    save_checkpoint(tmp_path, build(), 1, 0.1)
    assert (tmp_path / "00000001.weights.h5").read_text() == "mine"
    assert listing(tmp_path)[0]["path"] == "00000001-2.weights.h5"
