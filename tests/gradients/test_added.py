"""Losses that layers add, against Keras's own total for each example by itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close, at, engine_of, plain_gradients, task_of, values_of

from tracin_beam.errors import InputError
from tracin_beam.gradients import added

L = keras.layers
N = 7
rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(N, 5)).astype("float32")
LABEL = rng.normal(size=(N, 5)).astype("float32")


@keras.saving.register_keras_serializable("test_added")
class Code(L.Layer):
    """Adds the mean or the sum over the batch, or a number for each example."""

    def __init__(self, reduce):
        super().__init__()
        self.reduce = reduce

    def call(self, h):
        each = 0.5 * tf.reduce_sum(h**2, axis=-1)
        self.add_loss(
            {"mean": tf.reduce_mean, "sum": tf.reduce_sum}.get(self.reduce, tf.identity)(each)
        )
        return h


class OwnDense(L.Dense):
    """Adds a loss inside of a call that a rule knows."""

    def call(self, x, training=None):
        h = super().call(x)
        self.add_loss(tf.reduce_mean(tf.abs(h)))
        return h


class WeightPenalty(L.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x):
        self.add_loss(0.1 * tf.reduce_sum(self.kernel**2))
        return x @ self.kernel


class Variational(keras.Model):
    def __init__(self):
        super().__init__()
        self.mean, self.log_variance, self.decoder = L.Dense(2), L.Dense(2), L.Dense(5)

    def call(self, x):
        m, v = self.mean(x), self.log_variance(x)
        self.add_loss(-0.5 * tf.reduce_mean(1 + v - m**2 - tf.exp(v)))
        return self.decoder(m)


def between(*layers):
    return lambda: keras.Sequential(
        [keras.Input((5,)), L.Dense(4), *(x() for x in layers), L.Dense(5)]
    )


def check(build, left_out=lambda model: 0.0, weight=None, **config):
    """Embeddings, norms, losses and scores against `compute_loss` of a compiled model."""
    engine, batch = engine_of(task_of(build, FEATURES, LABEL, "mse", weight), N, **config)
    values = values_of(engine.model)
    model = engine.model
    model.compile("sgd", "mse")

    def total(i):
        x, y = at(FEATURES, i), at(LABEL, i)
        w = None if weight is None else at(weight, i)
        return model.compute_loss(x, y, model(x, training=False), w) - left_out(model)

    for v, value in zip(model.variables, values, strict=True):
        v.assign(value)
    expected = plain_gradients(model, [w.variable for w in engine.weights], total, N)
    got = engine.embed(values, batch)
    assert_close(got.embedding, expected)
    np.testing.assert_allclose(got.squared_norm, (expected**2).sum(axis=1), 1e-3)
    np.testing.assert_allclose(got.loss, [float(total(i)) for i in range(N)], 1e-4)
    queries = engine.queries(values, batch.take(range(3)))
    assert_close(engine.scores(values, batch, queries), expected @ expected[:3].T, 1e-3)
    engine.verify(values, batch)
    engine.check_independence(values, batch)
    return engine


@pytest.mark.parametrize("reduce", ["mean", "sum", "each"])
@pytest.mark.parametrize("rules", [True, False])
def test_add_loss(reduce, rules):
    engine = check(between(lambda: Code(reduce)), rules=rules)
    assert [one.kind for one in engine.added] == [reduce]
    assert any("sum over the batch" in note for note in engine.notes()) == (reduce == "sum")


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_activity_regularizers(activation):
    def dense():
        return L.Dense(4, activation, activity_regularizer=keras.regularizers.L1L2(0.1, 0.2))

    engine = check(between(dense, lambda: L.ActivityRegularization(0.3)))
    assert [one.kind for one in engine.added] == ["mean", "mean"]


def test_a_loss_added_inside_of_a_layer_with_a_rule():
    check(between(lambda: OwnDense(4)))


def test_a_variational_model_and_sample_weights():
    check(Variational)
    check(Variational, weight=np.arange(N, dtype="float32") / 3)


class Odd(L.Layer):
    """Sums over the batch by ways that are linear, or that nothing here sees to be so."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def call(self, h):
        if self.known:
            by_unit = keras.ops.mean(tf.abs(h), axis=0, keepdims=True)
            self.add_loss(tf.reduce_sum(by_unit * tf.range(1.0, 5.0)) / 3.0 - tf.nn.l2_loss(0.3))
            self.add_loss(0.5 + tf.reduce_sum(tf.square(h)) / tf.cast(tf.shape(h)[0], tf.float32))
        else:
            ones = tf.ones_like(h[:, :1]) / tf.cast(tf.shape(h)[0], tf.float32)
            self.add_loss(tf.reduce_sum(tf.matmul(ones, tf.abs(h), transpose_a=True)))
        return h


@pytest.mark.parametrize("known", [True, False])
def test_the_loss_of_an_example_takes_no_run_of_its_own_where_sums_are_seen(known, monkeypatch):
    alone = []
    kept = added.values_alone
    monkeypatch.setattr(added, "values_alone", lambda *args: alone.append(1) or kept(*args))

    def dense():
        return L.Dense(4, activity_regularizer="l1l2")

    layers = [dense, lambda: Code("mean"), lambda: Code("sum")] if known else []
    check(between(*layers, lambda: Odd(known)))
    assert bool(alone) != known


def test_weight_penalties_are_left_out_and_named():
    def penalty(model):
        layers = [x for x in model.layers if isinstance(x, WeightPenalty)]
        return sum(0.1 * tf.reduce_sum(x.kernel**2) for x in layers) + sum(
            v.regularizer(v) for v in model.trainable_variables if v.regularizer
        )

    def decayed():
        return L.Dense(4, kernel_regularizer="l2")

    engine = check(between(decayed, WeightPenalty, lambda: Code("mean")), penalty)
    (note,) = engine.notes()
    assert "left out" in note
    assert "weight_penalty" in note
    assert "kernel" in note
    assert "code" not in note


class Spread(L.Layer):
    def call(self, h):
        self.add_loss(tf.reduce_mean(tf.math.reduce_variance(h, axis=0)))
        return h


def test_added_losses_that_mix_the_batch():
    engine, batch = engine_of(task_of(between(Spread), FEATURES, LABEL, "mse"), N)
    with pytest.raises(InputError, match=r"the loss that layer 'spread.*adds.*mixes the examples"):
        engine.check_independence(values_of(engine.model), batch)


def test_the_targets_other_than_the_loss_are_without_what_is_added():
    def build():
        return keras.Sequential([keras.Input((5,)), L.Dense(3), Code("mean")])

    label = rng.integers(0, 3, N)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    engine, batch = engine_of(task_of(build, FEATURES, label, loss), N)
    values = values_of(engine.model)
    for v, value in zip(engine.model.variables, values, strict=True):
        v.assign(value)
    expected = plain_gradients(
        engine.model,
        engine.model.trainable_variables,
        lambda i: -engine.model(at(FEATURES, i))[0, int(label[i])],
        N,
    )
    assert_close(engine.embed(values, batch, "logit").embedding, expected)


def test_a_model_with_a_loss_of_its_own_is_named():
    class Own(Variational):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return tf.reduce_mean(y_pred)

    engine, _ = engine_of(task_of(Own, FEATURES, LABEL, "mse"), N)
    assert any("its own compute_loss" in note for note in engine.notes())
