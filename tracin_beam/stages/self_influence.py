"""Training embeddings → self-influence tables, whose columns are the registered signals."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import apache_beam as beam
import pyarrow as pa

from tracin_beam.signals import registry
from tracin_beam.signals.registry import Rows, Signal, Statistic
from tracin_beam.storage import embeddings, runs, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Output, ShardResult

# What tells which example a row is of, before and after the signals.
_BEFORE = (("id", pa.string()), ("label", pa.float64()), ("prediction", pa.float64()))
_AFTER = (("shard", pa.string()), ("position", pa.int64()))


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
    return registry.rows_of(parts, [c.learning_rate for c in checkpoints], needs)


def summarise(
    result: ShardResult, output: Output, checkpoints: Sequence[CheckpointFile]
) -> Iterator[dict[str, Any]]:
    """The statistics that the signals name, of some of a shard's examples at a time."""
    wanted = registry.statistics_of(registry.every())
    paths = [output.embeddings(runs.TRAIN, c.step, result.shard) for c in checkpoints]
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


class WriteSelfInfluence(beam.DoFn):
    """ShardResult → the path of its Parquet file."""

    def __init__(
        self, output: Output, checkpoints: Sequence[CheckpointFile], shards: Sequence[str]
    ) -> None:
        self._output = output
        self._checkpoints = list(checkpoints)
        self._shards = list(shards)

    def process(
        self, result: ShardResult, statistics: Mapping[str, Any] = MappingProxyType({})
    ) -> Iterator[str]:
        paths = [
            self._output.embeddings(runs.TRAIN, c.step, result.shard) for c in self._checkpoints
        ]
        parts = [
            table_of(part, self._checkpoints, result.shard.path, statistics)
            for part in embeddings.read_checkpoints(paths, result.excluded)
        ]
        number = self._shards.index(result.shard.path)
        name = runs.numbered("self_influence", number, len(self._shards))
        path = self._output.self_influence(name)
        tables.write(path, pa.concat_tables(parts or [schema().empty_table()]))
        yield path


@dataclasses.dataclass
class SelfInfluence(beam.PTransform):
    """Training ShardResults → paths of the self-influence tables."""

    output: Output
    checkpoints: Sequence[CheckpointFile]
    shards: Sequence[str]

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        spread = results | "SpreadResults" >> beam.Reshuffle()
        write = WriteSelfInfluence(self.output, self.checkpoints, self.shards)
        if not registry.statistics_of(registry.every()):
            return spread | "Write" >> beam.ParDo(write)
        statistics = (
            spread
            | "Summarise" >> beam.FlatMap(summarise, self.output, self.checkpoints)
            | "Statistics" >> beam.CombineGlobally(merged)
        )
        return spread | "Write" >> beam.ParDo(write, beam.pvalue.AsSingleton(statistics))
