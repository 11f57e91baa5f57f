"""Whole jobs with a preconditioner, against matrices of NumPy in float64."""

import os

import numpy as np
import pytest
import tiny as t
from tiny import Tiny

from tracin_beam.scoring.damping import GRID
from tracin_beam.storage import embeddings

CLOSE = {"rtol": 2e-4, "atol": 1e-5}


@pytest.fixture
def problem(tmp_path, launch):
    return Tiny(tmp_path, launch).write_all()


def embedded(tiny, side):
    """float64 [n, D] of every checkpoint."""
    found = []
    for step in tiny.steps:
        folder = tiny.out / "embeddings" / side / str(step)
        paths = sorted(folder.glob("*.tfrecord"))
        parts = [rows.embedding for path in paths for rows in embeddings.read(str(path))]
        found.append(np.concatenate(parts).astype(np.float64))
    return found


def projected(tiny, damping, queries="test"):
    """float64 [queries, trains, C]."""
    terms = []
    train, test = embedded(tiny, "train"), embedded(tiny, queries)
    for s, q, rate in zip(train, test, tiny.rates, strict=True):
        r = sum(np.outer(row, row) for row in s) / len(s)
        ridge = damping * np.trace(r) / len(r) * np.eye(len(r))
        terms.append(rate * np.linalg.solve(r + ridge, q.T).T @ s.T)
    return np.stack(terms, axis=2)


def kronecker(tiny, damping, queries="test"):
    """The same by K-FAC: A ⊗ B + λ I written out, the bias's input being a one."""
    train, test = tiny.good("train"), tiny.good(queries)
    terms = []
    for weights, rate in zip(tiny.weights, tiny.rates, strict=True):
        delta, inputs, _ = t.residuals(train, weights)
        other, asked, _ = t.residuals(test, weights)
        own = np.stack([np.outer(x, d).ravel() for x, d in zip(inputs, delta, strict=True)])
        query = np.stack([np.outer(x, d).ravel() for x, d in zip(asked, other, strict=True)])
        terms.append(rate * t.damped(t.kronecker(train, weights), query, damping) @ own.T)
    return np.stack(terms, axis=2)


def check(tiny, expected):
    """The influence table is that of these scores."""
    train = {row.id: i for i, row in enumerate(tiny.good("train"))}
    test = {row.id: i for i, row in enumerate(tiny.good("test"))}
    table = t.table(tiny.out / "influence" / "test")
    assert len(table) == 2 * len(test) * len(train)
    wanted = np.stack([expected[test[r["test_id"]], train[r["train_id"]]] for r in table])
    np.testing.assert_allclose([r["score_by_checkpoint"] for r in table], wanted, **CLOSE)
    np.testing.assert_allclose([r["score"] for r in table], wanted.sum(axis=1), **CLOSE)
    assert all(row["exact"] for row in table)
    rows = t.table(tiny.out / "total_influence" / "test")
    found = np.stack([row["score_by_checkpoint"] for row in rows])
    np.testing.assert_allclose(found, expected.sum(axis=0), rtol=1e-3, atol=1e-4)
    state = tiny.run_json()
    for role in ("proponents", "opponents"):
        assert state["retrieval"][role]["recall"] == 1
        slots = 10 * len(test)
        top = [r for r in table if r["role"] + "s" == role and r["rank"] <= 10]
        distinct = len({r["train_id"] for r in top})
        assert state["distinct"][role] == {
            "slots": slots,
            "examples": distinct,
            "share": distinct / slots,
        }


@pytest.mark.parametrize(("name", "oracle"), [("projected", projected), ("kfac", kronecker)])
def test_a_preconditioned_job(problem, name, oracle):
    run = {"preconditioner": name, "total": True}
    assert problem.run("influence", damping=0.1, **run) == 0
    check(problem, oracle(problem, 0.1))
    before = t.snapshot(problem.out / "embeddings"), t.snapshot(problem.out / "curvature")
    # Another damping costs only the join; nothing stale is served.
    assert problem.run("influence", **run) == 0
    check(problem, oracle(problem, 1.0))
    after = t.snapshot(problem.out / "embeddings"), t.snapshot(problem.out / "curvature")
    assert {k: v for k, v in after[1].items() if "group" in k} == {
        k: v for k, v in before[1].items() if "group" in k
    }
    assert after[0] == before[0]
    assert problem.run("influence") == 0
    t.check_influence(problem, problem.good("train"), problem.good("test"))
    assert not (problem.out / "total_influence" / "test").exists() or not os.listdir(
        problem.out / "total_influence" / "test"
    )


