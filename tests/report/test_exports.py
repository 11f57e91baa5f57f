"""Metrics as other software reads them: Prometheus's parser, OpenLineage's classes."""

import pyarrow as pa
import pytest

from tracin_beam.report import exports

HOSTILE = 'a "b"\\\n{c}=1'
NIGHT = {
    "date": "2026-11-22",
    "metrics": {
        "examples": 1000,
        "suspects": 7,
        "suspects.conflicting duplicate": 3,
        "suspects_rate": 0.007,
        "mean_loss": 0.25,
        "accuracy": None,
        "shards": 2,
    },
    "by_class": {"3": {"suspects": 2}},
    "by_shard": {HOSTILE: {"suspects": 5, "probability": None, "mean_loss": float("nan")}},
    "gates": [
        {"gate": "suspects > 5", "level": "error", "value": 7, "baseline": None, "fired": True,
         "reason": "suspects > 5 is 7 > 5"},
    ],
}  # fmt: skip


def test_prometheus_reads_it():
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(exports.prometheus(NIGHT)))
    found = {(s.name, *s.labels.values()): s.value for f in families for s in f.samples}
    assert all(family.type == "gauge" for family in families)
    assert found == {
        ("tracin_beam_examples",): 1000,
        ("tracin_beam_suspects",): 7,
        ("tracin_beam_suspects_of_kind", "conflicting duplicate"): 3,
        ("tracin_beam_suspects_rate",): 0.007,
        ("tracin_beam_mean_loss",): 0.25,
        ("tracin_beam_shards",): 2,
        ("tracin_beam_class_suspects", "3"): 2,
        ("tracin_beam_shard_suspects", HOSTILE): 5,
        ("tracin_beam_gate_fired", "suspects > 5", "error"): 1,
        ("tracin_beam_night_timestamp_seconds",): 1795305600,
    }


def test_open_lineage_takes_the_facets():
    metrics = pytest.importorskip("openlineage.client.generated.data_quality_metrics_input_dataset")
    from openlineage.client.generated import data_quality_assertions_dataset as assertions

    facets = exports.open_lineage(NIGHT)
    for facet, cls, part, of in (
        ("dataQualityMetrics", metrics.DataQualityMetricsInputDatasetFacet, "columnMetrics",
         metrics.ColumnMetrics),
        ("dataQualityAssertions", assertions.DataQualityAssertionsDatasetFacet, "assertions",
         assertions.Assertion),
    ):  # fmt: skip
        given = facets[facet]
        assert given.pop("_producer").startswith("tracin-beam/")
        assert given.pop("_schemaURL") == cls._get_schema()
        inner = given[part]
        made = {k: of(**v) for k, v in inner.items()} if isinstance(inner, dict) else None
        cls(**{**given, part: made or [of(**v) for v in inner]})  # refuses unknown fields
    assert facets["dataQualityMetrics"]["rowCount"] == 1000
    assert facets["dataQualityMetrics"]["columnMetrics"]["loss"]["sum"] == 250
    (assertion,) = facets["dataQualityAssertions"]["assertions"]
    assert (assertion["success"], assertion["severity"]) == (False, "error")


def test_datalabs_columns():
    signals = pa.table(
        {
            "id": ["a", "b", "c"],
            "shard": ["s"] * 3,
            "position": [0, 1, 2],
            "label": [1.0, 2.0, None],
            "suggested_label": [1.0, 0.0, 1.0],
            "mislabel_score": [0.25, 1.0, None],
        }
    )
    suspects = pa.table(
        {
            "id": ["b", "a", "a", "c"],
            "kind": ["mislabelled", "duplicate", "conflicting duplicate", "outlier"],
            "score": [1.0, 0.5, 0.75, 0.5],
        }
    )
    (found,) = exports.datalab([signals], suspects)
    assert found.schema == exports.DATALAB
    assert found["is_label_issue"].to_pylist() == [False, True, False]
    assert found["label_score"].to_pylist()[:2] == [0.75, 0.0]
    assert found["is_outlier_issue"].to_pylist() == [False, False, True]
    assert found["outlier_score"].to_pylist() == [1.0, 1.0, 0.5]
    assert found["near_duplicate_score"].to_pylist() == [0.25, 1.0, 1.0]
    many = signals.set_column(3, "label", pa.array([[1.0]] * 3))
    (found,) = exports.datalab([many], suspects)
    assert found["given_label"].to_pylist() == [None] * 3
