"""The job `influence`: the proponents and opponents of every test example, and their page."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import apache_beam as beam

from tracin_beam.jobs import graphs
from tracin_beam.jobs.parts import Parts
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import JOBS
from tracin_beam.storage.files import Stamp
from tracin_beam.storage.runs import TRAIN

if TYPE_CHECKING:
    from tracin_beam.stages.groups import Sets

_log = logging.getLogger(__name__)

# Test examples that the terminal shows.
_SHOWN = 5


def graph(pipeline: beam.Pipeline, run: Run) -> None:
    """Embeds, searches candidates, scores them exactly and states the recall."""
    from tracin_beam.jobs import joins
    from tracin_beam.planning import retrieval
    from tracin_beam.stages.curvature import StateDamping
    from tracin_beam.stages.distinct import Distinct
    from tracin_beam.stages.groups import SetInfluence
    from tracin_beam.stages.influence import Influence
    from tracin_beam.stages.retrieval import Retrieval
    from tracin_beam.stages.total import KeptTotals, TotalInfluence

    config = run.config
    results = graphs.embed_stage(pipeline, run)
    train = graphs.of_set(results, TRAIN, "TrainResults")
    tests = graphs.of_set(results, config.test_name, "TestResults")
    engine = run.source.get().engine
    numbers = engine.dim * len(run.checkpoints)
    choice = retrieval.choose(config, run.train, run.test, numbers)
    _log.info("candidates by %s: %s", choice.index, choice.why)
    join = joins.join_of(run)
    joined = {"train": train, "tests": tests} | "Join" >> Influence(
        join, choice.index, config.index_rows, config.top_k, config.rescore, config.recall_queries
    )
    ready = train
    if join.score.preconditioner != "none":  # whose moments are there once the census is
        census = beam.pvalue.AsList(joined["census"])
        ready = train | "WhenReady" >> beam.Map(lambda result, _: result, census)
    found = {}
    if config.recall_queries:
        found["retrieval"] = joined | "Retrieval" >> Retrieval(
            join, config.top_k, config.rescore > 0 or join.score.on_embeddings
        )
    found["distinct"] = joined["best"] | "Distinct" >> beam.CombineGlobally(Distinct())
    totals = {"train": ready, "tests": tests} | "Total" >> (
        TotalInfluence(join) if config.total else KeptTotals(join)
    )
    sets = {"train": ready, "tests": tests} | "Sets" >> SetInfluence(join, sets_of(run))
    tables_of_sets = sets | "TablesOfSets" >> beam.FlatMap(lambda said: said["made"])
    for name in ("groups", "slices"):
        found[name] = sets | name >> beam.Map(lambda said, name=name: said[name])
    made = (joined["made"], totals, tables_of_sets) | "AllTables" >> beam.Flatten()
    if join.score.preconditioner != "none":
        found["damping"] = joined["census"] | "Damping" >> StateDamping(join)
    entries = {"index": dataclasses.asdict(choice), "retrieval": None, "damping": None}
    graphs.finish_with(pipeline, run, JOBS["influence"], results, made, entries, found)


def sets_of(run: Run) -> "Sets":
    """The sets of test examples that a run is asked for.

    Raises:
      InputError: the task has not what they are told by.
    """
    from tracin_beam.scoring import groups
    from tracin_beam.stages.groups import Sets

    loaded, config = run.source.get(), run.config
    names = loaded.task.label_names
    grouped = groups.by(config.group_by) if config.group_by else None
    slices = tuple(groups.slice_of(one, names) for one in dict.fromkeys(config.slice))
    classes = loaded.engine.kind.name == "classification"
    groups.check(grouped, slices, loaded.parser.gives_groups, classes)
    return Sets(grouped, slices, config.top_k, run.kind["threshold"])


def _made_by(run: Run) -> list[object]:
    config = run.config
    return [
        config.preconditioner,
        config.damping,
        config.top_k,
        config.rescore,
        config.index_rows,
        config.recall_queries,
        config.index,
        config.total,
        config.group_by,
        config.slice,
        config.report_examples,
        run.source.get().task.label_names,
    ]


def _results(run: Run) -> list[str]:
    return [run.output.report(run.config.test_name)]


def _page(run: Run, state: Mapping[str, Any]) -> dict[str, Stamp]:
    from tracin_beam.report.write import write_influence_report

    name, count = run.config.test_name, run.config.report_examples
    stamp = write_influence_report(run.output, name, run.source.get(), state, count)
    return {run.output.report(name): stamp}


def _summary(run: Run, state: Mapping[str, Any]) -> str:
    from tracin_beam.report import excerpt, text

    name = run.config.test_name
    names = run.source.get().task.label_names
    found = excerpt.read(run.output.influence(name), state, names, _SHOWN)
    lines = [
        text.influence_summary(
            found.rows, state, label_names=names, max_tests=_SHOWN, tests_in_table=found.tests
        ),
        f"Tables are in {run.output.influence(name)}",
    ]
    if run.config.total:
        lines.append(f"Totals are in {run.output.path('total_influence', name)}")
    return "\n".join([*lines, f"Report: {run.output.report(name)}"])


PARTS = Parts(graph, _summary, _made_by, _results, _page)
