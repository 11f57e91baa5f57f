"""Embeddings and test shards → the influence of every training example on a whole test set.

A score is linear in the query's gradient, so that an example's scores summed over the test set are
its score for one query: the sum of the test examples' gradients. That is taken on the workers,
for some test shards at a checkpoint at a time, and kept in files: gradients are never shuffled.
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.stages import joining
from tracin_beam.stages.joining import Join
from tracin_beam.stages.rescore import records_at
from tracin_beam.storage import embeddings, files, marks, records, runs, sinks, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Made, ShardResult

_log = logging.getLogger(__name__)

# Files of summed gradients for a checkpoint, at most.
_PARTS = 16
_MARK = ".json"


@dataclasses.dataclass(frozen=True)
class Part:
    """Some test shards at a checkpoint.

    Attributes:
      checkpoint: its place.
      shards: of the test set.
      path: of the file with the sum of their examples' gradients; named by all it depends on.
      examples: how many.
    """

    checkpoint: int
    shards: tuple[ShardResult, ...]
    path: str
    examples: int


def parts_of(join: Join, tests: Iterable[ShardResult]) -> list[Part]:
    """The parts whose sums are taken one by one."""
    ordered = sorted((r for r in tests if r.used), key=lambda result: result.shard.path)
    groups = [ordered[i::_PARTS] for i in range(min(_PARTS, len(ordered)))]
    found = []
    for place, checkpoint in enumerate(join.checkpoints):
        for group in groups:
            content = [[join.units[r.shard.path], r.excluded] for r in group]
            name = f"{runs.digest([checkpoint.identity, join.target, content])}.npy"
            path = join.output.path(
                "evaluation", join.test_name, "gradients", str(checkpoint.step), name
            )
            found.append(Part(place, tuple(group), path, sum(r.used for r in group)))
    return found


def summed(join: Join, part: Part) -> np.ndarray:
    """Σ ∇t over a part's usable examples: float64 [N]."""
    loaded = join.source.get()
    engine = loaded.engine
    values = engine.values(join.checkpoints[part.checkpoint].path)
    total = np.zeros(0)
    every = itertools.chain.from_iterable(map(_usable_records, part.shards))
    while some := list(itertools.islice(every, engine.batch_size)):
        found = engine.summed(values, loaded.parse([r.data for r in some]), join.target)
        total = found + total if len(total) else found
    return total


def _usable_records(result: ShardResult) -> Iterator[records.Record]:
    return records_at(result.shard.path, set(joining.usable(result).tolist()))


class SumGradients(beam.DoFn):
    """Part → Part, when its file is there."""

    def __init__(self, join: Join) -> None:
        self._join = join

    def process(self, part: Part) -> Iterator[Part]:
        root, name = self._join.output.root, os.path.basename(part.path)
        if not marks.read(part.path + _MARK, root, name, {part.path}):
            total = summed(self._join, part)
            files.remove([part.path + _MARK])
            with files.atomic_write(part.path) as handle:
                np.save(handle, total)
            marks.write(part.path + _MARK, root, name, {part.path: handle.stamp})
        yield part


def read_sums(parts: Sequence[Part], checkpoints: Sequence[CheckpointFile]) -> list[np.ndarray]:
    """The whole test set's summed gradients by checkpoint: float64 [N] each."""
    totals = []
    for place in range(len(checkpoints)):
        mine = sorted(part.path for part in parts if part.checkpoint == place)
        totals.append(np.sum([_load(path) for path in mine], axis=0))
    return totals


def _load(path: str) -> np.ndarray:
    with files.local_copy(path) as local:
        return np.load(local, allow_pickle=False)


