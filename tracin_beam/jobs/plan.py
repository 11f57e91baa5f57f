"""`plan` from the command line to the printed plan; it writes nothing."""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from apache_beam.io.filesystems import FileSystems

from tracin_beam.config import Config
from tracin_beam.jobs import launch, options, preflight
from tracin_beam.jobs.preflight import CheckedRun
from tracin_beam.jobs.registry import JOBS, Job
from tracin_beam.stages import progress
from tracin_beam.storage import runs
from tracin_beam.storage.runs import Shard, Unit

if TYPE_CHECKING:
    from tracin_beam.inputs.counting import Count
    from tracin_beam.planning.pilot import Choice
    from tracin_beam.planning.plan import Data, Plan, Speed

_REQUESTS = 32  # made of a file system at a time


@dataclasses.dataclass(frozen=True, repr=False)
class Planned:
    """A plan: all that is printed.

    Attributes:
      dim: length of an embedding that the plan is for.
      checkpoints: how many.
      sets: by name.
      speed: as measured.
      plan: what follows.
      choice: of the dim; None with the projection "none".
      config: the flags.
    """

    dim: int
    checkpoints: int
    sets: "dict[str, Data]"
    speed: "Speed"
    plan: "Plan"
    choice: "Choice | None"
    config: Config

    def __repr__(self) -> str:
        return as_text(self)


def main(name: str, prog: str = "", argv: Sequence[str] | None = None) -> int:
    """Prints a plan. Arguments and result are those of `launch.main`."""
    return launch.command(JOBS[name], prog, argv, _print)


def _print(job: Job, prog: str, argv: Sequence[str]) -> int:
    config, beam_options = options.parse(argv, job, prog)
    launch.set_up_logging()
    FileSystems.set_options(beam_options)
    with progress.reported(progress.as_lines):
        planned = make(config)
    print(json.dumps(as_json(planned), indent=1) if config.json else as_text(planned))
    return 0


def make(config: Config) -> Planned:
    """Looks at the data, lets a sample of it through the engine, and plans the run.

    Raises:
      InputError: anything that the run would trip over.
    """
    found = preflight.check(config, with_test=bool(config.test))

    from tracin_beam.planning import counts, pilot, plan, retrieval, speed
    from tracin_beam.planning.sample import id_bytes

    run = found.run
    counted = counts.count(config, run.train, run.test)
    measured = speed.measure(run.source, run.checkpoints[-1], run.train)
    choice = found.choice
    if choice is None and config.projection != "none":
        choice = pilot.choose_dim(
            run.config, run.source, run.checkpoints, run.train, run.test, counted
        )
    todo = _todo(found)
    train = _data(run.train, counted.train, len(run.checkpoints), todo)
    test = _data(run.test, counted.test, len(run.checkpoints), todo) if run.test else None
    dim = run.source.get().engine.dim
    stored = sum(
        plan.embedding_bytes(
            dim, shards, count, id_bytes(run.source, shards), run.config.embedding_dtype
        )
        for shards, count in ((run.train, counted.train), (run.test, counted.test))
    )
    way = None
    if test:
        numbers = dim * len(run.checkpoints)
        way = retrieval.of_counts(config, train.total, test.total, numbers)
    job = plan.Job(
        len(run.checkpoints),
        dim,
        config.top_k,
        config.rescore,
        config.recall_queries,
        config.index_rows,
        way,
        config.hours,
        config.worker_memory,
        _passes(config),
    )
    sets = {runs.TRAIN: train} | ({config.test_name: test} if test else {})
    made = plan.make(train, test, stored, measured, job)
    return Planned(
        dim,
        len(run.checkpoints),
        sets,
        measured,
        made,
        choice,
        config,
    )


def _passes(config: Config) -> tuple[str, ...]:
    """What of the flags goes through the training set's gradients; projected takes embeddings."""
    if config.preconditioner == "projected":
        return ()
    asked = {"total": config.total, "groups and slices": config.group_by or config.slice}
    return tuple(name for name, wanted in asked.items() if wanted)


def _todo(found: CheckedRun) -> list[Unit]:
    """The units that are still to be embedded."""
    run = found.run
    if found.stale or not found.earlier:
        return list(run.units)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        done = pool.map(lambda unit: runs.read_unit(run.output, unit), run.units)
        return [unit for unit, result in zip(run.units, done, strict=True) if result is None]


def _data(
    shards: Sequence[Shard], count: "Count", checkpoints: int, todo: Sequence[Unit]
) -> "Data":
    from tracin_beam.planning.plan import Data

    records = {shard.path: n for shard, n in zip(shards, count.records, strict=True)}
    mine = [records[unit.shard.path] for unit in todo if unit.shard.path in records]
    return Data(count.records, count.exact, len(shards) * checkpoints, sum(mine), len(mine))


def as_json(planned: Planned) -> dict[str, Any]:
    """The plan for a program: numbers of bytes, seconds, examples."""
    choice = planned.choice
    return {
        "dim": planned.dim,
        "checkpoints": planned.checkpoints,
        "sets": {
            name: {
                "shards": len(data.records),
                "examples": data.total,
                "exact": data.exact,
                "units": data.units,
                "units_todo": data.units_todo,
            }
            for name, data in planned.sets.items()
        },
        "speed": dataclasses.asdict(planned.speed),
        **dataclasses.asdict(planned.plan),
        "worker_hours": planned.plan.worker_hours,
        "suggested_dim": dataclasses.asdict(choice) if choice else None,
    }


def as_text(planned: Planned) -> str:
    """The plan for a reader."""
    from tracin_beam.planning.plan import duration, size

    plan, speed = planned.plan, planned.speed
    lines = []
    for name, data in planned.sets.items():
        about = "" if data.exact else "about "
        lines.append(
            f"{name}: {about}{data.total:,} examples in {len(data.records):,} shards; "
            f"{data.units_todo:,} of {data.units:,} units (shards × checkpoints) to embed"
        )
    if not all(data.exact for data in planned.sets.values()):
        lines.append("(estimated from the size of the shards and their first records)")
    lines += [
        "",
        f"embeddings: {size(plan.embedding_bytes)} with --dim={planned.dim}, "
        f"{planned.checkpoints} checkpoint(s)",
    ]
    if plan.parts:
        lines.append(f"index: {size(plan.index_bytes)} in {plan.parts} part(s)")
    if plan.index:
        lines.append(f"candidates: by {plan.index.index}; {plan.index.why}")
    if planned.choice:
        lines += ["", *planned.choice.lines()]
    lines += [
        "",
        f"A worker like this machine embeds {speed.embed_rows:,.0f} examples a second at each "
        f"checkpoint.",
        *([str(speed.slow)] if speed.slow else []),
        "Its time:",
    ]
    lines += [f"  {stage}: {duration(seconds)}" for stage, seconds in plan.seconds.items()]
    lines += [
        f"  together: {plan.worker_hours:,.2f} worker hours, without the workers' start",
        f"Memory of a worker: {size(plan.memory)}",
        "",
        f"For --hours={planned.config.hours:g}: {plan.workers} worker(s)",
    ]
    if plan.parts:
        lines.append(f"Suggested: --index_rows={plan.index_rows}")
    return "\n".join([*lines, *plan.advice])
