"""Embeddings → candidates: the training examples of each query with the best estimated scores.

By the exact product of all queries with all rows, block by block, whose two ends are both roles'
candidates, or by ScaNN over rows that are sketched once more, whose candidates are then ranked
again by their whole embeddings.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import numpy as np

from tracin_beam.scoring import cost, sketch, topk
from tracin_beam.scoring.topk import ROLES, SIGNS, Candidates, Scored
from tracin_beam.stages import index, joining
from tracin_beam.stages.index import Piece
from tracin_beam.stages.joining import Census, Group, Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.storage import runs

# Both roles' training examples, in the order of ROLES.
Both = tuple[Candidates, Candidates]
BothScored = tuple[Scored, Scored]

_MOST_QUERIES = 4096
# Bytes of queries' vectors held at a time.
_QUERY_BYTES = 256 << 20
# Bytes of pairs' embeddings held at a time, when candidates are ranked again.
_PAIR_BYTES = 64 << 20


# Records count once for each batch of queries that goes through them.
_COUNTED = ("records", "batches", "pairs_estimated", "read_msec", "compute_msec")


def queries_at_a_time(numbers: int) -> int:
    """How many queries, of so many numbers, go through the rows together."""
    return max(64, min(_MOST_QUERIES, _QUERY_BYTES // (4 * numbers)))


def by_product(
    join: Join, census: Census, group: Group, count: int, tally: Tally | None = None
) -> Iterator[tuple[int, Both]]:
    """The best of a group's rows for every block of queries, by the product with all of them."""
    tally = tally or Tally()
    size = queries_at_a_time(join.numbers)
    for queries, vectors in timed(joining.read_queries(join, census, size), tally, "read"):
        tally.add("batches")
        with tally.timed("compute"):
            weighted = join.score.queries(vectors)
            ends = topk.Ends(queries, count)
        for shard, position, rows in timed(joining.train_rows(join, group), tally, "read"):
            tally.add("records", len(position))
            with tally.timed("compute"):
                ends.add(join.score.estimates(weighted, rows), shard, position)
        with tally.timed("compute"):
            found = [ends.of(role) for role in ROLES]
        yield from _blocks(join, found)


def by_index(
    join: Join, census: Census, piece: Piece, count: int, tally: Tally | None = None
) -> Iterator[tuple[int, Both]]:
    """The best of a piece's rows for every block of queries, by its searcher."""
    tally = tally or Tally()
    size = queries_at_a_time(join.numbers)
    with contextlib.ExitStack() as stack:
        with tally.timed("read"):
            searcher = stack.enter_context(index.loaded(join.output, piece))
        number = np.array([join.train_number[path] for path in searcher.shards], np.int32)
        for queries, vectors in timed(joining.read_queries(join, census, size), tally, "read"):
            tally.add("batches")
            tally.add("records", len(searcher.position))
            with tally.timed("compute"):
                rows = sketch.sketch(join.score.query_rows(vectors))
            found = []
            for role in ROLES:
                with tally.timed("compute"):
                    hits, scores = searcher.search(np.float32(SIGNS[role]) * rows, count)
                query, column = np.nonzero(hits >= 0)
                at = hits[query, column]
                found.append(
                    Candidates(
                        queries[query],
                        number[searcher.code[at]],
                        searcher.position[at],
                        SIGNS[role] * scores[query, column].astype(np.float64),
                    )
                )
            yield from _blocks(join, found)


def _blocks(join: Join, found: Sequence[Candidates]) -> Iterator[tuple[int, Both]]:
    proponents, opponents = found
    for (block, one), (_, other) in zip(
        joining.by_block(proponents.query, join.block),
        joining.by_block(opponents.query, join.block),
        strict=True,
    ):
        yield block, (topk.take(proponents, one), topk.take(opponents, other))  # type: ignore[arg-type]


class TopOfBlock(beam.CombineFn):
    """The best of both roles' rows; the accumulators stay as small as the result."""

    def __init__(self, count: int) -> None:
        self._count = count

    def create_accumulator(self) -> list[tuple]:
        return []

    def add_input(self, accumulator: list[tuple], value: tuple) -> list[tuple]:
        return self._compacted([*accumulator, value])

    def merge_accumulators(self, accumulators: Iterable[list[tuple]]) -> list[tuple]:
        return self._compacted([part for accumulator in accumulators for part in accumulator])

    def extract_output(self, accumulator: list[tuple]) -> tuple:
        return accumulator[0]

    def _compacted(self, parts: list[tuple]) -> list[tuple]:
        if not parts:
            return []
        merged = [topk.merge(of_role) for of_role in zip(*parts, strict=True)]
        return [
            tuple(
                topk.best(rows, rows.score, self._count, role)
                for role, rows in zip(ROLES, merged, strict=True)
            )
        ]


