"""Index and test embeddings → influence tables with exact scores.

Candidates come from the index: for a query q the rows of greatest inner product with q and with
−q, merged over the partitions. A candidate's score is then computed anew from unprojected
gradients, Σ_c η_c ∇ℓ(w_c, z) · ∇t(w_c, z'), and the best of these make the table. What crosses the
workers is places and scores, never a gradient: gradients are computed again where they are needed.
"""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.errors import InputError
from tracin_beam.stages import embed, index
from tracin_beam.stages.index import Partition
from tracin_beam.stages.workers import EngineSource, Loaded
from tracin_beam.storage import embeddings, records, runs, tables
from tracin_beam.storage.runs import CheckpointFile, Output, ShardResult

_log = logging.getLogger(__name__)

PROPONENT, OPPONENT = "proponent", "opponent"
ROLES = (PROPONENT, OPPONENT)

# A test example: (number of its shard among the test set's, position).
Query = tuple[int, int]
Key = tuple[Query, str]

# Raw candidate records held at a time.
_CHUNK_BYTES = 256 << 20
# Query gradients kept for the next shard.
_QUERY_CACHE_BYTES = 512 << 20
_SEARCH_QUERIES = 1024
# Up to so many pairs of a training and a test example, all are scored exactly: that costs little
# more than the candidates would, which are then most of the training set.
_ALL_PAIRS = 2_000_000


class Scored(NamedTuple):
    """Training examples with their scores for one query.

    Attributes:
      shard: int32 [n], number of the shard among the training set's.
      position: int64 [n].
      score: float64 [n].
      by_checkpoint: float64 [n, C], or [n, 0] where only the sum is known.
    """

    shard: np.ndarray
    position: np.ndarray
    score: np.ndarray
    by_checkpoint: np.ndarray

    def take(self, order: np.ndarray) -> "Scored":
        return Scored(*(column[order] for column in self))

    def top(self, count: int, role: str) -> "Scored":
        """The count greatest (least for opponents), ties in the order of shards and positions."""
        key = -self.score if role == PROPONENT else self.score
        return self.take(np.lexsort((self.position, self.shard, key))[:count])


