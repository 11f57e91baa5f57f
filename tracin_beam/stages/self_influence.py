"""Training embeddings → self-influence tables, whose columns are the registered signals."""

import dataclasses
import inspect
import itertools
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam._version import __version__
from tracin_beam.signals import registry
from tracin_beam.signals.registry import Rows, Signal, Statistic
from tracin_beam.stages import curvature, index, joining, rescore
from tracin_beam.stages.joining import Census, Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.storage import embeddings, files, marks, runs, sinks, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Made, Output, ShardResult

# Of a table, held at a time: each piece is a row group of its own, which readers want long.
_PIECE_ROWS = 65_536

# What tells which example a row is of, before and after the signals.
_BEFORE = (("id", pa.string()), ("label", pa.float64()), ("prediction", pa.float64()))
_AFTER = (("shard", pa.string()), ("position", pa.int64()))


# Records and seconds are those of tables that were not found; the seconds of a table are all of
# them, writing included.
_COUNTED = (
    *("tables_found", "tables_renamed", "tables_written", "records", "batches"),
    *("read_msec", "compute_msec", "table_msec"),
)


# Of the pass for statistics of the whole set, where a signal needs some.
_COUNTED_FIRST = ("statistics_records", "statistics_batches", "statistics_msec")


def schema() -> pa.Schema:
    """The columns of the table."""
    types = {False: pa.float64(), True: pa.list_(pa.float64())}
    columns = [(signal.name, types[signal.by_checkpoint]) for signal in registry.every()]
    return pa.schema([*_BEFORE, *columns, *_AFTER])


def table_of(
    parts: Sequence[Embeddings],
    checkpoints: Sequence[CheckpointFile],
    shard: str,
    statistics: Mapping[str, Any] = MappingProxyType({}),
) -> pa.Table:
    """Rows of the self-influence table for the same examples at every checkpoint.

    Args:
      parts: their embeddings, in checkpoint order.
      checkpoints: in the same order.
      shard: path of their shard.
      statistics: values of those that the signals name.
    """
    last, signals = parts[-1], registry.every()
    rows = _rows(parts, checkpoints, signals)
    columns = {signal.name: signal.of(rows, statistics) for signal in signals}
    return pa.table(
        {
            "id": [tables.text(identity) for identity in last.ids],
            "label": tables.numbers(last.label),
            "prediction": tables.numbers(last.prediction),
            **{name: v if v.ndim == 1 else list(v) for name, v in columns.items()},
            "shard": [shard] * len(last),
            "position": last.position,
        },
        schema=schema(),
    )


def _rows(
    parts: Sequence[Embeddings],
    checkpoints: Sequence[CheckpointFile],
    wanted: Sequence[Signal | Statistic],
) -> Rows:
    needs = sorted({name for one in wanted for name in one.needs})
    return registry.rows_of(parts, [c.rate for c in checkpoints], needs)


def summarise(
    result: ShardResult, output: Output, checkpoints: Sequence[CheckpointFile]
) -> Iterator[dict[str, Any]]:
    """The statistics that the signals name, of some of a shard's examples at a time."""
    wanted = registry.statistics_of(registry.every())
    paths = [output.embeddings(runs.TRAIN, c, result.shard) for c in checkpoints]
    for parts in embeddings.read_checkpoints(paths, result.excluded):
        rows = _rows(parts, checkpoints, wanted)
        yield {one.name: one.function(rows.only(one.needs)) for one in wanted}


