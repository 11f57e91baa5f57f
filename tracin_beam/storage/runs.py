"""What lies in an output directory, and what of it is still good.

    run.json                                    configuration, versions, fingerprint, counts, …
    embeddings/<set>/<step>/<shard>.tfrecord    with <shard>.tfrecord.json, written after it: its
                                                fingerprint, counts and rejected records
    index/plan.json                             number of each shard's group
    index/part-00000/                           of a group, if there is an index: ScaNN searcher,
                                                rows.parquet, partition.json
    influence/<test name>/                      influence-*.parquet
    total_influence/<test name>/                total_influence-*.parquet, with --total
    reports/<test name>.html
    evaluation/<test name>/group-*.parquet      exact scores of the queries that recall is of
    self_influence/                             self_influence-*.parquet
    rejected/<set>=<shard>.jsonl
    _state/influence/<test name>.json           what says that the tables are whole

A set is "train" or the name of a test set. A table's folder holds the table alone, so that any
tool reads it as it is.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tracin_beam import config
from tracin_beam.errors import InputError
from tracin_beam.storage import files, patterns

TRAIN = "train"
_REQUESTS = 32  # made of a file system at a time
_LONGEST_NAME = 150  # bytes of a shard's name, to which names of files of ours add some
_FOLDERS = (
    "embeddings",
    "index",
    "influence",
    "total_influence",
    "evaluation",
    "self_influence",
    "reports",
    "rejected",
    "_state",
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """An input file.

    Attributes:
      path: as matched.
      name: its base name, with a hash of its path where another shard has the same.
      identity: changes whenever the file does.
    """

    path: str
    name: str
    identity: str

    @property
    def size(self) -> int:
        """Bytes, when it was found."""
        return int(self.identity.partition(":")[0] or 0)


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of a run; its learning rate does not touch the embeddings."""

    path: str
    step: int
    epoch: int | None
    learning_rate: float
    identity: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """A shard at a checkpoint: what is computed and kept as one.

    Attributes:
      set_name: "train" or the test set's name.
      target: what is differentiated; always "loss" for the training set.
      fingerprint: of everything the embeddings depend on.
    """

    set_name: str
    shard: Shard
    checkpoint: CheckpointFile
    target: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What became of a unit.

    Attributes:
      read: records in the shard.
      rejected: (position, reason) of those that could not be used.
    """

    unit: Unit
    read: int
    rejected: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What became of a shard over all checkpoints.

    Attributes:
      rejected: (position, reason) of records that could not be used at some checkpoint, or whose
        id another record has; in the order of positions.
    """

    set_name: str
    shard: Shard
    read: int
    rejected: tuple[tuple[int, str], ...]

    @property
    def used(self) -> int:
        return self.read - len(self.rejected)

    @property
    def excluded(self) -> list[int]:
        return [position for position, _ in self.rejected]


@dataclasses.dataclass(frozen=True)
class Output:
    """Paths in an output directory."""

    root: str

    def path(self, *parts: str) -> str:
        return files.join(self.root, *parts)

    @property
    def run(self) -> str:
        return self.path("run.json")

    def embeddings(self, set_name: str, step: int, shard: Shard) -> str:
        suffix = "" if shard.name.endswith(".tfrecord") else ".tfrecord"
        return self.path("embeddings", set_name, str(step), shard.name + suffix)

    def unit(self, unit: Unit) -> str:
        return self.embeddings(unit.set_name, unit.checkpoint.step, unit.shard)

    def rejected(self, set_name: str, shard: Shard) -> str:
        return self.path("rejected", f"{set_name}={shard.name}.jsonl")

    def influence(self, test_name: str, *parts: str) -> str:
        return self.path("influence", test_name, *parts)

    def report(self, test_name: str) -> str:
        return self.path("reports", test_name + ".html")

    def done(self, *job: str) -> str:
        """The mark of a job's results: of ("influence", test name), for example."""
        return self.path("_state", *job) + ".json"

    def evaluation(self, test_name: str, group: int) -> str:
        return self.path("evaluation", test_name, f"group-{group:05d}.parquet")

    def self_influence(self, *parts: str) -> str:
        return self.path("self_influence", *parts)


