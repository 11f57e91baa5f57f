"""What the tables must say, by brute force and without tracin_beam.

Gradients come from one `tf.GradientTape` for each example, in a batch of its own; inner products
and sums are float64.
"""

import dataclasses
import glob
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

ROLES = {"proponent": 1, "opponent": -1}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples in the order of their shards' paths.

    Attributes:
      features, label, sample_weight: nested arrays [n, ...]; None if there is none.
      places: (path of the shard, position) [n].
      ids: [n]; by default "<shard name>#<position>".
    """

    features: Any
    label: Any
    places: list[tuple[str, int]]
    sample_weight: Any = None
    ids: list[str] = None

    def __post_init__(self):
        if self.ids is None:
            names = [f"{os.path.basename(path)}#{position}" for path, position in self.places]
            object.__setattr__(self, "ids", names)
        assert len(self.places) == len(self.ids) == len(self)

    def __len__(self):
        return len(tf.nest.flatten(self.features)[0])

    def index(self, rows, prefix):
        """Which example each row of a table means, by its columns of shard and position."""
        number = {place: i for i, place in enumerate(self.places)}
        columns = (rows[f"{prefix}shard"], rows[f"{prefix}position"])
        return np.array([number[place] for place in zip(*columns, strict=True)])

    def at(self, i):
        """Example i as a batch of one."""
        structure = (self.features, self.label, self.sample_weight)
        return tf.nest.map_structure(
            lambda a: None if a is None else tf.constant(a[i : i + 1]), structure
        )


def places(*patterns):
    """(path, position) of all records, in the order of the paths."""
    found = sorted(path for pattern in patterns for path in glob.glob(pattern))
    return [(path, i) for path in found for i, _ in enumerate(records(path))]


def records(path):
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return tf.data.TFRecordDataset(path, "GZIP" if packed else "").as_numpy_iterator()


def keras_loss(loss) -> Callable:
    """The loss of a batch of one, as Keras computes it in training."""

    def quantity(label, output, sample_weight):
        if sample_weight is None:
            return loss(label, output)
        return loss(label, output, sample_weight=sample_weight)

    return quantity


def per_example(model, quantity, examples, variables=None):
    """Values float64 [n], gradients float32 [n, N] and the model's outputs, nested [n, ...]."""
    variables = model.trainable_variables if variables is None else variables

    @tf.function(reduce_retracing=True)
    def one(features, label, sample_weight):
        with tf.GradientTape() as tape:
            output = model(features, training=False)
            value = tf.reduce_sum(quantity(label, output, sample_weight))
        gradients = tape.gradient(value, [v.value for v in variables], unconnected_gradients="zero")
        flat = [tf.reshape(tf.convert_to_tensor(g), [-1]) for g in gradients]
        return value, tf.concat(flat, 0), output

    results = [one(*examples.at(i)) for i in range(len(examples))]
    outputs = tf.nest.map_structure(lambda *x: np.concatenate(x), *(r[2] for r in results))
    return (
        np.array([float(r[0]) for r in results]),
        np.stack([r[1].numpy() for r in results]),
        outputs,
    )


@dataclasses.dataclass(frozen=True)
class Truth:
    """Attributes:
    train, test: the examples.
    rates: learning rates [C].
    products: float64 [tests, trains, C], unscaled inner products.
    squares: float64 [trains, C], ‖∇ℓ‖².
    losses: float64 [trains, C].
    train_output, test_output: the model's, at the last checkpoint.
    """

    train: Examples
    test: Examples
    rates: np.ndarray
    products: np.ndarray
    squares: np.ndarray
    losses: np.ndarray
    train_output: Any
    test_output: Any

    @property
    def scores(self):
        return (self.products * self.rates).sum(axis=2)


