"""Shards × checkpoints → embedding files."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from tracin_beam import embeddings, files, records, runs
from tracin_beam.embeddings import Embeddings
from tracin_beam.errors import InputError
from tracin_beam.runs import Output, ShardResult, Unit, UnitResult
from tracin_beam.workers import EngineSource, Loaded

_log = logging.getLogger(__name__)

T = TypeVar("T")


def embed_records(
    loaded: Loaded,
    values: Any,
    target: str,
    shard_name: str,
    source: Iterable[records.Record | records.BadRecord],
) -> Iterator[tuple[Embeddings | None, list[tuple[int, str]]]]:
    """Embeds a shard's records, a batch at a time.

    Args:
      loaded: task and engine.
      values: the checkpoint's weights.
      target: what to differentiate.
      shard_name: for the ids of examples that bring none.
      source: the records, and what could not be read.

    Yields:
      The rows of the records that could be used, or None, and (position, reason) of the others.
    """
    for waiting, bad in _batches(source, loaded.engine.batch_size):
        rejected = [(record.position, record.reason) for record in bad]
        batch, kept, refused = parse_records(loaded, waiting)
        rejected += refused
        rows = None
        if batch is not None:
            rows, refused = _embed_batch(loaded, values, target, shard_name, batch, kept)
            rejected += refused
        yield rows, sorted(rejected)


def parse_records(
    loaded: Loaded, waiting: Sequence[records.Record]
) -> tuple[Any, list[int], list[tuple[int, str]]]:
    """Parses records; those that do not parse are set aside, one by one.

    Returns:
      The batch (None if nothing is left), the positions of its examples, and (position, reason)
      of the records that do not parse.
    """
    batch, good, refused = without_failing(
        lambda some: loaded.parse([record.data for record in some]), waiting
    )
    rejected = [(record.position, f"parse failed: {reason}") for record, reason in refused]
    return batch, [record.position for record in good], rejected


def _embed_batch(
    loaded: Loaded, values: Any, target: str, shard_name: str, batch: Any, positions: list[int]
) -> tuple[Embeddings | None, list[tuple[int, str]]]:
    engine = loaded.engine
    everything = list(range(batch.size))
    result, kept, refused = without_failing(
        lambda some: engine.embed(
            values, batch if len(some) == batch.size else batch.take(some), target
        ),
        everything,
    )
    rejected = [(positions[i], f"the model or the loss fails: {reason}") for i, reason in refused]
    if result is None:
        return None, rejected
    if rejected:
        batch, positions = batch.take(kept), [positions[i] for i in kept]
    finite = np.isfinite(result.squared_norm) & np.isfinite(result.embedding).all(axis=1)
    if target == "loss":
        not_finite_loss = ~np.isfinite(result.loss)
    else:
        not_finite_loss = np.isinf(result.loss)
    usable = finite & ~not_finite_loss
    for i in np.flatnonzero(~usable):
        what = (
            f"the loss is {result.loss[i]}" if not_finite_loss[i] else "the gradient is not finite"
        )
        rejected.append((positions[i], what))
    if batch.ids is not None:
        ids = batch.ids
    else:
        ids = np.array([f"{shard_name}#{p}".encode() for p in positions], object)
    rows = Embeddings(
        ids,
        np.array(positions, np.int64),
        result.label,
        result.prediction,
        result.loss,
        result.squared_norm,
        result.embedding,
    ).take(usable)
    return (rows if len(rows) else None), rejected


def _batches(
    source: Iterable[records.Record | records.BadRecord], size: int
) -> Iterator[tuple[list[records.Record], list[records.BadRecord]]]:
    good: list[records.Record] = []
    bad: list[records.BadRecord] = []
    for record in source:
        if isinstance(record, records.BadRecord):
            bad.append(record)
        else:
            good.append(record)
        if len(good) == size:
            yield good, bad
            good, bad = [], []
    if good or bad:
        yield good, bad


def without_failing(
    attempt: Callable[[Sequence[Any]], T], items: Sequence[Any]
) -> tuple[T | None, Sequence[Any], list[tuple[Any, str]]]:
    """Attempts all items at once, and if that fails, without those that fail on their own.

    Returns:
      The result (None if no item is left), its items, and the others with the reasons.
    """
    try:
        return (attempt(items) if items else None), items, []
    except InputError:
        raise
    except Exception as error:
        refused = _failing(attempt, items, error)
    bad = {id(item) for item, _ in refused}
    kept = [item for item in items if id(item) not in bad]
    return (attempt(kept) if kept else None), kept, refused


def _failing(
    attempt: Callable[[Sequence[Any]], Any], items: Sequence[Any], error: Exception
) -> list[tuple[Any, str]]:
    """The items behind an error, found by halving, each with its own."""
    if len(items) == 1:
        return [(items[0], _reason(error))]
    found = []
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        try:
            attempt(half)
        except Exception as own:  # whatever TensorFlow raises: it is the records'
            found += _failing(attempt, half, own)
    return found


def _reason(error: Exception) -> str:
    """The first line of an error that says something, without TensorFlow's graph nodes."""
    message = getattr(error, "message", None) or str(error)
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Detected at node", "File "))]
    says = next((x for x in lines if not x.endswith("root error(s) found.")), type(error).__name__)
    says = says.removeprefix("(0) ").split("[[{{node")[0].strip()
    return f"{type(error).__name__}: {says}"[:500]