@pytest.mark.parametrize(("name", "oracle"), [("projected", projected), ("kfac", kronecker)])
def test_preconditioned_self_influence(problem, name, oracle):
    assert problem.run("self_influence") == 0
    assert problem.run("self_influence", preconditioner=name, damping=0.1) == 0
    expected = np.einsum("iic->ic", oracle(problem, 0.1, "train"))
    train = {row.id: i for i, row in enumerate(problem.good("train"))}
    rows = t.table(problem.out / "self_influence")
    wanted = expected[[train[row["id"]] for row in rows]]
    np.testing.assert_allclose([r["self_influence_by_checkpoint"] for r in rows], wanted, **CLOSE)
    np.testing.assert_allclose([r["self_influence"] for r in rows], wanted.sum(axis=1), **CLOSE)
    assert problem.run_json()["method"].startswith("TracInCP, preconditioned")
    assert problem.run("self_influence") == 0
    t.check_self_influence(problem, problem.good("train"))


def agreement(tiny, damping):
    """How scores by the second moments of two halves of the training set agree."""
    found = []
    for s, q in zip(embedded(tiny, "train"), embedded(tiny, "test"), strict=True):
        # Every second of each shard, of eight.
        odd = np.arange(len(s)) % 2 == 1
        scores = []
        for half in (s[~odd], s[odd]):
            r = half.T @ half
            ridge = damping * np.trace(r) / len(r) * np.eye(len(r))
            scores.append(np.linalg.solve(r + ridge, q.T).T @ s.T)
        both = np.corrcoef(*scores)[: len(q), len(q) :]
        found.append(np.trace(both) / len(both) - both[~np.eye(len(both), dtype=bool)].mean())
    return np.mean(found)


def test_damping_that_is_chosen(problem):
    assert problem.run("influence", preconditioner="projected", damping="auto", total=True) == 0
    stated = problem.run_json()["damping"]
    wanted = {damping: agreement(problem, damping) for damping in GRID}
    assert stated["agreement"] == pytest.approx({f"{k:g}": x for k, x in wanted.items()}, abs=1e-5)
    assert stated["value"] == min(k for k, x in wanted.items() if x >= 0.6)
    check(problem, projected(problem, stated["value"]))
    assert problem.run("self_influence", preconditioner="kfac", damping="auto") == 0
    stated = problem.run_json()["damping"]
    expected = np.einsum("iic->i", kronecker(problem, stated["value"], "train"))
    found = [row["self_influence"] for row in t.table(problem.out / "self_influence")]
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_shards_that_come_and_go_cost_their_group(problem):
    run = {"preconditioner": "projected", "total": True, "index_rows": 8}
    assert problem.run("influence", **run) == 0
    groups = "curvature/**/group-*"
    before = t.snapshot(problem.out, groups)
    assert len([name for name in before if name.endswith(".npz")]) == 3 * len(problem.steps)
    problem.write("train-3.tfrecord", t.rows("new", 5, 50))
    problem.write("train-1.tfrecord", t.rows("changed", 7, 51))
    assert problem.run("influence", **run) == 0
    check(problem, projected(problem, 1.0))
    after = t.snapshot(problem.out, groups)
    same = {name for name in before if after[name] == before[name]}
    assert {name.split("/")[-1][:11] for name in same} == {"group-00000", "group-00002"}
    (problem.folder / "train-0.tfrecord").unlink()
    del problem.shards["train-0.tfrecord"]
    assert problem.run("influence", **run) == 0
    check(problem, projected(problem, 1.0))


def test_candidates_where_not_all_pairs_are_scored(problem, monkeypatch):
    monkeypatch.setattr("tracin_beam.stages.joining.ALL_PAIRS", 0)
    flags = {"preconditioner": "kfac", "total": True, "rescore": 100}
    assert problem.run("influence", **flags) == 0
    check(problem, kronecker(problem, 1.0))
    assert problem.run("influence", **{**flags, "preconditioner": "projected"}) == 0
    check(problem, projected(problem, 1.0))


def test_embeddings_that_are_too_long(problem, capsys):
    assert problem.run("influence", preconditioner="projected", dim=9000) != 0
    assert "smaller --dim" in capsys.readouterr().err
