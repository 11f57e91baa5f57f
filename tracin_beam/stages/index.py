"""Embedding files → ScaNN searchers, a part of the training set each.

A row of the index is an example's embeddings at all checkpoints, one after the other as
`Score.rows` has them, sketched once more. The inner product of two rows estimates the score, so
that proponents are the rows of greatest inner product with a query q, and opponents those with −q.
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

from tracin_beam.errors import InputError
from tracin_beam.scoring import sketch
from tracin_beam.stages import joining
from tracin_beam.stages.joining import Group, Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.storage import files, marks, runs, tables
from tracin_beam.storage.runs import Output, ShardResult

_log = logging.getLogger(__name__)

# ScaNN's own advice: below this number of rows nothing is faster than looking at all of them.
BRUTE_FORCE_ROWS = 20_000
_PLAN = "plan.json"
_MARK = "partition.json"
_ROWS = "rows.parquet"
_SCANN = "scann"

# Records and seconds are those of pieces that were not found.
_COUNTED = (
    *("pieces_found", "pieces_built", "records", "batches"),
    *("read_msec", "compute_msec", "write_msec"),
)


def plan(
    results: Iterable[ShardResult],
    units: Mapping[str, str],
    index_rows: int,
    known: Mapping[str, int],
) -> list[Group]:
    """Divides shards into groups of about index_rows rows.

    A shard that was in a group stays in it, so that a new day's shards change the last group only.

    Args:
      results: of all training shards.
      units: fingerprint of each shard's embeddings and their scale, by its path.
      index_rows: rows that a group may have; a single shard may exceed it.
      known: group's number of the shards that are in one already, by path.
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
    groups = []
    for number, held in sorted(members.items()):
        held.sort(key=lambda r: r.shard.path)
        content = [[r.shard.path, units[r.shard.path], r.excluded] for r in held]
        groups.append(Group(number, tuple(held), runs.digest(content)))
    return groups


def _rows(results: Sequence[ShardResult]) -> int:
    return sum(result.used for result in results)


def known_groups(output: Output) -> dict[str, int]:
    """Number of the group by path of the shards that are in one."""
    path = output.path("index", _PLAN)
    known: Any = None
    with contextlib.suppress(InputError):
        known = files.read_json(path) if files.exists(path) else {}
    if not files.fits(known, {str: int}) or min(known.values(), default=0) < 0:
        _log.warning("%s is not as it was written: the index is made again", path)
        return {}
    return known


@dataclasses.dataclass(frozen=True)
class Piece:
    """What of a group is indexed together: all of it, or some of its rows if it has too many.

    Attributes:
      group: the shards.
      number, of: which piece of how many.
      start, stop: the rows, counted over the group's shards.
    """

    group: Group
    number: int
    of: int
    start: int
    stop: int

    @property
    def fingerprint(self) -> str:
        return runs.digest([self.group.fingerprint, self.start, self.stop, sketch.DIM])

    def path(self, output: Output, *names: str) -> str:
        suffix = f".{self.number}" if self.of > 1 else ""
        return output.path("index", f"part-{self.group.number:05d}{suffix}", *names)


