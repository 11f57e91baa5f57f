"""Embedding files → ScaNN searchers, a partition of the training set each.

A row of the index is an example's embeddings at all checkpoints, √η_c e_c, one after the other.
The inner product of two rows estimates TracInCP (Pruthi et al. 2020, equation 5 with section 3's
checkpoints), so that proponents are the rows of greatest inner product with a query q, and
opponents those with −q.
"""

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.storage import embeddings, files, runs, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Output, ShardResult

_log = logging.getLogger(__name__)

# ScaNN's own advice: below this number of rows nothing is faster than looking at all of them.
_BRUTE_FORCE_ROWS = 20_000
_PLAN = "plan.json"
_MARK = "partition.json"
_ROWS = "rows.parquet"
_SCANN = "scann"


@dataclasses.dataclass(frozen=True)
class Partition:
    """Some shards whose rows are searched together.

    Attributes:
      number: of its folder.
      shards: in the order of their rows.
      fingerprint: of all that is in it.
    """

    number: int
    shards: tuple[ShardResult, ...]
    fingerprint: str


def rows_of(parts: Sequence[Embeddings], checkpoints: Sequence[CheckpointFile]) -> np.ndarray:
    """√η_c e_c concatenated over the checkpoints: float32 [n, len(checkpoints)·dim]."""
    scales = [math.sqrt(checkpoint.learning_rate) for checkpoint in checkpoints]
    scaled = [part.embedding * np.float32(s) for part, s in zip(parts, scales, strict=True)]
    return np.concatenate(scaled, axis=1)


def plan(
    results: Iterable[ShardResult],
    units: Mapping[str, str],
    index_rows: int,
    known: Mapping[str, int],
) -> list[Partition]:
    """Divides shards into partitions of about index_rows rows.

    A shard that was in the index stays in its partition, so that a new day's shards change the
    last partition only.

    Args:
      results: of all training shards.
      units: fingerprint of each shard's embeddings and their scale, by its path.
      index_rows: rows that a partition may have; a single shard may exceed it.
      known: partition number of the shards that are in the index already, by path.
    """
    members: dict[int, list[ShardResult]] = {}
    fresh = []
    for result in sorted(results, key=lambda r: r.shard.path):
        if result.used == 0:
            continue
        if result.shard.path in known:
            members.setdefault(known[result.shard.path], []).append(result)
        else:
            fresh.append(result)
    for number in [n for n, held in members.items() if _rows(held) > index_rows and len(held) > 1]:
        fresh += members.pop(number)
    last = max(members, default=0)
    for result in sorted(fresh, key=lambda r: r.shard.path):
        held = members.setdefault(last, [])
        if held and _rows(held) + result.used > index_rows:
            last = max(members) + 1
            held = members.setdefault(last, [])
        held.append(result)
    partitions = []
    for number, held in sorted(members.items()):
        held.sort(key=lambda r: r.shard.path)
        content = [[r.shard.path, units[r.shard.path], r.excluded] for r in held]
        partitions.append(Partition(number, tuple(held), runs.digest(content)))
    return partitions


def _rows(results: Sequence[ShardResult]) -> int:
    return sum(result.used for result in results)


def known_partitions(output: Output) -> dict[str, int]:
    """Partition number by path of the shards that are planned to be in the index."""
    path = output.path("index", _PLAN)
    return files.read_json(path) if files.exists(path) else {}


def build(output: Output, partition: Partition, checkpoints: Sequence[CheckpointFile]) -> Partition:
    """Writes a partition's searcher and the places of its rows, unless they are there."""
    mark = output.partition(partition.number, _MARK)
    earlier = files.read_json(mark) if files.exists(mark) else {}
    if earlier.get("fingerprint") == partition.fingerprint:
        return partition
    matrices, shards, positions = [], [], []
    for result in partition.shards:
        paths = [output.embeddings(runs.TRAIN, c.step, result.shard) for c in checkpoints]
        for parts in embeddings.read_checkpoints(paths, result.excluded):
            matrices.append(rows_of(parts, checkpoints))
            positions.append(parts[0].position)
            shards += [result.shard.path] * len(parts[0])
    matrix = np.concatenate(matrices)
    matrices.clear()
    files.remove([mark])
    with tempfile.TemporaryDirectory() as folder:
        searcher(matrix).serialize(folder, relative_path=True)
        names = sorted(os.listdir(folder))
        # Named by its content: a retry, while the first attempt still writes, may train another.
        content = [files.checksum(os.path.join(folder, name)) for name in names]
        trained = f"{_SCANN}-{runs.digest(content)}"
        for name in names:
            files.upload(
                os.path.join(folder, name), output.partition(partition.number, trained, name)
            )
    rows = {"shard": pa.array(shards).dictionary_encode(), "position": np.concatenate(positions)}
    tables.write(
        output.partition(partition.number, _ROWS),
        pa.table(rows).cast(tables.INDEX_ROWS),
    )
    files.write_json(
        mark,
        {
            "number": partition.number,
            "fingerprint": partition.fingerprint,
            "rows": len(matrix),
            "folder": trained,
            "files": names,
        },
    )
    if earlier.get("folder", trained) != trained:
        _remove(output.partition(partition.number, earlier["folder"]), earlier["files"])
    _log.info("indexed partition %d: %d rows", partition.number, len(matrix))
    return partition


