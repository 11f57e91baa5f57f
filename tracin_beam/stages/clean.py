"""Shards → the same shards with the verdicts of the ledger applied, and a table of every change."""

import contextlib
import dataclasses
import functools
import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam._version import __version__
from tracin_beam.errors import InputError, reason
from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.inputs import formats
from tracin_beam.inputs.task import Task, TaskSource
from tracin_beam.stages.metrics import Counters, Tally
from tracin_beam.storage import files, marks, records, runs, tables, verdicts
from tracin_beam.storage.records import BadRecord
from tracin_beam.storage.runs import Shard

PROVENANCE = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),  # path of the shard that was cleaned
        ("position", pa.int64()),  # there
        ("action", pa.string()),  # dropped, relabelled, not applied, or unreadable
        ("label", pa.float64()),  # before
        ("new_label", pa.float64()),
        ("reason", pa.string()),  # of what was not applied, or is unreadable
        ("content_hash", pa.binary()),
        ("new_position", pa.int64()),  # in the cleaned shard
        ("new_content_hash", pa.binary()),
        ("who", pa.string()),
        ("when", pa.string()),
        ("why", pa.string()),
    ]
)
ACTIONS = ("dropped", "relabelled", "not applied", "unreadable")


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """What a worker needs to clean shards; small, as it travels in the pipeline's graph.

    Attributes:
      task: the task's sources.
      folder: where the cleaned shards go.
      ledger: path of a copy of the ledger that nobody changes.
      feature: the `tf.train.Example` feature that holds the label; "" where `Task.relabel` writes
        it, or no label is to be written.
      digest: of all that a cleaned shard depends on besides the shard.
    """

    task: TaskSource
    folder: str
    ledger: str
    feature: str
    digest: str

    def shard(self, shard: Shard) -> str:
        return files.join(self.folder, shard.name)

    def provenance(self, shard: Shard) -> str:
        return files.join(self.folder, "provenance", shard.name + ".parquet")

    def mark(self, shard: Shard) -> str:
        return files.join(self.folder, "_state", shard.name + ".json")

    def fingerprint(self, shard: Shard) -> str:
        return runs.digest([__version__, shard.path, shard.identity, self.digest])

    def kept(self, shard: Shard) -> dict[str, Any] | None:
        """The mark of a shard that is cleaned already."""
        made = {self.shard(shard), self.provenance(shard)}
        return marks.read(self.mark(shard), self.folder, self.fingerprint(shard), made)


def label_of(batch: Batch) -> float | None:
    """The label of a batch of one example: a number, or the class of a one-hot label.

    None where there is none, or it is of another kind.
    """
    if batch.label is None:
        return None
    values = np.asarray(batch.label)[0].ravel()
    if values.dtype.kind not in "biuf":
        return None
    if values.size == 1:
        return float(values[0])
    one_hot = values.size > 1 and set(np.unique(values)) == {0, 1} and values.sum() == 1
    return float(values.argmax()) if one_hot else None


def find_label_feature(some: Sequence[bytes], labels: Sequence[float]) -> str:
    """The one feature of `tf.train.Example`s whose value equals the label in all of them.

    Args:
      some: serialised records.
      labels: theirs, as the task parses them.

    Raises:
      InputError: there is no such feature, or more than one.
    """
    candidates: set[str] | None = None
    for record, label in zip(some, labels, strict=True):
        equal = {
            name
            for name, feature in _features(record).items()
            if (values := _values(feature)) is not None and list(values) == [label]
        }
        candidates = equal if candidates is None else candidates & equal
    found = sorted(candidates or ())
    if len(found) == 1:
        return found[0]
    said = "no feature of the records" if not found else f"more than one feature ({found})"
    raise InputError(
        f"A label is to be rewritten, and {said} equals the label that the task parses: name it "
        "with --label_feature, or give Task(relabel=…), a function of a serialised record and a "
        "label that gives the record with that label."
    )


