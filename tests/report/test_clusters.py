"""The page of clusters."""

import pyarrow as pa
from influence_table import HOSTILE, RUN, Page

from tracin_beam.report import clusters
from tracin_beam.report.show import Shown


def cluster(number, examples, names=(), **others):
    count = len(names)
    return {
        "cluster": number,
        "examples": examples,
        "mean_distance": 1.25 if examples else None,
        "labels": [1.0, 0.0] if examples else [],
        "label_counts": [examples - 1, 1] if examples else [],
        "mean_label": None,
        "nearest_ids": list(names),
        "nearest_labels": [1.0] * count,
        "nearest_predictions": [0.0] * count,
        "nearest_distances": [0.5 + i for i in range(count)],
        "nearest_shards": ["train.tfrecord"] * count,
        "nearest_positions": list(range(count)),
    } | others


def page(*rows, run=None, shown=None, **others):
    run = {**RUN, "kind": {"name": "classification"}, **(run or {})}
    return clusters.clusters_page(pa.Table.from_pylist(rows), shown or {}, run, **others)


def test_the_largest_come_first_with_their_labels_and_examples():
    shown = {("train.tfrecord", 0): Shown("text", "Muddy waters")}
    run = {"clusters": {"rounds": 7, "by": "distance", "settled": True}}
    rows = (cluster(0, 10, ["a"]), cluster(1, 30, ["b", "c"]), cluster(2, 0))
    made = Page(page(*rows, run=run, shown=shown, label_names=["cat", "dog"]))
    assert made.texts("h2") == ["Cluster 1", "Cluster 0", "Cluster 2"]
    assert "40 training examples in 3 clusters" in made.text
    assert "by distance, 7 rounds, after which nothing moved" in made.text
    assert "30 (75.0%)" in made.text
    assert made.texts("td")[:3:2] == ["29", "1"]
    assert [bar["aria-label"] for bar in made.all("svg")] == ["97%", "3%", "90%", "10%"]
    assert made.text.count("Muddy waters") == 2
    assert made.texts("th")[:2] == ["dog", "cat"]


def test_what_is_hostile_is_text_and_nothing_is_fetched_or_run():
    shown = {("train.tfrecord", 0): Shown("text", "<script>alert(1)</script>")}
    run = {"clusters": {"rounds": 1, "by": HOSTILE}}
    made = page(cluster(0, 2, [HOSTILE]), run=run, shown=shown, label_names=[HOSTILE] * 2)
    assert "<script" not in made
    policy = [meta["content"] for meta in Page(made).all("meta") if "http-equiv" in meta]
    assert ["script-src 'none'" in one for one in policy] == [True]
    assert not [tag for tag in ("http:", "https:", "<link", "\x1b", "\u202e") if tag in made]


def test_a_regression_has_a_mean_label():
    row = cluster(0, 4, ["a"], labels=[], label_counts=[], mean_label=2.5)
    made = Page(page(row, run={"kind": {"name": "regression"}}))
    assert made.texts("dd")[-1] == "2.500"
    assert "Mean label" in made.texts("dt")


def test_places_are_those_of_the_examples():
    rows = pa.Table.from_pylist([cluster(0, 2, ["a", "b"]), cluster(1, 0)])
    assert clusters.places_shown(rows) == {("train.tfrecord", 0), ("train.tfrecord", 1)}