def merge(parts: Sequence[Scored]) -> Scored:
    """All of the parts."""
    return Scored(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class TopScored(beam.CombineFn):
    """The best of ((query, role), Scored) values; the accumulators stay as small as the result."""

    def __init__(self, count: int, role: str) -> None:
        self._count = count
        self._role = role

    def create_accumulator(self) -> list[Scored]:
        return []

    def add_input(self, accumulator: list[Scored], value: Scored) -> list[Scored]:
        return self._compacted([*accumulator, value])

    def merge_accumulators(self, accumulators: Iterable[list[Scored]]) -> list[Scored]:
        return self._compacted([part for accumulator in accumulators for part in accumulator])

    def extract_output(self, accumulator: list[Scored]) -> Scored:
        return accumulator[0]

    def _compacted(self, parts: list[Scored]) -> list[Scored]:
        return [merge(parts).top(self._count, self._role)] if parts else []


@dataclasses.dataclass
class TopPerQuery(beam.PTransform):
    """((query, role), Scored) → ((query, role), Scored) of the best count."""

    count: int

    def expand(self, scored: beam.PCollection) -> beam.PCollection:
        return [
            scored
            | f"Only{role}" >> beam.Filter(lambda pair, role=role: pair[0][1] == role)
            | f"Top{role}" >> beam.CombinePerKey(TopScored(self.count, role))
            for role in ROLES
        ] | beam.Flatten()


@dataclasses.dataclass(frozen=True)
class Sets:
    """What the join needs to know of both sets; small, and the same for all workers.

    Attributes:
      output: the output directory.
      train, test: the shards, in order; their numbers are their places here.
      test_name, target: of the test set.
      checkpoints: in training order.
      source: the engine.
    """

    output: Output
    train: tuple[runs.Shard, ...]
    test: tuple[runs.Shard, ...]
    test_name: str
    target: str
    checkpoints: tuple[CheckpointFile, ...]
    source: EngineSource

    def files(self, set_name: str, shard: runs.Shard) -> list[str]:
        """A shard's embedding files, by checkpoint."""
        return [self.output.embeddings(set_name, c.step, shard) for c in self.checkpoints]


def search(
    sets: Sets, partition: Partition, tests: Sequence[ShardResult], count: int
) -> Iterator[tuple[Key, Scored]]:
    """The best candidates of one partition for every query, by estimated score."""
    number = {shard.path: i for i, shard in enumerate(sets.train)}
    with index.loaded(sets.output, partition) as searcher:
        shard_number = np.array([number[path] for path in searcher.shards], np.int32)
        for result in tests:
            test_number = sets.test.index(result.shard)
            paths = sets.files(sets.test_name, result.shard)
            for parts in embeddings.read_checkpoints(paths, result.excluded):
                rows = index.rows_of(parts, sets.checkpoints)
                for start in range(0, len(rows), _SEARCH_QUERIES):
                    block = rows[start : start + _SEARCH_QUERIES]
                    positions = parts[0].position[start : start + _SEARCH_QUERIES]
                    for role, sign in ((PROPONENT, 1.0), (OPPONENT, -1.0)):
                        found, scores = searcher.search(np.float32(sign) * block, count)
                        for q, position in enumerate(positions):
                            hits = found[q][found[q] >= 0]
                            yield (
                                ((test_number, int(position)), role),
                                Scored(
                                    shard_number[searcher.code[hits]],
                                    searcher.position[hits],
                                    sign * scores[q][found[q] >= 0].astype(np.float64),
                                    np.empty((len(hits), 0)),
                                ),
                            )


class Search(beam.DoFn):
    """Partition → ((query, role), Scored)."""

    def __init__(self, sets: Sets, count: int) -> None:
        self._sets = sets
        self._count = count

    def process(
        self, partition: Partition, tests: Sequence[ShardResult]
    ) -> Iterator[tuple[Key, Scored]]:
        yield from search(self._sets, partition, tests, self._count)


class ExactScores:
    """Exact scores of training examples for test examples, at every checkpoint.

    Query gradients are computed in blocks, and kept for the next shard as far as memory allows.

    Args:
      sets: what is joined.
      sample: the only queries that will be asked for, which then share blocks; otherwise a block
        is of consecutive test examples.
    """

    def __init__(self, sets: Sets, sample: Sequence[Query] = ()) -> None:
        self._sets = sets
        self._sample = sample
        self._loaded: Loaded = sets.source.get()
        self._cache: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._size = self._loaded.engine.batch_size

    def _block_of(self, query: Query) -> tuple[Query, ...]:
        """The places whose gradients are computed together with this query's."""
        if self._sample:
            start = self._sample.index(query) // self._size * self._size
            return tuple(self._sample[start : start + self._size])
        start = query[1] // self._size * self._size
        return tuple((query[0], position) for position in range(start, start + self._size))

    def scores(
        self, shard: runs.Shard, wanted: Mapping[Query, np.ndarray]
    ) -> Iterator[tuple[Query, np.ndarray, np.ndarray]]:
        """Exact scores of a shard's examples.

        Args:
          shard: a training shard.
          wanted: positions of the examples for each query.

        Yields:
          Query, positions int64 [n] and η_c ⟨∇ℓ(w_c, z), ∇t(w_c, z')⟩, float64 [n, C]; a query
          may come several times, with other positions.
        """
        needed = np.unique(np.concatenate(list(wanted.values())))
        blocks: dict[tuple[Query, ...], list[Query]] = {}
        for query in sorted(wanted):
            blocks.setdefault(self._block_of(query), []).append(query)
        for positions, data in _chunks(shard.path, needed):
            present = {q: np.intersect1d(wanted[q], positions) for q in wanted}
            out = {q: np.zeros((len(p), len(self._sets.checkpoints))) for q, p in present.items()}
            for c, checkpoint in enumerate(self._sets.checkpoints):
                values = self._loaded.engine.values(checkpoint.path)
                for block, queries in blocks.items():
                    mine = [present[q] for q in queries]
                    union = np.unique(np.concatenate(mine))
                    if not len(union):
                        continue
                    at = np.searchsorted(positions, union)
                    column_of, gradients = self._queries(values, checkpoint, block)
                    products = self._products(values, [data[i] for i in at], gradients)
                    for query, own in zip(queries, mine, strict=True):
                        picked = products[np.searchsorted(union, own), column_of[query]]
                        out[query][:, c] = checkpoint.learning_rate * picked.astype(np.float64)
            for query in sorted(present):
                if len(present[query]):
                    yield query, present[query], out[query]

    def _products(self, values: Any, data: Sequence[bytes], gradients: Any) -> np.ndarray:
        engine = self._loaded.engine
        parts = []
        for start in range(0, len(data), engine.batch_size):
            batch = self._loaded.parse(data[start : start + engine.batch_size])
            parts.append(engine.scores(values, batch, gradients, self._sets.target))
        return np.concatenate(parts)

    def _queries(
        self, values: Any, checkpoint: CheckpointFile, block: tuple[Query, ...]
    ) -> tuple[dict[Query, int], Any]:
        """Which column of the products each query of a block has, and their gradients."""
        key = (checkpoint.path, block)
        if key not in self._cache:
            places: list[Query] = []
            data: list[records.Record] = []
            for shard, mine in itertools.groupby(block, lambda query: query[0]):
                wanted = {position for _, position in mine}
                for record in records.read_records(self._sets.test[shard].path):
                    if record.position > max(wanted):
                        break
                    if record.position in wanted and isinstance(record, records.Record):
                        places.append((shard, record.position))
                        data.append(record)
            # Queries that could not be used are not asked for; here they are only left out.
            batch, parsed = self._parsed(places, data)
            engine, target = self._loaded.engine, self._sets.target
            queries, kept, _ = embed.without_failing(
                lambda some: engine.queries(values, batch.take(some), target),
                list(range(batch.size)),
            )
            self._cache[key] = ({parsed[i]: column for column, i in enumerate(kept)}, queries)
            limit = max(1, _QUERY_CACHE_BYTES // max(1, engine.query_bytes(target)))
            while len(self._cache) > limit:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _parsed(
        self, places: Sequence[Query], data: Sequence[records.Record]
    ) -> tuple[Any, list[Query]]:
        # Numbered anew: a position is a place in one shard only.
        numbered = [records.Record(i, record.data) for i, record in enumerate(data)]
        batch, numbers, _ = embed.parse_records(self._loaded, numbered)
        return batch, [places[i] for i in numbers]


def _chunks(path: str, needed: np.ndarray) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """The records at these positions, in order, as many at a time as memory allows."""
    wanted = set(needed.tolist())
    last = needed[-1]
    positions: list[int] = []
    data: list[bytes] = []
    size = found = 0
    for record in records.read_records(path):
        if record.position in wanted and isinstance(record, records.Record):
            positions.append(record.position)
            data.append(record.data)
            size += len(record.data)
            found += 1
        if data and (size >= _CHUNK_BYTES or record.position >= last):
            yield np.array(positions, np.int64), data
            positions, data, size = [], [], 0
        if record.position >= last:
            break
    if found != len(needed):
        raise InputError(
            f"{path} changed since it was embedded: {len(needed) - found} of {len(needed)} "
            "records that were in it are not there any more. Run again."
        )


class Rescore(beam.DoFn):
    """(training shard, [(query, role, positions)]) → ((query, role), Scored), exact."""

    def __init__(self, sets: Sets, top_k: int) -> None:
        self._sets = sets
        self._top_k = top_k
        self._exact: ExactScores | None = None

    def process(
        self, group: tuple[int, Iterable[tuple[Key, np.ndarray]]]
    ) -> Iterator[tuple[Key, Scored]]:
        number, asked = group
        if self._exact is None:
            self._exact = ExactScores(self._sets)
        by_query: dict[Query, dict[str, np.ndarray]] = {}
        for (query, role), positions in asked:
            roles = by_query.setdefault(query, {})
            roles[role] = np.union1d(roles.get(role, positions), positions)
        wanted = {
            query: np.unique(np.concatenate(list(roles.values())))
            for query, roles in by_query.items()
        }
        for query, positions, scores in self._exact.scores(self._sets.train[number], wanted):
            scored = Scored(
                np.full(len(positions), number, np.int32), positions, scores.sum(axis=1), scores
            )
            for role, own in by_query[query].items():
                chosen = scored.take(np.flatnonzero(np.isin(positions, own)))
                if len(chosen.score):
                    yield (query, role), chosen.top(self._top_k, role)


class Estimate(beam.DoFn):
    """(training shard, [(query, role, positions)]) → ((query, role), Scored), by projections."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets

    def process(
        self,
        group: tuple[int, Iterable[tuple[Key, np.ndarray]]],
        tests: Sequence[ShardResult],
    ) -> Iterator[tuple[Key, Scored]]:
        number, asked = group
        sets = self._sets
        shard = sets.train[number]
        asked = list(asked)
        needed = np.unique(np.concatenate([positions for _, positions in asked]))
        own = [embeddings.read_at(path, needed).embedding for path in sets.files(runs.TRAIN, shard)]
        by_shard: dict[int, list[tuple[Key, np.ndarray]]] = {}
        for key, positions in asked:
            by_shard.setdefault(key[0][0], []).append((key, positions))
        for test, group_of_shard in by_shard.items():
            places = np.unique([key[0][1] for key, _ in group_of_shard])
            paths = sets.files(sets.test_name, sets.test[test])
            queries = [embeddings.read_at(path, places).embedding for path in paths]
            for (query, role), positions in group_of_shard:
                at = np.searchsorted(needed, positions)
                column = int(np.searchsorted(places, query[1]))
                scores = np.stack(
                    [
                        c.learning_rate
                        * (mine[at].astype(np.float64) @ other[column].astype(np.float64))
                        for c, mine, other in zip(sets.checkpoints, own, queries, strict=True)
                    ],
                    axis=1,
                )
                yield (
                    (query, role),
                    Scored(
                        np.full(len(at), number, np.int32), positions, scores.sum(axis=1), scores
                    ),
                )


def by_train_shard(pair: tuple[Key, Scored]) -> Iterator[tuple[int, tuple[Key, np.ndarray]]]:
    """((query, role), Scored) → (training shard, ((query, role), positions))."""
    key, scored = pair
    for number in np.unique(scored.shard):
        yield int(number), (key, np.sort(scored.position[scored.shard == number]))


def all_pairs(
    result: ShardResult, train: Sequence[ShardResult], tests: Sequence[ShardResult], sets: Sets
) -> Iterator[tuple[int, tuple[Key, np.ndarray]]]:
    """Every pair of a training shard's examples and a query, unless there are too many."""
    pairs = sum(r.used for r in train) * sum(r.used for r in tests)
    if pairs > _ALL_PAIRS or not result.used:
        return
    number = sets.train.index(result.shard)
    positions = np.setdiff1d(np.arange(result.read), result.excluded)
    for test in tests:
        test_number = sets.test.index(test.shard)
        for position in np.setdiff1d(np.arange(test.read), test.excluded):
            for role in ROLES:
                yield number, (((test_number, int(position)), role), positions)


class DescribeTrain(beam.DoFn):
    """(training shard, [(key, rank, score, by_checkpoint, position)]) → (test shard, row part)."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets

    def process(self, group: tuple[int, Iterable[Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        number, asked = group
        asked = list(asked)
        shard = self._sets.train[number]
        positions = np.unique([position for *_, position in asked])
        rows = embeddings.read_at(self._sets.files(runs.TRAIN, shard)[-1], positions)
        for (query, role), rank, score, by_checkpoint, position in asked:
            i = int(np.searchsorted(rows.position, position))
            yield (
                query[0],
                {
                    "train_id": tables.text(rows.ids[i]),
                    "role": role,
                    "rank": rank,
                    "score": score,
                    "score_by_checkpoint": by_checkpoint,
                    "train_label": tables.number(rows.label[i]),
                    "train_prediction": tables.number(rows.prediction[i]),
                    "train_shard": shard.path,
                    "train_position": position,
                    "test_position": query[1],
                },
            )


def ranked(pair: tuple[Key, Scored]) -> Iterator[tuple[int, Any]]:
    """((query, role), Scored, best first) → (training shard, one row's key, rank and scores)."""
    key, scored = pair
    for i in range(len(scored.score)):
        yield (
            int(scored.shard[i]),
            (
                key,
                i + 1,
                float(scored.score[i]),
                scored.by_checkpoint[i].tolist(),
                int(scored.position[i]),
            ),
        )


class WriteTable(beam.DoFn):
    """(test shard, its rows) → the path of its Parquet file."""

    def __init__(self, sets: Sets, exact: bool) -> None:
        self._sets = sets
        self._exact = exact

    def process(self, group: tuple[int, Iterable[dict[str, Any]]]) -> Iterator[str]:
        number, parts = group
        sets = self._sets
        shard = sets.test[number]
        rows = sorted(
            parts, key=lambda row: (row["test_position"], ROLES.index(row["role"]), row["rank"])
        )
        if rows:
            positions = np.unique([row["test_position"] for row in rows])
            tests = embeddings.read_at(sets.files(sets.test_name, shard)[-1], positions)
        for row in rows:
            i = int(np.searchsorted(tests.position, row["test_position"]))
            row["test_id"] = tables.text(tests.ids[i])
            row["test_label"] = tables.number(tests.label[i])
            row["test_prediction"] = tables.number(tests.prediction[i])
            row["test_shard"] = shard.path
            row["exact"] = self._exact
        path = sets.output.influence(
            sets.test_name, runs.numbered("influence", number, len(sets.test))
        )
        tables.write(path, pa.Table.from_pylist(rows, schema=tables.INFLUENCE))
        yield path


@dataclasses.dataclass
class Influence(beam.PTransform):
    """ShardResults and Partitions → "paths" of the tables, "best" as ((query, role), Scored).

    The inputs are "train" and "tests", ShardResults, and "partitions".

    Attributes:
      sets: what is joined.
      top_k: rows per query and role.
      rescore: candidates per query and role to be scored exactly, more where all pairs are few;
        0 for estimates.
    """

    sets: Sets
    top_k: int
    rescore: int

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> dict[str, beam.PCollection]:
        tests = beam.pvalue.AsList(inputs["tests"])
        candidates = (
            inputs["partitions"]
            | "SpreadPartitions" >> beam.Reshuffle()
            | "Search" >> beam.ParDo(Search(self.sets, self.rescore or self.top_k), tests)
            | "Candidates" >> TopPerQuery(self.rescore or self.top_k)
            | "ByTrainShard" >> beam.FlatMap(by_train_shard)
        )
        if self.rescore:
            every_pair = inputs["train"] | "AllPairs" >> beam.FlatMap(
                all_pairs, beam.pvalue.AsList(inputs["train"]), tests, self.sets
            )
            scored = (
                (candidates, every_pair)
                | beam.Flatten()
                | "Places" >> beam.GroupByKey()
                | "Rescore" >> beam.ParDo(Rescore(self.sets, self.top_k))
            )
        else:
            places = candidates | "Places" >> beam.GroupByKey()
            scored = places | "Estimate" >> beam.ParDo(Estimate(self.sets), tests)
        best = scored | "Best" >> TopPerQuery(self.top_k)
        rows = (
            best
            | "Rank" >> beam.FlatMap(ranked)
            | "TrainRows" >> beam.GroupByKey()
            | "DescribeTrain" >> beam.ParDo(DescribeTrain(self.sets))
        )
        # A shard without any usable example has a table too, an empty one.
        every_shard = inputs["tests"] | "EveryTestShard" >> beam.FlatMap(_nothing, self.sets)
        paths = (
            {"rows": rows, "every": every_shard}
            | "TestRows" >> beam.CoGroupByKey()
            | "AllRows" >> beam.Map(lambda pair: (pair[0], pair[1]["rows"]))
            | "WriteTable" >> beam.ParDo(WriteTable(self.sets, self.rescore > 0))
        )
        return {"best": best, "paths": paths}


def _nothing(result: ShardResult, sets: Sets) -> list[tuple[int, None]]:
    return [(sets.test.index(result.shard), None)]
