"""How good is the retrieval? Exact scores of all training examples for a sample of queries.

What is looked at of each group of training shards, its best by exact and by estimated score and
an even sample, is kept in `evaluation/<test name>/`, so that only changed groups cost a pass.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.scoring import recall, topk
from tracin_beam.scoring.topk import ROLES, Judged, Scored
from tracin_beam.stages import joining
from tracin_beam.stages.joining import Census, Group, Join
from tracin_beam.stages.metrics import Counters, Tally
from tracin_beam.stages.rescore import ExactScores, places_of
from tracin_beam.stages.search import BothScored
from tracin_beam.storage import files, marks, runs, tables

# Pairs of (estimate, exact) kept for each query, for the correlation; of each group a few at least.
_PAIRS = 20_000
_FEWEST_PAIRS = 500
# Ends kept of each query at least, so that a smaller --top_k costs nothing.
_KEPT_ENDS = 100

# Those of groups whose scores were not kept; pairs were scored exactly.
_COUNTED = (
    *("groups_found", "groups_judged", "records", "pairs", "batches", "queries"),
    *("read_msec", "parse_msec", "queries_msec", "compute_msec", "estimate_msec"),
)

_KEPT = pa.schema(
    [
        ("query", pa.int64()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int64()),
        ("exact", pa.float64()),
        ("estimate", pa.float64()),
        ("sampled", pa.bool_()),
    ]
)


def judge(
    join: Join,
    census: Census,
    exact: ExactScores,
    group: Group,
    count: int,
    tally: Tally | None = None,
) -> Judged:
    """Exact and estimated scores of a group's examples for the sampled queries.

    Returns:
      Those of them that `recall.to_keep` names; `query` counts the sampled queries.
    """
    queries = census.sample
    tally = tally or Tally()
    places = places_of(join, group)
    with tally.timed("estimate"):
        estimates = _estimates(join, census, group, places)
    if join.score.on_embeddings:
        exact_scores = estimates
    else:
        exact_scores = _exact(exact, queries, places, join.block, tally)
    known = np.isfinite(exact_scores).all(axis=1)
    estimates = estimates[known]
    exact_scores = exact_scores[known]
    share = max(_FEWEST_PAIRS, _PAIRS * len(places) // max(1, census.train_rows))
    step = -(-len(places) // share)
    query, row = np.nonzero(recall.to_keep(exact_scores, estimates, count, step))
    return Judged(
        np.flatnonzero(known)[query],
        places[row, 0].astype(np.int32),
        places[row, 1],
        exact_scores[query, row],
        estimates[query, row],
        row % step == 0,
    )


def _exact(
    exact: ExactScores, queries: np.ndarray, places: np.ndarray, block: int, tally: Tally
) -> np.ndarray:
    """float64 [queries, places]; NaN for a query that could not be computed."""
    scores = np.full((len(queries), len(places)), np.nan)
    keys = _keys(*places.T)
    for start in range(0, len(queries), block):
        wanted = [(queries[start : start + block], places[:, 0], places[:, 1])]
        for _, products in exact.products(wanted, tally):
            rows = np.searchsorted(queries, products.queries)
            at = np.searchsorted(keys, _keys(products.shard, products.position))
            scores[np.ix_(rows, at)] = products.by_checkpoint.sum(axis=2)
    return scores


def _estimates(join: Join, census: Census, group: Group, places: np.ndarray) -> np.ndarray:
    """float64 [sampled queries, places]."""
    queries = joining.queries_at(join, census, census.sample)
    if join.score.on_embeddings:
        queries = queries.astype(np.float64)
    weighted = join.score.queries(queries)
    estimates = np.empty((len(census.sample), len(places)))
    keys = _keys(*places.T)
    for shard, position, rows in joining.train_rows(join, group):
        at = np.searchsorted(keys, _keys(shard, position))
        estimates[:, at] = join.score.estimates(weighted, rows)
    return estimates


def _keys(shard: np.ndarray, position: np.ndarray) -> np.ndarray:
    return shard.astype(np.int64) << 40 | position


def kept_or_judged(
    join: Join,
    census: Census,
    exact: ExactScores,
    group: Group,
    top_k: int,
    tally: Tally | None = None,
) -> Judged:
    """What is kept of a group, if it is of the same shards, queries and k; else it is made.

    Raises:
      InputError: a file that was read for it has become another.
    """
    tally = tally or Tally()
    count = max(_KEPT_ENDS, top_k)
    path = join.output.evaluation(join.test_name, group.number)
    shards, positions = census.places(census.sample)
    places = [
        [join.units[join.test[shard].path], int(position)]
        for shard, position in zip(shards, positions, strict=True)
    ]
    mark = runs.digest([group.fingerprint, places, join.score_identity])
    kept = marks.read(marks.beside(path), join.output.root, mark, {path})
    if kept and kept["count"] >= top_k:
        tally.add("groups_found")
        return _judged(tables.read(path), join)
    tally.add("groups_judged")
    judged = judge(join, census, exact, group, count, tally)
    read = [*(result.shard for result in group.shards), *(join.test[i] for i in np.unique(shards))]
    runs.check_unchanged([*read, *join.checkpoints])
    paths = np.array([shard.path for shard in join.train])
    columns = {**judged._asdict(), "shard": pa.array(paths[judged.shard]).dictionary_encode()}
    table = pa.table(columns).cast(_KEPT)
    files.remove([marks.beside(path)])
    made = {path: tables.write(path, table)}
    marks.write(marks.beside(path), join.output.root, mark, made, count=count)
    return judged


def _judged(table: pa.Table, join: Join) -> Judged:
    shard = table["shard"].combine_chunks()
    number = np.array([join.train_number[p] for p in shard.dictionary.to_pylist()], np.int32)
    columns = {name: table[name].to_numpy() for name in Judged._fields if name != "shard"}
    return Judged(shard=number[shard.indices.to_numpy()], **columns)


class Judge(beam.DoFn):
    """Group → Judged, of the sampled queries."""

    def __init__(self, join: Join, top_k: int) -> None:
        self._join = join
        self._top_k = top_k
        self._exact: ExactScores | None = None
        self._counters = Counters("retrieval", *_COUNTED)

    def process(self, group: Group, census: Census) -> Iterator[Judged]:
        if not len(census.sample):
            return
        if self._exact is None:
            self._exact = ExactScores(self._join, census)
        tally = Tally()
        judged = kept_or_judged(self._join, census, self._exact, group, self._top_k, tally)
        self._counters.take(tally)
        yield judged


def _of_sample(pair: tuple[int, BothScored], census: Census) -> Iterator[dict[str, Scored]]:
    """The table's rows of sampled queries, which are counted as in `Judged`."""
    _, both = pair
    found = {}
    for role, rows in zip(ROLES, both, strict=True):
        mine = topk.take(rows, np.isin(rows.query, census.sample))
        found[role] = mine._replace(query=np.searchsorted(census.sample, mine.query))
    if any(len(rows.query) for rows in found.values()):
        yield found


