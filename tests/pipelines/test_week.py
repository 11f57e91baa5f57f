"""A week of nights: each one's tables are those of a run that has never seen another night."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny as t

from tracin_beam.__main__ import main
from tracin_beam.stages import quality

FLAGS = {"test": None, "projection": "none", "dim": None}
GATE = "new_suspicious_shards > 0"


class Week:
    """A tiny training set whose labels can be told, in an output and in ever new ones."""

    def __init__(self, folder, launch, options):
        self.options = options
        self.tiny = t.Tiny(folder, launch)
        # Features for which the given label is nearly the largest logit.
        self.kernel = 4 * np.eye(4, 3).astype(np.float32)
        model = [self.kernel, np.zeros(3, np.float32)]
        self.tiny.write_checkpoints(weights=[model, [2 * model[0], model[1]]])
        self.scratch = 0

    def shard(self, name, seed, bad=0.0, count=150):
        rng = np.random.default_rng(seed)
        right = [
            row.but(y=int((row.x @ self.kernel).argmax())) for row in t.rows(name, count, seed)
        ]
        wrong = rng.random(count) < bad
        self.tiny.write(
            f"train-{name}.tfrecord",
            [r.but(y=(r.y + 1) % 3) if w else r for r, w in zip(right, wrong, strict=True)],
        )

    def gone(self, name):
        (self.tiny.folder / f"train-{name}.tfrecord").unlink()

    def run(self, date, out="out", **changes):
        seen = self.tiny.path("train-[ab].tfrecord")
        flags = {**FLAGS, "trained": seen, "output": self.tiny.path(out), "error_if": GATE}
        return self.tiny.run("quality", date=date, **flags, **changes)

    def tables(self, date, out="out"):
        folder = self.tiny.folder / out / "quality" / date
        return (
            pq.read_table(folder / "signals.parquet").to_pylist(),
            pq.read_table(folder / "suspects.parquet").to_pylist(),
            json.loads((folder / "metrics.json").read_text()),
        )

    def check(self, date, reviewed=()):
        """A night's tables are those that another folder has from the same data."""
        self.scratch += 1
        out = f"scratch{self.scratch}"
        assert self.run(date, out) in (0, 3)
        for one, other in zip(self.tables(date)[0], self.tables(date, out)[0], strict=True):
            for name, value in one.items():
                exact = name == "content_hash" or not isinstance(value, float)
                close = other[name] if exact else pytest.approx(other[name], rel=1e-6, abs=1e-9)
                assert value == close, name
        keys = [
            [(r["kind"], r["id"], r["cohort"]) for r in self.tables(date, o)[1]]
            for o in ("out", out)
        ]
        assert keys[0] == [key for key in keys[1] if key[1] not in reviewed]
        numbers, others = self.tables(date)[2], self.tables(date, out)[2]
        for name, row in others["by_shard"].items():
            assert numbers["by_shard"][name]["examples"] == row["examples"]
        told = {"examples", "examples_new", "shards", "accuracy", "mean_loss", "wrong_labels_high"}
        for name in told:
            assert numbers["metrics"][name] == pytest.approx(others["metrics"][name])


@pytest.fixture
def week(tmp_path, launch, pipeline_options):
    return Week(tmp_path, launch, pipeline_options)


