"""Checks before a run: flags → `Run`, or an error that says what is wrong with them.

All that can be wrong with the input is looked for before a graph is made: the task is imported,
the checkpoints loaded, and some records go through the whole computation once.
"""

import contextlib
import dataclasses
import itertools
import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam

from tracin_beam._version import __version__
from tracin_beam.config import Config
from tracin_beam.errors import InputError, reason
from tracin_beam.inputs import formats
from tracin_beam.inputs.checkpoints import read_checkpoints
from tracin_beam.inputs.task import Task, check_keras, load_task
from tracin_beam.jobs.registry import Job
from tracin_beam.planning import dims
from tracin_beam.scoring import methods
from tracin_beam.storage import files, leases, runs
from tracin_beam.storage.runs import TRAIN, CheckpointFile, Output, Shard, Unit

_log = logging.getLogger(__name__)

# Records that are tried together, and how many of each set at most, should they all be unusable.
_PILOT = 64
_MOST_TRIED = 1024
# Times that a run looks at its input, should others in the same output begin and end meanwhile.
_LOOKS = 5


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked configuration and what follows from it.

    Attributes:
      config: the flags.
      output: the output directory.
      checkpoints: in training order.
      train, test: shards; no test shards where the job needs none.
      units: what is to be embedded.
      source: the engine.
      explicit_ids: whether the task gives ids.
      fingerprint: of task and projection, by what a user calls its parts.
      started: seconds since the epoch.
      kind: of the task, as run.json tells it.
      lease: of the results; None where nobody holds one, as of a job that begins by itself.
    """

    config: Config
    output: Output
    checkpoints: tuple[CheckpointFile, ...]
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    units: tuple[Unit, ...]
    source: Any
    explicit_ids: bool
    fingerprint: dict[str, str]
    started: float
    kind: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lease: leases.Lease | None = None

    @property
    def shard_fingerprints(self) -> dict[str, str]:
        """By path of a shard: what its embeddings and their scores depend on."""
        rates = [c.learning_rate for c in self.checkpoints]
        by_shard: dict[str, list[str]] = {}
        for unit in self.units:
            by_shard.setdefault(unit.shard.path, []).append(unit.fingerprint)
        return {path: runs.digest([marks, rates]) for path, marks in by_shard.items()}


@dataclasses.dataclass(frozen=True)
class Found:
    """A run that could begin, and what is in its output directory.

    Attributes:
      run: the checked run; its `config.dim` is a number.
      earlier: run.json of earlier runs; empty if the output is new, or to be overwritten.
      stale: whether all that is in the output is to be overwritten.
      choice: of the dim, if it was chosen now.
      names: what of run.json the run depends on.
    """

    run: Run
    earlier: dict[str, Any]
    stale: bool
    choice: Any
    names: Any = None


@contextlib.contextmanager
def prepared(config: Config, job: Job) -> Iterator[Run]:
    """Checks a configuration against what it names, and begins the job in its output.

    Args:
      config: the flags.
      job: which one.

    Yields:
      The run. As long as it is used no other run is at work on the same results.

    Raises:
      InputError: anything that the run would trip over.
    """
    for _ in range(_LOOKS):
        found = look(config, with_test=job.uses_test)
        run, output = found.run, found.run.output
        name, claims = _claims(job, found)
        with contextlib.ExitStack() as stack:
            try:
                lease = stack.enter_context(leases.held(output.leases, name, claims, _shared(run)))
                if _names(runs.read_run(output)) != found.names:
                    continue  # another run has begun or ended in the meantime
                run = dataclasses.replace(run, lease=lease)
                _begin(found, run)
            except OSError as error:
                raise InputError(
                    f"--output={config.output} cannot be written to: {error}"
                ) from error
            yield run
            return
    raise InputError(f"--output={config.output}: too many runs begin and end there. Run again.")


def _claims(job: Job, found: Found) -> tuple[str, tuple[str, ...]]:
    """What the job is called, and what no other may work on meanwhile."""
    test = [f"the test set {found.run.config.test_name!r}"] if found.run.test else []
    name = " of ".join([job.name, *test])
    if found.stale:
        return name, ("*",)
    return name, tuple(test if job.per_test_set else [job.name, *test])


def _shared(run: Run) -> str:
    """What runs that are at work at the same time must have in common."""
    train = [run.shard_fingerprints[shard.path] for shard in run.train]
    return runs.digest([train, run.fingerprint, run.config.index_rows])


def _names(state: Mapping[str, Any]) -> Any:
    """What of run.json a run depends on."""
    return state.get("fingerprint"), state.get("sets")


def _begin(found: Found, run: Run) -> None:
    """Removes what nobody will use again, and writes run.json."""
    config, sets = run.config, found.earlier.get("sets", {})
    if found.stale:
        runs.clear(run.output)
    described: dict[str, Any] = {TRAIN: {"shards": {s.path: s.name for s in run.train}}}
    if run.test:
        described[config.test_name] = {
            "shards": {s.path: s.name for s in run.test},
            "target": config.target,
        }
    gone = [
        run.output.rejected(name, Shard(path, shard, ""))
        for name in described
        for path, shard in sets.get(name, {}).get("shards", {}).items()
        if path not in described[name]["shards"]
    ]
    files.remove(gone)
    there = files.under(run.output.root)
    if run.lease and not leases.others(run.output.leases, run.lease):
        runs.sweep(run.output, there, run.units)
    news: dict[str, Any] = {"sets": described}
    if found.choice:
        for line in found.choice.lines():
            _log.info("%s", line)
        news["dim_auto"] = dataclasses.asdict(found.choice)
    write_run(run, news, anew=found.stale)


def look(config: Config, *, with_test: bool) -> Found:
    """Checks a configuration against what it names, and writes nothing.

    Raises:
      InputError: anything that the run would trip over.
    """
    started = time.time()
    check_keras()
    output = Output(files.full(config.output) if config.output else "")
    checkpoints = tuple(
        CheckpointFile(
            files.full(c.path), c.step, c.epoch, c.learning_rate, *runs.identify(files.full(c.path))
        )
        for c in read_checkpoints(files.home(config.checkpoints), config.learning_rate)
    )
    earlier = runs.read_run(output) if config.output else {}
    names = _names(earlier)
    sets = earlier.get("sets", {})
    train = _shards(config.train, TRAIN, "train", sets)
    test = _shards(config.test, config.test_name, "test", sets) if with_test and config.test else ()
    both = {files.absolute(s.path) for s in train} & {files.absolute(s.path) for s in test}
    if both:
        raise InputError(f"--train and --test both name {sorted(both)[0]}")

    kept = _earlier_dim(earlier)
    automatic = config.dim == "auto"
    if config.dim == "auto":
        config = dataclasses.replace(config, dim=kept or dims.DIMS[0])
    source, fingerprint, explicit_ids = _try_out(config, checkpoints, train, test)
    changed = stale = _changes(earlier, fingerprint)
    target = sets.get(config.test_name, {}).get("target", config.target)
    if test and target != config.target:
        changed = [
            *stale,
            f"target of the test set {config.test_name!r} ({target} → {config.target}; "
            "another --test_name keeps both)",
        ]
    if changed and not config.overwrite:
        raise InputError(
            f"{config.output} holds results of another run; what changed: {', '.join(changed)}. "
            "Choose another --output, or --overwrite the results that are there."
        )
    if stale:
        earlier = {}
    choice = None
    if automatic and kept and not stale:
        _log.info("--dim=auto: %d, as in the earlier run in %s", kept, config.output)
    elif automatic and config.projection != "none":
        choice, source = _chosen(config, source, checkpoints, train, test)
        config = dataclasses.replace(config, dim=choice.dim)
        fingerprint = {**fingerprint, "dim": str(choice.dim)}
    sides = ((TRAIN, train, "loss"), (config.test_name, test, config.target))
    units = tuple(
        Unit(
            name,
            shard,
            checkpoint,
            target,
            runs.digest(
                [fingerprint, target, shard.path, shard.name, shard.identity, checkpoint.identity]
            ),
        )
        for name, shards, target in sides
        for shard, checkpoint in itertools.product(shards, checkpoints)
    )
    run = Run(
        config,
        output,
        checkpoints,
        train,
        test,
        units,
        source,
        explicit_ids,
        fingerprint,
        started,
        source.get().engine.described_kind(),
    )
    return Found(run, earlier, bool(stale), choice, names)


def _changes(earlier: dict[str, Any], fingerprint: dict[str, str]) -> list[str]:
    from tracin_beam.jobs import fingerprints  # imports Keras

    return fingerprints.changes(earlier.get("fingerprint", fingerprint), fingerprint)


def _earlier_dim(earlier: dict[str, Any]) -> int | None:
    dim = earlier.get("fingerprint", {}).get("dim")
    return int(dim) if dim else None


def _chosen(
    config: Config,
    source: Any,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
) -> tuple[Any, Any]:
    """The dim that a pilot sample finds good, and the engine with it."""
    from tracin_beam.planning import counts, pilot
    from tracin_beam.stages import workers

    counted = counts.count(config, train, test)
    choice = pilot.choose_dim(config, source, checkpoints, train, test, counted)
    loaded = source.get()
    engine_config = dataclasses.replace(source.config, dim=choice.dim)
    source = dataclasses.replace(source, config=engine_config)
    if engine_config != loaded.engine.config:
        workers.adopt(
            source, workers.load(loaded.task, loaded.parser, engine_config, source.sample)
        )
    return choice, source


def _shards(
    pattern: str | None, set_name: str, flag: str, sets: dict[str, Any]
) -> tuple[Shard, ...]:
    known = sets.get(set_name, {}).get("shards", {})
    shards = tuple(runs.find_shards(pattern or "", flag, known))
    formats.check(flag, [shard.path for shard in shards])
    return shards


def _try_out(
    config: Config,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
) -> tuple[Any, dict[str, str], bool]:
    """Loads everything once and runs some records through it."""
    task, task_source = load_task(files.home(config.task))

    from tracin_beam.gradients import projections
    from tracin_beam.gradients.engine import BatchParser, EngineConfig
    from tracin_beam.jobs import fingerprints
    from tracin_beam.stages import workers

    if config.projection not in projections.names():
        raise InputError(
            f"--projection={config.projection} is not known; "
            f"take one of {', '.join(projections.names())}."
        )
    parser = BatchParser(task)
    engine_config = EngineConfig(**config.embedding_flags(), batch_size=config.batch_size)
    sample, loaded = _load(task, parser, engine_config, train)
    # Only now, as building the model may have imported more of the user's modules.
    source = workers.EngineSource(task_source(), engine_config, sample)
    workers.adopt(source, loaded)
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
        tried = [_try(loaded, c, config.target, "test", test) for c in checkpoints]
        _check_gradients(tried, "test", config.target)
    loaded.engine.check_repeatable()
    try:
        _verify(loaded, checkpoints, batch)
    except InputError as error:
        _log.warning("%s. Each example will be computed by itself, which is slower.", error)
        source, loaded = _reloaded(source, loaded, rules=False)
        _verify(loaded, checkpoints, batch)
    if slow := loaded.engine.slow_weights():
        _log.warning("%s", _cost_of(slow, loaded, checkpoints[-1], batch))
    return source, fingerprints.of_task(task, loaded.engine, config, source.task), parser.gives_ids


def _load(task: Task, parser: Any, engine_config: Any, train: Sequence[Shard]) -> tuple[bytes, Any]:
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


def _first_parsed(loaded: Any, shards: Sequence[Shard]) -> list[bytes]:
    """The first records that parse."""
    from tracin_beam.stages import embed
    from tracin_beam.storage import records

    every = (record for shard in shards for record in formats.read(shard.path))
    some = [r for r in itertools.islice(every, _PILOT) if isinstance(r, records.Record)]
    _, positions, _ = embed.parse_records(loaded, some)
    return [record.data for record in some if record.position in set(positions)]


def _reloaded(source: Any, loaded: Any, **changes: Any) -> tuple[Any, Any]:
    """This process's engine, built again with changes to its configuration."""
    from tracin_beam.stages import workers

    source = dataclasses.replace(source, config=dataclasses.replace(source.config, **changes))
    loaded = workers.load(loaded.task, loaded.parser, source.config, source.sample)
    workers.adopt(source, loaded)
    return source, loaded


