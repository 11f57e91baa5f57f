"""Training embeddings → clusters of examples: k-means by Beam, a pass over the embeddings a round.

A round hands every shard the last round's centres, by a file in `_state/clusters/`, and adds up
what each cluster is given. Those files are what a run that was killed goes on from.
"""

import dataclasses
import functools
import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.errors import InputError
from tracin_beam.scoring import clusters
from tracin_beam.scoring.clusters import Sums
from tracin_beam.stages import curvature, index, joining
from tracin_beam.stages.joining import Census, Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.storage import arrays, embeddings, files, marks, runs, sinks, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import Made, ShardResult

# Rows that a round goes through, at most; of more it takes every second, third and so on.
_ROUND_ROWS = 100_000
# Rows that the first centres are drawn from: so many for each centre, at least, and bytes of them.
_SEED_ROWS, _SEED_ROWS_AT_LEAST, _SEED_BYTES = 20, 2048, 512 << 20
# Of a cluster, examples nearest to its centre, and labels, that its row names.
_NEAREST, _LABELS = 12, 10
# Of a table, held at a time.
_PIECE_ROWS = 65_536

_COUNTED = (
    *("rows_assigned", "records", "tables_written"),
    *("read_msec", "compute_msec", "table_msec"),
)

CLUSTERS = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.float64()),
        ("prediction", pa.float64()),
        ("cluster", pa.int32()),
        ("distance", pa.float64()),
        ("medoid", pa.bool_()),
        ("shard", pa.string()),
        ("position", pa.int64()),
    ]
)

SUMMARY = pa.schema(
    [
        ("cluster", pa.int32()),
        ("examples", pa.int64()),
        ("mean_distance", pa.float64()),
        ("mean_squared_distance", pa.float64()),
        ("labels", pa.list_(pa.float64())),
        ("label_counts", pa.list_(pa.int64())),
        ("mean_label", pa.float64()),
        ("nearest_ids", pa.list_(pa.string())),
        ("nearest_labels", pa.list_(pa.float64())),
        ("nearest_predictions", pa.list_(pa.float64())),
        ("nearest_distances", pa.list_(pa.float64())),
        ("nearest_shards", pa.list_(pa.string())),
        ("nearest_positions", pa.list_(pa.int64())),
    ]
)


