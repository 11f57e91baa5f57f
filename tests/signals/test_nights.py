"""The metrics of a night against counts by hand, and the shards that stand out."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from scipy.optimize import isotonic_regression

from tracin_beam.signals import nights


def signals(scores, label=None, prediction=None, cohort="new"):
    count = len(scores)
    return pa.table(
        {
            "label": np.zeros(count) if label is None else np.asarray(label, float),
            "prediction": np.zeros(count) if prediction is None else np.asarray(prediction, float),
            "cohort": [cohort] * count,
            "loss": np.full(count, 0.5),
            "mislabel_score": np.asarray(scores, float),
        }
    )


NO_SUSPECTS = pa.table(
    {
        "id": pa.array([], pa.string()),
        "kind": pa.array([], pa.string()),
        "label": pa.array([], pa.float64()),
        "shard": pa.array([], pa.string()),
        "first_seen": pa.array([], pa.string()),
    }
)


def test_metrics_are_what_counting_gives():
    first = signals([0.1, 0.9, 0.2], [0, 1, 1], [0, 1, 0], "trained")
    second = signals([0.3], [1], [1])
    suspects = pa.table(
        {
            "id": ["a", "a", "b"],
            "kind": ["mislabelled", "outlier", "mislabelled"],
            "label": [1.0, 1.0, 0.0],
            "shard": ["x", "x", "x"],
            "first_seen": ["2026-11-22", "2026-11-22", "2026-11-20"],
        }
    )
    shards = {"x": nights.summary(first, True), "y": nights.summary(second, True)}
    found = nights.metrics_of("2026-11-22", shards, suspects, extra={"wrong_labels_low": 1.0})
    metrics = found["metrics"]
    assert metrics["examples"] == 4
    assert metrics["examples_new"] == 1
    assert metrics["suspects"] == 3
    assert metrics["new_suspects"] == 2
    assert metrics["suspects.mislabelled"] == 2
    assert metrics["new_suspects.mislabelled"] == 1
    assert metrics["suspects.leaked"] == 0
    assert metrics["suspects_rate"] == 0.5
    assert metrics["mean_loss"] == 0.5
    assert metrics["accuracy"] == 0.75
    assert metrics["wrong_labels_low"] == 1
    assert found["by_class"]["1"] == {
        "examples": 3,
        "accuracy": 2 / 3,
        "suspects": 1,
        "suspects_rate": 1 / 3,
    }
    assert found["by_shard"]["x"]["suspects"] == 3
    assert found["by_shard"]["y"]["accuracy"] == 1


def test_summaries_add_up_to_that_of_all():
    rng = np.random.default_rng(0)
    tables = [
        signals(rng.random(n), rng.integers(0, 3, n), rng.integers(0, 3, n)) for n in (5, 9, 3)
    ]
    whole = nights.summary(pa.concat_tables(tables), True)
    parts = nights.merged(nights.summary(table, True) for table in tables)
    assert parts.pop("loss") == pytest.approx(whole.pop("loss"))
    assert parts == whole


def test_a_list_or_no_label_has_no_accuracy():
    table = signals([0.5]).set_column(0, "label", pa.array([[0.0, 1.0]]))
    found = nights.metrics_of("d", {"x": nights.summary(table, True)}, NO_SUSPECTS)
    assert "accuracy" not in found["metrics"]
    empty = nights.metrics_of("d", {"x": nights.summary(table[:0], True)}, NO_SUSPECTS)
    assert empty["metrics"]["suspects_rate"] is None


@pytest.mark.parametrize(
    ("hits", "total", "marked", "drawn"),
    [(0, 50, 5, 10), (3, 50, 5, 10), (5, 50, 5, 10), (6, 50, 5, 10), (40, 90, 60, 70),
     (41, 90, 60, 70), (30, 100_000, 1000, 1000)],
)  # fmt: skip
def test_the_tail_of_the_hypergeometric(hits, total, marked, drawn):
    expected = stats.hypergeom.sf(hits - 1, total, marked, drawn)
    assert nights._at_least(hits, total, marked, drawn) == pytest.approx(expected, abs=1e-12)


def scores_of(rng, count, bad=0.0):
    """Scores of a shard: most near 0, natural suspects, and flips near 1."""
    scores = rng.beta(0.3, 4, count)
    flips = rng.random(count) < bad
    scores[flips] = rng.beta(6, 1, int(flips.sum()))
    return scores


def week(rng, bad=0.0, cohort="new", nights_count=6, shards=2, size=1000):
    """Metrics of nights on which shards arrive; in the last one of them has wrong labels."""
    history, known = [], {}
    for day in range(nights_count):
        for k in range(shards):
            share = bad if day == nights_count - 1 and k == 0 else 0.0
            path = f"{day}-{k}"
            table = signals(scores_of(rng, size, share), cohort=cohort)
            known[path] = nights.summary(table, True, "v1")
        history.append(nights.metrics_of(f"{day}", dict(known), NO_SUSPECTS, history))
    return history, known


def test_one_per_cent_of_wrong_labels_in_a_new_shard_stands_out():
    history, known = week(np.random.default_rng(1), bad=0.01)
    assert [night["metrics"]["new_suspicious_shards"] for night in history] == [0] * 5 + [1]
    assert history[-1]["by_shard"]["5-0"]["probability"] < nights.LEVEL
    again = nights.metrics_of("5", known, NO_SUSPECTS, history)
    assert again == history[-1]  # a night that is run again says the same
    after = nights.metrics_of("6", known, NO_SUSPECTS, history)
    assert after["metrics"]["new_suspicious_shards"] == 0
    assert after["metrics"]["suspicious_shards"] == 1
    mended = {**known, "5-0": {**known["0-0"], "identity": "v2"}}
    after = nights.metrics_of("6", mended, NO_SUSPECTS, history)
    assert after["metrics"]["suspicious_shards"] == 0


def test_shards_of_one_kind_stand_out_on_hardly_any_night():
    found = [
        night["metrics"]["new_suspicious_shards"]
        for seed in range(10)
        for night in week(np.random.default_rng(seed))[0]
    ]
    assert len(found) == 60
    assert sum(found) <= 2  # of 60 at a level of 0.01: more has a probability of 0.02


def test_the_first_shard_has_nothing_to_be_compared_with():
    history, _ = week(np.random.default_rng(0), nights_count=1, shards=1)
    assert history[0]["by_shard"]["0-0"]["probability"] is None


def surprising(seed, wrong=0, count=1000, classes=10):
    """What is kept of a shard whose labels are as probable as is said, but for some."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, classes))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    label = (rng.random((count, 1)) < p.cumsum(axis=1)).argmax(axis=1)
    label[:wrong] = (label[:wrong] + rng.integers(1, classes, wrong)) % classes
    return nights.surprises(-np.log(p), label)