def pieces(group: Group, index_rows: int) -> list[Piece]:
    """A group's pieces of at most index_rows rows, as even as can be."""
    count = max(1, -(-group.rows // index_rows))
    cuts = [group.rows * i // count for i in range(count + 1)]
    return [Piece(group, i, count, cuts[i], cuts[i + 1]) for i in range(count)]


def build(join: Join, piece: Piece, tally: Tally | None = None) -> Piece:
    """Writes a piece's searcher and the places of its rows, unless they are there.

    Args:
      join: what is joined.
      piece: which.
      tally: takes the records and the batches of them, and the seconds of reading, of training the
        searcher, and of writing.
    """
    tally = tally or Tally()
    output = join.output
    mark = piece.path(output, _MARK)
    if marks.read(mark, output.root, piece.fingerprint):
        tally.add("pieces_found")
        return piece
    earlier = marks.named(mark, output.root)
    matrix = np.empty((piece.stop - piece.start, min(join.numbers, sketch.DIM)), np.float32)
    shards, positions, filled = [], [], 0
    blocks = joining.scaled_rows(join, piece.group, piece.start, piece.stop)
    for shard, position, rows in timed(blocks, tally, "read"):
        with tally.timed("compute"):
            matrix[filled : filled + len(rows)] = sketch.sketch(rows)
        tally.add("batches")
        filled += len(rows)
        positions.append(position)
        shards.append(shard)
    files.remove([mark])
    with tempfile.TemporaryDirectory() as folder:
        with tally.timed("compute"):
            searcher(matrix).serialize(folder, relative_path=True)
        names = sorted(os.listdir(folder))
        # Named by its content: a retry, while the first attempt still writes, may train another.
        content = [files.checksum(os.path.join(folder, name)) for name in names]
        trained = f"{_SCANN}-{runs.digest(content)}"
        made = {}
        with tally.timed("write"):
            for name in names:
                path = piece.path(output, trained, name)
                made[path] = files.upload(os.path.join(folder, name), path)
    paths = pa.array([shard.path for shard in join.train])
    places = {
        "shard": pa.DictionaryArray.from_arrays(np.concatenate(shards), paths),
        "position": np.concatenate(positions),
    }
    path = piece.path(output, _ROWS)
    with tally.timed("write"):
        made[path] = tables.write(path, pa.table(places).cast(tables.INDEX_ROWS))
    marks.write(
        mark,
        output.root,
        piece.fingerprint,
        made,
        number=piece.group.number,
        rows=len(matrix),
        folder=trained,
    )
    _remove(earlier - set(made))
    tally.add("pieces_built")
    tally.add("records", len(matrix))
    _log.info("indexed part %d: %d rows", piece.group.number, len(matrix))
    return piece


def _remove(paths: Iterable[str]) -> None:
    """Removes files, and their folders where these are empty then."""
    for path in paths:
        files.remove([path])
        if files.is_local(path):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(os.path.dirname(path))


def searcher(matrix: np.ndarray) -> Any:
    """A ScaNN searcher for inner products over float32 [n, d].

    It keeps them as int8, which costs no candidate: these are ranked again by whole embeddings.
    """
    from scann.scann_ops.py import scann_ops_pybind

    rows = len(matrix)
    builder = scann_ops_pybind.builder(matrix, 1, "dot_product")
    if rows < BRUTE_FORCE_ROWS:
        return builder.score_brute_force(quantize=True).build()
    leaves = round(math.sqrt(rows))
    return (
        builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=max(1, leaves // 2),
            training_sample_size=min(rows, 100_000),
        )
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(1000, quantize=True)
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
def loaded(output: Output, piece: Piece) -> Iterator[Searcher]:
    """Loads a piece's searcher from any file system."""
    from scann.scann_ops.py import scann_ops_pybind

    rows = tables.read(piece.path(output, _ROWS))
    shard = rows.column("shard").combine_chunks()
    mark = marks.read(piece.path(output, _MARK), output.root, piece.fingerprint)
    if mark is None:
        raise InputError(f"{piece.path(output)} changed while it was used: run again.")
    trained = mark["folder"]
    with contextlib.ExitStack() as stack:
        if files.is_local(output.root):
            folder = piece.path(output, trained)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for path in mark["files"]:
                if os.path.basename(path) != _ROWS:
                    files.download(path, os.path.join(folder, os.path.basename(path)))
        yield Searcher(
            shard.dictionary.to_pylist(),
            shard.indices.to_numpy(),
            rows.column("position").to_numpy(),
            scann_ops_pybind.load_searcher(folder),
        )


class BuildPiece(beam.DoFn):
    """Piece → Piece, when it is on disk."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._counters = Counters("index", *_COUNTED)

    def process(self, piece: Piece) -> Iterator[Piece]:
        tally = Tally()
        build(self._join, piece, tally)
        self._counters.take(tally)
        yield piece


def planned_groups(join: Join, results: Sequence[ShardResult], index_rows: int) -> list[Group]:
    """Plans the groups, and keeps the plan for later runs."""
    output = join.output
    known = known_groups(output)
    groups = plan(results, join.units, index_rows, known)
    kept = {group.number for group in groups}
    # A part that has lost its last shard must not be taken for a living one.
    files.remove(
        output.path("index", f"part-{number:05d}", _MARK) for number in set(known.values()) - kept
    )
    # Written before anything is built, so that a run that is killed goes on with the same plan.
    numbers = {r.shard.path: group.number for group in groups for r in group.shards}
    if numbers != known:
        files.write_json(output.path("index", _PLAN), numbers)
    return groups
