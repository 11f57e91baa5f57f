"""The job `embed`: shards × checkpoints → embeddings."""

from collections.abc import Mapping
from typing import Any

import apache_beam as beam

from tracin_beam.jobs import graphs
from tracin_beam.jobs.parts import Parts, counts_summary
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import JOBS


def graph(pipeline: beam.Pipeline, run: Run) -> None:
    """Embeds, and no more."""
    results = graphs.embed_stage(pipeline, run)
    graphs.finish_with(pipeline, run, JOBS["embed"], results)


def _summary(run: Run, state: Mapping[str, Any]) -> str:
    return counts_summary(state, run.output.path("embeddings"))


PARTS = Parts(graph, _summary)
