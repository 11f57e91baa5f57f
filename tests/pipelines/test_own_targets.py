"""Targets that the task gives, against closed forms in NumPy; and functions that cannot be one."""

import numpy as np
import pytest
import tiny as t
from tiny import Tiny

from tracin_beam.errors import InputError
from tracin_beam.inputs.task import Task

TARGETS = """
SHARPNESS = 1.0

def entropy(outputs):
    p = tf.nn.softmax(SHARPNESS * outputs)
    return -tf.reduce_sum(p * tf.math.log(p), axis=1)

def distance(outputs, label):
    return tf.reduce_sum((outputs - tf.one_hot(label, 3)) ** 2, axis=1)
"""
TASK = t.TASK.replace(
    "task = Task(build_model, loss, parse)",
    TARGETS
    + "task = Task(build_model, loss, parse, targets="
    + "{'entropy': entropy, 'distance': distance})",
)


@pytest.fixture
def tiny(tmp_path, launch):
    tiny = Tiny(tmp_path, launch).write_all(train=2, test=1)
    (tiny.folder / "task.py").write_text(TASK)
    return tiny


def slopes(some, logits, name):
    """∂t/∂logits, float64 [n, 3]."""
    if name == "entropy":
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        entropy = -(p * np.log(p)).sum(axis=1, keepdims=True)
        return -p * (np.log(p) + entropy)
    if name == "distance":
        return 2 * (logits - np.eye(3)[[row.y for row in some]])
    raise KeyError(name)


def gradients(some, weights, name="loss"):
    """Of kernel and bias: float64 [n, 15]."""
    residual, x, logits = t.residuals(some, weights)
    slope = residual if name == "loss" else slopes(some, logits, name)
    return np.einsum("ni,nj->nij", x, slope).reshape(len(some), -1)


def expected(tiny, name, of_query=lambda q, *_: q):
    """float64 [tests, trains, C]."""
    train, test = tiny.good("train"), tiny.good("test")
    parts = []
    for weights, rate in zip(tiny.weights, tiny.rates, strict=True):
        rows = gradients(train, weights)
        parts.append(rate * of_query(gradients(test, weights, name), rows, weights) @ rows.T)
    return np.stack(parts, axis=2)


def check(tiny, name, want):
    ids = {side: [row.id for row in tiny.good(side)] for side in ("train", "test")}
    found = t.table(tiny.out / "influence" / name)
    assert len(found) == 2 * want.shape[0] * want.shape[1]
    for row in found:
        own = want[ids["test"].index(row["test_id"]), ids["train"].index(row["train_id"])]
        np.testing.assert_allclose(row["score_by_checkpoint"], own, rtol=1e-4, atol=1e-5)
        assert row["exact"]


def test_scores_and_sums_are_those_of_the_targets_gradient(tiny):
    name = "distance"
    assert tiny.run("influence", target=name, test_name=name, total=True) == 0
    want = expected(tiny, name)
    check(tiny, name, want)
    ids = [row.id for row in tiny.good("train")]
    sums = t.table(tiny.out / "total_influence" / name)
    assert len(sums) == len(ids)
    for row in sums:
        own = want[:, ids.index(row["train_id"])].sum(axis=0)
        np.testing.assert_allclose(row["score_by_checkpoint"], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["projected", "kfac"])
def test_preconditioned(tiny, kind):
    flags = {"projection": "none", "target": "entropy", "preconditioner": kind}
    assert tiny.run("influence", **flags) == 0

    def solved(query, train, weights):
        if kind == "kfac":
            return t.damped(t.kronecker(tiny.good("train"), weights), query)
        return t.damped(train.T @ train / len(train), query)

    check(tiny, "test", expected(tiny, "entropy", solved))


def test_a_changed_function_costs_the_test_set_alone(tiny):
    assert tiny.run("influence", target="entropy") == 0
    train = t.snapshot(tiny.out / "embeddings" / "train", "*.tfrecord")
    test = t.snapshot(tiny.out / "embeddings" / "test", "*.tfrecord")
    other = tiny.folder / "task.py"
    other.write_text(TASK.replace("SHARPNESS = 1.0", "SHARPNESS = 2.0"))
    assert tiny.run("influence", target="entropy") == 0
    assert t.snapshot(tiny.out / "embeddings" / "train", "*.tfrecord") == train
    changed = t.snapshot(tiny.out / "embeddings" / "test", "*.tfrecord")
    assert not changed.items() & test.items()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("outputs", "gives shape (8, 3) for 8 examples"),
        ("tf.reduce_mean(outputs)", "gives shape () for"),
        ("tf.argmax(outputs, 1)", "gives int64, which has no gradient"),
        (
            "tf.cast(tf.argmax(outputs, 1), tf.float32)",
            "not in a way that TensorFlow differentiates",
        ),
        ("outputs[:, 0] - tf.reduce_mean(outputs[:, 0])", "depends on the others of its batch"),
        ("outputs.nothing", "the target mine of Task(targets=…) fails"),
    ],
)
def test_misuse_is_named_before_work_starts(tiny, capsys, code, words):
    task = t.TASK.replace("parse)\n", f"parse, targets={{'mine': lambda outputs: {code}}})\n")
    tiny.write("test-0.tfrecord", t.rows("test", 8, 100))
    (tiny.folder / "task.py").write_text(task)
    assert tiny.run("influence", target="mine") == 2
    assert words in capsys.readouterr().err
    assert not (tiny.out / "embeddings").exists()


def test_names(tiny, capsys):
    assert tiny.run("influence", target="entropi") == 2
    assert "take one of loss, predicted_loss, logit, probability, margin, entropy, distance" in (
        capsys.readouterr().err
    )
    with pytest.raises(InputError, match="'a b' is no name"):
        Task(None, None, None, targets={"a b": abs})
    (tiny.folder / "task.py").write_text(TASK.replace("'distance'", "'loss'"))
    assert tiny.run("influence", target="entropy") == 2
    assert "there is a target loss already" in capsys.readouterr().err
