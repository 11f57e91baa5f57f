"""Candidates → exact scores, from gradients that were never projected.

A score is Σ_c weight_c ⟨∇ℓ(w_c, z), T_c ∇t(w_c, z')⟩, as `scoring.methods` has it.

What crosses the workers is places and scores, never a gradient: gradients are computed again where
they are needed.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.inputs import formats
from tracin_beam.scoring import topk
from tracin_beam.scoring.topk import ROLES, Scored
from tracin_beam.stages import embed, joining, progress
from tracin_beam.stages.batching import without_failing
from tracin_beam.stages.joining import Census, Group, Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.stages.search import Both, BothScored
from tracin_beam.stages.workers import Loaded
from tracin_beam.storage import records
from tracin_beam.storage.runs import CheckpointFile, ShardResult

# Raw records held at a time.
CHUNK_BYTES = 256 << 20
# Query gradients kept for the next group.
QUERY_CACHE_BYTES = 512 << 20
# Inner products held at a time.
_PRODUCT_BYTES = 64 << 20
# Batches of parsed examples held at a time.
_MOST_BATCHES = 16

# Batches count at each checkpoint; queries are those whose gradients were computed, at each too.
_COUNTED = (
    *("records", "pairs", "batches", "queries"),
    *("read_msec", "parse_msec", "queries_msec", "compute_msec"),
)


class Products(NamedTuple):
    """Exact inner products of some training examples with some queries.

    Attributes:
      queries: int64 [q].
      shard, position: int32 and int64 [n], of the training examples.
      by_checkpoint: float64 [q, n, C], the score's terms.
    """

    queries: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    by_checkpoint: np.ndarray


class ExactScores:
    """Exact scores of training examples for test examples, at every checkpoint.

    Query gradients are computed in blocks, and kept for the next group as far as memory allows.
    """

    def __init__(self, join: Join, census: Census) -> None:
        self._join = join
        self._census = census
        self._loaded: Loaded = join.source.get()
        self._cache: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def products(
        self,
        wanted: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        tally: Tally | None = None,
    ) -> Iterator[tuple[int, Products]]:
        """Exact scores of training examples.

        Args:
          wanted: queries, at most `Join.block` of them, and the shards and positions of the
            training examples that all of them are to be scored for, in rising order.
          tally: takes records, pairs, batches and queries, and the seconds by part.

        Yields:
          The place in `wanted`, and products; several times, each with other examples.
        """
        tally = tally or Tally()
        shard = np.concatenate([shard for _, shard, _ in wanted])
        position = np.concatenate([position for *_, position in wanted])
        needed = np.unique(np.stack([shard, position], axis=1), axis=0)
        pairs = sum(len(queries) * len(own) for queries, own, _ in wanted)
        with progress.piece("exact scoring", pairs) as piece:
            chunks = timed(_chunks(self._join, needed), tally, "read")
            for shards, positions, data in chunks:
                tally.add("records", len(data))
                keys = _keys(shards, positions)
                for i, (queries, *own) in enumerate(wanted):
                    at = np.searchsorted(keys, np.intersect1d(keys, _keys(*own)))
                    step = self._rows_at_a_time(len(queries))
                    for start in range(0, len(at), step):
                        some = at[start : start + step]
                        kept, terms = self._terms(queries, [data[j] for j in some], tally)
                        piece.add(len(some), len(queries) * len(some))
                        tally.add("pairs", len(queries) * len(some))
                        yield i, Products(kept, shards[some], positions[some], terms)

    def _rows_at_a_time(self, queries: int) -> int:
        size = self._loaded.engine.batch_size
        rows = _PRODUCT_BYTES // (8 * queries * len(self._join.checkpoints))
        return min(_MOST_BATCHES, max(1, rows // size)) * size

    def _terms(
        self, queries: np.ndarray, data: Sequence[bytes], tally: Tally
    ) -> tuple[np.ndarray, np.ndarray]:
        """The queries that could be computed, and their terms of the score for some records."""
        engine, score = self._loaded.engine, self._join.score
        size = engine.batch_size
        with tally.timed("parse"):
            batches = [self._loaded.parse(data[i : i + size]) for i in range(0, len(data), size)]
        products = []
        for place, checkpoint in enumerate(self._join.checkpoints):
            values = engine.values(checkpoint.path)
            with tally.timed("queries"):
                kept, gradients = self._queries(values, place, checkpoint, queries, tally)
            with tally.timed("compute"):
                parts = [engine.scores(values, b, gradients, self._join.target) for b in batches]
                products.append(np.concatenate(parts).T)
            tally.add("batches", len(batches))
        return kept, score.by_checkpoint(np.stack(products, axis=2))

    def _queries(
        self,
        values: Any,
        place: int,
        checkpoint: CheckpointFile,
        queries: np.ndarray,
        tally: Tally,
    ) -> tuple[np.ndarray, Any]:
        """The queries whose gradients at a checkpoint could be computed, and the gradients."""
        key = (place, queries.tobytes())
        if key not in self._cache:
            shards, positions = self._census.places(queries)
            data: list[records.Record] = []
            for shard in np.unique(shards):
                mine = positions[shards == shard].tolist()
                path = self._join.test[shard].path
                # Numbered anew: a position is a place in one shard only.
                number = {p: len(data) + i for i, p in enumerate(mine)}
                data += [
                    records.Record(number[record.position], record.data)
                    for record in records_at(path, set(mine))
                ]
            batch, parsed, _ = embed.parse_records(self._loaded, data)
            engine, target = self._loaded.engine, self._join.target
            written_out = self._join.score.written_out
            # Queries that could not be used are none; here a few could only be left out.
            gradients, kept, _ = without_failing(
                lambda some: engine.queries(values, batch.take(some), target, written_out),
                batch.size,
            )
            self._cache[key] = (
                queries[np.asarray(parsed, np.int64)[kept]],
                None if gradients is None else self._join.score.of_gradients(place, gradients),
            )
            tally.add("queries", len(self._cache[key][0]))
            each = engine.query_bytes()
            if written_out:
                each = 4 * len(queries) * sum(spec.size for spec in engine.specs)
            limit = max(len(self._join.checkpoints), QUERY_CACHE_BYTES // max(1, each))
            while len(self._cache) > limit:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


def _keys(shard: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One number for a place, in the order of shards and positions: int64 [n]."""
    return shard.astype(np.int64) << 40 | position


