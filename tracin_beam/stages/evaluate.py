"""How good is the retrieval? Exact scores of all training examples for a sample of queries.

Each training shard's exact scores, and the estimates its embeddings give, are kept in
`evaluation/<test name>/`, so that only new shards cost a pass.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.stages import index
from tracin_beam.stages.influence import (
    PROPONENT,
    ROLES,
    ExactScores,
    Key,
    Query,
    Scored,
    Sets,
    TopPerQuery,
)
from tracin_beam.storage import embeddings, files, runs, tables
from tracin_beam.storage.runs import ShardResult

# Pairs of (estimate, exact) kept for each query, for the correlation; of each shard a few at least.
_PAIRS = 20_000
_FEWEST_PAIRS = 5


def sample_queries(tests: Iterable[ShardResult], sets: Sets, count: int) -> list[Query]:
    """Up to count usable test examples, always the same for the same test set.

    They are those whose places have the smallest hashes, so that a new shard changes few.
    """
    hashed = []
    for result in tests:
        number = sets.test.index(result.shard)
        excluded = set(result.excluded)
        for position in range(result.read):
            if position not in excluded:
                name = f"{result.shard.name}#{position}".encode()
                key = hashlib.blake2b(name, digest_size=8).digest()
                hashed.append((key, (number, position)))
    return sorted(query for _, query in sorted(hashed)[:count])


@dataclasses.dataclass(frozen=True)
class ShardScores:
    """Scores of a shard's usable examples for the sampled queries.

    Attributes:
      position: int64 [n].
      exact, estimate: float64 [n, queries].
    """

    position: np.ndarray
    exact: np.ndarray
    estimate: np.ndarray


def shard_scores(
    sets: Sets, exact: ExactScores, result: ShardResult, queries: Sequence[Query], mark: str
) -> ShardScores:
    """Exact and estimated scores of a shard, computed unless they are kept under this mark."""
    path = sets.output.evaluation(sets.test_name, result.shard)
    if files.exists(path):
        kept = tables.read(path)
        if (kept.schema.metadata or {}).get(b"mark") == mark.encode():
            return ShardScores(
                kept["position"].to_numpy(),
                _matrix(kept["exact"], len(queries)),
                _matrix(kept["estimate"], len(queries)),
            )
    vectors = _query_rows(sets, queries)
    positions, estimates = [], []
    for parts in embeddings.read_checkpoints(sets.files(runs.TRAIN, result.shard), result.excluded):
        positions.append(parts[0].position)
        rows = index.rows_of(parts, sets.checkpoints)
        estimates.append(rows.astype(np.float64) @ vectors.T)
    position = np.concatenate(positions)
    column = {query: i for i, query in enumerate(queries)}
    scores = np.empty((len(position), len(queries)))
    for query, found, values in exact.scores(result.shard, dict.fromkeys(queries, position)):
        scores[np.searchsorted(position, found), column[query]] = values.sum(axis=1)
    computed = ShardScores(position, scores, np.concatenate(estimates))
    table = pa.table(
        {
            "position": position,
            "exact": list(computed.exact),
            "estimate": list(computed.estimate),
        }
    )
    tables.write(path, table.replace_schema_metadata({"mark": mark}))
    return computed


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, width)


def _query_rows(sets: Sets, queries: Sequence[Query]) -> np.ndarray:
    """The queries' rows as in the index: float64 [queries, C·dim]."""
    rows: dict[Query, np.ndarray] = {}
    for number in sorted({query[0] for query in queries}):
        wanted = np.array([q[1] for q in queries if q[0] == number])
        paths = sets.files(sets.test_name, sets.test[number])
        parts = [embeddings.read_at(path, wanted) for path in paths]
        for position, row in zip(
            parts[0].position, index.rows_of(parts, sets.checkpoints), strict=True
        ):
            rows[number, int(position)] = row
    return np.stack([rows[query] for query in queries]).astype(np.float64)