def _remove(folder: str, names: Sequence[str]) -> None:
    files.remove([files.join(folder, name) for name in names])
    if files.is_local(folder):
        with contextlib.suppress(OSError):  # somebody else's file
            os.rmdir(folder)


def searcher(matrix: np.ndarray) -> Any:
    """A ScaNN searcher for inner products over float32 [n, d]."""
    from scann.scann_ops.py import scann_ops_pybind

    rows = len(matrix)
    builder = scann_ops_pybind.builder(matrix, 1, "dot_product")
    if rows < _BRUTE_FORCE_ROWS:
        return builder.score_brute_force().build()
    leaves = round(math.sqrt(rows))
    return (
        builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=max(1, leaves // 2),
            training_sample_size=min(rows, 100_000),
        )
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(1000)
        .build()
    )


@dataclasses.dataclass(frozen=True)
class Searcher:
    """A partition, loaded.

    Attributes:
      shards: paths of the shards of the rows, by code.
      code: int32 [n], the shard of each row.
      position: int64 [n].
      scann: the ScaNN searcher.
    """

    shards: list[str]
    code: np.ndarray
    position: np.ndarray
    scann: Any

    def search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of greatest inner product with each of float32 [q, d].

        Returns:
          int [q, k] indices and float32 [q, k] scores, k the smaller of count and the rows; an
          index of −1 where the searcher found fewer.
        """
        count = min(count, len(self.position))
        index, score = self.scann.search_batched(
            queries, final_num_neighbors=count, pre_reorder_num_neighbors=max(1000, 4 * count)
        )
        missing = np.isnan(score)
        return np.where(missing, -1, index.astype(np.int64)), score


@contextlib.contextmanager
def loaded(output: Output, partition: Partition) -> Iterator[Searcher]:
    """Loads a partition from any file system."""
    from scann.scann_ops.py import scann_ops_pybind

    number = partition.number
    rows = tables.read(output.partition(number, _ROWS))
    shard = rows.column("shard").combine_chunks()
    mark = files.read_json(output.partition(number, _MARK))
    trained = mark["folder"]
    with contextlib.ExitStack() as stack:
        if files.is_local(output.root):
            folder = output.partition(number, trained)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for name in mark["files"]:
                files.download(output.partition(number, trained, name), os.path.join(folder, name))
        yield Searcher(
            shard.dictionary.to_pylist(),
            shard.indices.to_numpy(),
            rows.column("position").to_numpy(),
            scann_ops_pybind.load_searcher(folder),
        )


class BuildPartition(beam.DoFn):
    """Partition → Partition, when it is on disk."""

    def __init__(self, output: Output, checkpoints: Sequence[CheckpointFile]) -> None:
        self._output = output
        self._checkpoints = list(checkpoints)

    def process(self, partition: Partition) -> Iterator[Partition]:
        yield build(self._output, partition, self._checkpoints)


@dataclasses.dataclass
class Index(beam.PTransform):
    """Training ShardResults → Partitions, each when it is on disk.

    Attributes:
      output: the output directory.
      checkpoints: in training order.
      units: fingerprint of each shard's embeddings and their scale, by its path.
      index_rows: rows that a partition may have.
    """

    output: Output
    checkpoints: Sequence[CheckpointFile]
    units: Mapping[str, str]
    index_rows: int

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        return (
            results.pipeline
            | "Once" >> beam.Create([None])
            | "Plan" >> beam.FlatMap(self._plan, beam.pvalue.AsList(results))
            | "SpreadPlan" >> beam.Reshuffle()
            | "Build" >> beam.ParDo(BuildPartition(self.output, self.checkpoints))
        )

    def _plan(self, _: None, results: Sequence[ShardResult]) -> list[Partition]:
        known = known_partitions(self.output)
        partitions = plan(results, self.units, self.index_rows, known)
        kept = {partition.number for partition in partitions}
        # A partition that has lost its last shard must not be taken for a living one.
        files.remove(self.output.partition(number, _MARK) for number in set(known.values()) - kept)
        # Written before anything is built, so that a run that is killed goes on with the same plan.
        numbers = {r.shard.path: part.number for part in partitions for r in part.shards}
        if numbers != known:
            files.write_json(self.output.path("index", _PLAN), numbers)
        return partitions
