"""A small job, what the direct runner makes of it, and what it must be on every engine."""

import dataclasses
from pathlib import Path

import pytest
import tiny as t
from tiny import Tiny, rows

FLAGS = {"index_rows": 16}
REJECTED = {
    ("train-1.tfrecord", 7): "parse failed",
    ("train-2.tfrecord", 3): "duplicate id",
    ("test-1.tfrecord", 4): "parse failed",
}


@dataclasses.dataclass
class Job:
    """A small job, and what a run of it on Beam's direct runner has made."""

    tiny: Tiny
    embeddings: dict[str, bytes]
    tables: dict[str, list[dict]]
    counts: dict
    recall: dict

    def run(self, stage, flags, **changes):
        from tracin_beam.jobs.registry import JOBS

        return JOBS[stage].main([*self.tiny.argv(stage, **FLAGS, **changes), *flags])

    def check(self, out):
        """What is in a folder is what the direct runner makes, and what the oracle says."""
        made = Tiny.__new__(Tiny)
        made.__dict__ = {**self.tiny.__dict__, "out": Path(out)}
        found = tables(made.out)
        sides = tuple(made.run_json()["counts"])
        rejected = {place: why for place, why in REJECTED.items() if place[0].startswith(sides)}
        made.check(rejected, tables=[name.split("/")[0] for name in found])
        for name, expected in found.items():
            same(expected, self.tables[name], name)
        for path, content in embeddings(made.out).items():
            assert content == self.embeddings[path], path
        if "influence/test" in found:
            assert set(embeddings(made.out)) == set(self.embeddings)
            assert made.run_json()["counts"] == self.counts
            same([made.run_json()["retrieval"]], [self.recall], "retrieval")


def tables(out):
    """Rows by name of a table: all there are."""
    names = ("influence/test", "self_influence")
    return {name: t.table(out / name) for name in names if (out / name).exists()}


def embeddings(out):
    """The bytes of every embedding file and its mark, by path, as of `tiny.whole`."""
    return t.whole(out / "embeddings")


def same(found, expected, where):
    """Nested values are equal, floats to 1e-5."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}/{i}")
    else:
        assert found == expected, where


def make_job(folder, task=t.TASK):
    tiny = Tiny(folder)
    (folder / "task.py").write_text(task)
    tiny.write_all()
    tiny.write("train-1.tfrecord", [*rows("train1.", 8, 1)[:7], b"garbage"])
    again = rows("train2.", 8, 2)
    again[3] = again[3].but(id="train0.5")
    tiny.write("train-2.tfrecord", again)
    tiny.write("test-1.tfrecord", [*rows("test1.", 4, 101), b"garbage"])
    job = Job(tiny, {}, {}, {}, {})
    for stage in ("influence", "self_influence"):
        assert job.run(stage, ["--runner=FnApiRunner"]) == 0
    tiny.check(REJECTED)
    job.embeddings = embeddings(tiny.out)
    job.tables = tables(tiny.out)
    job.counts = tiny.run_json()["counts"]
    job.recall = tiny.run_json()["retrieval"]
    return job
