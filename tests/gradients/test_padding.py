"""Ragged and sparse features: an example's numbers are those that it has alone, without padding."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close, keras_loss, plain_gradients, values_of

from tracin_beam.gradients import padding
from tracin_beam.gradients.batches import BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig
from tracin_beam.inputs.task import Task

L = keras.layers
N = 11
rng = np.random.default_rng(0)
TOKENS = [rng.integers(1, 12, n).tolist() for n in (3, 1, 7, 3, 5, 1, 2, 7, 4, 3, 6)]
CLASSES = rng.integers(0, 3, N)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def pooled(mask):
    def build():
        inputs = keras.Input((None,), dtype="int32")
        hidden = L.Embedding(12, 4, mask_zero=mask)(inputs)
        hidden = L.Dense(5, "tanh")(L.GlobalAveragePooling1D()(hidden))
        return keras.Model(inputs, L.Dense(3)(hidden))

    return build


def parse_as(kind):
    def parse(serialized):
        index = tf.strings.to_number(serialized, tf.int32)
        tokens = tf.gather(tf.ragged.constant(TOKENS, tf.int64), index)
        if kind == "sparse":
            tokens = tokens.to_sparse()
        if kind == "padded":
            tokens = tokens.to_tensor()
        return {"features": tokens, "label": tf.gather(tf.constant(CLASSES), index)}

    return parse


def records(indices):
    return [str(i).encode() for i in indices]


def engine_of(build, kind, **config):
    task = Task(build, LOSS, parse_as(kind))
    parser = BatchParser(task)
    config = {"projection": "none", "batch_size": 4, **config}
    engine = Engine(task, EngineConfig(**config), parser, parser(records([0])))
    return engine, parser, values_of(engine.model)


def expected_of(engine):
    def quantity(i):
        output = engine.model(tf.constant([TOKENS[i]]), training=False)
        return keras_loss(LOSS, CLASSES[i : i + 1], output)

    model = engine.model
    return plain_gradients(model, model.trainable_variables, quantity, N)


@pytest.mark.parametrize(
    ("kind", "mask", "rules"),
    [("ragged", True, True), ("ragged", False, True), ("sparse", False, False)],
)
def test_examples_of_any_length(kind, mask, rules):
    engine, parser, values = engine_of(pooled(mask), kind, padding=mask, rules=rules)
    expected = expected_of(engine)
    batch = parser(records(range(N)))
    got = engine.embed(values, batch)
    assert_close(got.embedding, expected)
    np.testing.assert_array_equal(got.label, CLASSES)
    queries = engine.queries(values, batch.take([2, 0, 5]))
    scores = engine.scores(values, batch, queries)
    assert_close(scores, expected @ expected[[2, 0, 5]].T)
    other = engine.embed(values, parser(records([5, 2, 9]))).embedding
    np.testing.assert_allclose(other, got.embedding[[5, 2, 9]], 1e-4, 1e-6)
    engine.verify(values, batch)
    engine.check_independence(values, batch)


def test_what_depends_on_padding():
    for kind, masks in (("ragged", (True, False)), ("padded", (False,))):
        for mask in masks:
            engine, parser, values = engine_of(pooled(mask), kind)
            batch = parser(records(range(6)))
            alone = [parser(records([i])) for i in range(6)]
            assert engine.depends_on_padding(values, batch, alone) is not mask
            assert bool(batch.extents) == (kind == "ragged")
            equal = [parser(records([i])) for i in (0, 3)]
            found = engine.depends_on_padding(values, parser(records([0, 3])), equal)
            assert found == (kind == "ragged" and not mask)


def test_sketched_norms_are_verified_without_padding():
    engine, parser, values = engine_of(
        pooled(False), "ragged", padding=False, norms="sketched", projection="countsketch", dim=64
    )
    engine.verify(values, parser(records([0, 2, 1])))


def test_several_ragged_axes():
    nested = tf.ragged.constant([[[1, 2], [3]], [], [[4, 5, 6]]])
    sparse = tf.SparseTensor([[0, 2], [1, 0]], ["a", "b"], [3, 5])
    fixed = tf.SparseTensor([[1, 1]], [2.0], [3, 2])
    dense, extents = padding.densify({"a": nested, "b": tf.zeros([3, 2]), "c": fixed})
    np.testing.assert_array_equal(extents[0], [[2, 2], [0, 0], [1, 3]])
    assert set(extents) == {0}
    np.testing.assert_array_equal(dense["a"][2], [[4, 5, 6], [0, 0, 0]])
    np.testing.assert_array_equal(dense["c"], [[0, 0], [0, 2], [0, 0]])
    part = padding.trim(dense["a"][2:], padding.take({0: extents[0]}, np.array([2])))
    np.testing.assert_array_equal(part, [[[4, 5, 6]]])
    assert padding.extend(dense, extents, 2)["a"].shape == (3, 4, 5)

    @tf.function(input_signature=[tf.SparseTensorSpec([None, None], tf.string)])
    def of_unknown_width(x):
        return padding.densify(x)

    @tf.function(input_signature=[tf.SparseTensorSpec([None, 2], tf.float32)])
    def of_known_width(x):
        dense, extents = padding.densify(x)
        assert dense.shape.as_list() == [None, 2]
        assert not extents
        return dense

    assert of_known_width(fixed)[1, 1] == 2
    dense, extents = of_unknown_width(sparse)
    np.testing.assert_array_equal(extents[0], [[3], [1], [0]])
    assert dense[0, 2] == b"a"
    sizes = {0: np.array([[2], [1], [2], [2]])}
    assert [g.tolist() for g in padding.groups(sizes, 2)] == [[1], [0, 2], [3]]
