"""Trying a task out before a run: everything is loaded once, and some records go through it all.

What is wrong with a task, a loss, a checkpoint or the records is said here, before any work.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracin_beam.config import Config
from tracin_beam.errors import InputError, reason
from tracin_beam.inputs import formats
from tracin_beam.inputs.task import Task, load_task
from tracin_beam.storage import files
from tracin_beam.storage.runs import CheckpointFile, Shard

if TYPE_CHECKING:
    from tracin_beam.gradients.batches import Batch, BatchParser
    from tracin_beam.gradients.engine import EngineConfig
    from tracin_beam.stages.workers import EngineSource, Loaded

_log = logging.getLogger(__name__)

# Records that are tried together, and how many of each set at most, should they all be unusable.
_PILOT = 64
_MOST_TRIED = 1024


@dataclasses.dataclass(frozen=True)
class Opened:
    """A task with its engine, built for a record and not tried out yet.

    Attributes:
      loaded: the task and its engine, which are this process's.
      source: what workers make them of.
      fingerprint: of task and projection, by what a user calls its parts.
    """

    loaded: "Loaded"
    source: "EngineSource"
    fingerprint: dict[str, str]


def opened(config: Config, train: Sequence[Shard]) -> Opened:
    """Loads a task, and builds its engine with the first record that can be used."""
    task, task_source = load_task(files.home(config.task))

    from tracin_beam.gradients import projections, quantities
    from tracin_beam.gradients.batches import BatchParser
    from tracin_beam.gradients.engine import EngineConfig
    from tracin_beam.jobs import fingerprints
    from tracin_beam.stages import workers

    if config.projection not in projections.names():
        raise InputError(
            f"--projection={config.projection} is not known; "
            f"take one of {', '.join(projections.names())}."
        )
    quantities.check_target(config.target, task.targets)
    determining = config.embedding_flags()
    del determining["embedding_dtype"]  # of what is written, not of what is computed
    engine_config = EngineConfig(**determining, batch_size=config.batch_size)
    sample, loaded = _load(task, BatchParser(task), engine_config, train)
    # Only now, as building the model may have imported more of the user's modules.
    source = workers.EngineSource(task_source(), engine_config, sample)
    workers.adopt(source, loaded)
    fingerprint = fingerprints.of_task(task, loaded.engine, config, source.task)
    return Opened(loaded, source, fingerprint)


def try_out(
    opened: Opened,
    config: Config,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
) -> "EngineSource":
    """Runs some records through everything.

    Returns:
      The source of an engine that is right for the model.

    Raises:
      InputError: what is wrong with the task, a checkpoint or the records.
    """
    from tracin_beam.planning import speed

    source, loaded = opened.source, opened.loaded
    try:
        tried = [_try(loaded, checkpoint, "loss", "train", train) for checkpoint in checkpoints]
    except InputError as error:
        # A loss that compares the examples of a batch may have no value for one alone.
        try:
            _check_independence(loaded, checkpoints, _first_parsed(loaded, train))
        except InputError:
            raise
        except Exception:  # whatever the records fail by: it is in the first error
            raise error from None
        raise
    usable = [record.data for record in tried[-1].records]
    batch = _check_independence(loaded, checkpoints, usable)
    if _depends_on_padding(loaded, checkpoints, usable):
        source, loaded = _reloaded(source, loaded, padding=False)
    for note in loaded.engine.notes():
        _log.warning("%s", note)
    _check_gradients(tried, "train", "loss")
    if test:
        _check_target(loaded, config.target, checkpoints, test)
        tried = [_try(loaded, c, config.target, "test", test) for c in checkpoints]
        _check_gradients(tried, "test", config.target)
    loaded.engine.check_repeatable()
    try:
        _verify(loaded, checkpoints, batch)
    except InputError as error:
        _log.warning("%s. Each example will be computed by itself, which is slower.", error)
        source, loaded = _reloaded(source, loaded, rules=False)
        _verify(loaded, checkpoints, batch)
    if slow := speed.slow(loaded, checkpoints[-1], batch):
        _log.warning("%s", slow)
    return source


def _load(
    task: Task, parser: "BatchParser", engine_config: "EngineConfig", train: Sequence[Shard]
) -> "tuple[bytes, Loaded]":
    """The engine, built for the first record that parses and that the model takes."""
    from tracin_beam.stages import workers
    from tracin_beam.storage import records

    tried, failures, first = 0, 0, ""
    every = (record for shard in train for record in formats.read(shard.path))
    for record in itertools.islice(every, _MOST_TRIED):
        tried += 1
        try:
            if isinstance(record, records.BadRecord):
                raise ValueError(record.reason)
            parser([record.data])
        except Exception as error:  # whatever the user's parse raises
            first = first or reason(error)
            continue
        try:
            return record.data, workers.load(task, parser, engine_config, record.data)
        except InputError:
            raise
        except Exception as error:  # whatever the user's model raises
            failures += 1
            if failures == 3:
                raise InputError(f"the model fails on what parse gives: {reason(error)}") from error
    if not tried:
        raise InputError(f"--train: {train[0].path} and all other shards are empty")
    raise InputError(
        f"--train: none of the first {tried} records can be parsed. "
        f"The first of {train[0].path}: {first}"
    )


def _first_parsed(loaded: "Loaded", shards: Sequence[Shard]) -> list[bytes]:
    """The first records that parse."""
    from tracin_beam.stages import embed
    from tracin_beam.storage import records

    every = (record for shard in shards for record in formats.read(shard.path))
    some = [r for r in itertools.islice(every, _PILOT) if isinstance(r, records.Record)]
    _, positions, _ = embed.parse_records(loaded, some)
    return [record.data for record in some if record.position in set(positions)]


def _check_target(
    loaded: "Loaded", target: str, checkpoints: Sequence[CheckpointFile], test: Sequence[Shard]
) -> None:
    """Refuses a target of the task's that mixes the examples of a batch."""
    some = _first_parsed(loaded, test)[:8] if target in loaded.task.targets else []
    if some:
        batch = loaded.parse(some)
        for checkpoint in _ends(checkpoints):
            loaded.engine.check_target(target, loaded.engine.values(checkpoint.path), batch)