def _depends_on_padding(
    loaded: Any, checkpoints: Sequence[CheckpointFile], usable: Sequence[bytes]
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


def _cost_of(
    slow: Mapping[str, str | None], loaded: Any, checkpoint: CheckpointFile, batch: Any
) -> str:
    """Which weights no rule is for, and by how much they slow the run."""
    engine = loaded.engine
    factor = engine.slowdown(engine.values(checkpoint.path), batch)
    names = list(slow)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    layers = sorted({layer for layer in slow.values() if layer})
    how = f"layer {', '.join(layers[:5])}" if None not in slow.values() else "the whole model"
    return (
        f"No rule is for {len(names)} of {len(engine.weights)} weights: {shown}. For them {how} is "
        f"run for each example, and embedding takes {factor:.1f} times as long as without them."
    )


def _check_independence(
    loaded: Any, checkpoints: Sequence[CheckpointFile], usable: Sequence[bytes]
) -> Any:
    """Refuses models and losses for which an example has no gradient of its own; their batch."""
    batch = loaded.parse(usable)
    for checkpoint in _ends(checkpoints):
        loaded.engine.check_independence(loaded.engine.values(checkpoint.path), batch)
    return batch


def _verify(loaded: Any, checkpoints: Sequence[CheckpointFile], batch: Any) -> None:
    for checkpoint in _ends(checkpoints):
        loaded.engine.verify(loaded.engine.values(checkpoint.path), batch)


def _ends(checkpoints: Sequence[CheckpointFile]) -> list[CheckpointFile]:
    """The first and the last, where a model may behave differently."""
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
    loaded: Any, checkpoint: CheckpointFile, target: str, flag: str, shards: Sequence[Shard]
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


# Of what run.json holds by name, and jobs add to.
_MERGED = ("sets", "counts", "timings")


def write_run(run: Run, news: dict[str, Any], *, anew: bool = False) -> dict[str, Any]:
    """Writes run.json: what is in it, unless it is to begin anew, what this run is, and its news.

    Returns:
      What is in it then.
    """
    with leases.waited_for(run.output.path("_state", "writing"), "writing run.json", "run.json"):
        return _merge_run(run, news, {} if anew else runs.read_run(run.output))


def _merge_run(run: Run, news: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    described = {
        "method": methods.DEFAULT,
        "config": run.config.recorded(),
        "versions": _versions(),
        "fingerprint": run.fingerprint,
        "kind": run.kind,
        "checkpoints": [
            {"path": c.path, "step": c.step, "epoch": c.epoch, "learning_rate": c.learning_rate}
            for c in run.checkpoints
        ],
    }
    merged = {key: {**earlier.get(key, {}), **news[key]} for key in _MERGED if key in news}
    state = {**earlier, **described, **news, **merged}
    files.write_json(run.output.run, state)
    return state


def _versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    return {
        "tracin_beam": __version__,
        "apache_beam": beam.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
