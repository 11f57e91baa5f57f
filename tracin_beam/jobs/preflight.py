"""Checks before a run: flags → `Run`, or an error that says what is wrong with them.

All that can be wrong with the input is looked for before a graph is made; `tryout` loads the task
and the checkpoints, and lets some records go through the whole computation once.
"""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracin_beam.config import Config
from tracin_beam.errors import InputError, os_problem
from tracin_beam.inputs import formats
from tracin_beam.inputs.checkpoints import moments_of, read_checkpoints
from tracin_beam.inputs.task import check_keras
from tracin_beam.jobs import tryout
from tracin_beam.jobs.registry import Job
from tracin_beam.jobs.run_json import write_run
from tracin_beam.planning import dims
from tracin_beam.storage import embeddings, files, leases, listings, runs
from tracin_beam.storage.runs import TRAIN, CheckpointFile, Output, Shard, Unit

if TYPE_CHECKING:
    from tracin_beam.planning.pilot import Choice
    from tracin_beam.stages.workers import EngineSource

_log = logging.getLogger(__name__)

# Times that a run checks its input, should other runs in the same output begin and end meanwhile.
_ATTEMPTS = 5


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
      shard_fingerprints: a digest of what the embeddings and scores of a shard depend on, by the
        shard's path.
      started: seconds since the epoch.
      kind: of the task, as run.json tells it.
      selection: which of the checkpoints were taken and why, as run.json tells it; None for all.
      lease: of the results; None where nobody holds one, as of a job that begins by itself.
    """

    config: Config
    output: Output
    checkpoints: tuple[CheckpointFile, ...]
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    units: tuple[Unit, ...]
    source: "EngineSource"
    explicit_ids: bool
    fingerprint: dict[str, str]
    shard_fingerprints: dict[str, str]
    started: float
    kind: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lease: leases.Lease | None = None
    selection: Mapping[str, Any] | None = None
    untried: tryout.Opened | None = None

    def tried_out(self) -> "Run":
        """The same run, which may compute something.

        Raises:
          InputError: anything that it would trip over.
        """
        if self.untried is None:
            return self
        source = tryout.try_out(self.untried, self.config, self.checkpoints, self.train, self.test)
        return dataclasses.replace(self, source=source, untried=None)

    def travelling(self) -> "Run":
        """The same run, for a graph: its long lists travel by path."""
        out = self.output
        return dataclasses.replace(
            self,
            train=listings.of_list(out, self.train),
            test=listings.of_list(out, self.test),
            units=listings.of_list(out, self.units),
            shard_fingerprints=listings.of_dict(out, self.shard_fingerprints),
        )


@dataclasses.dataclass(frozen=True)
class CheckedRun:
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
    choice: "Choice | None"
    names: Any = None


@contextlib.contextmanager
def prepared(
    config: Config, job: Job, is_known: Callable[[Run], bool] = lambda _: False
) -> Iterator[Run]:
    """Checks a configuration against what it names, and begins the job in its output.

    Args:
      config: the flags.
      job: which one.
      is_known: as of `check`.

    Yields:
      The run. As long as it is used no other run is at work on the same results.

    Raises:
      InputError: anything that the run would trip over.
    """
    for _ in range(_ATTEMPTS):
        found = check(config, with_test=job.uses_test, is_known=is_known)
        run, output = found.run, found.run.output
        name, claims = _claims(job, found)
        with contextlib.ExitStack() as stack:
            try:
                lease = stack.enter_context(leases.held(output.leases, name, claims, _shared(run)))
                if _names(runs.read_run(output)) != found.names:
                    continue  # another run has begun or ended in the meantime
                run = dataclasses.replace(run, lease=lease)
                _begin(found, run)
            except (OSError, InputError) as error:
                # A file that cannot be written is an InputError already, which names no flag.
                said: object = error
                if isinstance(error, OSError):
                    said = os_problem(error) or error
                elif not isinstance(error.__cause__, OSError):
                    raise
                raise InputError(
                    f"--output={config.output} cannot be written to: {said}"
                ) from error
            yield run
            return
    raise InputError(f"--output={config.output}: too many runs begin and end there. Run again.")


def _claims(job: Job, found: CheckedRun) -> tuple[str, tuple[str, ...]]:
    """What the job is called, and what no other job may work on meanwhile."""
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
    """The entries of run.json that a run depends on."""
    return state.get("fingerprint"), state.get("sets"), state.get("folders")


def _begin(found: CheckedRun, run: Run) -> None:
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
    folders = {c.folder: {"path": c.path, "identity": c.identity} for c in run.checkpoints}
    entries: dict[str, Any] = {"sets": described, "folders": folders}
    if found.choice:
        for line in found.choice.lines():
            _log.info("%s", line)
        entries["dim_auto"] = dataclasses.asdict(found.choice)
    write_run(run, entries, anew=found.stale)


def check(
    config: Config, *, with_test: bool, is_known: Callable[[Run], bool] = lambda _: False
) -> CheckedRun:
    """Checks a configuration against what it names, and writes nothing.

    Args:
      config: the flags.
      with_test: whether the test set belongs to it.
      is_known: whether an earlier run had the same inputs, so that it need not be tried out here.

    Raises:
      InputError: anything that the run would trip over.
    """
    started = time.time()
    selection: dict[str, Any] | None = None
    check_keras()
    output = Output(files.full(config.output) if config.output else "")
    earlier = runs.read_run(output) if config.output else {}
    checkpoints = runs.in_folders(_checkpoints(config), earlier.get("folders", {}))
    read = _names(earlier)
    sets = earlier.get("sets", {})
    train = _shards(config.train, TRAIN, "train", sets)
    test = _shards(config.test, config.test_name, "test", sets) if with_test and config.test else ()
    _check_apart(train, test)
    every = checkpoints
    if config.checkpoints_select and config.checkpoints_select_by == "evenly":
        checkpoints, selection = _selected(config, every, {}, None, train)
    kept = _earlier_dim(earlier)
    automatic = config.dim == "auto"
    if config.dim == "auto":
        config = dataclasses.replace(config, dim=kept or dims.DIMS[0])
    given = config.embedding_dtype
    config = _with_dtype(config, earlier)
    opened = tryout.opened(config, train)
    source, fingerprint = opened.source, opened.fingerprint
    stale = _changes(earlier, fingerprint)
    by_loss = config.checkpoints_select and config.checkpoints_select_by == "loss"
    at_once = stale or by_loss or (automatic and not kept)
    if at_once:
        source = tryout.try_out(opened, config, checkpoints, train, test)
    if by_loss:
        known = earlier.get("selection") or {}
        checkpoints, selection = _selected(config, every, known, source, train)
    _check_same(config, stale, sets if test else {})
    if stale:
        earlier = {}
        config = _with_dtype(dataclasses.replace(config, embedding_dtype=given), earlier)
        fingerprint = {**fingerprint, "embedding_dtype": config.embedding_dtype}
    choice = None
    if automatic and kept and not stale:
        _log.info("--dim=auto: %d, as in the earlier run in %s", kept, config.output)
    elif automatic and config.projection != "none":
        choice, source = _chosen(config, source, checkpoints, train, test)
        config = dataclasses.replace(config, dim=choice.dim)
        fingerprint = {**fingerprint, "dim": str(choice.dim)}
    target = _target_of(source, config.target)
    units = _units(config, fingerprint, target, checkpoints, train, test)
    run = Run(
        config,
        output,
        checkpoints,
        train,
        test,
        units,
        source,
        opened.loaded.parser.gives_ids,
        fingerprint,
        _by_shard(units, checkpoints),
        started,
        source.get().engine.described_kind(),
        selection=selection,
        untried=None if at_once else opened,
    )
    if not is_known(run):
        run = run.tried_out()
    return CheckedRun(run, earlier, bool(stale), choice, read)


def _checkpoints(config: Config) -> tuple[CheckpointFile, ...]:
    """The checkpoints, with what tells whether one is still the same later.

    Raises:
      InputError: one cannot be used, or a training run is given twice.
    """
    trainings = [
        read_checkpoints(files.home(spec), config.learning_rate) for spec in config.checkpoints
    ]
    found = tuple(
        CheckpointFile(
            path,
            c.step,
            c.epoch,
            c.learning_rate,
            *runs.identify(path),
            training=number,
            trainings=len(trainings),
            moments=_moments(path, c.step) if config.gradient == "adam" else None,
        )
        for number, training in enumerate(trainings)
        for c in training
        for path in [files.full(c.path)]
    )
    weights: dict[tuple[str, ...], int] = {}
    for number in range(len(trainings)):
        mine = tuple(c.identity for c in found if c.training == number)
        other = weights.setdefault(mine, number)
        if other != number:
            raise InputError(
                f"--checkpoints: {config.checkpoints[other]} and {config.checkpoints[number]} are "
                "the same training run: give each once."
            )
    return found


def _moments(path: str, step: int) -> CheckpointFile:
    """The optimizer's second moments beside a checkpoint.

    Raises:
      InputError: there are none.
    """
    moments = moments_of(path)
    if not files.exists(moments):
        raise InputError(
            f"--gradient=adam: there is no {moments}, the optimizer's second moments beside "
            f"{path}: train with TracInCheckpoint(…, optimizer_state=True)."
        )
    return CheckpointFile(moments, step, None, 0.0, *runs.identify(moments))


def _selected(
    config: Config,
    every: Sequence[CheckpointFile],
    known: Mapping[str, Any],
    source: "EngineSource | None",
    train: Sequence[Shard],
) -> tuple[tuple[CheckpointFile, ...], dict[str, Any]]:
    """Some checkpoints of each training run, and what run.json says of them.

    Args:
      config: the flags.
      every: the checkpoints of all runs.
      known: what an earlier run's said; its losses hold still.
      source: to compute losses with; None where they do not count.
      train: the training shards.
    """
    from tracin_beam.planning import checkpoints as selecting

    losses: dict[str, float] = {}
    if source:
        before = known["losses"] if files.fits(known, {"losses": {str: float}}) else {}
        losses = {c.identity: before[c.identity] for c in every if c.identity in before}
        new = [c for c in every if c.identity not in losses]
        found_now = selecting.mean_losses(source.get(), [c.path for c in new], train)
        losses |= dict(zip((c.identity for c in new), found_now, strict=True))
    found: list[CheckpointFile] = []
    for number in range(len(config.checkpoints)):
        mine = [c for c in every if c.training == number]
        wanted = min(config.checkpoints_select, len(mine))
        if source:
            places = selecting.by_fall([losses[c.identity] for c in mine], wanted)
        else:
            places = selecting.evenly(len(mine), wanted)
        rates = selecting.mean_rates([c.learning_rate for c in mine], places)
        found += [
            dataclasses.replace(mine[place], learning_rate=rate)
            for place, rate in zip(places, rates, strict=True)
        ]
    said = {"by": config.checkpoints_select_by, "of": len(every), "losses": losses}
    steps = ", ".join(str(c.step) for c in found)
    _log.info("%d of %d checkpoints: steps %s", len(found), len(every), steps)
    return tuple(found), said


def _check_apart(train: Sequence[Shard], test: Sequence[Shard]) -> None:
    both = {files.absolute(s.path) for s in train} & {files.absolute(s.path) for s in test}
    if both:
        raise InputError(f"--train and --test both name {sorted(both)[0]}")


def _check_same(config: Config, stale: Sequence[str], sets: Mapping[str, Any]) -> None:
    """Refuses to mix results with those of another model, loss, projection or target.

    Args:
      config: the flags.
      stale: what has changed of all that embeddings depend on.
      sets: those of the earlier run, by name; empty if no test set is used.
    """
    changed = list(stale)
    target = sets.get(config.test_name, {}).get("target", config.target)
    if target != config.target:
        changed.append(
            f"target of the test set {config.test_name!r} ({target} → {config.target}; "
            "another --test_name keeps both)"
        )
    if changed and not config.overwrite:
        raise InputError(
            f"{config.output} holds results of another run; what changed: {', '.join(changed)}. "
            "Choose another --output, or --overwrite the results that are there."
        )


def _target_of(source: "EngineSource", target: str) -> str:
    from tracin_beam.jobs import fingerprints  # imports Keras

    return fingerprints.of_target(source.get().task, target, source.task)


def _units(
    config: Config,
    fingerprint: Mapping[str, str],
    target_of_test: str,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
) -> tuple[Unit, ...]:
    """What is to be embedded: every shard at every checkpoint.

    Args:
      config: the flags.
      fingerprint: of the task and the projection.
      target_of_test: what identifies the target of the test set.
      checkpoints, train, test: what is there.
    """
    both = (
        (TRAIN, train, "loss", "loss"),
        (config.test_name, test, config.target, target_of_test),
    )
    return tuple(
        Unit(
            name,
            shard,
            checkpoint,
            target,
            runs.digest(
                [
                    *(fingerprint, known, shard.path, shard.name, shard.identity),
                    *(checkpoint.identity, checkpoint.moments and checkpoint.moments.identity),
                ]
            ),
        )
        for name, shards, target, known in both
        for shard, checkpoint in itertools.product(shards, checkpoints)
    )


def _by_shard(units: Sequence[Unit], checkpoints: Sequence[CheckpointFile]) -> dict[str, str]:
    """A digest of the fingerprints of a shard's units and the learning rates, by its path."""
    rates = [c.rate for c in checkpoints]
    by_shard: dict[str, list[str]] = {}
    for unit in units:
        by_shard.setdefault(unit.shard.path, []).append(unit.fingerprint)
    return {path: runs.digest([marks, rates]) for path, marks in by_shard.items()}


def _changes(earlier: dict[str, Any], fingerprint: dict[str, str]) -> list[str]:
    from tracin_beam.jobs import fingerprints  # imports Keras

    return fingerprints.changes(earlier.get("fingerprint", fingerprint), fingerprint)


def _earlier_dim(earlier: dict[str, Any]) -> int | None:
    dim = earlier.get("fingerprint", {}).get("dim")
    return int(dim) if dim else None


def _with_dtype(config: Config, earlier: Mapping[str, Any]) -> Config:
    """The configuration with a dtype of embeddings for "auto": that of the earlier run, if any."""
    if config.embedding_dtype != "auto":
        return config
    smallest = "float32" if config.projection == "none" else embeddings.SMALLEST
    dtype = earlier.get("fingerprint", {}).get("embedding_dtype", smallest)
    return dataclasses.replace(config, embedding_dtype=dtype)


def _chosen(
    config: Config,
    source: "EngineSource",
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
) -> "tuple[Choice, EngineSource]":
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