def records_at(path: str, positions: set[int]) -> Iterator[records.Record]:
    """A shard's records at these positions, of which there is at least one.

    Raises:
      InputError: some are not there any more.
    """
    found = 0
    for record in formats.read_at(path, positions):
        if isinstance(record, records.Record):
            found += 1
            yield record
    if found != len(positions):
        raise InputError(
            f"{path} changed since it was embedded: {len(positions) - found} of {len(positions)} "
            "records that were in it are not there any more. Run again."
        )


def usable_records(result: ShardResult) -> Iterator[records.Record]:
    """A shard's records that can be used, in their order."""
    positions = set(joining.usable(result).tolist())
    return records_at(result.shard.path, positions) if positions else iter(())


def _chunks(join: Join, needed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, list[bytes]]]:
    """The records at these places, in order, as many at a time as memory allows.

    Args:
      join: what is joined.
      needed: int64 [n, 2], shards and positions, in rising order.
    """
    shards: list[int] = []
    positions: list[int] = []
    data: list[bytes] = []
    size = 0
    for shard, places in itertools.groupby(needed.tolist(), lambda place: place[0]):
        wanted = {position for _, position in places}
        for record in records_at(join.train[shard].path, wanted):
            shards.append(shard)
            positions.append(record.position)
            data.append(record.data)
            size += len(record.data)
            if size >= CHUNK_BYTES:
                yield np.array(shards, np.int32), np.array(positions, np.int64), data
                shards, positions, data, size = [], [], [], 0
    if data:
        yield np.array(shards, np.int32), np.array(positions, np.int64), data


def places_by_group(
    pair: tuple[int, Both], census: Census, join: Join
) -> Iterator[tuple[int, tuple[int, np.ndarray | None]]]:
    """(block, both roles' candidates) → (group, (block, places int64 [n, 2], rising)).

    A block is scored for all of its queries' candidates: the gradients are there anyway.
    """
    block, both = pair
    shard = np.concatenate([rows.shard for rows in both])
    position = np.concatenate([rows.position for rows in both])
    places = np.unique(np.stack([shard.astype(np.int64), position], axis=1), axis=0)
    group_of = census.group_of(join.train)[places[:, 0]]
    for group in np.unique(group_of):
        yield int(group), (block, places[group_of == group])


def all_places(census: Census, join: Join) -> Iterator[tuple[int, tuple[int, None]]]:
    """Every group with every block, if all pairs are to be scored."""
    if census.all_pairs:
        for group in range(len(census.groups)):
            for block in range(-(-census.queries // join.block)):
                yield group, (block, None)


def places_of(join: Join, group: Group) -> np.ndarray:
    """The places of a group's usable examples: int64 [n, 2], shards and positions, rising."""
    parts = []
    for result in sorted(group.shards, key=lambda r: join.train_number[r.shard.path]):
        position = joining.usable(result)
        number = join.train_number[result.shard.path]
        parts.append(np.stack([np.full(len(position), number), position], axis=1))
    return np.concatenate(parts)


class Rescore(beam.DoFn):
    """(group, [(block, places)]) → (block, both roles' `Scored`), exact."""

    def __init__(self, join: Join, top_k: int) -> None:
        self._join = join
        self._top_k = top_k
        self._exact: ExactScores | None = None
        self._counters = Counters("rescore", *_COUNTED)

    def process(
        self, pair: tuple[int, Iterable[tuple[int, np.ndarray | None]]], census: Census
    ) -> Iterator[tuple[int, BothScored]]:
        number, asked = pair
        group, tally = census.groups[number], Tally()
        if self._exact is None:
            self._exact = ExactScores(self._join, census)
        blocks, wanted = [], []
        for block, places in sorted(asked, key=lambda item: item[0]):
            if places is None:
                places = places_of(self._join, group)
            first = block * self._join.block
            queries = np.arange(first, min(first + self._join.block, census.queries))
            blocks.append(block)
            wanted.append((queries, places[:, 0], places[:, 1]))
        best: dict[int, BothScored] = {}
        for i, products in self._exact.products(wanted, tally):
            found = best_of(products, self._top_k)
            if i in best:
                found = merged(best[i], found, self._top_k)
            best[i] = found
        self._counters.take(tally)
        for i, both in best.items():
            yield blocks[i], both


def best_of(products: Products, count: int) -> BothScored:
    """Both ends of every query's scores."""
    scores = products.by_checkpoint.sum(axis=2)
    both = []
    for role in ROLES:
        query, column = topk.ends(scores, count, role)
        rows = Scored(
            products.queries[query],
            products.shard[column],
            products.position[column],
            scores[query, column],
            products.by_checkpoint[query, column],
        )
        both.append(topk.best(rows, rows.score, count, role))
    return both[0], both[1]


def merged(one: BothScored, other: BothScored, count: int) -> BothScored:
    """The best `count` pairs of each role out of two selections."""
    both = []
    for role, parts in zip(ROLES, zip(one, other, strict=True), strict=True):
        rows = topk.merge(parts)
        both.append(topk.best(rows, rows.score, count, role))
    return both[0], both[1]