def digest(value: Any) -> str:
    """16 hex digits for a value made of dicts, lists, strings and numbers."""
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs, in words."""
    words = []
    for key in new:
        if old.get(key) != new[key]:
            spelt_out = key in config.flags()
            words.append(f"{key} ({old.get(key)} → {new[key]})" if spelt_out else key)
    return words


def numbered(stem: str, number: int, total: int) -> str:
    """`stem-00000-of-0000N.parquet`."""
    return f"{stem}-{number:05d}-of-{total:05d}.parquet"


def find_shards(pattern: str, flag: str, known: Mapping[str, str]) -> list[Shard]:
    """The shards that a pattern names, in the order of their paths.

    Args:
      pattern: glob, or several with commas.
      flag: for the error message.
      known: name by path of shards in an earlier run, which keep their names.

    Raises:
      InputError: nothing matches.
    """
    try:
        matched = [files.FileInfo(files.full(i.path), i.size) for i in patterns.match(pattern)]
    except InputError as error:
        raise InputError(f"--{flag}: {error}") from None
    # Names that differ by ".tfrecord" alone would have the same embedding file.
    taken = {_stem(known[info.path]) for info in matched if info.path in known}
    with ThreadPoolExecutor(_REQUESTS) as pool:
        checksums = list(pool.map(lambda info: files.checksum(info.path), matched))
    shards = []
    for info, checksum in zip(matched, checksums, strict=True):
        name = known.get(info.path)
        if name is None:
            name = os.path.basename(info.path)
            if _stem(name) in taken or len(name.encode()) > _LONGEST_NAME:
                stem, extension = os.path.splitext(name)
                stem = stem.encode()[:_LONGEST_NAME].decode(errors="ignore")
                name = f"{stem}-{digest(info.path)[:8]}{extension[-20:]}"
            taken.add(_stem(name))
        shards.append(Shard(info.path, name, f"{info.size}:{checksum}"))
    return shards


def _stem(name: str) -> str:
    return name.removesuffix(".tfrecord")


def read_unit(output: Output, unit: Unit) -> UnitResult | None:
    """The result of a unit that is done already, or None when it has to be computed."""
    path = output.unit(unit)
    try:
        if not files.exists(path + ".json"):
            return None
        stored = files.read_json(path + ".json")
    except InputError:
        return None
    if stored.get("fingerprint") != unit.fingerprint or not files.exists(path):
        return None
    rejected = tuple((int(position), str(reason)) for position, reason in stored["rejected"])
    return UnitResult(unit, stored["read"], rejected)


def write_unit(output: Output, result: UnitResult) -> None:
    """Marks a unit's embedding file as complete."""
    files.write_json(
        output.unit(result.unit) + ".json",
        {
            "fingerprint": result.unit.fingerprint,
            "shard": result.unit.shard.path,
            "step": result.unit.checkpoint.step,
            "read": result.read,
            "embedded": result.read - len(result.rejected),
            "rejected": [list(pair) for pair in result.rejected],
        },
    )


def read_run(output: Output) -> dict[str, Any]:
    """run.json, or an empty dict for a new directory."""
    return files.read_json(output.run) if files.exists(output.run) else {}


def clear(output: Output) -> None:
    """Removes all results."""
    for folder in _FOLDERS:
        # Hidden files too, which runs that were killed have left.
        files.remove([info.path for info in files.list_folder(output.path(folder), deep=True)])


def merge_results(results: Sequence[UnitResult]) -> ShardResult:
    """A shard's result from those of its units, one for each checkpoint."""
    rejected: dict[int, str] = {}
    for result in sorted(results, key=lambda r: r.unit.checkpoint.step):
        for position, reason in result.rejected:
            rejected.setdefault(position, reason)
    first = results[0]
    reads = {result.read for result in results}
    if len(reads) != 1:
        raise InputError(f"{first.unit.shard.path} changed while it was read: run again.")
    return ShardResult(
        first.unit.set_name, first.unit.shard, first.read, tuple(sorted(rejected.items()))
    )
