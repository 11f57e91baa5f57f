"""Shards × checkpoints → embedding files."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.inputs import formats
from tracin_beam.stages import progress
from tracin_beam.stages.batching import ahead, without_failing
from tracin_beam.stages.metrics import Counters, Tally, timed
from tracin_beam.stages.workers import EngineSource, Loaded
from tracin_beam.storage import embeddings, files, marks, records, runs, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Output, ShardResult, Unit, UnitResult

_log = logging.getLogger(__name__)

_LONGEST_ID = 200  # bytes of one in a message

# Records of a shard count at each checkpoint. Bytes, batches and seconds are those of units that
# were not found; reading and parsing, computing, and writing go on at the same time.
_COUNTED = (
    *("units_found", "units_embedded", "records_read", "records_rejected"),
    *("bytes", "batches", "read_msec", "compute_msec", "write_msec"),
)


def embed_records(
    loaded: Loaded,
    checkpoint: CheckpointFile,
    target: str,
    shard_name: str,
    source: Iterable[records.Record | records.BadRecord],
    tally: Tally | None = None,
) -> Iterator[tuple[Embeddings | None, list[tuple[int, str]]]]:
    """Embeds a shard's records, a batch at a time.

    Args:
      loaded: task and engine.
      checkpoint: whose weights to take.
      target: what to differentiate.
      shard_name: for the ids of examples that bring none.
      source: the records, and what could not be read.
      tally: takes the records and their bytes, the batches, and the seconds of reading and of
        computing.

    Yields:
      The rows of the records that could be used, or None, and (position, reason) of the others.
    """
    tally = tally or Tally()
    for batch, kept, rejected in ahead(timed(_parsed(loaded, source, tally), tally, "read")):
        rows = None
        if batch is not None:
            tally.add("batches")
            with tally.timed("compute"):
                rows, refused = _embed_batch(loaded, checkpoint, target, shard_name, batch, kept)
            rejected += [(place, f"{why} at step {checkpoint.step}") for place, why in refused]
        yield rows, sorted(rejected)


def _parsed(
    loaded: Loaded, source: Iterable[records.Record | records.BadRecord], tally: Tally
) -> Iterator[tuple[Any, list[int], list[tuple[int, str]]]]:
    """Parsed batches of records, as `parse_records` gives them, with what could not be read."""
    for waiting, bad in batches(source, loaded.engine.batch_size):
        tally.add("records_read", len(waiting) + len(bad))
        tally.add("bytes", sum(len(record.data) for record in waiting))
        batch, kept, refused = parse_records(loaded, waiting)
        yield batch, kept, [*((record.position, record.reason) for record in bad), *refused]


def parse_records(
    loaded: Loaded, waiting: Sequence[records.Record]
) -> tuple[Any, list[int], list[tuple[int, str]]]:
    """Parses records; those that do not parse are set aside, one by one.

    Returns:
      The batch (None if nothing is left), the positions of its examples, and (position, reason)
      of the records that do not parse.
    """
    batch, good, refused = without_failing(
        lambda some: loaded.parse([waiting[i].data for i in some]), len(waiting)
    )
    rejected = [(waiting[i].position, f"parse failed: {why}") for i, why in refused]
    return batch, [waiting[i].position for i in good], rejected


def _embed_batch(
    loaded: Loaded,
    checkpoint: CheckpointFile,
    target: str,
    shard_name: str,
    batch: Any,
    positions: list[int],
) -> tuple[Embeddings | None, list[tuple[int, str]]]:
    engine = loaded.engine
    values = engine.values(checkpoint.path)
    result, kept, refused = without_failing(
        lambda some: engine.embed(
            values, batch if len(some) == batch.size else batch.take(some), target
        ),
        batch.size,
    )
    rejected = [(positions[i], f"the model or the loss fails: {why}") for i, why in refused]
    if result is None:
        return None, rejected
    if rejected:
        batch, positions = batch.take(kept), [positions[i] for i in kept]
    # A sum is finite only where all of its numbers are, and takes a fraction of looking at each.
    finite = np.isfinite(result.squared_norm) & np.isfinite(result.embedding.sum(axis=1))
    if not finite.all():
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
        ids=ids,
        position=np.array(positions, np.int64),
        **{name: getattr(result, name) for name in embeddings.COMPUTED},
    )
    if not usable.all():
        rows = rows.take(usable)
    return (rows if len(rows) else None), rejected


def batches(
    source: Iterable[records.Record | records.BadRecord], size: int
) -> Iterator[tuple[list[records.Record], list[records.BadRecord]]]:
    """Records, at most so many at a time, and what could not be read between them."""
    good: list[records.Record] = []
    bad: list[records.BadRecord] = []
    for record in source:
        if isinstance(record, records.BadRecord):
            bad.append(record)
        else:
            good.append(record)
        # No more bad records wait than a batch has, either.
        if len(good) == size or len(bad) == size:
            yield good, bad
            good, bad = [], []
    if good or bad:
        yield good, bad


def embed_unit(
    output: Output,
    source: EngineSource,
    unit: Unit,
    max_rejected: float,
    tally: Tally,
    dtype: str = "float32",
) -> UnitResult:
    """Writes a unit's embedding file, and then its mark; the tally, a new one, takes what it cost.

    The numbers are stored as `dtype`, one of `embeddings.DTYPES`.

    Raises:
      InputError: too many of the first records cannot be used, which rejected/ then tells of; or
        the shard or the checkpoint is not what the unit was to be made from.
    """
    loaded = source.get()
    path = output.unit(unit)
    used = done = 0
    rejected: list[tuple[int, str]] = []
    crc = files.Crc()
    source_records = formats.read(unit.shard.path, crc)
    # The mark of an earlier file must not vouch for the new one.
    files.remove([marks.beside(path)])
    with (
        files.atomic_write(path) as handle,
        progress.piece("embedding", unit.shard.size) as piece,
    ):
        writer = embeddings.EmbeddingWriter(handle, dtype)
        # Reading and parsing, computing, and writing each have a thread.
        for rows, refused in ahead(
            embed_records(
                loaded, unit.checkpoint, unit.target, unit.shard.name, source_records, tally
            )
        ):
            if rows is not None:
                with tally.timed("write"):
                    writer.write(rows)
                used += len(rows)
            rejected += refused
            before, done = done, used + len(rejected)
            counted = tally.read()
            share = (done - before) / max(counted.get("records_read", 0), 1)
            piece.add(done - before, counted.get("bytes", 0) * share)
            if len(rejected) > max(1000, max_rejected * done):
                partly = ShardResult(unit.set_name, unit.shard, done, tuple(rejected))
                _write_rejected(partly, output)
                raise too_many(unit.set_name, unit.shard.path, done, rejected)
        _check_inputs(unit, crc)
    result = UnitResult(unit, done, tuple(rejected), handle.stamp)
    runs.write_unit(output, result)
    return result


def _check_inputs(unit: Unit, crc: files.Crc) -> None:
    """What was read must be what the unit's fingerprint names."""
    shard = unit.shard
    checksum = crc.hexdigest() if files.is_local(shard.path) else files.checksum(shard.path)
    if f"{crc.size}:{checksum}" != shard.identity:
        raise runs.changed_while_used(shard)
    if not runs.is_unchanged(unit.checkpoint):
        raise runs.changed_while_used(unit.checkpoint)


