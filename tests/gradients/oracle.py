"""Per-example gradients by plain `tf.GradientTape`, one example at a time, to compare with."""

import keras
import numpy as np
import tensorflow as tf

from tracin_beam.gradients.batches import BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig
from tracin_beam.inputs.task import Task


def task_of(build, features, label, loss, sample_weight=None):
    """A task whose records are the examples' indices."""

    def parse(serialized):
        index = tf.strings.to_number(serialized, tf.int32)
        given = {"features": features, "label": label, "sample_weight": sample_weight}
        return {
            key: tf.nest.map_structure(lambda a: tf.gather(tf.constant(a), index), value)
            for key, value in given.items()
            if value is not None
        }

    return Task(build, loss, parse)


def engine_of(task, count, **config):
    """An engine with the full gradient as embedding, and a batch of the first `count` examples."""
    parser = BatchParser(task)
    batch = parser([str(i).encode() for i in range(count)])
    config = {"projection": "none", "batch_size": 4, **config}
    return Engine(task, EngineConfig(**config), parser, batch), batch


def values_of(model):
    """The weights of the model, moved off zero and one first, where mistakes would not show."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if "float" in variable.dtype:
            noise = 0.2 * np.abs(rng.normal(size=variable.shape))
            variable.assign(variable + tf.cast(noise, variable.dtype))
    return [tf.identity(tf.convert_to_tensor(v.value)) for v in model.variables]


def at(structure, i):
    return tf.nest.map_structure(lambda a: tf.constant(a[i : i + 1]), structure)


def keras_loss(loss, label, output, sample_weight=None):
    """The loss as Keras computes it for this batch, usually of one."""
    loss = keras.losses.get(loss)
    arguments = {} if sample_weight is None else {"sample_weight": sample_weight}
    return tf.reduce_sum(loss(label, output, **arguments))


def plain_gradients(model, variables, quantity, examples):
    """float64 [n, N]: gradients of quantity(i) for each example i."""
    rows = []
    for i in range(examples):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(quantity(i))
        gradients = tape.gradient(value, [v.value for v in variables], unconnected_gradients="zero")
        flat = [np.array(tf.convert_to_tensor(g), np.float64).ravel() for g in gradients]
        rows.append(np.concatenate(flat))
    return np.stack(rows)


def assert_close(got, expected, tolerance=1e-4):
    """Each row close to the expected one, relative to that row's norm."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    errors = np.linalg.norm(got - expected, axis=-1)
    norms = np.linalg.norm(expected, axis=-1)
    assert norms.max() > 0, "nothing to compare"
    assert np.all(errors <= tolerance * (norms + 1e-3 * norms.max())), (errors / norms).max()


def check_model(
    build, features, label, loss, sample_weight=None, general=(), tolerance=1e-4, **config
):
    """Compares embeddings, norms, losses and scores of an engine with the oracle.

    Args:
      general: paths of the weights that are expected to take the general way.

    Returns:
      The engine and the batch.
    """
    count = len(tf.nest.flatten(features)[0])
    task = task_of(build, features, label, loss, sample_weight)
    engine, batch = engine_of(task, count, **config)
    values = values_of(engine.model)

    def example_loss(i):
        output = engine.model(at(features, i), training=False)
        weight = None if sample_weight is None else at(sample_weight, i)
        return keras_loss(loss, at(label, i), output, weight)

    variables = [w.variable for w in engine.weights]
    expected = plain_gradients(engine.model, variables, example_loss, count)
    got = engine.embed(values, batch)
    assert_close(got.embedding, expected, tolerance)
    norms = np.sum(expected**2, axis=1)
    np.testing.assert_allclose(got.squared_norm, norms, 3 * tolerance, 1e-6 * norms.max())
    reference = [float(example_loss(i)) for i in range(count)]
    np.testing.assert_allclose(got.loss, reference, tolerance, 1e-6)
    queries = engine.queries(values, batch.take(range(min(3, count))))
    scores = engine.scores(values, batch, queries)
    assert_close(scores, expected @ expected[:3].T, 3 * tolerance)
    assert sorted(engine.weights[i].path for i in engine.general) == sorted(general)
    assert set(engine.trace_counts().values()) == {1}
    return engine, batch