def brute_force(model, loss, train, test, checkpoints, target=None, variables=None):
    """The truth.

    Args:
      model: built; takes each checkpoint's weights.
      loss: a function (label, output, sample_weight) of a batch of one.
      train, test: Examples.
      checkpoints: (path of the weights, learning rate) in training order.
      target: a function as loss, for the test side.
      variables: whose gradients count; by default all trainable ones.
    """
    model(train.at(0)[0], training=False)
    rates, products, squares, losses = [], [], [], []
    for path, rate in checkpoints:
        model.load_weights(path)
        values, own, train_output = per_example(model, loss, train, variables)
        _, other, test_output = per_example(model, target or loss, test, variables)
        other = other.astype(np.float64)
        blocks = [own[i : i + 256].astype(np.float64) for i in range(0, len(own), 256)]
        rates.append(rate)
        products.append(np.concatenate([other @ block.T for block in blocks], axis=1))
        squares.append(np.concatenate([np.square(block).sum(axis=1) for block in blocks]))
        losses.append(values)
    return Truth(
        train,
        test,
        np.array(rates),
        np.stack(products, axis=2),
        np.stack(squares, axis=1),
        np.stack(losses, axis=1),
        train_output,
        test_output,
    )


def listed_checkpoints(folder):
    """(path, learning rate) of the checkpoints in a directory of TracInCheckpoint's."""
    with open(os.path.join(folder, "checkpoints.json")) as file:
        entries = json.load(file)
    return [(os.path.join(folder, e["path"]), e["learning_rate"]) for e in entries]


def read_table(pattern):
    found = sorted(glob.glob(str(pattern)))
    assert found, pattern
    return pa.concat_tables([pq.ParquetFile(path).read() for path in found]).to_pandas()


def read_run(out):
    with open(os.path.join(out, "run.json")) as file:
        return json.load(file)


def same_numbers(got, expected):
    """Equal, with None or NaN for each NaN."""
    np.testing.assert_allclose(
        np.array(got, np.float64), np.asarray(expected, np.float64), rtol=1e-4, atol=1e-6
    )


def check_influence(rows, truth, predict, top_k=10, label=lambda y: y):
    """Compares an influence table with the truth: lists, scores and all other columns.

    Args:
      predict: from outputs [n, ...] to the predictions [n] the table should have.
      label: from labels [n, ...] to those the table should have.
    """
    assert rows.exact.all()
    i, j = truth.test.index(rows, "test_"), truth.train.index(rows, "train_")
    assert rows.train_id.tolist() == [truth.train.ids[x] for x in j]
    assert rows.test_id.tolist() == [truth.test.ids[x] for x in i]
    same_numbers(rows.train_label, label(truth.train.label)[j])
    same_numbers(rows.test_label, label(truth.test.label)[i])
    same_numbers(rows.train_prediction, predict(truth.train_output)[j])
    same_numbers(rows.test_prediction, predict(truth.test_output)[i])
    check_scores(rows, i, j, truth)
    top_k = min(top_k, len(truth.train))
    groups = rows.assign(i=i, j=j).groupby(["i", "role"])
    assert len(groups) == 2 * len(truth.test)
    for (query, role), group in groups:
        assert group["rank"].tolist() == list(range(1, top_k + 1))
        scores = truth.scores[query]
        best = np.argsort(-ROLES[role] * scores, kind="stable")[:top_k]
        found = group.j.to_numpy()
        assert len(set(found)) == top_k
        if found.tolist() != best.tolist():  # only where scores are as good as equal
            np.testing.assert_allclose(scores[found], scores[best], rtol=1e-5)


def check_scores(rows, i, j, truth):
    expected = truth.products[i, j] * truth.rates
    by_checkpoint = np.stack(rows.score_by_checkpoint.to_list())
    np.testing.assert_allclose(rows.score, truth.scores[i, j], rtol=1e-4)
    np.testing.assert_allclose(by_checkpoint.sum(axis=1), rows.score, rtol=1e-12)
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(by_checkpoint - expected) / scale, 1e-4)


def check_self_influence(rows, truth, predict, label=lambda y: y):
    """Compares a self-influence table with the truth, every row and column."""
    j = truth.train.index(rows, "")
    assert sorted(j) == list(range(len(truth.train)))
    assert rows.id.tolist() == [truth.train.ids[x] for x in j]
    same_numbers(rows.label, label(truth.train.label)[j])
    same_numbers(rows.prediction, predict(truth.train_output)[j])
    expected = (truth.squares * truth.rates)[j]
    # What a softmax leaves of a gradient that is almost nothing is rounding.
    nothing = 1e-9 * expected.max()
    got = np.stack(rows.self_influence_by_checkpoint.to_list())
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=nothing)
    np.testing.assert_allclose(rows.self_influence, got.sum(axis=1), rtol=1e-12)
    losses = np.stack(rows.loss_by_checkpoint.to_list())
    np.testing.assert_allclose(losses, truth.losses[j], rtol=1e-4, atol=1e-6)