def too_many(
    set_name: str, where: str, read: int, rejected: Sequence[tuple[int, str]]
) -> InputError:
    """The error of a run that could not use too many of its records."""
    position, why = rejected[0]
    return InputError(
        f"{len(rejected)} of {read} records of the {set_name} set could not be used, more than "
        f"--max_rejected allows. The first is record {position} of {where}: {why}"
    )


class EmbedUnit(beam.DoFn):
    """Unit → (set and path of its shard, UnitResult)."""

    def __init__(
        self, output: Output, source: EngineSource, max_rejected: float, dtype: str
    ) -> None:
        self._output = output
        self._source = source
        self._max_rejected = max_rejected
        self._dtype = dtype
        self._counters = Counters("embed", *_COUNTED)

    def process(self, unit: Unit) -> Iterator[tuple[tuple[str, str], UnitResult]]:
        result, verb, tally = runs.read_unit(self._output, unit), "found", Tally()
        if result is None:
            result = embed_unit(
                self._output, self._source, unit, self._max_rejected, tally, self._dtype
            )
            verb = "embedded"
        else:
            progress.skip("embedding", unit.shard.size)
            tally.add("records_read", result.read)
        tally.add(f"units_{verb}")
        tally.add("records_rejected", len(result.rejected))
        self._counters.take(tally)
        _log.info(
            "%s %s at step %d: %d of %d records",
            verb,
            unit.shard.name,
            unit.checkpoint.step,
            result.read - len(result.rejected),
            result.read,
        )
        yield (unit.set_name, unit.shard.path), result


