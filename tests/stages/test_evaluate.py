import numpy as np
import pandas as pd
import pytest

from tracin_beam.stages import evaluate
from tracin_beam.stages.evaluate import recall, summarise
from tracin_beam.stages.influence import OPPONENT, PROPONENT, Scored, Sets
from tracin_beam.storage import runs


def scored(places, scores):
    shard, position = np.array(places).T
    return Scored(shard, position, np.array(scores, float), np.empty((len(scores), 0)))


BEST = scored([(0, 1), (0, 2), (1, 1), (1, 2)], [9.0, 8.0, 7.0, 6.0])


def test_recall_counts_places():
    assert recall(BEST, BEST, PROPONENT, None) == 1
    found = scored([(1, 1), (2, 2), (0, 1), (0, 3)], [7.0, 6.5, 9.0, 1.0])
    assert recall(BEST, found, PROPONENT, None) == 0.5
    assert recall(BEST, scored([(0, 1)], [9.0]), PROPONENT, None) == 0.25
    assert recall(BEST, scored([(5, 5)], [9.0]), PROPONENT, None) == 0


def test_equal_scores_stand_for_each_other():
    found = scored([(0, 1), (0, 2), (1, 1), (7, 7)], [0.0] * 4)
    assert recall(BEST, found, PROPONENT, np.array([9.0, 8.0, 7.0, 6.0])) == 1
    assert recall(BEST, found, PROPONENT, np.array([9.0, 8.0, 7.0, 5.9])) == 0.75
    least = scored([(0, 1), (0, 2)], [-9.0, -8.0])
    found = scored([(0, 1), (3, 3)], [0.0, 0.0])
    assert recall(least, found, OPPONENT, np.array([-9.0, -8.0])) == 1
    assert recall(least, found, OPPONENT, np.array([-9.0, -7.9])) == 0.5


def test_summary():
    recalls = [
        (PROPONENT, 1.0, 0.8),
        (OPPONENT, 0.9, 0.6),
        (PROPONENT, 0.9, 0.6),
        (OPPONENT, 0.8, 0.4),
    ]
    rng = np.random.default_rng(0)
    pairs = [rng.normal(size=(50, 2)).round(1) for _ in range(2)]  # rounded: with ties
    pairs = [np.stack([p[:, 0], p[:, 0] + p[:, 1]], axis=1) for p in pairs]
    quality = summarise(recalls, [*pairs, np.zeros((1, 2))], 10)
    assert (quality["queries"], quality["k"]) == (2, 10)
    assert quality["proponents"] == pytest.approx({"recall": 0.95, "recall_projection": 0.7})
    assert quality["opponents"] == pytest.approx({"recall": 0.85, "recall_projection": 0.5})
    frames = [pd.DataFrame(p) for p in pairs]
    for method in ("pearson", "spearman"):
        expected = np.mean([frame.corr(method).iloc[0, 1] for frame in frames])
        assert quality["correlation"][method] == pytest.approx(expected)


def test_a_correlation_that_is_not_defined_is_left_out():
    constant = np.stack([np.zeros(5), np.arange(5.0)], axis=1)
    recalls = [(PROPONENT, 1.0, 1.0), (OPPONENT, 1.0, 1.0)]
    nothing = summarise(recalls, [constant], 1)["correlation"]
    assert nothing == {"pearson": None, "spearman": None}
    line = np.stack([np.arange(5.0), 2 * np.arange(5.0)], axis=1)
    some = summarise(recalls, [constant, line], 1)["correlation"]
    assert some == pytest.approx({"pearson": 1.0, "spearman": 1.0})


def sets_of(*names):
    shards = tuple(runs.Shard(f"/test/{name}", name, "x") for name in names)
    return Sets(runs.Output("out"), (), shards, "test", "loss", (), None)


def results_of(sets, read, rejected=()):
    bad = tuple((position, "bad") for position in rejected)
    return [runs.ShardResult("test", shard, read, bad) for shard in sets.test]


def test_the_sample_of_queries_is_stable_and_usable():
    sets = sets_of("b", "c")
    chosen = evaluate.sample_queries(results_of(sets, 100), sets, 10)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == evaluate.sample_queries(results_of(sets, 100)[::-1], sets, 10)
    # More of the same shards, or fewer queries: of those before, none is new.
    assert set(evaluate.sample_queries(results_of(sets, 100), sets, 5)) < set(chosen)
    without = evaluate.sample_queries(results_of(sets, 100, [chosen[0][1]]), sets, 10)
    assert chosen[0] not in without
    assert len(set(without) & set(chosen)) >= 8
    assert len(evaluate.sample_queries(results_of(sets, 3), sets, 10)) == 6
