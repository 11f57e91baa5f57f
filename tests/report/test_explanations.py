"""How labels and predictions are read, and which examples are shown."""

import numpy as np
import pyarrow as pa
import pytest
from influence_table import RUN, Page, table

from tracin_beam.report import explanations
from tracin_beam.report.influence import influence_page
from tracin_beam.report.text import influence_summary


def test_places_shown_are_those_of_the_page():
    rows = pa.concat_tables([table(0, 1), table(2, test_prediction=0.0)])
    places = explanations.places_shown(rows, explanations.reading(rows, RUN, None), max_tests=2)
    assert places == {
        ("test.tfrecord", 2),
        ("test.tfrecord", 0),
        ("train.tfrecord", 1),
        ("train.tfrecord", 2),
    }


def binary(threshold, probabilities):
    kind = {"name": "classification", "threshold": threshold, "probabilities": probabilities}
    return RUN | {"kind": kind}


def named(kind):
    return RUN | {"kind": {"name": kind}}


def scored(prediction, label, test=0):
    return table(test, test_prediction=prediction, test_label=label, train_label=label)


@pytest.mark.parametrize(
    ("prediction", "label", "run", "first"),
    [
        (0.5171, 1.0, binary(0.5, True), "test-0: predicted pos (0.52), label pos"),
        (0.5171, 0.0, binary(0.5, True), "test-0: predicted pos (0.52), label neg  (wrong)"),
        (0.31, 0.0, binary(0.5, True), "test-0: predicted neg (0.31), label neg"),
        (0.31, 1.0, binary(0.0, False), "test-0: predicted pos (logit 0.31), label pos"),
        (-2.0, 1.0, binary(0.0, False), "test-0: predicted neg (logit -2.00), label pos  (wrong)"),
        (0.5171, 1.0, named("regression"), "test-0: predicted 0.5171, label pos"),
        (np.nan, np.nan, named("multilabel"), "test-0: predicted unknown, label unknown"),
    ],
)
def test_one_output_for_two_classes_is_read_by_its_threshold(prediction, label, run, first):
    rows = scored(prediction, label)
    names = ["neg", "pos"]
    assert influence_summary(rows, run, label_names=names).splitlines()[0] == first
    text = Page(influence_page(rows, {}, run, label_names=names)).text
    assert ("wrong" in text) == ("wrong" in first)
    if np.isfinite(prediction):
        assert first.partition("predicted ")[2].partition(",")[0] in text


def test_wrong_ones_come_first_by_their_threshold():
    rows = pa.concat_tables([scored(0.6, 1.0, 0), scored(0.6, 0.0, 1), scored(0.1, 0.0, 2)])
    lines = influence_summary(rows, binary(0.5, True)).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("test-")] == [
        "test-1",
        "test-0",
        "test-2",
    ]