@dataclasses.dataclass
class Embed(beam.PTransform):
    """Units → ShardResults, one for each shard, when its files at all checkpoints are there.

    Attributes:
      output: where to.
      source: the engine.
      units: all there are, in the order of shards and checkpoints.
      explicit_ids: whether the task's parse gives ids, which may then be duplicates.
      max_rejected: share of the records of a set that may be unusable.
      dtype: of the embeddings on disk, one of `embeddings.DTYPES`.
    """

    output: Output
    source: EngineSource
    units: Sequence[Unit]
    explicit_ids: bool
    max_rejected: float
    dtype: str = "float32"

    def expand(self, pipeline: beam.Pipeline) -> beam.PCollection:
        listed = self.units
        units = (
            pipeline
            | "All" >> beam.Create([None], reshuffle=False)
            | "Units" >> beam.FlatMap(lambda _: listed)
            | "FanOut" >> beam.Reshuffle()
            | "EmbedUnit"
            >> beam.ParDo(EmbedUnit(self.output, self.source, self.max_rejected, self.dtype))
            | "UnitsOfShard" >> beam.GroupByKey()
        )
        if self.explicit_ids:
            last = max((u.checkpoint for u in self.units), key=lambda c: c.order)
            shards = units | "Merge" >> beam.Map(lambda group: runs.merge_results(list(group[1])))
            duplicates = (
                shards
                | "Ids" >> beam.FlatMap(_ids, self.output, last)
                | "SameId" >> beam.GroupByKey()
                | "Duplicates" >> beam.FlatMap(_duplicates)
            )
            keyed = shards | "ByShard" >> beam.Map(lambda r: ((r.set_name, r.shard.path), r))
            whole = (
                {"shard": keyed, "duplicates": duplicates}
                | "Gather" >> beam.CoGroupByKey()
                | "WriteRejected"
                >> beam.Map(
                    lambda group, output: _by_set(_without_duplicates(group), output), self.output
                )
            )
        else:
            whole = units | "WriteRejected" >> beam.Map(
                lambda group, output: _by_set(runs.merge_results(list(group[1])), output),
                self.output,
            )
        return (
            whole
            | "SetOf" >> beam.GroupByKey()
            | "Check" >> beam.FlatMap(_check, self.max_rejected)
        )


def _ids(result: ShardResult, output: Output, last: CheckpointFile) -> Iterator[tuple[Any, Any]]:
    path = output.embeddings(result.set_name, last, result.shard)
    for (rows,) in embeddings.read_checkpoints([path], result.excluded):
        for identity, position in zip(rows.ids, rows.position, strict=True):
            yield (result.set_name, identity), (result.shard.path, int(position))


def _duplicates(group: tuple[Any, Iterable[tuple[str, int]]]) -> Iterator[tuple[Any, Any]]:
    (set_name, identity), places = group
    first, *others = sorted(places)
    for path, position in others:
        why = (
            f"duplicate id {tables.text(bytes(identity)[:_LONGEST_ID])!r}: "
            f"record {first[1]} of {first[0]} has it"
        )
        yield (set_name, path), (position, why)


def _without_duplicates(group: tuple[Any, dict[str, Iterable[Any]]]) -> ShardResult:
    _, parts = group
    (result,) = parts["shard"]
    rejected = sorted([*result.rejected, *parts["duplicates"]])
    return dataclasses.replace(result, rejected=tuple(rejected))


def _check(group: tuple[str, Iterable[ShardResult]], max_rejected: float) -> list[ShardResult]:
    set_name, results = group
    results = sorted(results, key=lambda r: r.shard.path)
    read = sum(r.read for r in results)
    if read == 0:
        raise InputError(f"the shards of the {set_name} set are empty")
    rejected = [(r, position, why) for r in results for position, why in r.rejected]
    # Rounded up, so that of a few records one may always be bad.
    if len(rejected) == read or len(rejected) > math.ceil(max_rejected * read):
        first, position, why = rejected[0]
        pairs = [(position, why)] * len(rejected)
        raise too_many(set_name, first.shard.path, read, pairs)
    return results


def _by_set(result: ShardResult, output: Output) -> tuple[str, ShardResult]:
    """A shard's result by its set, once what it rejected is written."""
    return result.set_name, _write_rejected(result, output)


def _write_rejected(result: ShardResult, output: Output) -> ShardResult:
    path = output.rejected(result.set_name, result.shard)
    if not result.rejected:
        files.remove([path])
        return result
    with files.atomic_write(path) as handle:
        for position, why in result.rejected:
            row = {"file": result.shard.path, "position": position, "reason": why}
            handle.write((json.dumps(row) + "\n").encode())
    return result