def _summarised(
    _: None, judged: Sequence[Judged], found: Sequence[dict[str, Scored]], top_k: int, exact: bool
) -> Iterator[dict[str, Any]]:
    if judged and found:
        table = {role: topk.merge([part[role] for part in found]) for role in ROLES}
        # Groups come in any order, and sums of numbers differ with it in their last digits.
        every = topk.merge(judged)
        order = np.lexsort([every.position, every.shard, every.query])
        yield recall.retrieval(topk.take(every, order), table, top_k, exact)


@dataclasses.dataclass
class Retrieval(beam.PTransform):
    """The "groups", the "census" and the "best" of a join → one "retrieval" dict.

    Attributes:
      join: what was joined.
      top_k: rows per query and role.
      exact: whether the scores of "best" are exact.
    """

    join: Join
    top_k: int
    exact: bool

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        census = beam.pvalue.AsSingleton(inputs["census"])
        judged = inputs["groups"] | "Judge" >> beam.ParDo(Judge(self.join, self.top_k), census)
        found = inputs["best"] | "OfSample" >> beam.FlatMap(_of_sample, census)
        return (
            inputs["best"].pipeline
            | "Once" >> beam.Create([None])
            | "Summarise"
            >> beam.FlatMap(
                _summarised,
                beam.pvalue.AsList(judged),
                beam.pvalue.AsList(found),
                self.top_k,
                self.exact,
            )
        )