def with_label(record: bytes, feature: str, label: float) -> bytes:
    """A serialised `tf.train.Example` with another value of one feature.

    Raises:
      ValueError: there is no such feature with one number, or it is whole and the label is not.
    """
    from tensorflow.train import Example

    try:
        example = Example.FromString(record)
    except Exception:  # the protobuf runtime's own
        raise ValueError("the record is no tf.train.Example") from None
    if feature not in example.features.feature:
        raise ValueError(f"the record has no feature {feature!r}")
    values = _values(example.features.feature[feature])
    if values is None or len(values) != 1:
        raise ValueError(f"the feature {feature!r} does not hold one number")
    if example.features.feature[feature].WhichOneof("kind") == "int64_list":
        if not float(label).is_integer():
            raise ValueError(f"the feature {feature!r} is whole, and {label} is not")
        values[0] = int(label)
    else:
        values[0] = label
    return bytes(example.SerializeToString(deterministic=True))


def _features(record: bytes) -> Mapping[str, Any]:
    from tensorflow.train import Example

    try:
        found: Mapping[str, Any] = Example.FromString(record).features.feature
    except Exception:  # the protobuf runtime's own
        return {}
    return found


def _values(feature: Any) -> Any:
    """The numbers of a feature; None for bytes."""
    kind = feature.WhichOneof("kind")
    return getattr(feature, kind).value if kind in ("int64_list", "float_list") else None


def rewritten(
    record: bytes,
    label: float,
    parse: Callable[[Sequence[bytes]], Batch],
    task: Task,
    feature: str,
) -> bytes:
    """A record with another label, which the task parses as such, and nothing else changed.

    Raises:
      ValueError: it says why that cannot be done.
    """
    if task.relabel is not None:
        try:
            new = task.relabel(record, label)
        except Exception as error:
            raise ValueError(f"Task.relabel failed: {reason(error)}") from None
        if not isinstance(new, bytes):
            raise ValueError(f"Task.relabel gave a {type(new).__name__}, not bytes")
    else:
        new = with_label(record, feature, label)
    try:
        before, after = parse([record]), parse([new])
    except Exception as error:
        raise ValueError(f"the record with its new label does not parse: {reason(error)}") from None
    if label_of(after) != label:
        raise ValueError(f"the record is parsed with the label {label_of(after)}, not {label}")
    if not _same(before.features, after.features) or not _same(before.ids, after.ids):
        raise ValueError("the new label changes features or id of the record")
    return new


def _same(one: Any, other: Any) -> bool:
    import tensorflow as tf

    left, right = tf.nest.flatten(one), tf.nest.flatten(other)
    return len(left) == len(right) and all(
        a is b or np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(left, right, strict=True)
    )


def clean(shard: Shard, cleaning: Cleaning, tally: Tally) -> dict[str, int]:
    """Writes a cleaned shard and its provenance, unless they are there.

    Returns:
      How many records were read, and how many there were of each of `ACTIONS`.

    Raises:
      InputError: the shard changed meanwhile.
    """
    if kept := cleaning.kept(shard):
        return dict(kept["counts"])
    task, parse = _loaded(cleaning.task)
    held = _held(cleaning.ledger)
    files.remove([cleaning.mark(shard)])
    changes: list[dict[str, Any]] = []
    read = 0
    with _record_writer(shard.path, cleaning.shard(shard)) as (writer, handle):
        written = 0
        for record in formats.read(shard.path):
            read += 1
            tally.add("records")
            change = _change(record, shard, held, parse, task, cleaning.feature)
            action = change["action"] if change else ""
            if change is not None:
                changes.append({"shard": shard.path, "position": record.position, **change})
            if action in ("dropped", "unreadable") or isinstance(record, BadRecord):
                continue
            data = record.data
            if change is not None:
                data = change.pop("data", data)
                changes[-1].pop("data", None)
                changes[-1]["new_position"] = written
                changes[-1]["new_content_hash"] = records.content_hash(data)
            writer.write(data)
            written += 1
        runs.check_unchanged([shard])
    provenance = tables.write(cleaning.provenance(shard), pa.Table.from_pylist(changes, PROVENANCE))
    counts = {action: sum(c["action"] == action for c in changes) for action in ACTIONS}
    made = {cleaning.shard(shard): handle.stamp, cleaning.provenance(shard): provenance}
    counts = {"read": read, **counts}
    marks.write(
        cleaning.mark(shard), cleaning.folder, cleaning.fingerprint(shard), made, counts=counts
    )
    return counts


