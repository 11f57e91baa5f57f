"""What is kept of many classes, against all of them."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tracin_beam.signals import mislabel, trajectory
from tracin_beam.storage import features
from tracin_beam.storage.features import Features

N, K = 60, 150


@pytest.fixture
def dense():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (N, K))
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    label = rng.integers(0, K, (N, 1)).astype(np.float32)
    label[:10, 0] = logs[:10].argmax(axis=1)
    label[10] = np.nan
    hashes = np.array([bytes([i] * 16) for i in range(N)], object)
    return Features(np.arange(N), hashes, logs.astype(np.float32), np.zeros((N, 0)), label)


def written(rows, path):
    schema = features.schema(rows.log_probabilities.shape[1], 0, 1, half=True, single=True)
    pq.write_table(rows.table(schema), path)
    return schema


def test_of_many_classes_few_are_kept(dense, tmp_path):
    schema = written(dense, tmp_path / "f.parquet")
    assert schema.field("log_probabilities").type.list_size == features.LARGEST + 2
    (found,) = features.read(str(tmp_path / "f.parquet"))
    assert found.log_probabilities.shape == (N, K)
    p, expected = np.exp(found.log_probabilities), np.exp(dense.log_probabilities)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=5e-3)
    order = np.argsort(-expected, axis=1)
    for i in range(N):
        known = [] if i == 10 else [int(dense.labels[i, 0])]
        others = [k for k in order[i] if k not in known][: features.LARGEST + (i == 10)]
        np.testing.assert_allclose(p[i, known + others], expected[i, known + others], rtol=6e-3)
        rest = np.delete(np.arange(K), known + others)
        np.testing.assert_allclose(p[i, rest], expected[i, rest].mean(), rtol=6e-3)


def test_signals_of_many_classes_are_those_of_all(dense, tmp_path):
    written(dense, tmp_path / "f.parquet")
    (found,) = features.read(str(tmp_path / "f.parquet"))
    rows = np.arange(N) != 10
    label = dense.labels[rows, 0].astype(int)
    logs, few = (one.log_probabilities[rows, None].astype(float) for one in (dense, found))
    for function in trajectory.COLUMNS:
        np.testing.assert_allclose(
            function(few, label), function(logs, label), rtol=5e-3, atol=8e-3
        )
    q = np.random.default_rng(1).dirichlet(np.full(K, 0.1), len(label))[:, None]
    m, expected = (mislabel.mixed(q, np.exp(one)) for one in (few, logs))
    scores = mislabel.scores(m, label)
    np.testing.assert_allclose(scores, mislabel.scores(expected, label), rtol=2e-2)
    suggested = expected[np.arange(len(m)), mislabel.suggestions(m)]
    np.testing.assert_allclose(suggested, expected.max(axis=1), atol=5e-3)
    ratio = mislabel.best_other_ratio(m, label)
    np.testing.assert_allclose(ratio, mislabel.best_other_ratio(expected, label), rtol=5e-2)


def test_few_classes_are_kept_whole(dense, tmp_path):
    rows = Features(
        **{**vars(dense), "log_probabilities": dense.log_probabilities[:, : features.ALL_CLASSES]}
    )
    schema = written(rows, tmp_path / "f.parquet")
    assert "classes" not in schema.names
    (found,) = features.read(str(tmp_path / "f.parquet"))
    np.testing.assert_allclose(found.log_probabilities, rows.log_probabilities, rtol=1e-3)
