"""What the steps of a join share: what is joined, and what is known of it once it is embedded."""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.scoring import methods
from tracin_beam.scoring.curvature import Curvature
from tracin_beam.scoring.methods import Score
from tracin_beam.stages.workers import EngineSource
from tracin_beam.storage import arrays, embeddings, files, runs
from tracin_beam.storage.runs import CheckpointFile, Output, Shard, ShardResult

# Up to so many pairs of a training and a test example, all are scored exactly: that costs little
# more than the candidates would, which are then most of the training set.
ALL_PAIRS = 2_000_000
# Training examples that are read at a time, and bytes of their embeddings.
_BLOCK_ROWS, _BLOCK_BYTES = 4096, 64 << 20
# Rows of the influence table in one file, at most: they are in memory together when it is made.
_FILE_ROWS = 200_000

# This process's, of one job at a time, by file and by what it depends on.
_curvatures: dict[tuple[str, str], Curvature] = {}
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Join:
    """What is joined; small, and the same for all workers.

    Attributes:
      output: the output directory.
      train, test: the shards, in order; their numbers are their places here.
      test_name, target: of the test set.
      checkpoints: in training order.
      source: the engine.
      units: fingerprint of every shard's embeddings and their scale, by path.
      method: name of the score.
      numbers: in an embedding, over all checkpoints.
      block: queries that are computed together, with consecutive numbers.
      damping: of the score's preconditioner; "auto" is what `damping_path` says.
    """

    output: Output
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    test_name: str
    target: str
    checkpoints: tuple[CheckpointFile, ...]
    source: EngineSource
    units: Mapping[str, str]
    method: str
    numbers: int
    block: int
    damping: float | Literal["auto"] = 1.0

    def files(self, set_name: str, shard: Shard) -> list[str]:
        """A shard's embedding files, by checkpoint."""
        return [self.output.embeddings(set_name, c, shard) for c in self.checkpoints]

    def of_set(self, set_name: str) -> tuple[Shard, ...]:
        """The shards of a set."""
        return self.train if set_name == runs.TRAIN else self.test

    @functools.cached_property
    def score(self) -> Score:
        rates = [c.rate for c in self.checkpoints]
        return methods.make(self.method, rates, self.curvature)

    def moments(self, place: int) -> str:
        """The file with the training set's second moments at the checkpoint of a place."""
        folder = self.checkpoints[place].folder
        return self.output.path("curvature", self.score.preconditioner, folder, "moments.npz")

    @property
    def damping_path(self) -> str:
        """The file with the damping that was chosen for this test set."""
        preconditioner = self.score.preconditioner
        return self.output.path("curvature", preconditioner, f"damping-{self.test_name}.json")

    @functools.cached_property
    def chosen_damping(self) -> float:
        """κ, once it is chosen."""
        if self.damping == "auto":
            return float(files.read_json(self.damping_path)["damping"])
        return self.damping

    def curvature(self, place: int) -> Curvature:
        """The training set's second moments at the checkpoint of a place, once they are taken.

        All steps of a process share it, as inverses take seconds.
        """
        path, identity = self.moments(place), self._curvature_identity
        with _lock:
            if any(known != identity for _, known in _curvatures):
                _curvatures.clear()
            if (path, identity) not in _curvatures:
                means = arrays.read(path)
                _curvatures[path, identity] = Curvature(means, self.chosen_damping)
            return _curvatures[path, identity]

    @functools.cached_property
    def _curvature_identity(self) -> str:
        return runs.digest(self.score_identity)

    @functools.cached_property
    def score_identity(self) -> object:
        """All that a score depends on besides the two examples."""
        if self.score.preconditioner == "none":
            return self.method
        train = sorted(self.units[shard.path] for shard in self.train)
        return [self.method, self.chosen_damping, runs.digest(train)]

    @functools.cached_property
    def train_number(self) -> dict[str, int]:
        """A training shard's number, by its path."""
        return {shard.path: number for number, shard in enumerate(self.train)}