def read_embeddings(out, name, step, shard_name):
    """An embedding file as dict of arrays, by TensorFlow alone."""
    suffix = "" if shard_name.endswith(".tfrecord") else ".tfrecord"
    path = os.path.join(out, "embeddings", name, str(step), shard_name + suffix)
    spec = {k: tf.io.FixedLenFeature([], tf.float32) for k in ("label", "prediction", "loss")}
    spec["squared_norm"] = tf.io.FixedLenFeature([], tf.float32)
    spec["position"] = tf.io.FixedLenFeature([], tf.int64)
    spec["id"] = spec["embedding"] = tf.io.FixedLenFeature([], tf.string)
    spec["scale"] = tf.io.FixedLenFeature([], tf.float32, default_value=-1.0)  # of int8 alone
    parsed = tf.io.parse_example(list(tf.data.TFRecordDataset(path)), spec)
    stored, scale = parsed.pop("embedding"), parsed.pop("scale").numpy()[:, None]
    if np.all(scale < 0):
        vectors = tf.io.decode_raw(stored, tf.float32).numpy()
    else:
        vectors = tf.io.decode_raw(stored, tf.int8).numpy() * scale
    return {**{k: v.numpy() for k, v in parsed.items()}, "embedding": vectors}


def estimated_products(out, test_name, truth, steps):
    """float64 [tests, trains, C]: inner products of the embeddings on disk."""
    products = []
    for step in steps:
        sides = []
        for name, examples in (("train", truth.train), (test_name, truth.test)):
            shards = sorted({path for path, _ in examples.places})
            parts = [read_embeddings(out, name, step, os.path.basename(p)) for p in shards]
            sides.append(np.concatenate([p["embedding"] for p in parts]).astype(np.float64))
        products.append(sides[1] @ sides[0].T)
    return np.stack(products, axis=2)


def top_sets(scores, role, k):
    return [set(row[:k]) for row in np.argsort(-ROLES[role] * scores, axis=1, kind="stable")]


def check_retrieval(out, rows, truth, test_name="test", k=10):
    """Recomputes recall and correlation, of a run with all its test examples sampled."""
    run = read_run(out)
    stated_all = run["retrieval"]
    assert (stated_all["queries"], stated_all["k"]) == (len(truth.test), k)
    steps = [c["step"] for c in run["checkpoints"]]
    estimates = (estimated_products(out, test_name, truth, steps) * truth.rates).sum(axis=2)
    i, j = truth.test.index(rows, "test_"), truth.train.index(rows, "train_")
    for role in ROLES:
        exact = top_sets(truth.scores, role, k)
        mine = (rows.role == role).to_numpy()
        table = [set(j[mine & (i == query)]) for query in range(len(exact))]
        alone = top_sets(estimates, role, k)
        stated = stated_all[role + "s"]
        # Near ties may fall either way.
        ties = 0.51 / (k * len(exact))
        assert stated["recall"] == pytest.approx(recall(exact, table), abs=ties)
        assert stated["recall_projection"] == pytest.approx(recall(exact, alone), abs=4 * ties)
    pearson, spearman = np.transpose(
        [correlations(a, b) for a, b in zip(estimates, truth.scores, strict=True)]
    )
    assert stated_all["correlation"]["pearson"] == pytest.approx(pearson.mean(), abs=1e-3)
    assert stated_all["correlation"]["spearman"] == pytest.approx(spearman.mean(), abs=1e-3)


def recall(exact, found):
    return np.mean([len(e & f) / len(e) for e, f in zip(exact, found, strict=True)])


def correlations(a, b):
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return np.corrcoef(a, b)[0, 1], np.corrcoef(*ranks)[0, 1]