def embed_unit(output: Output, source: EngineSource, unit: Unit, max_rejected: float) -> UnitResult:
    """Writes a unit's embedding file, unless it is there with the same fingerprint."""
    done = runs.read_unit(output, unit)
    if done is not None:
        return done
    loaded = source.get()
    values = loaded.engine.values(unit.checkpoint.path)
    path = output.unit(unit)
    read = 0
    rejected: list[tuple[int, str]] = []

    def counted() -> Iterator[records.Record | records.BadRecord]:
        nonlocal read
        for record in records.read_records(unit.shard.path):
            read += 1
            yield record

    # The mark of an earlier file must not vouch for the new one.
    files.remove([path + ".json"])
    with files.atomic_write(path) as handle:
        writer = embeddings.EmbeddingWriter(handle)
        for rows, refused in embed_records(
            loaded, values, unit.target, unit.shard.name, counted()
        ):
            if rows is not None:
                writer.write(rows)
            rejected += refused
            if len(rejected) > max(1000, max_rejected * read):
                raise too_many(unit.set_name, unit.shard.path, read, rejected)
    result = UnitResult(unit, read, tuple(rejected))
    runs.write_unit(output, result)
    return result


def too_many(
    set_name: str, where: str, read: int, rejected: Sequence[tuple[int, str]]
) -> InputError:
    """The error of a run that could not use too many of its records."""
    position, reason = rejected[0]
    return InputError(
        f"{len(rejected)} of {read} records of the {set_name} set could not be used, more than "
        f"--max_rejected allows. The first is record {position} of {where}: {reason}"
    )


class EmbedUnit(beam.DoFn):
    """Unit → UnitResult."""

    def __init__(
        self, output: Output, source: EngineSource, total: int, max_rejected: float
    ) -> None:
        self._output = output
        self._source = source
        self._total = total
        self._max_rejected = max_rejected
        self._read = Metrics.counter("tracin", "records_read")
        self._rejected = Metrics.counter("tracin", "records_rejected")

    def process(self, unit: Unit) -> Iterator[UnitResult]:
        result = embed_unit(self._output, self._source, unit, self._max_rejected)
        self._read.inc(result.read)
        self._rejected.inc(len(result.rejected))
        _log.info(
            "embedded %s at step %d: %d of %d records",
            unit.shard.name,
            unit.checkpoint.step,
            result.read - len(result.rejected),
            result.read,
        )
        yield result


