"""The clusters of training examples as one static HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tracin_beam.report import explanations, pages, words
from tracin_beam.report.explanations import Place
from tracin_beam.report.show import Shown

# Clusters that the page shows, so that it stays one that a browser opens at once.
_SHOWN = 100


@dataclass(frozen=True)
class _Example:
    """An example near to its cluster's centre."""

    id: str
    place: Place
    label: str
    prediction: str
    distance: float


@dataclass(frozen=True)
class _Label:
    """How many of a cluster's examples have a label, and their share of it."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class _Cluster:
    """A row of the summary, in words."""

    number: int
    examples: int
    distance: float | None
    mean_label: float | None
    labels: tuple[_Label, ...]
    nearest: tuple[_Example, ...]
    pictures: bool


def places_shown(summary: pa.Table) -> set[Place]:
    """The examples that the page shows: (shard, position)."""
    return {place for row in _largest(summary) for place in _places(row)}


def clusters_page(
    summary: pa.Table,
    shown: Mapping[Place, Shown],
    run: Mapping[str, Any],
    *,
    label_names: Sequence[str] | None = None,
) -> str:
    """Makes the page: every cluster with its labels and the examples nearest to its centre.

    Args:
      summary: the table with a row for each cluster.
      shown: what to show of an example, by (shard, position); of any other the id alone.
      run: what run.json holds. Whatever is missing or null is left out of the page.
      label_names: names of the classes 0, 1, …; without them labels are shown as numbers.

    Returns:
      A whole HTML document that refers to nothing outside itself.
    """
    read = explanations.reading(None, run, label_names)
    rows = _largest(summary)
    stated = run.get("clusters")
    by = stated.get("by") if isinstance(stated, Mapping) else None
    context = {
        "clusters": [_cluster(row, read, shown) for row in rows],
        "more": len(summary) - len(rows),
        "examples": sum(summary["examples"].to_pylist()),
        "direction": by == "direction",
        "shown": shown,
    }
    styles = ("page.css", "lists.css", "clusters.css")
    return pages.render("clusters.html", context, run, styles=styles, scripts=())


def _largest(summary: pa.Table) -> list[dict[str, Any]]:
    return sorted(summary.to_pylist(), key=lambda row: -row["examples"])[:_SHOWN]


def _places(row: Mapping[str, Any]) -> list[Place]:
    return list(zip(row["nearest_shards"], row["nearest_positions"], strict=True))


def _cluster(
    row: Mapping[str, Any], read: explanations.Reading, shown: Mapping[Place, Shown]
) -> _Cluster:
    places = _places(row)
    nearest = zip(
        row["nearest_ids"],
        places,
        row["nearest_labels"],
        row["nearest_predictions"],
        row["nearest_distances"],
        strict=True,
    )
    return _Cluster(
        row["cluster"],
        row["examples"],
        row["mean_distance"],
        row["mean_label"],
        tuple(
            _Label(read.label(label), count, count / row["examples"])
            for label, count in zip(row["labels"], row["label_counts"], strict=True)
        ),
        tuple(
            _Example(words.shown(name), place, read.label(label), read.prediction(said), distance)
            for name, place, label, said, distance in nearest
        ),
        any((it := shown.get(place)) is not None and it.kind == "image" for place in places),
    )