def test_surprises_are_counted():
    found = nights.surprises(np.array([[0.3, 1.1], [2.0, 0.1], [5, 5]]), np.array([0, 0, -1]))
    assert sum(found["surprises"]) == sum(found["if_wrong"]) == 2
    assert found["surprises"][1] == found["surprises"][8] == 1
    assert found["if_wrong"][4] == found["if_wrong"][0] == 1


@pytest.mark.parametrize("wrong", [0, 4, 8])
def test_surprise_is_as_probable_as_among_permutations(wrong):
    one, others = surprising(99, wrong), [surprising(seed) for seed in range(6)]
    own, rest = np.array(one["surprises"]), np.array([o["surprises"] for o in others])
    every = own + rest.sum(axis=0)
    flipped = np.sum([o["if_wrong"] for o in (one, *others)], axis=0) + 0.5
    given = (every + 0.5) / (every + 0.5).sum()
    ratio = isotonic_regression(flipped / flipped.sum() / given, weights=given).x
    gain = np.log(1 + 0.01 * (ratio - 1))
    draws = np.random.default_rng(0).multivariate_hypergeometric(every, own.sum(), 20_000)
    expected = (draws @ gain >= own @ gain - 1e-9).mean()
    found = nights.surprise_probability(one, others)
    if own @ gain <= every @ gain * own.sum() / every.sum():
        assert found == 1
    else:
        assert found == pytest.approx(expected, rel=0.15, abs=0.003)


def test_few_wrong_labels_of_a_new_shard_are_seen_and_right_ones_are_not():
    others = [surprising(seed) for seed in range(10)]
    assert nights.surprise_probability(surprising(50, 15), others) < 1e-3
    least = min(nights.surprise_probability(surprising(seed), others) for seed in range(60, 80))
    assert least > 1e-3


def test_a_shard_is_tested_once():
    history = []
    for night in range(70):
        names = [f"s{k}" for k in range(night // 35 + 2)]
        shards = {name: nights.summary(signals([0.1]), True, name) for name in names}
        made = nights.metrics_of(f"{night:03d}", shards, NO_SUSPECTS, history[-60:])
        assert list(made["arrivals"]) == {0: ["s0", "s1"], 35: ["s2"]}.get(night, [])
        history.append(made)


def test_shards_of_another_model_are_not_compared():
    others = [surprising(seed) for seed in range(5)]

    def row(kept, model):
        scores = nights.summary(signals(np.full(1000, 0.1)), True)
        return {**scores, **kept, "model": model}

    for model, found in (("new", pytest.approx(0, abs=1e-6)), ("old", 1)):
        shards = {f"o{i}": row(kept, model) for i, kept in enumerate(others)}
        shards["one"] = row(surprising(50, 30), "new")
        assert nights.shard_probabilities("d", shards)["one"] == found


def test_what_came_after_a_night_of_the_same_model_is_compared_with_its_like():
    """The model may have seen the shards of the first night, and has not seen those after it."""

    def row(kept, unseen, name, model="m"):
        scores = nights.summary(signals(np.full(1000, 0.1)), True, name)
        as_unseen = {f"unseen_{key}": value for key, value in unseen.items()}
        return {**scores, **kept, **as_unseen, "cohort": "unknown", "model": model}

    easy = surprising(1, 0)
    easy = {**easy, "surprises": sorted(easy["surprises"], reverse=True)}  # learnt by heart
    shards = {f"first-{i}": row(easy, surprising(i), f"first-{i}") for i in range(5)}
    history = []
    for night in range(4):
        if night:
            wrong = 30 if night == 3 else 0
            kept = surprising(20 + night, wrong)
            shards[f"later-{night}"] = row(kept, kept, f"later-{night}")
        history.append(nights.metrics_of(str(night), shards, NO_SUSPECTS, history))
    found = [one["metrics"]["new_suspicious_shards"] for one in history]
    assert found[2:] == [0, 1]
    assert history[3]["known"]["later-2"]["late"]
    assert not history[3]["known"]["first-0"]["late"]
    others = {name: {**one, "model": "another"} for name, one in shards.items()}
    again = nights.metrics_of("4", others, NO_SUSPECTS, history)
    assert not any(one["late"] for one in again["known"].values())