def _reloaded(
    source: "EngineSource", loaded: "Loaded", **changes: Any
) -> "tuple[EngineSource, Loaded]":
    """This process's engine, built again with changes to its configuration."""
    from tracin_beam.stages import workers

    source = dataclasses.replace(source, config=dataclasses.replace(source.config, **changes))
    loaded = workers.load(loaded.task, loaded.parser, source.config, source.sample)
    workers.adopt(source, loaded)
    return source, loaded


def _depends_on_padding(
    loaded: "Loaded", checkpoints: Sequence[CheckpointFile], usable: Sequence[bytes]
) -> bool:
    """Whether examples have another loss or gradient where they are padded to one length."""
    from tracin_beam.gradients import independence

    some = usable[:: max(1, len(usable) // 8)][:8]
    batch, alone = loaded.parse(some), [loaded.parse([data]) for data in some]
    independence.check_parse(
        (batch.features, batch.label, batch.sample_weight),
        [(one.features, one.label, one.sample_weight) for one in alone],
    )
    values = loaded.engine.values(checkpoints[-1].path)
    if not loaded.engine.depends_on_padding(values, batch, alone):
        return False
    if not batch.extents:
        raise InputError(
            "parse pads the records of a batch to one length, and the model's loss of an example "
            "depends on that padding, and so on what shares its batch. Let parse return the "
            "tf.RaggedTensor itself, or pad to a fixed length, or let the model mask the padding."
        )
    _log.warning(
        "The loss of an example depends on the padding of a batch: examples are computed without "
        "it, those of one length together, which is slower. Masking the padding would avoid it."
    )
    return True


def _check_independence(
    loaded: "Loaded", checkpoints: Sequence[CheckpointFile], usable: Sequence[bytes]
) -> "Batch":
    """Refuses models and losses that give an example no gradient of its own; returns the batch."""
    batch = loaded.parse(usable)
    for checkpoint in _ends(checkpoints):
        loaded.engine.check_independence(loaded.engine.values(checkpoint.path), batch)
    return batch


def _verify(loaded: "Loaded", checkpoints: Sequence[CheckpointFile], batch: "Batch") -> None:
    for checkpoint in _ends(checkpoints):
        loaded.engine.verify(loaded.engine.values(checkpoint.path), batch)


def _ends(checkpoints: Sequence[CheckpointFile]) -> list[CheckpointFile]:
    """The first and the last checkpoint, as a model may behave differently at each."""
    return list(dict.fromkeys([checkpoints[0], checkpoints[-1]]))


@dataclasses.dataclass(frozen=True)
class _Tried:
    """Records that can be used at a checkpoint, and whether any of them has a gradient there."""

    records: list[Any]
    any_gradient: bool


def _check_gradients(tried: Sequence[_Tried], flag: str, target: str) -> None:
    if not any(checkpoint.any_gradient for checkpoint in tried):
        raise InputError(
            f"--{flag}: the gradient of the {target} is zero for each of the first "
            f"{len(tried[-1].records)} examples at every checkpoint, so that all scores would be "
            "zero. Is the loss that of the training, do its labels fit the model, and do --layers "
            "name weights that it depends on?"
        )


def _try(
    loaded: "Loaded", checkpoint: CheckpointFile, target: str, flag: str, shards: Sequence[Shard]
) -> _Tried:
    """Some of the first records that can be used at a checkpoint; an InputError if none can."""
    from tracin_beam.stages import embed

    tried, first = 0, ""
    for shard in shards:
        found = formats.read(shard.path)
        while tried < _MOST_TRIED and (some := list(itertools.islice(found, _PILOT))):
            tried += len(some)
            for rows, rejected in embed.embed_records(loaded, checkpoint, target, shard.name, some):
                if rows is not None:
                    usable = set(rows.position.tolist())
                    records_used = [record for record in some if record.position in usable]
                    return _Tried(records_used, bool(rows.squared_norm.any()))
                position, why = rejected[0]
                first = first or f"The first is record {position} of {shard.path}: {why}"
    if not tried:
        raise InputError(f"--{flag}: {shards[0].path} and all other shards are empty")
    raise InputError(f"--{flag}: none of the first {tried} records can be used. {first}")
