"""The job `cluster`: clusters of training examples that influence alike, and their page."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import apache_beam as beam

from tracin_beam.errors import InputError
from tracin_beam.jobs import graphs
from tracin_beam.jobs.parts import Parts, counts_summary
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import JOBS
from tracin_beam.storage import runs
from tracin_beam.storage.files import Stamp

if TYPE_CHECKING:
    from tracin_beam.stages.cluster import Clustering, State


def graph(pipeline: beam.Pipeline, run: Run) -> None:
    """Embeds, moves the centres some times, and makes a table of each training shard."""
    from tracin_beam.stages.cluster import Cluster

    clustering = clustering_of(run)
    results = graphs.embed_stage(pipeline, run)
    found = results | "Cluster" >> Cluster(clustering, run.config.index_rows)
    stated = found["state"] | "State" >> beam.Map(_stated, clustering)
    graphs.finish_with(
        pipeline, run, JOBS["cluster"], results, found["made"], found={"clusters": stated}
    )


def clustering_of(run: Run) -> "Clustering":
    """What a run clusters, and how.

    Raises:
      InputError: the preconditioner is not one of embeddings.
    """
    from tracin_beam.jobs import joins
    from tracin_beam.stages.cluster import Clustering

    config = run.config
    if config.preconditioner == "kfac":
        raise InputError(
            "cluster goes by embeddings, on which --preconditioner=kfac is not defined: take none "
            "or projected."
        )
    if config.damping == "auto" and config.preconditioner != "none":
        raise InputError(
            "--damping=auto chooses by test examples, which cluster has none of: give a number, "
            "such as what an influence run has chosen."
        )
    classes = run.kind["name"] == "classification"
    return Clustering(
        joins.join_of(run), config.clusters, config.rounds, config.cluster_by, config.seed, classes
    )


def _stated(state: "State", clustering: "Clustering") -> dict[str, Any]:
    return {
        "clusters": clustering.count,
        "by": clustering.by,
        "preconditioner": clustering.join.score.preconditioner,
        "rounds": state.turn,
        "settled": state.settled,
    }


def _made_by(run: Run) -> list[object]:
    config = run.config
    names = ("clusters", "rounds", "cluster_by", "seed", "preconditioner", "damping", "index_rows")
    return [*(getattr(config, name) for name in names), run.source.get().task.label_names]


def _results(run: Run) -> Iterator[str]:
    for i in range(len(run.train)):
        yield run.output.path("clusters", runs.numbered("clusters", i, len(run.train)))
    yield run.output.cluster_summary
    yield run.output.cluster_report


def _page(run: Run, state: Mapping[str, Any]) -> dict[str, Stamp]:
    from tracin_beam.report.write import write_cluster_report

    stamp = write_cluster_report(run.output, run.source.get(), state)
    return {run.output.cluster_report: stamp}


def _summary(run: Run, state: Mapping[str, Any]) -> str:
    counted = counts_summary(state, run.output.path("clusters"))
    return f"{counted}\nReport: {run.output.cluster_report}"


PARTS = Parts(graph, _summary, _made_by, _results, _page)
