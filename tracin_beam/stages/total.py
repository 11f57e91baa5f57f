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

from tracin_beam.gradients.engine import Queries
from tracin_beam.stages.joining import Join
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.stages.rescore import usable_records
from tracin_beam.storage import embeddings, files, marks, runs, sinks, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Made, ShardResult

_log = logging.getLogger(__name__)

# Files of summed gradients for a checkpoint, at most.
_PARTS = 16
# Records of both sets count once; batches at each checkpoint.
_COUNTED_SUMS = ("sums_found", "sums_made", "test_records", "sum_msec")
_COUNTED = (
    *("tables_found", "tables_written", "records", "batches"),
    *("read_msec", "compute_msec", "table_msec"),
)


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


def in_groups(tests: Iterable[ShardResult]) -> list[list[ShardResult]]:
    """Test shards whose gradients are summed together."""
    ordered = sorted((r for r in tests if r.used), key=lambda result: result.shard.path)
    return [ordered[i::_PARTS] for i in range(min(_PARTS, len(ordered)))]


def parts_of(join: Join, tests: Iterable[ShardResult]) -> list[Part]:
    """The parts whose sums are taken one by one."""
    groups = in_groups(tests)
    found = []
    for place, checkpoint in enumerate(join.checkpoints):
        for group in groups:
            content = [[join.units[r.shard.path], r.excluded] for r in group]
            of = [checkpoint.identity, join.target, content]
            # A score on embeddings has other sums than one of gradients.
            of += ["embeddings"] if join.score.on_embeddings else []
            name = f"{runs.digest(of)}.npy"
            path = join.output.path(
                "evaluation", join.test_name, "gradients", checkpoint.folder, name
            )
            found.append(Part(place, tuple(group), path, sum(r.used for r in group)))
    return found


def summed(join: Join, part: Part) -> np.ndarray:
    """Σ ∇t over a part's usable examples: float64 [N]; Σ S∇t where the score is of embeddings."""
    if join.score.on_embeddings:
        sums = [
            rows.embedding.sum(axis=0, dtype=np.float64)
            for r in part.shards
            for (rows,) in embeddings.read_checkpoints(
                [join.files(join.test_name, r.shard)[part.checkpoint]], r.excluded
            )
        ]
        return np.asarray(np.sum(sums, axis=0))
    loaded = join.source.get()
    engine = loaded.engine
    values = engine.values(join.checkpoints[part.checkpoint].path)
    total = np.zeros(0)
    every = itertools.chain.from_iterable(map(usable_records, part.shards))
    while some := list(itertools.islice(every, engine.batch_size)):
        found = engine.summed(values, loaded.parse([r.data for r in some]), join.target)
        total = found + total if len(total) else found
    return total


class SumGradients(beam.DoFn):
    """Part → Part, when its file is there."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._counters = Counters("total", *_COUNTED_SUMS)

    def process(self, part: Part) -> Iterator[Part]:
        tally = Tally()
        self._make(part, tally)
        self._counters.take(tally)
        yield part

    def _make(self, part: Part, tally: Tally) -> None:
        root, name = self._join.output.root, os.path.basename(part.path)

        def make() -> files.Stamp:
            with tally.timed("sum"):
                total = summed(self._join, part)
            checkpoint = self._join.checkpoints[part.checkpoint]
            runs.check_unchanged([*(result.shard for result in part.shards), checkpoint])
            tally.add("sums_made")
            tally.add("test_records", part.examples * (part.checkpoint == 0))
            with files.atomic_write(part.path) as handle:
                np.save(handle, total)
            stamp: files.Stamp = handle.stamp
            return stamp

        if marks.kept_or_made(part.path, root, name, make):
            tally.add("sums_found")


def read_sums(parts: Sequence[Part], checkpoints: Sequence[CheckpointFile]) -> list[np.ndarray]:
    """The whole test set's summed gradients by checkpoint: float64 [N] each."""
    totals = []
    for place in range(len(checkpoints)):
        mine = sorted(part.path for part in parts if part.checkpoint == place)
        totals.append(np.sum([_load(path) for path in mine], axis=0))
    return totals


def by_weight(join: Join, sums: np.ndarray) -> list[np.ndarray]:
    """Gradients [S, N] of all weights, cut into those of each."""
    cuts = np.cumsum([spec.size for spec in join.source.get().engine.specs])[:-1]
    return np.split(sums, cuts, axis=1)


def transformed(join: Join, place: int, sums: np.ndarray) -> np.ndarray:
    """T_c of sums of gradients, or of embeddings, [S, N] each: the score is linear in them.

    Args:
      join: what is joined.
      place: of the checkpoint.
      sums: of S sets.
    """
    score = join.score
    if score.on_embeddings:
        return score.of_embeddings(place, sums)
    if not score.written_out:
        return sums
    queries = Queries(len(sums), by_weight(join, sums), written_out=True, summed=True)
    return np.concatenate(score.of_gradients(place, queries).gradients, axis=1)


def _load(path: str) -> np.ndarray:
    with files.local_copy(path) as local:
        return np.load(local, allow_pickle=False)


