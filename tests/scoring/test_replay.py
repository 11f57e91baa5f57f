"""Replays of trainings: against closed forms of a linear regression, and trainings by Keras."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import tracin_beam
from tracin_beam import InputError, Task
from tracin_beam.gradients.batches import Batch
from tracin_beam.inputs import batches
from tracin_beam.scoring import replay
from tracin_beam.scoring.replay import Step, Training

RNG = np.random.default_rng(3)
X, X_TEST = RNG.normal(size=(12, 3)), RNG.normal(size=(5, 3))
Y, Y_TEST = RNG.normal(size=(12, 1)), RNG.normal(size=(5, 1))
RATE = 0.05


def batch(x, y):
    return Batch(tf.constant(x, tf.float32), tf.constant(y, tf.float32), None, None)


TRAIN, TEST = batch(X, Y), batch(X_TEST, Y_TEST)


def linear():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])


def network():
    keras.utils.set_random_seed(2)
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((3,)), *layers])


def training(model, optimizer=None):
    return Training(model, "mse", optimizer or keras.optimizers.SGD(RATE), TRAIN)


def by_hand(w, order):
    """Weights before each step of gradient descent on the mean squared error, and the last."""
    w, path = np.array(w, np.float64), []
    for places in order:
        path.append(w)
        x, y = X[list(places)], Y[list(places)]
        w = w - RATE * 2 * x.T @ (x @ w - y) / len(x)
    return [*path, w]


def squares(w):
    return ((X_TEST @ w - Y_TEST) ** 2)[:, 0]


def gradients(x, y, w):
    return 2 * (x @ w - y) * x


def test_ideal_by_closed_form():
    model = linear()
    order = [(int(i),) for i in RNG.integers(12, size=30)]
    path = by_hand(model.get_weights()[0], order)
    expected = np.zeros((12, 5))
    for (place,), w, after in zip(order, path, path[1:], strict=False):
        expected[place] += squares(w) - squares(after)
    found = replay.ideal(training(model), [Step(places) for places in order], TEST)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(found.after, squares(path[-1]), rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [keras.optimizers.SGD, keras.optimizers.Adam], ids=lambda o: o.__name__
)
def test_what_the_visits_did_is_all_that_happened(optimizer):
    steps = [Step((int(i),)) for i in np.random.default_rng(0).permutation(12)]
    model = network()
    before = keras.ops.convert_to_numpy(model(X_TEST))
    found = replay.ideal(training(model, optimizer(RATE)), steps, TEST)
    np.testing.assert_allclose(
        found.scores.sum(axis=0), found.before - found.after, rtol=0, atol=1e-14
    )
    np.testing.assert_allclose(found.before, ((before - Y_TEST) ** 2)[:, 0], rtol=1e-5)
    assert (found.before != found.after).all()


def test_first_order_by_closed_form():
    model = linear()
    order = [tuple(RNG.choice(12, size=4, replace=False).tolist()) for _ in range(9)]
    order.append((5, 5, 0, 1))  # a batch that has one twice
    expected = np.zeros((12, 5))
    for places, w in zip(order, by_hand(model.get_weights()[0], order), strict=False):
        for place in places:
            g = gradients(X[[place]], Y[[place]], w)
            expected[place] += RATE / 4 * (gradients(X_TEST, Y_TEST, w) @ g.T)[:, 0]
    found = replay.first_order(training(model), [Step(places) for places in order], TEST)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6)


def test_first_order_of_a_network_is_the_slope_of_the_ideal():
    errors = []
    for rate in (1e-2, 1e-3):
        steps = [Step((i,)) for i in range(12)]
        runs = []
        for function in (replay.ideal, replay.first_order):
            given = Training(network(), "mse", keras.optimizers.SGD(rate), TRAIN)
            runs.append(function(given, steps, TEST).scores)
        errors.append(np.abs(runs[0] - runs[1]).max() / np.abs(runs[0]).max())
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.05


def test_tracincp_converges_to_first_order(tmp_path):
    model, epochs = linear(), 64
    model.compile(keras.optimizers.SGD(RATE), "mse")
    saving = tracin_beam.TracInCheckpoint(tmp_path / "ckpts", record_batches=True)
    model.fit(X, Y, batch_size=12, epochs=epochs, verbose=0, callbacks=[saving])
    task = Task(linear, "mse", parse=None)
    directory = str(tmp_path / "ckpts")
    given, steps = replay.recorded(task, directory, keras.optimizers.SGD(RATE), TRAIN)
    exact = replay.first_order(given, steps, TEST).scores

    weights = []
    for step in range(1, epochs + 1):
        with h5py.File(f"{directory}/{step:08d}.weights.h5") as file:
            weights.append(file["layers/dense/vars/0"][:].astype(np.float64))

    def error(every):
        some = weights[every - 1 :: every]
        found = sum(
            RATE / 12 * every * gradients(X, Y, w) @ gradients(X_TEST, Y_TEST, w).T for w in some
        )
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    errors = [error(every) for every in (32, 8, 4, 1)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 < errors[0]


@pytest.mark.parametrize("steps_per_execution", [1, 2])
def test_a_recorded_training_is_the_one_that_was(tmp_path, steps_per_execution):
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    model = network()
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        "mse",
        steps_per_execution=steps_per_execution,
    )
    saving = tracin_beam.TracInCheckpoint(tmp_path, record_batches=True)
    # In float64 and as [n], which Keras makes float32 and [n, 1] of.
    model.fit(X, Y[:, 0], batch_size=5, epochs=3, verbose=0, callbacks=[saving])
    assert not isinstance(getattr(model.train_function, "__self__", None), batches.Recorder)
    model.fit(X, Y[:, 0], batch_size=5, initial_epoch=3, epochs=4, verbose=0, callbacks=[saving])
    task = Task(network, "mse", parse=None)
    optimizer = keras.optimizers.SGD(rate, momentum=0.9)
    given, steps = replay.recorded(task, str(tmp_path), optimizer, TRAIN)
    assert [len(step.examples) for step in steps] == [5, 5, 2] * 4
    for epoch in (0, 3, 6, 9):
        visited = sum((step.examples for step in steps[epoch : epoch + 3]), ())
        assert sorted(visited) == list(range(12))
    found = replay.first_order(given, steps, TEST)
    for one, other in zip(given.model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    kept = keras.ops.convert_to_numpy(model(X_TEST))
    np.testing.assert_allclose(found.after, ((kept - Y_TEST) ** 2)[:, 0], rtol=1e-4)


def test_misuse(tmp_path):
    with pytest.raises(InputError, match="one example a step"):
        replay.ideal(training(linear()), [Step((1, 2))], TEST)
    with pytest.raises(InputError, match=r"Step 1 .* rate 0\.5, and the optimizer given has 0\.05"):
        replay.ideal(training(linear()), [Step((1,), 0.5)], TEST)
    model = linear()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0, callbacks=[tracin_beam.TracInCheckpoint(tmp_path / "plain")])
    task = Task(linear, "mse", parse=None)
    with pytest.raises(InputError, match=r"does not record .* step 1 .* record_batches=True"):
        replay.recorded(task, str(tmp_path / "plain"), keras.optimizers.SGD(), TRAIN)
    saving = tracin_beam.TracInCheckpoint(tmp_path / "changed", record_batches=True)
    model.compile("sgd", "mse")
    model.fit(X + 1, Y, verbose=0, callbacks=[saving])
    with pytest.raises(InputError, match=r"Step 1 used an example .* not among the training"):
        replay.recorded(task, str(tmp_path / "changed"), keras.optimizers.SGD(), TRAIN)