class Evaluate(beam.DoFn):
    """ShardResult → exact and estimated bests by (query, role), and pairs for the correlation.

    Outputs, by tag:
      main: ((query, role), Scored), the shard's best by exact score.
      estimated: the same by estimated score; `by_checkpoint` holds the exact score.
      pairs: (query, float64 [m, 2]) of estimates and exact scores.
    """

    def __init__(self, sets: Sets, queries: int, top_k: int, units: Mapping[str, str]) -> None:
        self._sets = sets
        self._queries = queries
        self._top_k = top_k
        self._units = dict(units)
        self._exact: ExactScores | None = None

    def process(self, result: ShardResult, tests: Sequence[ShardResult]) -> Iterator[Any]:
        if result.used == 0:
            return
        queries = sample_queries(tests, self._sets, self._queries)
        if self._exact is None:
            self._exact = ExactScores(self._sets, queries)
        mark = runs.digest(
            [
                self._units[result.shard.path],
                result.excluded,
                [(self._units[self._sets.test[s].path], position) for s, position in queries],
            ]
        )
        scores = shard_scores(self._sets, self._exact, result, queries, mark)
        number = self._sets.train.index(result.shard)
        shard = np.full(len(scores.position), number, np.int32)
        pairs = max(_FEWEST_PAIRS, _PAIRS // len(self._sets.train))
        step = -(-len(shard) // pairs)
        for i, query in enumerate(queries):
            exact, estimate = scores.exact[:, i], scores.estimate[:, i]
            by_exact = Scored(shard, scores.position, exact, np.empty((len(shard), 0)))
            by_estimate = Scored(shard, scores.position, estimate, exact[:, None])
            for role in ROLES:
                yield (query, role), by_exact.top(self._top_k, role)
                yield beam.pvalue.TaggedOutput(
                    "estimated", ((query, role), by_estimate.top(self._top_k, role))
                )
            sample = np.stack([estimate[::step], exact[::step]], axis=1)
            yield beam.pvalue.TaggedOutput("pairs", (query, sample))


def recall(best: Scored, found: Scored, role: str, exact: np.ndarray | None) -> float:
    """Share of the exact best that was found.

    Args:
      best: the best by exact score.
      found: what was found.
      role: proponent or opponent.
      exact: float64 [m], exact scores of what was found, where known: examples with equal scores
        then stand for each other.
    """
    places = set(zip(best.shard.tolist(), best.position.tolist(), strict=True))
    hit = np.array(
        [p in places for p in zip(found.shard.tolist(), found.position.tolist(), strict=True)],
        bool,
    )
    if exact is not None:
        sign = 1.0 if role == PROPONENT else -1.0
        worst = float(np.min(sign * best.score))
        hit |= sign * exact >= worst - 1e-6 * abs(worst)
    return min(int(hit.sum()), len(places)) / len(places)


def summarise(
    recalls: Iterable[tuple[str, float, float]], pairs: Iterable[np.ndarray], top_k: int
) -> dict[str, Any]:
    """The "quality" entry of run.json.

    Args:
      recalls: (role, recall of the table, recall of the projection alone) by query.
      pairs: float64 [m, 2], estimates and exact scores, by query.
      top_k: the k of recall@k.
    """
    recalls, pairs = list(recalls), [p for p in pairs if len(p) > 1]
    quality: dict[str, Any] = {"queries": len(recalls) // 2, "k": top_k}
    for role in ROLES:
        mine = [(table, alone) for r, table, alone in recalls if r == role]
        quality[role + "s"] = {
            "recall": float(np.mean([table for table, _ in mine])),
            "recall_projection": float(np.mean([alone for _, alone in mine])),
        }
    quality["correlation"] = {
        "pearson": _mean([correlation(p[:, 0], p[:, 1]) for p in pairs]),
        "spearman": _mean([correlation(ranks(p[:, 0]), ranks(p[:, 1])) for p in pairs]),
    }
    return quality


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else None


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; NaN where either side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank: float64, of the shape of x, [n]."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[inverse]


@dataclasses.dataclass
class Quality(beam.PTransform):
    """ShardResults of "train" and "tests", and the "best" of the join → one "quality" dict.

    Attributes:
      sets: what was joined.
      queries: how many test examples to look at.
      top_k: rows per query and role.
      exact: whether the scores of "best" are exact.
      units: fingerprint of every shard's embeddings, by path.
    """

    sets: Sets
    queries: int
    top_k: int
    exact: bool
    units: Mapping[str, str]

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        outputs = (
            inputs["train"]
            | "SpreadShards" >> beam.Reshuffle()
            | "BruteForce"
            >> beam.ParDo(
                Evaluate(self.sets, self.queries, self.top_k, self.units),
                beam.pvalue.AsList(inputs["tests"]),
            ).with_outputs("estimated", "pairs", main="exact")
        )
        joined = {
            "exact": outputs.exact | "ExactBest" >> TopPerQuery(self.top_k),
            "estimated": outputs.estimated | "EstimatedBest" >> TopPerQuery(self.top_k),
            "table": inputs["best"],
        } | "Compare" >> beam.CoGroupByKey()
        recalls = joined | "Recall" >> beam.FlatMap(_recalls, self.exact)
        pairs = (
            outputs.pairs
            | "PairsOfQuery" >> beam.GroupByKey()
            | "JoinPairs" >> beam.Map(lambda pair: np.concatenate(list(pair[1])))
        )
        return (
            inputs["train"].pipeline
            | "Once" >> beam.Create([None])
            | "Summarise"
            >> beam.Map(
                lambda _, r, p, k: summarise(r, p, k),
                beam.pvalue.AsList(recalls),
                beam.pvalue.AsList(pairs),
                self.top_k,
            )
        )


def _recalls(
    group: tuple[Key, Mapping[str, Iterable[Scored]]], exact: bool
) -> Iterator[tuple[str, float, float]]:
    (_, role), parts = group
    for best in parts["exact"]:  # none for a query that is not in the sample
        (table,) = parts["table"]
        (alone,) = parts["estimated"]
        yield (
            role,
            recall(best, table, role, table.score if exact else None),
            recall(best, alone, role, alone.by_checkpoint[:, 0]),
        )