def rows_of(
    join: Join,
    result: ShardResult,
    sums: Sequence[np.ndarray],
    examples: int,
    tally: Tally | None = None,
) -> Iterator[pa.Table]:
    """A training shard's rows of the table, some thousand at a time.

    Args:
      join: what is joined.
      result: the shard.
      sums: of the test set's gradients, or embeddings, by checkpoint, as `transformed` gives them.
      examples: how many test examples there are.
      tally: takes records, batches and the seconds by part.
    """
    tally = tally or Tally()
    loaded = join.source.get()
    engine, size = loaded.engine, loaded.engine.batch_size
    paths = join.files(runs.TRAIN, result.shard)
    if join.score.on_embeddings:
        for parts in embeddings.read_checkpoints(paths, result.excluded):
            products = [
                rows.embedding.astype(np.float64) @ q for rows, q in zip(parts, sums, strict=True)
            ]
            tally.add("records", len(parts[-1]))
            by_checkpoint = join.score.by_checkpoint(np.stack(products, axis=1))
            yield _table(parts[-1], by_checkpoint, examples, result.shard.path)
        return
    path = paths[-1]
    found = timed(usable_records(result), tally, "read")
    for (part,) in embeddings.read_checkpoints([path], result.excluded):
        terms = []
        for start in range(0, len(part), size):
            some = list(itertools.islice(found, min(size, len(part) - start)))
            with tally.timed("compute"):
                batch = loaded.parse([record.data for record in some])
                products = [
                    engine.products(engine.values(checkpoint.path), batch, total)
                    for checkpoint, total in zip(join.checkpoints, sums, strict=True)
                ]
            tally.add("batches", len(products))
            terms.append(join.score.by_checkpoint(np.stack(products, axis=1)))
        tally.add("records", len(part))
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


@dataclasses.dataclass(frozen=True)
class _Table:
    """A training shard's file of the table.

    Attributes:
      path: of the file.
      mark: of what vouches for it.
      fingerprint: of all that is in it.
    """

    path: str
    mark: str
    fingerprint: str


def _table_of(join: Join, result: ShardResult, parts: Iterable[Part]) -> _Table:
    number = join.train_number[result.shard.path]
    name = runs.numbered("total_influence", number, len(join.train))
    path = join.output.path("total_influence", join.test_name, name)
    sums = sorted(part.path for part in parts)
    content = [join.units[result.shard.path], result.excluded, sums, join.score_identity]
    mark = join.output.total_mark(join.test_name, result.shard)
    return _Table(path, mark, runs.digest(content))


class WriteTotals(beam.DoFn):
    """Training ShardResult → (path, Stamp) of its table, made unless that is there already."""

    def __init__(self, join: Join) -> None:
        self._join = join
        self._sums: tuple[list[str], list[np.ndarray]] | None = None
        self._counters = Counters("total", *_COUNTED)

    def process(self, result: ShardResult, parts: Sequence[Part]) -> Iterator[Made]:
        tally = Tally()
        made = self._made(result, parts, tally)
        self._counters.take(tally)
        yield made

    def _made(self, result: ShardResult, parts: Sequence[Part], tally: Tally) -> Made:
        join, root = self._join, self._join.output.root
        table = _table_of(join, result, parts)
        kept = marks.read(table.mark, root, table.fingerprint, {table.path})
        if kept:
            tally.add("tables_found")
            return table.path, kept["files"][table.path]
        names = sorted(part.path for part in parts)
        if self._sums is None or self._sums[0] != names:
            sums = enumerate(read_sums(parts, join.checkpoints))
            self._sums = names, [transformed(join, c, total[None])[0] for c, total in sums]
        examples = sum(part.examples for part in parts if part.checkpoint == 0)
        files.remove([table.mark, join.output.done("influence", join.test_name)])
        rows = rows_of(join, result, self._sums[1], examples, tally) if result.used else iter(())
        with tally.timed("table"):
            stamp = sinks.write_parquet(table.path, tables.TOTAL_INFLUENCE, rows)
        runs.check_unchanged([result.shard, *join.checkpoints])
        marks.write(table.mark, root, table.fingerprint, {table.path: stamp})
        tally.add("tables_written")
        name = result.shard.name
        _log.info("scored %s for the whole test set: %d records", name, result.used)
        return table.path, stamp


def kept(join: Join, train: Iterable[ShardResult], tests: Iterable[ShardResult]) -> list[Made]:
    """The tables of an earlier run, if they are what a run with --total would make now.

    If any is missing or of other examples, checkpoints or scores, all of them are removed: what
    lies in the folder of a table is taken for its rows.
    """
    output, results = join.output, list(train)
    root, folder = output.root, output.path("total_influence", join.test_name)
    there = {info.path for info in files.list_folder(folder)}
    marked = {output.total_mark(join.test_name, result.shard) for result in results}
    parts = parts_of(join, tests)
    found: list[Made] = []
    for table in [_table_of(join, result, parts) for result in results] if there else ():
        mark = marks.read(table.mark, root, table.fingerprint, {table.path})
        found += mark["files"].items() if mark else ()
    if len(found) == len(results) and {path for path, _ in found} == there:
        return found
    if there:
        _log.info("removing %s, which is of another test or training set", folder)
    files.remove([*sorted(marked), *sorted(there)])
    return []


def _remove_others(parts: Sequence[Part]) -> list[Part]:
    """Removes summed gradients that are not of this run."""
    kept = {path for part in parts for path in (part.path, marks.beside(part.path))}
    for folder in {os.path.dirname(path) for path in kept}:
        found = {
            info.path for info in files.list_folder(folder) if info.path.endswith((".npy", ".json"))
        }
        files.remove(sorted(found - kept))
    return list(parts)


@dataclasses.dataclass
class KeptTotals(beam.PTransform):
    """ShardResults of "train" and "tests" → (path, Stamp) of tables that are there and hold still.

    Attributes:
      join: as of a run that would make them.
    """

    join: Join

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        return (
            inputs["train"].pipeline
            | "Once" >> beam.Create([None])
            | "Kept"
            >> beam.FlatMap(
                lambda _, train, tests, join: kept(join, train, tests),
                beam.pvalue.AsList(inputs["train"]),
                beam.pvalue.AsList(inputs["tests"]),
                self.join,
            )
        )


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