def test_a_week(week, monkeypatch, capsys):
    out = week.tiny.out
    for seed, name in enumerate("abc"):
        week.shard(name, seed)
    assert week.run("2026-11-16") == 0
    first = week.tables("2026-11-16")
    assert {r["id"][0]: r["cohort"] for r in first[0]} == {
        "a": "trained",
        "b": "trained",
        "c": "new",
    }
    assert first[2]["by_cohort"]["trained"]["examples"] == 300

    # Nothing is new: no example is looked at.
    before = t.snapshot(out / "features") | t.snapshot(out / "_state/quality/sums")
    with monkeypatch.context() as patched:
        patched.setattr(quality.Night, "read", None)
        assert week.run("2026-11-17") == 0
    assert t.snapshot(out / "features") | t.snapshot(out / "_state/quality/sums") == before
    assert list(week.tables("2026-11-17")[:2]) == [first[0], first[1]]
    assert week.tables("2026-11-17")[2]["metrics"]["new_suspects"] == 0

    # A shard that comes costs itself.
    week.shard("d", 3)
    assert week.run("2026-11-18") == 0
    after = t.snapshot(out / "features") | t.snapshot(out / "_state/quality/sums", "train-*")
    assert all(after[name] == there for name, there in before.items() if "total" not in name)
    week.check("2026-11-18")

    # One changes, another vanishes, and the night is cut off when it has counted that.
    week.shard("b", 13)
    week.gone("c")
    with monkeypatch.context() as patched:
        patched.setattr(quality.marks, "write", cut_off(quality.marks.write, "total.npz.json"))
        assert week.run("2026-11-19") == 1
    assert week.run("2026-11-19") == 0
    week.check("2026-11-19")
    gone = [path for path in t.snapshot(out) if "train-c" in path]
    assert gone == []
    assert week.tables("2026-11-16") == first

    # A bad one is planted.
    week.shard("e", 4, bad=0.2)
    capsys.readouterr()
    assert week.run("2026-11-20") == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"error: {GATE}: ")
    week.check("2026-11-20")
    flipped = week.tables("2026-11-20")[1]
    mine = [r for r in flipped if r["id"].startswith("e") and r["kind"] == "mislabelled"]
    assert len(mine) > 15

    # Verdicts are all that is new; the shard is mended from them, elsewhere.
    review(week, mine)
    monkeypatch.setattr(quality.Night, "read", None)
    assert week.run("2026-11-21") == 0
    monkeypatch.undo()
    reviewed = {r["id"] for r in mine}
    left = week.tables("2026-11-21")
    assert reviewed.isdisjoint(r["id"] for r in left[1])
    assert left[0] == week.tables("2026-11-20")[0]
    week.check("2026-11-21", reviewed)
    assert apply(week) == 0
    clean = week.tiny.folder / "clean" / "train-e.tfrecord"
    made = t.snapshot(week.tiny.folder / "clean")
    assert apply(week) == 0
    assert t.snapshot(week.tiny.folder / "clean") == made
    (week.tiny.folder / "train-e.tfrecord").write_bytes(clean.read_bytes())
    assert week.run("2026-11-22") == 0
    left = [r for r in week.tables("2026-11-22")[1] if r["kind"] == "mislabelled"]
    assert reviewed.isdisjoint(r["id"] for r in left)
    assert len(week.tables("2026-11-22")[0]) == 600


def cut_off(write, name):
    """`marks.write` of a process that is killed before it writes one of this name."""

    def cut(path, *args, **kwargs):
        if path.endswith(name):
            raise OSError("killed")
        return write(path, *args, **kwargs)

    return cut


def review(week, rows):
    """Relabels what was suspected, as was suggested."""
    verdicts = [
        {
            "id": row["id"],
            "content_hash": row["content_hash"].hex(),
            "verdict": "relabel",
            "label": row["suggested_label"],
            "who": "me",
            "when": "2026-11-20T08:00:00Z",
        }
        for row in rows
    ]
    path = week.tiny.folder / "verdicts.jsonl"
    path.write_text("\n".join(map(json.dumps, verdicts)))
    assert main(["quality", "verdicts", f"--output={week.tiny.out}", f"--add={path}"]) == 0


def apply(week):
    flags = ("task", "train", "output")
    given = {name: week.tiny.flags("quality")[name] for name in flags}
    given["to"] = week.tiny.path("clean")
    words = [f"--{name}={value}" for name, value in given.items()]
    return main(["quality", "apply", *words, *week.options])
