"""The ledger's command, and `quality apply`: whole commands on a tiny run."""

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tensorflow.train import Example
from tiny import Tiny, rows, snapshot, whole

from tracin_beam import Task
from tracin_beam.__main__ import main
from tracin_beam.errors import InputError
from tracin_beam.stages import clean
from tracin_beam.storage.records import content_hash, read_records


def parsed(path):
    """(id, label) of the records of a shard, as they stand."""
    found = []
    for record in read_records(str(path)):
        feature = Example.FromString(record.data).features.feature
        found.append((feature["id"].bytes_list.value[0].decode(), feature["y"].int64_list.value[0]))
    return found


def verdict(row, verdict="drop", **changes):
    return {
        "id": row.id,
        "content_hash": content_hash(row.serialized()).hex(),
        "verdict": verdict,
        "who": "me",
        "when": "2026-11-22T07:30:00Z",
        "why": "wrong",
        **changes,
    }


class Cleaned:
    """Two shards, one of them gzip, a ledger and a folder for the cleaned ones."""

    def __init__(self, folder, options):
        self.tiny = Tiny(folder)
        (folder / "train").mkdir()
        self.folder, self.to, self._options = folder, folder / "clean", options
        self.tiny.write("train/a.tfrecord", rows("a", 6, 0))
        self.tiny.write("train/b.tfrecord", rows("b", 5, 1))
        path = folder / "train/b.tfrecord"
        path.write_bytes(gzip.compress(path.read_bytes()))
        self.a, self.b = rows("a", 6, 0), rows("b", 5, 1)

    def add(self, *verdicts):
        path = self.folder / "verdicts.jsonl"
        path.write_text("\n".join(map(json.dumps, verdicts)))
        return main(["quality", "verdicts", f"--output={self.tiny.out}", f"--add={path}"])

    def apply(self, *flags, **changes):
        given = {
            "task": f"{self.folder}/task.py:task",
            "train": f"{self.folder}/train/*.tfrecord",
            "output": self.tiny.out,
            "to": self.to,
            **changes,
        }
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return main(["quality", "apply", *words, *flags, *self._options])

    def provenance(self):
        return {
            row["id"] or row["position"]: row
            for path in sorted((self.to / "provenance").glob("*.parquet"))
            for row in pq.read_table(path).to_pylist()
        }


@pytest.fixture
def cleaned(tmp_path, pipeline_options):
    return Cleaned(tmp_path, pipeline_options)


def other(row):
    return (row.y + 1) % 3


def test_the_ledger_is_applied_and_a_second_time_changes_nothing(cleaned, capsys):
    a, b = cleaned.a, cleaned.b
    assert (
        cleaned.add(
            verdict(a[1]),
            verdict(a[3], "relabel", label=other(a[3]), given_label=a[3].y),
            verdict(b[0], "relabel", label=other(b[0])),
            verdict(b[2], "keep"),
            verdict(b[3], given_label=other(b[3])),
            {**verdict(b[4]), "content_hash": "00" * 16},
        )
        == 0
    )
    assert "6 examples have a verdict (2 keep" not in capsys.readouterr().out
    before = {path: path.read_bytes() for path in (cleaned.folder / "train").iterdir()}
    assert cleaned.apply("--label_feature=y") == 0
    assert "2 shards: 11 read, 1 dropped, 2 relabelled, 1 not applied" in capsys.readouterr().out
    changed = {a[3].id: other(a[3]), b[0].id: other(b[0])}
    expected = [(r.id, changed.get(r.id, r.y)) for r in a if r.id != a[1].id]
    assert parsed(cleaned.to / "a.tfrecord") == expected
    assert parsed(cleaned.to / "b.tfrecord") == [(r.id, changed.get(r.id, r.y)) for r in b]
    assert (cleaned.to / "b.tfrecord").read_bytes()[:2] == b"\x1f\x8b"
    assert before == {path: path.read_bytes() for path in (cleaned.folder / "train").iterdir()}
    made = cleaned.provenance()
    assert {k: v["action"] for k, v in made.items()} == {
        a[1].id: "dropped",
        a[3].id: "relabelled",
        b[0].id: "relabelled",
        b[3].id: "not applied",
    }
    row = made[a[3].id]
    assert (row["position"], row["new_position"], row["who"], row["why"]) == (3, 2, "me", "wrong")
    assert (row["label"], row["new_label"]) == (a[3].y, other(a[3]))
    found = [record.data for record in read_records(str(cleaned.to / "a.tfrecord"))]
    assert row["new_content_hash"] == content_hash(found[2])
    assert "the reviewer saw" in made[b[3].id]["reason"]

    first = snapshot(cleaned.to)
    assert cleaned.apply("--label_feature=y") == 0
    assert snapshot(cleaned.to) == first
    bytes_then = whole(cleaned.to)
    for path in (cleaned.to / "a.tfrecord", cleaned.to / "_state/b.tfrecord.json"):
        path.unlink()  # as after a kill
    assert cleaned.apply("--label_feature=y") == 0
    assert bytes_then == whole(cleaned.to)

    (cleaned.folder / "train/b.tfrecord").unlink()
    assert cleaned.apply("--label_feature=y") == 0
    assert not list(cleaned.to.rglob("b.tfrecord*"))


