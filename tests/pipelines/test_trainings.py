"""Scores over several training runs, against the mean of each run's in closed form."""

import json
import shutil

import numpy as np
import pytest
import tiny as t
from tiny import Tiny


@pytest.fixture
def tiny(tmp_path, launch):
    """Two training runs with checkpoints at the same steps."""
    tiny = Tiny(tmp_path, launch).write_all(train=2, test=1)
    (tmp_path / "ckpts").rename(tmp_path / "first")
    tiny.singles = [(tiny.weights, tiny.rates)]
    tiny.steps = None
    tiny.write_checkpoints(rates=(0.125, 1.0), weights=[t.weights_at(s) for s in (77, 78)])
    (tmp_path / "ckpts").rename(tmp_path / "second")
    tiny.singles.append((tiny.weights, tiny.rates))
    tiny.both = [tiny.path("first"), tiny.path("second")]
    # The tiny run's own checks know one list of checkpoints: that of both, each with half a rate.
    tiny.weights = [w for weights, _ in tiny.singles for w in weights]
    tiny.rates = [rate / 2 for _, rates in tiny.singles for rate in rates]
    return tiny


def run(tiny, stage, specs, **changes):
    config = tiny.folder / "config.json"  # which is YAML too
    config.write_text(json.dumps({"checkpoints": specs}))
    return tiny.run(stage, checkpoints=None, config=config, **changes)


def embedded(tiny):
    return t.snapshot(tiny.out / "embeddings", "*.tfrecord")


def test_scores_are_the_means_of_single_runs(tiny):
    assert run(tiny, "influence", [tiny.both[0]]) == 0
    before = embedded(tiny)
    assert run(tiny, "influence", tiny.both, total=True) == 0
    after = embedded(tiny)
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)
    tiny.check(tables=["influence"])
    train, test = tiny.good("train"), tiny.good("test")
    means = np.mean(
        [
            t.scores(_with(tiny, weights, rates), test, train).sum(axis=2)
            for weights, rates in tiny.singles
        ],
        axis=0,
    )
    ids = [row.id for row in train]
    for row in t.table(tiny.out / "total_influence" / "test"):
        own = means[:, ids.index(row["train_id"])].sum()
        np.testing.assert_allclose(row["score_sum"], own, rtol=1e-4, atol=1e-5)
        assert row["score_sum"] == pytest.approx(sum(row["score_by_checkpoint"]))
    listed = tiny.run_json()["checkpoints"]
    assert [(c["training"], c["step"]) for c in listed] == [(1, 10), (1, 20), (2, 10), (2, 20)]
    # In the other order each run keeps its embeddings.
    assert run(tiny, "self_influence", tiny.both[::-1]) == 0
    assert embedded(tiny) == after
    assert run(tiny, "self_influence", tiny.both) == 0
    tiny.check(tables=["self_influence"])


def test_preconditioned_by_kfac(tiny):
    """Every checkpoint of every run has its own factors."""
    train, test = tiny.good("train"), tiny.good("test")
    want = 0.0
    for weights, rate in zip(tiny.weights, tiny.rates, strict=True):
        own, query = (
            np.einsum("ni,nj->nij", x, r).reshape(len(x), -1)
            for some in (train, test)
            for r, x, _ in [t.residuals(some, weights)]
        )
        want = want + rate * t.damped(t.kronecker(train, weights), query) @ own.T
    assert run(tiny, "influence", tiny.both, preconditioner="kfac") == 0
    places = [{row.id: i for i, row in enumerate(some)} for some in (test, train)]
    for row in t.table(tiny.out / "influence" / "test"):
        own = want[places[0][row["test_id"]], places[1][row["train_id"]]]
        np.testing.assert_allclose(row["score"], own, rtol=2e-4, atol=1e-5)


def _with(tiny, weights, rates):
    single = object.__new__(Tiny)
    single.weights, single.rates = weights, rates
    return single


def test_runs_into_the_same_output_one_by_one_keep_apart(tiny):
    assert run(tiny, "embed", [tiny.both[0]]) == 0
    first = embedded(tiny)
    assert run(tiny, "embed", [tiny.both[1]]) == 0
    both = embedded(tiny)
    assert first.items() <= both.items()
    assert run(tiny, "embed", tiny.both) == 0
    assert embedded(tiny) == both
    shutil.copytree(tiny.both[0], tiny.folder / "copy")
    assert run(tiny, "embed", [tiny.path("copy")]) == 0
    assert embedded(tiny) == both


def test_some_checkpoints_of_a_run(tmp_path, launch):
    tiny = Tiny(tmp_path, launch).write_all(train=2, test=1)
    steps, rates = (10, 20, 30, 40), (1.0, 0.5, 0.25, 0.5)
    tiny.write_checkpoints(steps, rates)
    weights = tiny.weights
    assert tiny.run("influence", checkpoints_select=2, recall_queries=0) == 0
    tiny.weights, tiny.rates = [weights[1], weights[3]], [0.75, 0.375]
    tiny.check(tables=["influence"])
    evenly = embedded(tiny)
    train = tiny.good("train")
    falls = -np.diff([_mean_loss(train, w) for w in weights])
    best = 1 + int(np.argmax(falls))
    flags = {"checkpoints_select": 2, "checkpoints_select_by": "loss"}
    assert tiny.run("embed", test=None, **flags) == 0
    state = tiny.run_json()
    assert [c["step"] for c in state["checkpoints"]] == [10, steps[best]]
    rate = np.mean(rates[1 : best + 1])
    assert [c["learning_rate"] for c in state["checkpoints"]] == [1.0, pytest.approx(rate)]
    losses = list(state["selection"]["losses"].values())
    np.testing.assert_allclose(losses, [_mean_loss(train, w) for w in weights], rtol=1e-5)
    assert evenly.items() <= embedded(tiny).items()
    # A new shard does not change which are taken.
    tiny.write("train-2.tfrecord", t.rows("late", 20, 9))
    assert tiny.run("embed", test=None, **flags) == 0
    assert tiny.run_json()["checkpoints"] == state["checkpoints"]


def _mean_loss(some, weights):
    logits = t.residuals(some, weights)[2]
    own = logits[np.arange(len(some)), [row.y for row in some]]
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - own)


def test_misuse(tiny, capsys):
    shutil.copytree(tiny.both[0], tiny.folder / "copy")
    for specs in ([tiny.both[0]] * 2, [tiny.both[0], tiny.path("copy")]):
        assert run(tiny, "influence", specs) == 2
        assert "are the same training run: give each once" in capsys.readouterr().err
    assert run(tiny, "quality", tiny.both, test=None, date="2026-11-22") == 2
    assert "by the course of one training" in capsys.readouterr().err
    assert not (tiny.out / "embeddings").exists()