def _change(
    record: Any,
    shard: Shard,
    held: Mapping[bytes, Mapping[str, Mapping[str, Any]]],
    parse: Callable[[Sequence[bytes]], Batch],
    task: Task,
    feature: str,
) -> dict[str, Any] | None:
    """What becomes of a record that does not stay as it is; "data" is that of a new one."""
    if isinstance(record, BadRecord):
        return {"action": "unreadable", "reason": record.reason}
    digest = records.content_hash(record.data)
    if digest not in held:
        return None
    try:
        batch = parse([record.data])
    except Exception as error:
        return {
            "action": "not applied",
            "reason": f"the record does not parse: {reason(error)}",
            "content_hash": digest,
        }
    name = f"{shard.name}#{record.position}".encode() if batch.ids is None else batch.ids[0]
    identity = tables.text(name)
    verdict = held[digest].get(identity)
    if verdict is None:
        return None
    label = label_of(batch)
    row = {
        "id": identity,
        "content_hash": digest,
        "label": label,
        **{key: verdict[key] for key in ("who", "when", "why")},
    }
    given = verdict["given_label"]
    if given is not None and label is not None and given != label:
        why = f"the label is {label:g}, and the reviewer saw {given:g}"
        return {**row, "action": "not applied", "reason": why}
    if verdict["verdict"] == "drop":
        return {**row, "action": "dropped"}
    if label == verdict["label"]:
        return None
    row["new_label"] = verdict["label"]
    try:
        data = rewritten(record.data, verdict["label"], parse, task, feature)
    except ValueError as error:
        return {**row, "action": "not applied", "reason": str(error)}
    return {**row, "action": "relabelled", "data": data}


@contextlib.contextmanager
def _record_writer(source: str, path: str) -> Iterator[tuple[records.RecordWriter, Any]]:
    """A writer of records that are compressed as those of `source` are."""
    with files.open_read(source) as opened:
        kind = records.compression(records.read_exactly(opened, 12))
    with files.atomic_write(path) as handle:
        if kind == "gzip":
            # Without time and name, so that the same records give the same bytes.
            with gzip.GzipFile(filename="", fileobj=handle, mode="wb", mtime=0) as packed:
                yield records.RecordWriter(packed), handle
        elif kind == "ZLIB":
            deflated = _Deflated(handle)
            yield records.RecordWriter(deflated), handle  # type: ignore[arg-type]
            handle.write(deflated.flush())
        else:
            yield records.RecordWriter(handle), handle


class _Deflated:
    """A handle whose bytes go through ZLIB."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle, self._deflate = handle, zlib.compressobj()
        self.flush = self._deflate.flush

    def write(self, data: bytes) -> int:
        self._handle.write(self._deflate.compress(data))
        return len(data)


@functools.lru_cache(2)
def _loaded(source: TaskSource) -> tuple[Task, BatchParser]:
    task = source.load()
    return task, BatchParser(task)


@functools.lru_cache(2)
def _held(path: str) -> Mapping[bytes, Mapping[str, Mapping[str, Any]]]:
    """The verdicts to apply, by content hash and id."""
    found: dict[bytes, dict[str, Mapping[str, Any]]] = {}
    for (identity, digest), row in verdicts.latest(tables.read(path)).items():
        if row["verdict"] in ("drop", "relabel"):
            found.setdefault(digest, {})[identity] = row
    return found


class CleanShard(beam.DoFn):
    """Shard → its counts, as of `clean`."""

    def __init__(self, cleaning: Cleaning) -> None:
        self._cleaning = cleaning
        self._counters = Counters("clean", "records")

    def process(self, shard: Shard) -> Iterator[dict[str, int]]:
        tally = Tally()
        counts = clean(shard, self._cleaning, tally)
        self._counters.take(tally)
        yield counts


@dataclasses.dataclass
class Clean(beam.PTransform):
    """Shards → counts of their records, as of `clean`."""

    cleaning: Cleaning

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        spread = shards | "SpreadShards" >> beam.Reshuffle()
        return spread | "CleanShard" >> beam.ParDo(CleanShard(self.cleaning))