def test_the_labels_feature_is_found(cleaned):
    a = cleaned.a
    assert cleaned.add(verdict(a[0], "relabel", label=other(a[0]))) == 0
    assert cleaned.apply() == 0
    assert parsed(cleaned.to / "a.tfrecord")[0] == (a[0].id, other(a[0]))


def test_what_is_asked_wrongly_is_said(cleaned, capsys):
    a = cleaned.a

    def says(*flags, **changes):
        assert cleaned.apply(*flags, **changes) == 2
        return capsys.readouterr().err

    assert "There are no verdicts" in says()
    cleaned.add(verdict(a[0], "relabel", label=other(a[0])))
    assert "never cleaned in place" in says(to=cleaned.folder / "train")
    assert "never cleaned in place" in says(to=cleaned.folder)
    assert "is the --output" in says(to=cleaned.tiny.out)
    assert "is test data" in says(test=f"{cleaned.folder}/train/b.tfrecord")
    assert "no feature 'z'" in says(label_feature="z")
    assert "does not hold one number" in says(label_feature="x")
    assert "--to must be given" in says(to=None)
    assert not cleaned.to.exists() or not list(cleaned.to.glob("*.tfrecord"))
    assert cleaned.apply("--test_data", test=f"{cleaned.folder}/train/b.tfrecord") == 0


def example(**values):
    from tensorflow.train import Feature, Features, Int64List

    features = {k: Feature(int64_list=Int64List(value=v)) for k, v in values.items()}
    return Example(features=Features(feature=features)).SerializeToString()


def test_which_feature_is_the_labels():
    some = [example(y=[1], z=[1], n=[1, 1]), example(y=[2], z=[3], n=[2])]
    assert clean.find_label_feature(some, [1, 2]) == "y"
    with pytest.raises(InputError, match="more than one feature"):
        clean.find_label_feature(some[:1], [1])
    with pytest.raises(InputError, match="no feature of the records"):
        clean.find_label_feature([*some, b"no example"], [1, 2, 1])


class Alone:
    """What `rewritten` looks at of a parsed batch of one."""

    def __init__(self, features, label):
        self.features, self.label, self.ids = np.array([features]), np.array([label]), None


@pytest.mark.parametrize(
    ("relabel", "said"),
    [
        (lambda record, label: 1 / 0, "Task.relabel failed: ZeroDivisionError"),
        (lambda record, label: "text", "gave a str, not bytes"),
        (lambda record, label: record, "parsed with the label 1.0, not 2"),
        (lambda record, label: b"x 2", "changes features"),
        (lambda record, label: b"x", "does not parse"),
    ],
    ids=range(5),
)
def test_a_relabel_of_the_task_is_checked(relabel, said):
    def parse(some):
        features, label = some[0].split()
        return Alone(features, float(label))

    def with_one(function):
        return Task(model=None, loss=None, parse=None, relabel=function)

    good = with_one(lambda record, label: b"a %d" % label)
    assert clean.rewritten(b"a 1", 2, parse, good, "") == b"a 2"
    with pytest.raises(ValueError, match=said):
        clean.rewritten(b"a 1", 2, parse, with_one(relabel), "")


def test_a_label_is_a_number_or_a_class():
    assert clean.label_of(Alone(0, [0, 0, 1])) == 2
    assert clean.label_of(Alone(0, [4])) == 4
    assert clean.label_of(Alone(0, [0, 1, 1])) is None
    assert clean.label_of(Alone(0, b"cat")) is None