def rows_of(
    join: Join, result: ShardResult, sums: Sequence[np.ndarray], examples: int
) -> Iterator[pa.Table]:
    """A training shard's rows of the table, some thousand at a time.

    Args:
      join: what is joined.
      result: the shard.
      sums: of the test set's gradients, by checkpoint.
      examples: how many test examples there are.
    """
    loaded = join.source.get()
    engine, size = loaded.engine, loaded.engine.batch_size
    path = join.files(runs.TRAIN, result.shard)[-1]
    found = _usable_records(result)
    for (part,) in embeddings.read_checkpoints([path], result.excluded):
        terms = []
        for start in range(0, len(part), size):
            some = list(itertools.islice(found, min(size, len(part) - start)))
            batch = loaded.parse([record.data for record in some])
            products = [
                engine.products(engine.values(checkpoint.path), batch, total)
                for checkpoint, total in zip(join.checkpoints, sums, strict=True)
            ]
            terms.append(join.score.by_checkpoint(np.stack(products, axis=1)))
        yield _table(part, np.concatenate(terms), examples, result.shard.path)


def _table(part: Embeddings, terms: np.ndarray, examples: int, shard: str) -> pa.Table:
    scores = terms.sum(axis=1)
    return pa.table(
        {
            "train_id": [tables.text(identity) for identity in part.ids],
            "score_sum": scores,
            "score_mean": scores / examples,
            "score_by_checkpoint": list(terms),
            "train_label": tables.numbers(part.label),
            "train_prediction": tables.numbers(part.prediction),
            "train_shard": [shard] * len(part),
            "train_position": part.position,
        },
        schema=tables.TOTAL_INFLUENCE,
    )


class WriteTotals(beam.DoFn):
    """Training ShardResult → (path, Stamp) of its table, made unless that is there already."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._sums: tuple[list[str], list[np.ndarray]] | None = None

    def process(self, result: ShardResult, parts: Sequence[Part]) -> Iterator[Made]:
        join = self._join
        number = join.train_number[result.shard.path]
        name = runs.numbered("total_influence", number, len(join.train))
        path = join.output.path("total_influence", join.test_name, name)
        names = sorted(part.path for part in parts)
        output = join.output
        content = [join.units[result.shard.path], result.excluded, names, join.method]
        fingerprint = runs.digest(content)
        mark = output.total_mark(join.test_name, result.shard)
        kept = marks.read(mark, output.root, fingerprint, {path})
        if kept:
            yield path, kept["files"][path]
        else:
            if self._sums is None or self._sums[0] != names:
                self._sums = names, read_sums(parts, join.checkpoints)
            examples = sum(part.examples for part in parts if part.checkpoint == 0)
            rows = rows_of(join, result, self._sums[1], examples) if result.used else iter(())
            files.remove([mark, output.done("influence", join.test_name)])
            stamp = sinks.write_parquet(path, tables.TOTAL_INFLUENCE, rows)
            marks.write(mark, output.root, fingerprint, {path: stamp})
            name = result.shard.name
            _log.info("scored %s for the whole test set: %d records", name, result.used)
            yield path, stamp


def _remove_others(parts: Sequence[Part]) -> list[Part]:
    """Removes summed gradients that are not of this run."""
    kept = {path for part in parts for path in (part.path, part.path + _MARK)}
    for folder in {os.path.dirname(path) for path in kept}:
        found = {
            info.path for info in files.list_folder(folder) if info.path.endswith((".npy", _MARK))
        }
        files.remove(sorted(found - kept))
    return list(parts)


@dataclasses.dataclass
class TotalInfluence(beam.PTransform):
    """ShardResults of "train" and "tests" → (path, Stamp) of the tables.

    Attributes:
      join: what is joined.
    """

    join: Join

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        parts = (
            inputs["train"].pipeline
            | "Once" >> beam.Create([None])
            | "Parts"
            >> beam.FlatMap(
                lambda _, tests, join: parts_of(join, tests),
                beam.pvalue.AsList(inputs["tests"]),
                self.join,
            )
            | "SpreadParts" >> beam.Reshuffle()
            | "SumGradients" >> beam.ParDo(SumGradients(self.join))
        )
        kept = (
            inputs["train"].pipeline
            | "Again" >> beam.Create([None])
            | "RemoveOthers"
            >> beam.FlatMap(lambda _, every: _remove_others(every), beam.pvalue.AsList(parts))
        )
        return (
            inputs["train"]
            | "SpreadTrain" >> beam.Reshuffle()
            | "WriteTotals" >> beam.ParDo(WriteTotals(self.join), beam.pvalue.AsList(kept))
        )
