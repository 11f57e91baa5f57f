"""The job `quality` on the direct runner, its scores against regressions fitted anew."""

import json

import numpy as np
import pyarrow.parquet as pq
from tiny import Tiny, rows

from tracin_beam.jobs.registry import JOBS
from tracin_beam.signals import ridge


def run(problem, date, **changes):
    given = problem.flags("self_influence", date=date, **changes)
    return JOBS["quality"].main([f"--{name}={value}" for name, value in given.items()])


def softmax(x):
    grown = np.exp(x - x.max(1, keepdims=True))
    return grown / grown.sum(1, keepdims=True)


def expected(table):
    """1 − m of the given labels, with a regression for each example on all others."""
    phi = np.array(table["features"].to_pylist())
    label = np.array(table["label"].to_pylist()).astype(int)
    y, p = np.eye(3)[label], np.exp(np.array(table["log_probabilities"].to_pylist(), float))
    centred = phi - phi.mean(0)
    scale = np.linalg.eigvalsh(centred.T @ centred).clip(0).mean()
    best = None
    for share in ridge.LAMBDAS:
        out = []
        for i in range(len(phi)):
            x, t = np.delete(phi, i, 0), np.delete(y, i, 0)
            gram = (x - x.mean(0)).T @ (x - x.mean(0)) + share * scale * np.eye(phi.shape[1])
            weights = np.linalg.solve(gram, (x - x.mean(0)).T @ (t - t.mean(0)))
            out.append(t.mean(0) + (phi[i] - x.mean(0)) @ weights)
        if best is None or np.square(out - y).sum() < best[0]:
            best = np.square(out - y).sum(), np.array(out)
    given = np.arange(len(phi)), label
    fits = [np.log(softmax(best[1] / t)[given]).sum() for t in ridge.TEMPERATURES]
    q = softmax(best[1] / ridge.TEMPERATURES[int(np.argmax(fits))])
    return dict(zip(table["id"].to_pylist(), 1 - ((2 * q + p) / 3)[given], strict=True))


def night(problem, date):
    folder = problem.out / "quality" / date
    return (
        pq.read_table(folder / "signals.parquet"),
        pq.read_table(folder / "suspects.parquet"),
        json.loads((folder / "metrics.json").read_text()),
    )


def check(problem, date):
    signals, suspects, metrics = night(problem, date)
    folder = problem.out / "features" / "train" / "10"
    names = sorted(name for name in problem.shards if name.startswith("train"))
    wanted = expected(pq.read_table([str(folder / f"{name}.parquet") for name in names]))
    found = dict(zip(signals["id"].to_pylist(), signals["mislabel_score"].to_pylist(), strict=True))
    np.testing.assert_allclose(
        [found[name.decode()] for name in wanted], list(wanted.values()), atol=1e-6
    )
    assert len(found) == len(wanted) == metrics["metrics"]["examples"]
    scores = suspects["score"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    assert metrics["metrics"]["suspects"] == len(scores) > 0
    return suspects


def test_nights(tmp_path):
    problem = Tiny(tmp_path).write_all(test=0)
    assert run(problem, "2026-11-22") == 0
    first = check(problem, "2026-11-22")
    kept = (problem.out / "features/train/10/train-0.tfrecord.parquet").stat().st_mtime_ns

    # What arrives, changes and vanishes.
    problem.write("train-1.tfrecord", rows("changed", 8, 7))
    problem.write("train-3.tfrecord", rows("new", 8, 8))
    (tmp_path / "train-2.tfrecord").unlink()
    del problem.shards["train-2.tfrecord"]
    assert run(problem, "2026-11-23", error_if="examples > 0") == 3
    second = check(problem, "2026-11-23")

    assert (problem.out / "features/train/10/train-0.tfrecord.parquet").stat().st_mtime_ns == kept
    assert night(problem, "2026-11-22")[1].equals(first)
    before = set(first["id"].to_pylist())
    for row in second.to_pylist():
        assert row["first_seen"] == ("2026-11-22" if row["id"] in before else "2026-11-23")