def merged(summaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of all examples from those of some; empty where there are none."""
    wanted = registry.statistics_of(registry.every())
    whole: dict[str, Any] = {}
    for summary in filter(None, summaries):
        for one in wanted if whole else ():
            summary = {**summary, one.name: one.merge(whole[one.name], summary[one.name])}
        whole = summary
    return whole


def made_by() -> list[str]:
    """The code that the columns come from."""
    return [__version__, *(inspect.getsource(one.function) for one in registry.every())]


class Summarise(beam.DoFn):
    """ShardResult → the statistics of some of its examples at a time, as `summarise` has them."""

    def __init__(self, output: Output, checkpoints: Sequence[CheckpointFile]) -> None:
        self._output = output
        self._checkpoints = list(checkpoints)
        self._counters = Counters("self_influence", *_COUNTED_FIRST)

    def process(self, result: ShardResult) -> Iterator[dict[str, Any]]:
        tally = Tally()
        summaries = summarise(result, self._output, self._checkpoints)
        for summary in timed(summaries, tally, "statistics"):
            tally.add("statistics_batches")
            yield summary
        tally.add("statistics_records", result.used)
        self._counters.take(tally)


class WriteSelfInfluence(beam.DoFn):
    """ShardResult → (path, Stamp) of its Parquet file.

    A table that is there already is kept; where other shards came or went it gets another number.

    Args:
      output: the output directory.
      checkpoints: in training order.
      shards: fingerprint of every training shard's embeddings and their rates, by path, in order.
      join: of the preconditioner, where there is one: the column `self_influence` is then
        Σ_c weight_c ⟨g_c, T_c g_c⟩, of embeddings or gradients as the score is.
    """

    def __init__(
        self,
        output: Output,
        checkpoints: Sequence[CheckpointFile],
        shards: Mapping[str, str],
        join: Join | None = None,
    ) -> None:
        self._output = output
        self._checkpoints = list(checkpoints)
        self._fingerprints = dict(shards)
        self._numbers = {path: number for number, path in enumerate(shards)}
        self._join = join
        self._counters = Counters("self_influence", *_COUNTED)

    def process(
        self,
        result: ShardResult,
        statistics: Mapping[str, Any] = MappingProxyType({}),
        census: Census | None = None,
    ) -> Iterator[Made]:
        del census  # which there is when the curvature is on disk
        tally = Tally()
        made = self._made(result, statistics, tally)
        self._counters.take(tally)
        yield made

    def _made(self, result: ShardResult, statistics: Mapping[str, Any], tally: Tally) -> Made:
        output, path = self._output, result.shard.path
        name = runs.numbered("self_influence", self._numbers[path], len(self._numbers))
        wanted = output.self_influence(name)
        mark = output.self_influence_mark(result.shard)
        fingerprint = runs.digest(
            [
                self._fingerprints[path],
                result.excluded,
                made_by(),
                pickle.dumps(dict(statistics)).hex(),
                *([self._join.score_identity] if self._join else []),
            ]
        )
        kept = marks.read(mark, output.root, fingerprint)
        if kept and list(kept["files"]) == [wanted]:
            tally.add("tables_found")
            return wanted, kept["files"][wanted]
        files.remove([mark, output.done("self_influence")])
        stamp = self._copied(kept["files"], wanted) if kept else None
        tally.add("tables_written" if stamp is None else "tables_renamed")
        if stamp is None:
            with tally.timed("table"):
                pieces = self._pieces(result, statistics, tally)
                stamp = sinks.write_parquet(wanted, schema(), pieces)
        marks.write(mark, output.root, fingerprint, {wanted: stamp})
        return wanted, stamp

    def _copied(self, kept: Mapping[str, files.Stamp], wanted: str) -> files.Stamp | None:
        """Gives a table another name, unless another shard's has just taken its own."""
        ((path, known),) = kept.items()
        try:
            stamp = files.copy(path, wanted)
        except OSError:
            return None
        return stamp if (stamp.size, stamp.checksum) == (known.size, known.checksum) else None

    def _pieces(
        self, result: ShardResult, statistics: Mapping[str, Any], tally: Tally
    ) -> Iterator[pa.Table]:
        """The rows of a shard's table, some thousand at a time."""
        output = self._output
        paths = [output.embeddings(runs.TRAIN, c, result.shard) for c in self._checkpoints]
        waiting: list[pa.Table] = []
        squares = Squares(self._join, result) if self._join else None
        for parts in timed(embeddings.read_checkpoints(paths, result.excluded), tally, "read"):
            with tally.timed("compute"):
                parts = squares.of(parts) if squares else parts
                rows = table_of(parts, self._checkpoints, result.shard.path, statistics)
            waiting.append(rows)
            tally.add("records", len(rows))
            tally.add("batches")
            if sum(map(len, waiting)) >= _PIECE_ROWS:
                yield pa.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pa.concat_tables(waiting)


class Squares:
    """⟨g_c, T_c g_c⟩ in place of ‖g_c‖², of a shard's examples in their order."""

    def __init__(self, join: Join, result: ShardResult) -> None:
        self._join = join
        self._found = rescore.usable_records(result)

    def of(self, parts: Sequence[Embeddings]) -> list[Embeddings]:
        if self._join.score.on_embeddings:
            squares = [self._join.score.squares(c, part.embedding) for c, part in enumerate(parts)]
        else:
            squares = self._of_gradients(len(parts[-1]))
        return [
            dataclasses.replace(part, squared_norm=own)
            for part, own in zip(parts, squares, strict=True)
        ]

    def _of_gradients(self, count: int) -> list[np.ndarray]:
        loaded = self._join.source.get()
        engine = loaded.engine
        found: list[list[np.ndarray]] = [[] for _ in self._join.checkpoints]
        while count:
            some = list(itertools.islice(self._found, min(engine.batch_size, count)))
            count -= len(some)
            batch = loaded.parse([record.data for record in some])
            for c, checkpoint in enumerate(self._join.checkpoints):
                values = engine.values(checkpoint.path)
                found[c].append(engine.quadratic(values, batch, self._join.score.parts(c)))
        return [np.concatenate(own) for own in found]


@dataclasses.dataclass
class SelfInfluence(beam.PTransform):
    """Training ShardResults → (path, Stamp) of the self-influence tables.

    Attributes: as of `WriteSelfInfluence`, and
      group_rows: training examples whose second moments are summed together.
    """

    output: Output
    checkpoints: Sequence[CheckpointFile]
    shards: Mapping[str, str]
    join: Join | None = None
    group_rows: int = 50_000

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        spread = results | "SpreadResults" >> beam.Reshuffle()
        write = WriteSelfInfluence(self.output, self.checkpoints, self.shards, self.join)
        known: dict[str, Any] = {}
        if self.join:
            counted = results | "Moments" >> Moments(self.join, self.group_rows)
            known["census"] = beam.pvalue.AsSingleton(counted)
        if not registry.statistics_of(registry.every()):
            return spread | "Write" >> beam.ParDo(write, **known)
        statistics = (
            spread
            | "Summarise" >> beam.ParDo(Summarise(self.output, self.checkpoints))
            | "Statistics" >> beam.CombineGlobally(merged)
        )
        known["statistics"] = beam.pvalue.AsSingleton(statistics)
        return spread | "Write" >> beam.ParDo(write, **known)


@dataclasses.dataclass
class Moments(beam.PTransform):
    """Training ShardResults → their Census, once a preconditioner's moments are on disk.

    Attributes:
      join: of the preconditioner.
      group_rows: training examples whose second moments are summed together.
    """

    join: Join
    group_rows: int = 50_000

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        return (
            results.pipeline
            | "Once" >> beam.Create([None])
            | "Census" >> beam.Map(self._census, beam.pvalue.AsList(results))
            | "Curvature" >> curvature.TakeCurvature(self.join)
        )

    def _census(self, _: None, train: Sequence[ShardResult]) -> Census:
        groups = index.planned_groups(self.join, train, self.group_rows)
        return joining.take_census(self.join, groups, train, [], 0)
