"""The metrics of a night for other software: Prometheus, OpenLineage, and Datalab's columns."""

import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tracin_beam._version import __version__

_PREFIX = "tracin_beam"
_MOST_SERIES = 500  # of classes, and of shards: a series for each is dear to whoever scrapes it
_PRODUCER = f"tracin-beam/{__version__}"
_SPEC = "https://openlineage.io/spec/facets"

DATALAB = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("position", pa.int64()),
        ("is_label_issue", pa.bool_()),
        ("label_score", pa.float64()),
        ("given_label", pa.float64()),
        ("predicted_label", pa.float64()),
        ("is_outlier_issue", pa.bool_()),
        ("outlier_score", pa.float64()),
        ("is_near_duplicate_issue", pa.bool_()),
        ("near_duplicate_score", pa.float64()),
    ]
)
_DUPLICATES = ("duplicate", "conflicting duplicate")


def prometheus(night: Mapping[str, Any]) -> str:
    """The text that Prometheus scrapes, or that its node exporter's textfile collector takes.

    Args:
      night: what `metrics.json` holds.
    """
    families: dict[str, list[str]] = {}

    def add(name: str, value: Any, **labels: str) -> None:
        if value is None or isinstance(value, str) or not math.isfinite(value):
            return
        full = f"{_PREFIX}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"
        words = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        number = str(int(value)) if float(value).is_integer() else repr(float(value))
        families.setdefault(full, []).append(f"{full}{{{words}}} {number}" if words else
                                             f"{full} {number}")  # fmt: skip

    for name, value in night.get("metrics", {}).items():
        stem, _, kind = name.partition(".")
        if kind:
            add(f"{stem}_of_kind", value, kind=kind)
        else:
            add(name, value)
    for group, label in (
        ("by_class", "class"),
        ("by_shard", "shard"),
        ("by_cohort", "cohort"),
    ):
        rows = night.get(group, {})
        for key in sorted(rows, key=lambda key: -(rows[key].get("suspects") or 0))[:_MOST_SERIES]:
            for name, value in rows[key].items():
                add(f"{label}_{name}", value, **{label: key})
    for gate in night.get("gates", ()):
        add("gate_fired", int(gate["fired"]), gate=gate["gate"], level=gate["level"])
    add("night_timestamp_seconds", _midnight(night["date"]).timestamp())
    lines = []
    for name, series in families.items():
        lines += [f"# TYPE {name} gauge", *series]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _midnight(date: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)


def open_lineage(night: Mapping[str, Any]) -> dict[str, Any]:
    """Facets of the training set as an input dataset of an OpenLineage event.

    Args:
      night: what `metrics.json` holds.

    Returns:
      "dataQualityMetrics" (DataQualityMetricsInputDatasetFacet) and "dataQualityAssertions"
      (DataQualityAssertionsDatasetFacet, the gates): for "inputFacets" of that dataset.
    """
    metrics = night.get("metrics", {})
    examples, loss = metrics.get("examples"), metrics.get("mean_loss")
    column: dict[str, Any] = {"count": examples}
    if loss is not None and examples:
        column["sum"] = loss * examples
    facets: dict[str, Any] = {
        "dataQualityMetrics": {
            **_facet("1-0-3", "DataQualityMetricsInputDatasetFacet"),
            "rowCount": examples,
            "fileCount": metrics.get("shards"),
            "columnMetrics": {"loss": column},
        },
        "dataQualityAssertions": {
            **_facet("1-1-0", "DataQualityAssertionsDatasetFacet"),
            "assertions": [
                {
                    "assertion": gate["gate"],
                    "success": not gate["fired"],
                    "severity": gate["level"],
                    "actual": str(gate["value"]),
                    "description": gate["reason"],
                }
                for gate in night.get("gates", ())
            ],
        },
    }
    return facets


def _facet(version: str, name: str) -> dict[str, str]:
    return {
        "_producer": _PRODUCER,
        "_schemaURL": f"{_SPEC}/{version}/{name}.json#/$defs/{name}",
    }


def datalab(
    pieces: Iterator[pa.Table] | Sequence[pa.Table], suspects: pa.Table
) -> Iterator[pa.Table]:
    """What cleanlab's Datalab would call the columns: scores with 0 for bad.

    Args:
      pieces: of `signals.parquet`.
      suspects: with the columns of `suspects.parquet`.

    Yields:
      For each piece its rows, with the schema `DATALAB`. The score of a kind of issue other than
      a label's is 1 where the example is no suspect of it.
    """
    found: dict[str, dict[str, float]] = {}
    for identity, kind, score in zip(
        *(suspects[name].to_pylist() for name in ("id", "kind", "score")), strict=True
    ):
        of_kind = found.setdefault(_DUPLICATES[0] if kind in _DUPLICATES else kind, {})
        of_kind[identity] = max(score, of_kind.get(identity, 0.0))
    for piece in pieces:
        ids = piece["id"].to_pylist()
        columns: dict[str, Any] = {name: piece[name] for name in ("id", "shard", "position")}
        labels = found.get("mislabelled", {})
        columns["is_label_issue"] = [identity in labels for identity in ids]
        columns["label_score"] = 1 - np.asarray(
            piece["mislabel_score"].cast(pa.float64()).to_numpy(), np.float64
        )
        columns["given_label"] = _numbers(piece, "label")
        columns["predicted_label"] = _numbers(piece, "suggested_label")
        for kind, name in (("outlier", "outlier"), (_DUPLICATES[0], "near_duplicate")):
            worst = found.get(kind, {})
            columns[f"is_{name}_issue"] = [identity in worst for identity in ids]
            columns[f"{name}_score"] = [1 - worst.get(identity, 0.0) for identity in ids]
        yield pa.table(columns).select(DATALAB.names).cast(DATALAB)


def _numbers(table: pa.Table, name: str) -> Any:
    """A column of numbers, null where each value is a list, as of a multi-label task."""
    if pa.types.is_list(table.schema.field(name).type):
        return pa.nulls(len(table), pa.float64())
    return table[name]
