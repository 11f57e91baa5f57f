"""A run that takes a second: a softmax regression, whose scores are known in closed form."""

import dataclasses
import gzip
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tracin_beam.storage.records import RecordWriter

FEATURES, CLASSES = 4, 3
STEPS = (10, 20)
RATES = (0.5, 0.25)

TASK = """
import keras
import tensorflow as tf
from tracin_beam import Task

def build_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="scores")])

def parse(serialized):
    columns = {
        "x": tf.io.FixedLenFeature([4], tf.float32),
        "y": tf.io.FixedLenFeature([], tf.int64),
        "id": tf.io.FixedLenFeature([], tf.string),
    }
    example = tf.io.parse_example(serialized, columns)
    return {"features": example["x"], "label": example["y"], "id": example["id"]}

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
task = Task(build_model, loss, parse)
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """An example: x float32 [4], the label y, and where it stands once it is written."""

    x: np.ndarray
    y: int
    id: str
    shard: str = ""
    position: int = -1

    def serialized(self):
        from tensorflow.train import BytesList, Example, Feature, Features, FloatList, Int64List

        feature = {
            "x": Feature(float_list=FloatList(value=self.x)),
            "y": Feature(int64_list=Int64List(value=[self.y])),
            "id": Feature(bytes_list=BytesList(value=[self.id.encode()])),
        }
        return Example(features=Features(feature=feature)).SerializeToString()

    def but(self, **changes):
        return dataclasses.replace(self, **changes)


def rows(name, count, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, FEATURES)).astype(np.float32)
    x[:, -1] = 0  # left for what is bad
    return [Row(x[i], int(rng.integers(CLASSES)), f"{name}{i}") for i in range(count)]


def starts(some):
    """Where the records of a TFRecord file begin, and its end."""
    return np.cumsum([0] + [16 + len(row.serialized()) for row in some]).tolist()


def framed(records):
    """The content of a TFRecord file."""
    handle = io.BytesIO()
    writer = RecordWriter(handle)
    for record in records:
        writer.write(record.serialized() if isinstance(record, Row) else record)
    return handle.getvalue()


class Tiny:
    """A folder with a task, checkpoints, shards and output, and a way to run the jobs on it.

    Attributes:
      shards: rows by name of the shard, of "train-*" and "test-*".
    """

    def __init__(self, folder, launch=None, prefix=""):
        self.folder = Path(folder)
        self.prefix = prefix
        self._launch = launch
        self.out = self.folder / "out"
        self.shards = {}
        self.steps = None
        (self.folder / "task.py").write_text(TASK)
        self.write_checkpoints()

    def write_checkpoints(self, steps=STEPS, rates=RATES, weights=None):
        """Writes checkpoints.json, and the files whose weights are not there yet."""
        import keras

        (self.folder / "ckpts").mkdir(parents=True, exist_ok=True)
        known = {} if self.steps is None else dict(zip(self.steps, self.weights, strict=True))
        self.steps, self.rates = steps, rates
        self.weights = weights or [weights_at(step) for step in steps]
        model = keras.Sequential(
            [keras.Input((FEATURES,)), keras.layers.Dense(CLASSES, name="scores")]
        )
        listing = []
        for step, rate, values in zip(steps, rates, self.weights, strict=True):
            name = f"{step:08d}.weights.h5"
            if step not in known or not same(known[step], values):
                model.set_weights(values)
                model.save_weights(self.folder / "ckpts" / name)
            listing.append({"path": name, "step": step, "epoch": 1, "learning_rate": rate})
        (self.folder / "ckpts" / "checkpoints.json").write_text(json.dumps(listing))

    def write(self, name, content):
        """Writes a shard of rows, or of raw bytes."""
        path = self.folder / name
        if not isinstance(content, bytes):
            self.shards[name] = [
                row.but(shard=self.path(name), position=i) if isinstance(row, Row) else row
                for i, row in enumerate(content)
            ]
            content = framed(content)
            if name.endswith(".gz"):
                content = gzip.compress(content, mtime=0)
        path.write_bytes(content)

    def write_all(self, train=3, test=2, packed=False):
        suffix = ".tfrecord" + ".gz" * packed
        for i in range(train):
            self.write(f"train-{i}{suffix}", rows(f"train{i}.", 8, i))
        for i in range(test):
            self.write(f"test-{i}{suffix}", rows(f"test{i}.", 4, 100 + i))
        return self

    def path(self, name):
        return self.prefix + str(self.folder / name)

    def flags(self, stage, **changes):
        given = {
            "task": f"{self.folder / 'task.py'}:task",
            "checkpoints": self.path("ckpts"),
            "train": self.path("train-*"),
            "output": self.path("out"),
            "dim": 16,
            **({} if stage == "self_influence" else {"test": self.path("test-*")}),
            **({"top_k": 100, "recall_queries": 2} if stage == "influence" else {}),
            **changes,
        }
        return {name: value for name, value in given.items() if value is not None}

    def argv(self, stage, **changes):
        flags = self.flags(stage, **changes)
        return [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items()]

    def run(self, stage, **changes):
        """The exit status of a job."""
        return self._launch(stage, **self.flags(stage, **changes))

    def run_json(self):
        return json.loads((self.out / "run.json").read_text())

    def rejected(self):
        """(shard's name, position) → reason, as rejected/*.jsonl says."""
        found = {}
        for path in sorted((self.out / "rejected").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                assert set(row) == {"file", "position", "reason"}
                found[os.path.basename(row["file"]), row["position"]] = row["reason"]
        return found

    def good(self, side, rejected=()):
        """The rows of a side that can be used."""
        return [
            row
            for name in sorted(self.shards)
            if name.startswith(side)
            for i, row in enumerate(self.shards[name])
            if (name, i) not in rejected
        ]

    def check(self, rejected=None, read=None, tables=("influence", "self_influence")):
        """The tables, the counts and rejected/ are those of what can be used.

        Args:
          rejected: (shard's name, position) → regular expression for the reason.
          read: number of records read by set, where that is not the number of rows.
          tables: which to look at.
        """
        rejected = rejected or {}
        train, test = self.good("train", rejected), self.good("test", rejected)
        if "influence" in tables:
            check_influence(self, train, test)
        if "self_influence" in tables:
            check_self_influence(self, train)
        self.check_counts(rejected, read)

    def check_counts(self, rejected, read=None):
        found = self.rejected()
        assert set(found) == set(rejected)
        for place, pattern in rejected.items():
            assert re.search(pattern, found[place]), found[place]
        for side, counts in self.run_json()["counts"].items():
            all_rows = sum(len(rows) for name, rows in self.shards.items() if name.startswith(side))
            bad = sum(name.startswith(side) for name, _ in rejected)
            expected = (read or {}).get(side, all_rows)
            assert counts["read"] == expected
            assert counts["rejected"] == bad
            assert counts["embedded"] == expected - bad


def weights_at(step):
    rng = np.random.default_rng(step)
    return [
        rng.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        rng.normal(size=CLASSES).astype(np.float32),
    ]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def residuals(some, weights):
    """p − y and [x, 1], float64: ∇ℓ of the kernel and bias is their outer product."""
    kernel, bias = (w.astype(np.float64) for w in weights)
    x = np.stack([row.x for row in some]).astype(np.float64)
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    y = np.eye(CLASSES)[[row.y for row in some]]
    return p - y, np.concatenate([x, np.ones((len(x), 1))], axis=1), logits


def kronecker(train, weights):
    """K-FAC's A ⊗ B of kernel and bias, whose input is a one: float64 [15, 15]."""
    delta, x, _ = residuals(train, weights)
    a, b = (np.mean([np.outer(row, row) for row in rows], axis=0) for rows in (x, delta))
    return np.kron(a, b)


def damped(moments, queries, damping=1.0):
    """(M + κ mean eigenvalue I)⁻¹ of each row, float64 [q, N]."""
    size = len(moments)
    ridge = damping * np.linalg.eigvalsh(moments).mean() * np.eye(size)
    return np.linalg.solve(moments + ridge, queries.T).T


def scores(tiny, test, train):
    """TracInCP by checkpoint: float64 [tests, trains, C]."""
    parts = []
    for weights, rate in zip(tiny.weights, tiny.rates, strict=True):
        r, x, _ = residuals(test, weights)
        s, z, _ = residuals(train, weights)
        parts.append(rate * (r @ s.T) * (x @ z.T))
    return np.stack(parts, axis=2)


def table(folder):
    found = sorted(Path(folder).glob("*.parquet"))
    return [row for path in found for row in pq.read_table(path).to_pylist()]


def check_influence(tiny, train, test, test_name="test"):
    expected = scores(tiny, test, train)
    found = {}
    for row in table(tiny.out / "influence" / test_name):
        found.setdefault((row["test_id"], row["role"]), []).append(row)
    assert len(found) == 2 * len(test)
    predicted = np.argmax(residuals(train, tiny.weights[-1])[2], axis=1)
    for q, example in enumerate(test):
        for role, sign in (("proponent", -1), ("opponent", 1)):
            mine = found[example.id, role]
            own = expected[q]
            order = np.argsort(sign * own.sum(axis=1), kind="stable")
            assert [row["rank"] for row in mine] == list(range(1, len(train) + 1))
            close = {"rtol": 1e-4, "atol": 1e-6 * np.abs(own).max()}  # sums may cancel out
            np.testing.assert_allclose([r["score"] for r in mine], own.sum(1)[order], **close)
            assert [r["train_id"] for r in mine] == [train[i].id for i in order]
            for row, i in zip(mine, order, strict=True):
                np.testing.assert_allclose(row["score_by_checkpoint"], own[i], **close)
                assert (row["train_shard"], row["train_position"]) == (
                    train[i].shard,
                    train[i].position,
                )
                assert (row["test_shard"], row["test_position"]) == (
                    example.shard,
                    example.position,
                )
                assert (row["test_label"], row["train_label"]) == (example.y, train[i].y)
                assert row["train_prediction"] == predicted[i]
                assert row["exact"]


def check_self_influence(tiny, train):
    found = table(tiny.out / "self_influence")
    assert [(r["id"], r["label"]) for r in found] == [(r.id, r.y) for r in train]
    assert [(r["shard"], r["position"]) for r in found] == [(r.shard, r.position) for r in train]
    products = scores(tiny, train, train)
    own = np.stack([products[i, i] for i in range(len(train))])
    close = {"rtol": 1e-4, "atol": 1e-6}  # p − y may cancel out
    np.testing.assert_allclose([r["self_influence_by_checkpoint"] for r in found], own, **close)
    np.testing.assert_allclose([r["self_influence"] for r in found], own.sum(axis=1), **close)


def snapshot(folder, pattern="*"):
    """Path → (inode, time of change) of all files that are not hidden, but run.json."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in Path(folder).rglob(pattern)
        if path.is_file() and not path.name.startswith(".") and path.name != "run.json"
    }


def contents(folder):
    """Path → bytes of all files that are not hidden, as of `whole`; of run.json without times."""
    found = whole(folder)
    state = json.loads(found.pop("run.json"))
    return {**found, "run.json": {**state, "timings": sorted(state["timings"])}}


def whole(folder):
    """Path → bytes of all files that are not hidden.

    Marks are without the times of the files that they vouch for, which are others in each run.
    """
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    for name, content in found.items():
        if name.endswith(".json") and b'"checksum": ' in content:
            mark = json.loads(content)
            for key in {"files", "embeddings"} & set(mark):
                if isinstance(mark[key], dict):  # a test may have given it another shape
                    mark[key] = {path: stamp[:2] for path, stamp in mark[key].items()}
            found[name] = json.dumps({**mark, "checksum": ""}).encode()
    return found
