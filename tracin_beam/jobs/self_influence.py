"""The job `self_influence`: how much each training example lowers its own loss."""

from collections.abc import Iterator, Mapping
from typing import Any

import apache_beam as beam

from tracin_beam.config import Config
from tracin_beam.jobs import graphs
from tracin_beam.jobs.parts import Parts, counts_summary
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import JOBS
from tracin_beam.storage import runs


def graph(pipeline: beam.Pipeline, run: Run) -> None:
    """Embeds, and makes a table of each training shard."""
    from tracin_beam.jobs import joins
    from tracin_beam.stages.curvature import StateDamping
    from tracin_beam.stages.self_influence import SelfInfluence

    config = run.config
    join = joins.join_of(run) if config.preconditioner != "none" else None
    results = graphs.embed_stage(pipeline, run)
    made = results | "SelfInfluence" >> SelfInfluence(
        run.output,
        run.checkpoints,
        run.shard_fingerprints,
        join,
        config.index_rows,
    )
    found = {"damping": made | "Damping" >> StateDamping(join)} if join else {}
    graphs.finish_with(
        pipeline, run, JOBS["self_influence"], results, made, {"damping": None}, found
    )


def _made_by(run: Run) -> list[object]:
    from tracin_beam.stages import self_influence

    config = run.config
    preconditioner = [] if config.preconditioner == "none" else _preconditioner(config)
    return [self_influence.made_by(), *preconditioner]


def _preconditioner(config: Config) -> list[object]:
    return [config.preconditioner, config.damping, config.index_rows]


def _results(run: Run) -> Iterator[str]:
    for i in range(len(run.train)):
        yield run.output.self_influence(runs.numbered("self_influence", i, len(run.train)))


def _summary(run: Run, state: Mapping[str, Any]) -> str:
    return counts_summary(state, run.output.path("self_influence"))


PARTS = Parts(graph, _summary, _made_by, _results)
