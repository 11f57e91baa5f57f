"""The job `quality`: a night's tables of what is wrong with the training data, and its gates."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import apache_beam as beam

from tracin_beam.errors import InputError
from tracin_beam.jobs import graphs, night
from tracin_beam.jobs.parts import Parts, counts_summary
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import JOBS
from tracin_beam.signals import gates
from tracin_beam.storage import files
from tracin_beam.storage.runs import Made


def _date(run: Run) -> str:
    given = run.config.date
    return night.check_date(given or time.strftime("%Y-%m-%d", time.gmtime(run.started)))


def graph(pipeline: beam.Pipeline, run: Run) -> None:
    """Embeds, keeps features, and makes the night's tables.

    Raises:
      InputError: the task is no classification.
    """
    from tracin_beam.stages.quality import Quality

    kind = run.source.get().engine.kind
    if kind.name != "classification":
        raise InputError(
            f"The job quality judges labels of a classification; this task is taken for "
            f"kind={kind.name!r}. If each example has one class, say so: "
            "Task(kind='classification')."
        )
    date = _date(run)
    results = graphs.embed_stage(pipeline, run)
    tables = results | "Quality" >> Quality(
        run.output, run.source, run.checkpoints, run.shard_fingerprints, date
    )
    conditions = gates.parse_all(run.config.warn_if, run.config.error_if or ())
    made = tables | "Night" >> beam.FlatMap(_end, run.output, date, conditions)
    graphs.finish_with(pipeline, run, JOBS["quality"], results, made)


def _end(made: Any, output: Any, date: str, conditions: Any) -> Iterator[Made]:
    """Metrics and gates of a night whose tables are there; the stamps of all its files."""
    from tracin_beam.storage import tables

    folder = output.path("quality", date)
    signals = tables.read(files.join(folder, "signals.parquet"))
    suspects = tables.read(files.join(folder, "suspects.parquet"))
    night.finish(output, date, made, suspects, conditions, [signals])
    for info in files.list_folder(folder):
        yield info.path, files.stamp(info.path)


def _made_by(run: Run) -> list[object]:
    return [_date(run), run.config.warn_if, run.config.error_if, 1]


def _results(run: Run) -> Iterator[str]:
    for name in ("signals.parquet", "suspects.parquet", "metrics.json"):
        yield run.output.path("quality", _date(run), name)


def _gates(run: Run) -> list[dict[str, Any]]:
    found = files.read_json(run.output.path("quality", _date(run), "metrics.json"))
    return list(found["gates"])


def _summary(run: Run, state: Mapping[str, Any]) -> str:
    where = run.output.path("quality", _date(run))
    return "\n".join([counts_summary(state, where), *gates.lines(_gates(run))])


def _status(run: Run) -> int:
    return gates.status(_gates(run))


PARTS = Parts(graph, _summary, _made_by, _results, status=_status)