class SearchByProduct(beam.DoFn):
    """Group → (block, both roles' candidates), unless all pairs are scored exactly anyway."""

    def __init__(self, join: Join, count: int, rescored: bool) -> None:
        self._join = join
        self._count = count
        self._rescored = rescored
        self._counters = Counters("search", *_COUNTED)

    def process(self, group: Group, census: Census) -> Iterator[tuple[int, Both]]:
        if not (census.all_pairs and self._rescored):
            tally = Tally()
            yield from by_product(self._join, census, group, self._count, tally)
            self._counters.take(tally)


class SearchByIndex(beam.DoFn):
    """Piece → (block, both roles' candidates), unless all pairs are scored exactly anyway."""

    def __init__(self, join: Join, count: int, rescored: bool) -> None:
        self._join = join
        self._count = count
        self._rescored = rescored
        self._counters = Counters("search", *_COUNTED)

    def process(self, piece: Piece, census: Census) -> Iterator[tuple[int, Both]]:
        if not (census.all_pairs and self._rescored):
            tally = Tally()
            yield from by_index(self._join, census, piece, cost.MORE * self._count, tally)
            self._counters.take(tally)


def by_group(
    pair: tuple[int, tuple], census: Census, join: Join
) -> Iterator[tuple[int, tuple[int, tuple]]]:
    """(block, both roles' rows) → (group, (block, those of both roles that are in the group))."""
    block, both = pair
    group_of = census.group_of(join.train)
    groups = [group_of[rows.shard] for rows in both]
    for group in np.unique(np.concatenate(groups)):
        parts = [topk.take(rows, own == group) for rows, own in zip(both, groups, strict=True)]
        yield int(group), (block, tuple(parts))


def estimate(
    join: Join, census: Census, asked: Sequence[tuple[int, Both]], tally: Tally | None = None
) -> Iterator[tuple[int, BothScored]]:
    """Estimated scores of some pairs by whole embeddings, at every checkpoint.

    Args:
      join, census: what is joined.
      asked: blocks, and the pairs of their queries.
      tally: takes the pairs, and the seconds of reading and of computing.
    """
    tally = tally or Tally()
    wanted = [topk.merge([both[i] for _, both in asked]) for i in range(len(ROLES))]
    places = topk.merge(wanted)
    shards, queries = np.unique(places.shard), np.unique(places.query)
    checkpoints = len(join.checkpoints)
    with tally.timed("read"):
        vectors = joining.queries_at(join, census, queries)
    if join.score.on_embeddings:
        vectors = vectors.astype(np.float64)
    weighted = join.score.queries(vectors)
    terms = [np.empty((len(rows.query), checkpoints)) for rows in wanted]
    step = max(1, _PAIR_BYTES // (8 * join.numbers))
    for shard in shards:
        needed = np.unique(places.position[places.shard == shard])
        matrix = np.empty((len(needed), join.numbers), np.float32)
        with tally.timed("read"):
            joining.read_rows(join, runs.TRAIN, join.train[shard], needed, matrix)
        for rows, out in zip(wanted, terms, strict=True):
            mine = np.flatnonzero(rows.shard == shard)
            for start in range(0, len(mine), step):
                some = mine[start : start + step]
                tally.add("pairs_estimated", len(some))
                with tally.timed("compute"):
                    own = matrix[np.searchsorted(needed, rows.position[some])]
                    other = weighted[np.searchsorted(queries, rows.query[some])]
                    shape = (len(some), checkpoints, -1)
                    out[some] = np.einsum(
                        "icd,icd->ic",
                        own.reshape(shape).astype(np.float64),
                        other.reshape(shape).astype(np.float64),
                    )
    scored = [
        Scored(*rows[:3], own.sum(axis=1), own) for rows, own in zip(wanted, terms, strict=True)
    ]
    for block, _ in asked:
        both = [topk.take(rows, rows.query // join.block == block) for rows in scored]
        yield block, (both[0], both[1])


class Estimate(beam.DoFn):
    """(group, [(block, both roles' candidates)]) → (block, both roles' `Scored`)."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._counters = Counters("search", *_COUNTED)

    def process(
        self, pair: tuple[int, Iterable[tuple[int, tuple]]], census: Census
    ) -> Iterator[tuple[int, BothScored]]:
        tally = Tally()
        yield from estimate(self._join, census, list(pair[1]), tally)
        self._counters.take(tally)