@dataclasses.dataclass(frozen=True)
class Clustering:
    """What is clustered, and how; small, and the same for all workers.

    Attributes:
      join: the training set and the score.
      count: how many clusters.
      rounds: of moving their centres, at most.
      by: "distance", or "direction" for rows of unit length.
      seed: of the first centres.
      classes: whether labels are classes, which are counted.
    """

    join: Join
    count: int
    rounds: int
    by: str
    seed: int
    classes: bool

    def path(self, turn: int) -> str:
        """The file of the centres after a round; 0 is what the first one begins with."""
        return self.join.output.path("_state", "clusters", f"round-{turn:04d}.npz")

    def rows(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Rows whose inner products are the scores, of embeddings by checkpoint: float32 [n, N]."""
        score = self.join.score
        rooted = [
            (root * score.of_root(c, part)).astype(np.float32)
            for c, (root, part) in enumerate(zip(score.roots, parts, strict=True))
        ]
        rows = np.concatenate(rooted, axis=1)
        return clusters.of_unit_length(rows) if self.by == "direction" else rows

    def read(self, result: ShardResult, only: np.ndarray | None) -> Iterator[np.ndarray]:
        """A shard's rows, or those at some rising positions, some thousand at a time."""
        join = self.join
        reader = embeddings.MatrixReader(
            join.files(runs.TRAIN, result.shard), result.excluded, only=only
        )
        out = np.empty((joining.block_rows(join.numbers), join.numbers), np.float32)
        while len(found := reader.read(out)):
            yield self.rows(np.split(out[: len(found)], len(join.checkpoints), axis=1))


@dataclasses.dataclass(frozen=True)
class State:
    """Where the centres are after some rounds.

    Attributes:
      turn: how many rounds.
      settled: whether the last one moved none of them.
      rows: of the training set.
      starts: number of the first row of each training shard.
      fingerprint: of all that the centres follow from, besides rounds.
    """

    turn: int
    settled: bool
    rows: int
    starts: tuple[int, ...]
    fingerprint: str

    @property
    def parts(self) -> int:
        """How many parts the rows are divided into, of which a round takes one."""
        return -(-self.rows // _ROUND_ROWS)


@dataclasses.dataclass(frozen=True, order=True)
class _Nearest:
    """An example near to its centre: how near, its shard's number and its position."""

    distance: float
    shard: int
    position: int


@dataclasses.dataclass
class _Summary:
    """What is known of a cluster from some of its examples."""

    examples: int = 0
    distances: float = 0.0
    squares: float = 0.0
    labels: Counter[float] = dataclasses.field(default_factory=Counter)
    label_sum: float = 0.0
    labelled: int = 0
    named: list[tuple[_Nearest, str, float | None, float | None]] = dataclasses.field(
        default_factory=list
    )

    def plus(self, other: "_Summary") -> "_Summary":
        return _Summary(
            self.examples + other.examples,
            self.distances + other.distances,
            self.squares + other.squares,
            self.labels + other.labels,
            self.label_sum + other.label_sum,
            self.labelled + other.labelled,
            self.named + other.named,
        )


def _begin(census: Census, clustering: Clustering) -> State:
    """Draws the first centres, or finds those of a run that was killed.

    Raises:
      InputError: there are fewer examples than clusters.
    """
    join, count = clustering.join, clustering.count
    results = sorted(
        (r for group in census.groups for r in group.shards),
        key=lambda result: join.train_number[result.shard.path],
    )
    rows = census.train_rows
    if count > rows:
        raise InputError(
            f"--clusters={count}: there are {rows} usable training examples: take fewer clusters."
        )
    starts = np.zeros(len(join.train), np.int64)
    content = []
    first = 0
    for result in results:
        starts[join.train_number[result.shard.path]] = first
        first += result.used
        content.append([result.shard.path, join.units[result.shard.path], result.excluded])
    fingerprint = runs.digest(
        [content, join.score_identity, count, clustering.by, clustering.seed, _ROUND_ROWS]
    )
    state = State(0, False, rows, tuple(starts.tolist()), fingerprint)
    for turn in range(clustering.rounds, -1, -1):
        if found := _kept(clustering, state, turn):
            return found
    rng = np.random.default_rng(clustering.seed)
    room = max(count, _SEED_BYTES // (4 * join.numbers))
    wanted = min(rows, room, max(_SEED_ROWS * count, _SEED_ROWS_AT_LEAST))
    chosen = np.sort(rng.choice(rows, wanted, replace=False))
    some = []
    for result in results:
        own = chosen - starts[join.train_number[result.shard.path]]
        own = own[(own >= 0) & (own < result.used)]
        if len(own):
            some += list(clustering.read(result, joining.usable(result)[own]))
    centres = clusters.seeds(np.concatenate(some), count, rng)
    _keep(clustering, state, centres, np.zeros(count, np.int64))
    return state


def _kept(clustering: Clustering, state: State, turn: int) -> State | None:
    path = clustering.path(turn)
    mark = marks.read(
        marks.beside(path), clustering.join.output.root, f"{state.fingerprint} {turn}", {path}
    )
    if mark is None:
        return None
    return dataclasses.replace(state, turn=turn, settled=bool(mark.get("settled")))


def _keep(clustering: Clustering, state: State, centres: np.ndarray, seen: np.ndarray) -> None:
    path = clustering.path(state.turn)
    files.remove([marks.beside(path)])
    stamp = arrays.write(path, {"centres": centres, "seen": seen})
    marks.write(
        marks.beside(path),
        clustering.join.output.root,
        f"{state.fingerprint} {state.turn}",
        {path: stamp},
        settled=state.settled,
    )


class _WithCentres(beam.DoFn):
    """What the steps of a round share: the centres, read once for each of their files."""

    def __init__(self, clustering: Clustering) -> None:
        self._clustering = clustering
        self._counters = Counters("cluster", *_COUNTED)
        self._read: tuple[str, np.ndarray] | None = None

    def _centres(self, state: State) -> np.ndarray:
        path = self._clustering.path(state.turn)
        if self._read is None or self._read[0] != path:
            self._read = path, arrays.read(path)["centres"]
        return self._read[1]


class Assign(_WithCentres):
    """ShardResult → (cluster, Sums) of its rows, in the round of a number."""

    def __init__(self, clustering: Clustering, turn: int) -> None:
        super().__init__(clustering)
        self._turn = turn

    def process(self, result: ShardResult, state: State) -> Iterator[tuple[int, Sums]]:
        if state.turn != self._turn - 1 or state.settled or not result.used:
            return
        tally = Tally()
        centres, only = self._centres(state), None
        if state.parts > 1:
            start = state.starts[self._clustering.join.train_number[result.shard.path]]
            usable = joining.usable(result)
            mine = (start + np.arange(len(usable))) % state.parts == self._turn % state.parts
            only = usable[mine]
        total: dict[int, Sums] = {}
        for rows in timed(self._clustering.read(result, only), tally, "read"):
            with tally.timed("compute"):
                found = clusters.sums(rows, clusters.assign(rows, centres)[0])
                for k, one in found.items():
                    total[k] = total[k].plus(one) if k in total else one
            tally.add("rows_assigned", len(rows))
        self._counters.take(tally)
        yield from total.items()


def _sum(found: Iterable[Any]) -> Any:
    return functools.reduce(lambda one, other: one.plus(other), found)


def _move(
    keyed: tuple[None, Mapping[str, Iterable[Any]]], clustering: Clustering, turn: int
) -> State:
    """Moves the centres, unless they are known, or nothing moved them in the round before."""
    (state,) = keyed[1]["state"]
    if state.turn != turn - 1 or state.settled:
        return state
    found = dict(keyed[1]["sums"])
    before = arrays.read(clustering.path(state.turn))
    whole = state.parts == 1
    centres, seen = clusters.moved(before["centres"], before["seen"], found, whole)
    settled = whole and np.array_equal(centres, before["centres"])
    moved = dataclasses.replace(state, turn=turn, settled=settled)
    _keep(clustering, moved, centres, seen)
    return moved


class Examples(_WithCentres):
    """What the two last passes share: a shard's examples with cluster and distance."""

    def _found(
        self, result: ShardResult, state: State, tally: Tally
    ) -> Iterator[tuple[Embeddings, np.ndarray, np.ndarray]]:
        clustering, centres = self._clustering, self._centres(state)
        paths = clustering.join.files(runs.TRAIN, result.shard)
        for parts in timed(embeddings.read_checkpoints(paths, result.excluded), tally, "read"):
            with tally.timed("compute"):
                rows = clustering.rows([part.embedding for part in parts])
                cluster, distance = clusters.assign(rows, centres)
            yield parts[-1], cluster, distance


class Nearest(Examples):
    """ShardResult → (cluster, the examples of the shard that are nearest to its centre)."""

    def process(self, result: ShardResult, state: State) -> Iterator[tuple[int, list[_Nearest]]]:
        tally = Tally()
        number = self._clustering.join.train_number[result.shard.path]
        best: dict[int, list[_Nearest]] = {}
        for examples, cluster, distance in self._found(result, state, tally):
            for k in np.unique(cluster).tolist():
                mine = np.flatnonzero(cluster == k)
                mine = mine[np.argsort(distance[mine], kind="stable")[:_NEAREST]]
                some = (
                    _Nearest(float(distance[i]), number, int(examples.position[i])) for i in mine
                )
                best[k] = heapq.nsmallest(_NEAREST, [*best.get(k, []), *some])
        self._counters.take(tally)
        yield from best.items()


def _nearest(found: Iterable[list[_Nearest]]) -> list[_Nearest]:
    return heapq.nsmallest(_NEAREST, itertools.chain.from_iterable(found))


class WriteClusters(Examples):
    """ShardResult → its table: (path, Stamp); and under "summaries" (cluster, summary) of its rows.

    Side inputs: the State, and by cluster its nearest examples.
    """

    def process(
        self, result: ShardResult, state: State, nearest: Mapping[int, Sequence[_Nearest]]
    ) -> Iterator[Any]:
        tally = Tally()
        join = self._clustering.join
        number = join.train_number[result.shard.path]
        path = join.output.path("clusters", runs.numbered("clusters", number, len(join.train)))
        mine = {
            one.position: (k, one, rank)
            for k, some in nearest.items()
            for rank, one in enumerate(some)
            if one.shard == number
        }
        summaries: dict[int, _Summary] = {}

        def pieces() -> Iterator[pa.Table]:
            waiting: list[pa.Table] = []
            for examples, cluster, distance in self._found(result, state, tally):
                ids = [tables.text(identity) for identity in examples.ids]
                places = examples.position.tolist()
                medoid = [place in mine and mine[place][2] == 0 for place in places]
                columns = [ids, tables.numbers(examples.label), tables.numbers(examples.prediction)]
                columns += [cluster, distance, medoid, [result.shard.path] * len(ids), places]
                waiting.append(pa.table(columns, schema=CLUSTERS))
                self._summarise(examples, ids, cluster, distance, mine, summaries)
                tally.add("records", len(ids))
                if sum(map(len, waiting)) >= _PIECE_ROWS:
                    yield pa.concat_tables(waiting)
                    waiting = []
            yield pa.concat_tables(waiting) if waiting else CLUSTERS.empty_table()

        files.remove([join.output.done("cluster")])
        with tally.timed("table"):
            stamp = sinks.write_parquet(path, CLUSTERS, pieces())
        tally.add("tables_written")
        self._counters.take(tally)
        yield path, stamp
        for k, summary in summaries.items():
            yield beam.pvalue.TaggedOutput("summaries", (k, summary))

    def _summarise(
        self,
        examples: Embeddings,
        ids: Sequence[str],
        cluster: np.ndarray,
        distance: np.ndarray,
        mine: Mapping[int, tuple[int, _Nearest, int]],
        summaries: dict[int, _Summary],
    ) -> None:
        for k in np.unique(cluster).tolist():
            own = np.flatnonzero(cluster == k)
            labels = examples.label[own].astype(np.float64)
            labels = labels[np.isfinite(labels)]
            counted = Counter(labels.tolist()) if self._clustering.classes else Counter()
            named = [
                (
                    mine[place][1],
                    ids[i],
                    tables.number(examples.label[i]),
                    tables.number(examples.prediction[i]),
                )
                for i, place in zip(own.tolist(), examples.position[own].tolist(), strict=True)
                if place in mine and mine[place][0] == k
            ]
            summary = _Summary(
                len(own),
                float(distance[own].sum()),
                float(np.square(distance[own]).sum()),
                counted,
                float(labels.sum()),
                len(labels),
                named,
            )
            summaries[k] = summaries.get(k, _Summary()).plus(summary)


def _write_summary(
    keyed: tuple[None, Iterable[tuple[int, _Summary]]], clustering: Clustering
) -> Made:
    join, found = clustering.join, dict(keyed[1])
    rows = []
    for k in range(clustering.count):
        one = found.get(k, _Summary())
        named = sorted(one.named)
        labels = sorted(one.labels.items(), key=lambda item: (-item[1], item[0]))[:_LABELS]
        rows.append(
            {
                "cluster": k,
                "examples": one.examples,
                "mean_distance": one.distances / one.examples if one.examples else None,
                "mean_squared_distance": one.squares / one.examples if one.examples else None,
                "labels": [label for label, _ in labels],
                "label_counts": [count for _, count in labels],
                "mean_label": one.label_sum / one.labelled
                if one.labelled and not clustering.classes
                else None,
                "nearest_ids": [identity for _, identity, _, _ in named],
                "nearest_labels": [label for _, _, label, _ in named],
                "nearest_predictions": [prediction for _, _, _, prediction in named],
                "nearest_distances": [near.distance for near, _, _, _ in named],
                "nearest_shards": [join.train[near.shard].path for near, _, _, _ in named],
                "nearest_positions": [near.position for near, _, _, _ in named],
            }
        )
    path = join.output.cluster_summary
    return path, tables.write(path, pa.Table.from_pylist(rows, SUMMARY))


@dataclasses.dataclass
class Cluster(beam.PTransform):
    """Training ShardResults → "made", (path, Stamp) of the tables, and "state", the last State.

    Attributes:
      clustering: what is clustered, and how.
      group_rows: training examples whose second moments are summed together.
    """

    clustering: Clustering
    group_rows: int = 50_000

    def expand(self, results: beam.PCollection) -> Any:
        clustering = self.clustering
        spread = results | "SpreadResults" >> beam.Reshuffle()
        counted = (
            results.pipeline
            | "Once" >> beam.Create([None])
            | "Census" >> beam.Map(self._census, beam.pvalue.AsList(results))
        )
        if clustering.join.score.preconditioner != "none":
            counted = counted | "Curvature" >> curvature.TakeCurvature(clustering.join)
        state = counted | "Begin" >> beam.Map(_begin, clustering)
        for turn in range(1, clustering.rounds + 1):
            state = (spread, state) | f"Round{turn}" >> _Round(clustering, turn)
        last = beam.pvalue.AsSingleton(state)
        nearest = (
            spread
            | "Nearest" >> beam.ParDo(Nearest(clustering), last)
            | "NearestOfAll" >> beam.CombinePerKey(_nearest)
        )
        written = spread | "Write" >> beam.ParDo(
            WriteClusters(clustering), last, beam.pvalue.AsDict(nearest)
        ).with_outputs("summaries", main="made")
        summary = (
            written["summaries"]
            | "Summaries" >> beam.CombinePerKey(_sum)
            | "Together" >> beam.Map(lambda one: (None, one))
            | "OfAll" >> beam.GroupByKey()
            | "WriteSummary" >> beam.Map(_write_summary, clustering)
        )
        return {"made": (written["made"], summary) | "Tables" >> beam.Flatten(), "state": state}

    def _census(self, _: None, train: Sequence[ShardResult]) -> Census:
        groups = index.planned_groups(self.clustering.join, train, self.group_rows)
        return joining.take_census(self.clustering.join, groups, train, [], 0)


@dataclasses.dataclass
class _Round(beam.PTransform):
    """(ShardResults, the State before) → the State after a round."""

    clustering: Clustering
    turn: int

    def expand(self, given: Any) -> beam.PCollection:
        spread, state = given
        sums = (
            spread
            | "Assign"
            >> beam.ParDo(Assign(self.clustering, self.turn), beam.pvalue.AsSingleton(state))
            | "Sum" >> beam.CombinePerKey(_sum)
            | "OfSums" >> beam.Map(lambda one: (None, one))
        )
        of_state = state | "OfState" >> beam.Map(lambda one: (None, one))
        return (
            {"state": of_state, "sums": sums}
            | "Both" >> beam.CoGroupByKey()
            | "Move" >> beam.Map(_move, self.clustering, self.turn)
        )