@dataclasses.dataclass(frozen=True)
class Group:
    """Some training shards that one worker goes through at a time.

    Attributes:
      number: of its files; that of a group of the same shards is the same in later runs.
      shards: in the order of their paths.
      fingerprint: of all that is in them.
    """

    number: int
    shards: tuple[ShardResult, ...]
    fingerprint: str

    @property
    def rows(self) -> int:
        return sum(result.used for result in self.shards)


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A file of the influence table: some queries of one test shard.

    Attributes:
      shard: number of the test shard.
      start, stop: numbers of the queries.
    """

    shard: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Census:
    """What is known of both sets once they are embedded; counted once for all steps.

    The test examples that can be used are numbered in the order of shards and positions: these
    numbers are the queries.

    Attributes:
      groups: of the training shards, those without usable examples left out.
      tests: all test shards, in order.
      train_rows: usable training examples.
      sample: int64 [n], queries for which the retrieval is judged, in rising order.
    """

    groups: tuple[Group, ...]
    tests: tuple[ShardResult, ...]
    train_rows: int
    sample: np.ndarray

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """int64 [test shards + 1], the number of each shard's first query, and of all."""
        return np.cumsum([0] + [result.used for result in self.tests])

    @property
    def queries(self) -> int:
        return int(self.starts[-1])

    @staticmethod
    def all_pairs_of(train_rows: int, queries: int) -> bool:
        """Whether there are so few pairs that all are scored exactly."""
        return train_rows * queries <= ALL_PAIRS

    @property
    def all_pairs(self) -> bool:
        return self.all_pairs_of(self.train_rows, self.queries)

    @functools.cached_property
    def _positions(self) -> list[np.ndarray]:
        return [usable(result) for result in self.tests]

    def places(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Test shards' numbers and positions of queries: int64 [n] each."""
        shard = np.searchsorted(self.starts, queries, side="right") - 1
        position = np.empty(len(queries), np.int64)
        for number in np.unique(shard):
            mine = shard == number
            position[mine] = self._positions[number][queries[mine] - self.starts[number]]
        return shard, position

    def group_of(self, train: Sequence[Shard]) -> np.ndarray:
        """int64 [training shards], the place of each one's group in `groups`; −1 for none."""
        place = {r.shard.path: i for i, group in enumerate(self.groups) for r in group.shards}
        return np.array([place.get(shard.path, -1) for shard in train])

    def files(self, top_k: int) -> list[TableFile]:
        """The files of the influence table: one for each test shard, of large ones several."""
        queries = max(1, _FILE_ROWS // (2 * top_k))
        found = []
        for number, (first, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            cuts = [*range(int(first), int(end), queries)] or [int(first)]
            stops = [*cuts[1:], int(end)]
            found += [TableFile(number, a, b) for a, b in zip(cuts, stops, strict=True)]
        return found


def usable(result: ShardResult) -> np.ndarray:
    """The positions of a shard's usable examples: int64 [n], rising."""
    return np.setdiff1d(np.arange(result.read), np.asarray(result.excluded, np.int64))


def sample_queries(tests: Sequence[ShardResult], starts: np.ndarray, count: int) -> np.ndarray:
    """Up to count queries, always the same for the same test set: int64 [n], rising.

    They are those whose places have the smallest hashes, so that a new shard changes few.
    """
    smallest: list[tuple[bytes, int]] = []
    for first, result in zip(starts, tests, strict=False):
        hashed = []
        for i, position in enumerate(usable(result).tolist()):
            name = f"{result.shard.name}#{position}".encode()
            hashed.append((hashlib.blake2b(name, digest_size=8).digest(), int(first) + i))
        smallest = sorted([*smallest, *hashed])[:count]
    return np.array(sorted(number for _, number in smallest), np.int64)


def take_census(
    join: Join,
    groups: Sequence[Group],
    train: Sequence[ShardResult],
    tests: Sequence[ShardResult],
    recall_queries: int,
) -> Census:
    """Counts both sets."""
    number = {shard.path: i for i, shard in enumerate(join.test)}
    ordered = tuple(sorted(tests, key=lambda result: number[result.shard.path]))
    counted = Census(tuple(groups), ordered, sum(r.used for r in train), np.empty(0, np.int64))
    sample = sample_queries(ordered, counted.starts, recall_queries)
    return dataclasses.replace(counted, sample=sample)


def read_queries(join: Join, census: Census, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All queries' embeddings, at most so many at a time.

    Yields:
      The queries, int64 [n], and their embeddings side by side by checkpoint, float32 [n, C·D],
      which are overwritten by the next.
    """
    first = 0
    for _, position, rows in _blocks(join, join.test_name, census.tests, size, None):
        yield np.arange(first, first + len(position)), rows
        first += len(position)


def queries_at(join: Join, census: Census, queries: np.ndarray) -> np.ndarray:
    """The embeddings of some rising queries side by side by checkpoint: float32 [n, C·D]."""
    shard, position = census.places(queries)
    out = np.empty((len(queries), join.numbers), np.float32)
    for number in np.unique(shard):
        mine = np.flatnonzero(shard == number)
        read_rows(join, join.test_name, census.tests[number].shard, position[mine], out[mine[0] :])
    return out


def read_rows(
    join: Join, set_name: str, shard: Shard, positions: np.ndarray, out: np.ndarray
) -> None:
    """A shard's embeddings at some rising positions, into the first rows of float32 [n, C·D].

    Raises:
      InputError: the files lack one of them.
    """
    paths = join.files(set_name, shard)
    reader = embeddings.MatrixReader(paths, only=positions)
    if not np.array_equal(reader.read(out[: len(positions)]), positions):
        raise InputError(f"{', '.join(paths)} lack some examples. Delete them and run again.")


def by_block(queries: np.ndarray, size: int) -> Iterator[tuple[int, slice]]:
    """The runs of rising queries that belong to one block, by the block's number."""
    blocks = queries // size
    for block in np.unique(blocks):
        start, stop = np.searchsorted(blocks, [block, block + 1])
        yield int(block), slice(int(start), int(stop))


def block_rows(numbers: int) -> int:
    """Training examples, of so many numbers, that are read at a time."""
    return max(64, min(_BLOCK_ROWS, _BLOCK_BYTES // (4 * numbers)))


def train_rows(join: Join, group: Group) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A group's training examples, a block at a time.

    Yields:
      Numbers of their shards, int32 [n], positions, int64 [n], and embeddings side by side by
      checkpoint, float32 [n, C·D], which are overwritten by the next.
    """
    yield from _blocks(join, runs.TRAIN, group.shards, block_rows(join.numbers), None)


def scaled_rows(
    join: Join, group: Group, start: int, stop: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """As `train_rows`, for the group's examples from `start` to `stop`, with √weight_c e_c."""
    yield from _blocks(
        join,
        runs.TRAIN,
        group.shards,
        block_rows(join.numbers),
        join.score.roots,
        (start, stop),
    )


def _blocks(
    join: Join,
    set_name: str,
    results: Sequence[ShardResult],
    size: int,
    scales: np.ndarray | None,
    part: tuple[int, int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Usable examples of some shards, so many at a time across shards.

    Args:
      join, set_name, results: the shards.
      size: of a block; the last may have fewer.
      scales: of each checkpoint's embedding.
      part: which of all these examples to read, first and end; None for all.
    """
    numbers = {shard.path: i for i, shard in enumerate(join.of_set(set_name))}
    given = None if scales is None else scales.tolist()
    out = np.empty((size, join.numbers), np.float32)
    shards: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    filled = first = 0
    for result in results:
        if not result.used:
            continue
        only = None
        if part is not None:
            begin, end = max(0, part[0] - first), min(result.used, part[1] - first)
            first += result.used
            if begin >= end:
                continue
            only = usable(result)[begin:end]
        reader = embeddings.MatrixReader(
            join.files(set_name, result.shard), result.excluded, only=only, scales=given
        )
        while len(position := reader.read(out[filled:])):
            shards.append(np.full(len(position), numbers[result.shard.path], np.int32))
            positions.append(position)
            filled += len(position)
            if filled == size:
                yield np.concatenate(shards), np.concatenate(positions), out
                shards, positions, filled = [], [], 0
    if filled:
        yield np.concatenate(shards), np.concatenate(positions), out[:filled]
