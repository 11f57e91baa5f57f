"""Training embeddings and shards → what a preconditioner knows of every checkpoint.

Second moments are taken as sums over a group of training shards at a checkpoint, which are kept in
`curvature/<preconditioner>/<step>/`: only a group that is new or changed costs its pass. What
crosses the workers is paths.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np

from tracin_beam.scoring import curvature, damping
from tracin_beam.scoring.damping import Chosen, Part
from tracin_beam.stages import joining
from tracin_beam.stages.joining import Census, Group, Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.stages.rescore import records_at
from tracin_beam.storage import arrays, embeddings, files, marks, runs

# Examples of a group that K-FAC's factors are taken from, evenly spread over it.
SAMPLED = 8192
# Of the queries and training examples by whose scores the damping is chosen, about so many.
_QUERIES, _ROWS = 64, 2048

_COUNTED = (*("sums_found", "sums_made", "embeddings", "records", "read_msec", "compute_msec"),)


def _of_embeddings(join: Join, group: Group, place: int, tally: Tally) -> dict[str, np.ndarray]:
    """Σ s sᵀ over a group's examples, and over every second of each shard's."""
    dim = join.numbers // len(join.checkpoints)
    out = np.empty((joining.block_rows(dim) // 2 * 2, dim), np.float32)
    halves = np.zeros((2, dim, dim))
    for result in group.shards:
        path = join.files(runs.TRAIN, result.shard)[place]
        reader = embeddings.MatrixReader([path], result.excluded)
        while True:
            with tally.timed("read"):
                count = len(reader.read(out))
            if not count:
                break
            tally.add("embeddings", count)
            with tally.timed("compute"):
                for i, half in enumerate(halves):
                    half += curvature.of_embeddings(out[i:count:2])
    return {"R": halves.sum(axis=0), "H": halves[0]}


def _of_gradients(join: Join, group: Group, place: int, tally: Tally) -> dict[str, np.ndarray]:
    """K-FAC's sums over a group's examples, estimated from a sample of them."""
    loaded = join.source.get()
    engine = loaded.engine
    values = engine.values(join.checkpoints[place].path)
    step = -(-group.rows // SAMPLED)
    total: dict[str, np.ndarray] = {}
    count = first = 0
    for result in group.shards:
        usable = joining.usable(result)
        # The first of the next shard continues the spacing.
        chosen = usable[-first % step :: step]
        first += len(usable)
        found = records_at(result.shard.path, set(chosen.tolist())) if len(chosen) else iter(())
        while some := list(itertools.islice(timed(found, tally, "read"), engine.batch_size)):
            with tally.timed("compute"):
                batch = loaded.parse([record.data for record in some])
                sums = engine.moments(values, batch, curvature.WIDEST)
                total = curvature.added(total, sums)
            count += len(some)
    tally.add("records", count)
    return curvature.scaled(total, group.rows / count)


def part_path(join: Join, group: Group, place: int) -> str:
    """The file of a group's sums at the checkpoint of a place."""
    folder = os.path.dirname(join.moments(place))
    return files.join(folder, f"group-{group.number:05d}.npz")


def take_sums(join: Join, group: Group, place: int, tally: Tally | None = None) -> str:
    """The file of a group's sums at the checkpoint of a place, made unless it is there."""
    tally = tally or Tally()
    path, root = part_path(join, group, place), join.output.root
    kind = join.score.preconditioner
    wanted = runs.digest([group.fingerprint, kind, curvature.LAYOUT, curvature.WIDEST, SAMPLED])

    def make() -> files.Stamp:
        sums = _of_embeddings(join, group, place, tally)
        if join.score.written_out:
            sums |= _of_gradients(join, group, place, tally)
            runs.check_unchanged([*(r.shard for r in group.shards), join.checkpoints[place]])
        return arrays.write(path, sums)

    found = marks.kept_or_made(path, root, wanted, make)
    tally.add("sums_found" if found else "sums_made")
    return path


def write_means(join: Join, place: int, census: Census) -> None:
    """Adds the groups' sums up, in their order, and writes the means over all examples."""
    total: dict[str, np.ndarray] = {}
    paths = [part_path(join, group, place) for group in census.groups]
    for path in paths:
        total = curvature.added(total, arrays.read(path))
    arrays.write(join.moments(place), curvature.scaled(total, 1 / max(1, census.train_rows)))
    kept = {join.moments(place), *paths, *map(marks.beside, paths)}
    there = {info.path for info in files.list_folder(os.path.dirname(join.moments(place)))}
    files.remove(sorted(path for path in there - kept if "group-" in os.path.basename(path)))