@dataclasses.dataclass
class Embed(beam.PTransform):
    """Units → ShardResults, one for each shard, when its files at all checkpoints are there.

    Attributes:
      output: where to.
      source: the engine.
      units: all there are, in the order of shards and checkpoints.
      explicit_ids: whether the task's parse gives ids, which may then be duplicates.
      max_rejected: share of the records of a set that may be unusable.
    """

    output: Output
    source: EngineSource
    units: Sequence[Unit]
    explicit_ids: bool
    max_rejected: float

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection:
        results = (
            pipeline
            | "Units" >> beam.Create(list(self.units), reshuffle=False)
            | "FanOut" >> beam.Reshuffle()
            | "EmbedUnit"
            >> beam.ParDo(
                EmbedUnit(self.output, self.source, len(self.units), self.max_rejected)
            )
        )
        keyed = results | "ByShard" >> beam.Map(
            lambda r: ((r.unit.set_name, r.unit.shard.path), r)
        )
        inputs = {"results": keyed}
        if self.explicit_ids:
            last = max(unit.checkpoint.step for unit in self.units)
            inputs["duplicates"] = (
                results
                | "LastCheckpoint" >> beam.Filter(lambda r: r.unit.checkpoint.step == last)
                | "Ids" >> beam.FlatMap(_ids, self.output)
                | "SameId" >> beam.GroupByKey()
                | "Duplicates" >> beam.FlatMap(_duplicates)
            )
        return (
            inputs
            | "Gather" >> beam.CoGroupByKey()
            | "Merge" >> beam.Map(_merge)
            | "WriteRejected" >> beam.Map(_write_rejected, self.output)
            | "BySet" >> beam.Map(lambda r: (r.set_name, r))
            | "SetOf" >> beam.GroupByKey()
            | "Check" >> beam.FlatMap(_check, self.max_rejected)
        )


def _ids(result: UnitResult, output: Output) -> Iterator[tuple[Any, Any]]:
    unit = result.unit
    for rows in embeddings.read(output.unit(unit)):
        for identity, position in zip(rows.ids, rows.position, strict=True):
            yield (unit.set_name, identity), (unit.shard.path, int(position))


def _duplicates(group: tuple[Any, Iterable[tuple[str, int]]]) -> Iterator[tuple[Any, Any]]:
    (set_name, identity), places = group
    first, *others = sorted(places)
    for path, position in others:
        reason = (
            f"duplicate id {bytes(identity).decode(errors='backslashreplace')!r}: "
            f"record {first[1]} of {first[0]} has it"
        )
        yield (set_name, path), (position, reason)


def _merge(group: tuple[Any, dict[str, Iterable[Any]]]) -> ShardResult:
    _, parts = group
    return runs.merge_results(list(parts["results"]), list(parts.get("duplicates", ())))


def _check(group: tuple[str, Iterable[ShardResult]], max_rejected: float) -> list[ShardResult]:
    set_name, results = group
    results = sorted(results, key=lambda r: r.shard.path)
    read = sum(r.read for r in results)
    if read == 0:
        raise InputError(f"the shards of the {set_name} set are empty")
    rejected = [(r, position, why) for r in results for position, why in r.rejected]
    if len(rejected) == read or len(rejected) > max_rejected * read:
        first, position, why = rejected[0]
        pairs = [(position, why)] * len(rejected)
        raise too_many(set_name, first.shard.path, read, pairs)
    return results


def _write_rejected(result: ShardResult, output: Output) -> ShardResult:
    path = output.rejected(result.set_name, result.shard)
    if not result.rejected:
        files.remove([path])
        return result
    with files.atomic_write(path) as handle:
        for position, reason in result.rejected:
            row = {"file": result.shard.path, "position": position, "reason": reason}
            handle.write((json.dumps(row) + "\n").encode())
    return result
