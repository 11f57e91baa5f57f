"""What a job on Beam is made of: functions of a checked run."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import apache_beam as beam

from tracin_beam.jobs.preflight import Run
from tracin_beam.storage.files import Stamp


def _nothing(run: Run) -> tuple[()]:
    return ()


def _success(run: Run) -> int:
    return 0


def _no_page(run: Run, state: Mapping[str, Any]) -> dict[str, Stamp]:
    return {}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The functions of a job that runs on Beam.

    Attributes:
      graph: puts the transforms into the pipeline, and ends with `graphs.finish_with`.
      summary: what to print at the end, from run.json.
      made_by: what its results depend on besides the embeddings, to tell whether they are done.
      results: paths of files that are there when it is done, whatever else there is.
      status: the exit status of a job that has ended well.
      page: writes the pages that show its tables, from run.json; the stamp of each by its path.
    """

    graph: Callable[[beam.Pipeline, Run], None]
    summary: Callable[[Run, Mapping[str, Any]], str]
    made_by: Callable[[Run], Iterable[object]] = _nothing
    results: Callable[[Run], Iterable[str]] = _nothing
    page: Callable[[Run, Mapping[str, Any]], dict[str, Stamp]] = _no_page
    status: Callable[[Run], int] = _success


def counts_summary(state: Mapping[str, Any], where: str) -> str:
    """A summary of how many examples were used, and of where the results are."""
    lines = []
    for name, counts in state["counts"].items():
        parts = ", ".join(f"{value} {key}" for key, value in counts.items())
        lines.append(f"{name}: {parts}")
    return "\n".join([*lines, f"Written to {where}"])