def choose_damping(join: Join, census: Census) -> Chosen:
    """Chooses κ by some test examples' scores, or some training examples' where there are none."""
    rows = [_spread(join, group, census) for group in census.groups]
    train = np.concatenate(rows) if rows else np.empty((0, join.numbers), np.float32)
    if census.queries:
        some = np.unique(np.linspace(0, census.queries - 1, _QUERIES).astype(np.int64))
        queries = joining.queries_at(join, census, some)
    else:
        queries = train[:: -(-len(train) // _QUERIES) or 1]
    count = len(join.checkpoints)
    parts = []
    for place, (query, row) in enumerate(
        zip(np.split(queries, count, axis=1), np.split(train, count, axis=1), strict=True)
    ):
        means = arrays.read(join.moments(place))
        # Of each half about a half of the sum, which is all that a damping in multiples needs.
        halves = means["H"], means["R"] - means["H"]
        parts.append(Part(halves, query, row))
    return damping.choose(parts)


def _spread(join: Join, group: Group, census: Census) -> np.ndarray:
    """Embeddings of some of a group's examples, evenly spread over it: float32 [n, C·D]."""
    step = -(-census.train_rows // _ROWS)
    found, first = [], 0
    for result in group.shards:
        usable = joining.usable(result)
        chosen = usable[-first % step :: step]
        first += len(usable)
        out = np.empty((len(chosen), join.numbers), np.float32)
        if len(chosen):
            joining.read_rows(join, runs.TRAIN, result.shard, chosen, out)
        found.append(out)
    return np.concatenate(found)


def _chosen(census: Census, join: Join) -> Census:
    chosen = choose_damping(join, census)
    files.write_json(
        join.damping_path,
        {
            "damping": chosen.damping,
            "agreement": {f"{k:g}": value for k, value in chosen.agreement.items()},
        },
    )
    return census


class TakeSums(beam.DoFn):
    """(place of a checkpoint, group) → (place of the checkpoint, group), when its sums are kept."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._counters = Counters("curvature", *_COUNTED)

    def process(self, pair: tuple[int, Group]) -> Iterator[tuple[int, str]]:
        place, group = pair
        tally = Tally()
        yield place, take_sums(self._join, group, place, tally)
        self._counters.take(tally)


def _write(pair: tuple[int, Mapping[str, Iterable[Any]]], join: Join) -> Iterator[tuple[None, int]]:
    place, grouped = pair
    (census,) = grouped["census"]
    if census.groups:
        write_means(join, place, census)
        yield None, place


def _census(pair: tuple[None, Mapping[str, Iterable[Any]]]) -> Census:
    (census,) = pair[1]["census"]
    return census


@dataclasses.dataclass
class TakeCurvature(beam.PTransform):
    """The Census → the same, when the second moments of every checkpoint are on disk.

    With them, where it is to be chosen, is the damping.

    Attributes:
      join: what is joined.
    """

    join: Join

    def expand(self, counted: beam.PCollection) -> beam.PCollection:
        sums = (
            counted
            | "Units" >> beam.FlatMap(self._units)
            | "SpreadUnits" >> beam.Reshuffle()
            | "TakeSums" >> beam.ParDo(TakeSums(self.join))
        )
        # The census goes the same way as what waits for it: as a side input, which all of it also
        # came from, the local runner has been seen to give it late.
        done = (
            {"census": counted | "ForCheckpoints" >> beam.FlatMap(self._places), "sums": sums}
            | "OfCheckpoint" >> beam.CoGroupByKey()
            | "WriteMeans" >> beam.FlatMap(_write, self.join)
        )
        once = counted | "Once" >> beam.Map(lambda census: (None, census))
        ready = (
            {"census": once, "done": done}
            | "WhenWritten" >> beam.CoGroupByKey()
            | "Ready" >> beam.Map(_census)
        )
        if self.join.damping == "auto":
            return ready | "ChooseDamping" >> beam.Map(_chosen, self.join)
        return ready

    def _places(self, census: Census) -> list[tuple[int, Census]]:
        return [(place, census) for place in range(len(self.join.checkpoints))]

    def _units(self, census: Census) -> list[tuple[int, Group]]:
        places = range(len(self.join.checkpoints))
        return [(place, group) for place in places for group in census.groups]


@dataclasses.dataclass
class StateDamping(beam.PTransform):
    """What is made with a preconditioner → one dict for run.json, its "value" and "agreement".

    Attributes:
      join: what was joined.
    """

    join: Join

    def expand(self, made: beam.PCollection) -> beam.PCollection:
        return (
            made.pipeline
            | "Once" >> beam.Create([None])
            | "State" >> beam.Map(_stated, self.join, beam.pvalue.AsList(made))
        )


def _stated(_: None, join: Join, made: object) -> dict[str, Any]:
    del made  # which there is once the damping is chosen
    stated = {"preconditioner": join.score.preconditioner, "value": join.chosen_damping}
    if join.damping != "auto":
        return stated
    return {**stated, "agreement": files.read_json(join.damping_path)["agreement"]}
