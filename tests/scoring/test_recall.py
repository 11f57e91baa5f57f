import numpy as np
import pandas as pd
import pytest

from tracin_beam.scoring import topk
from tracin_beam.scoring.recall import correlation, ranks, recall, retrieval, to_keep
from tracin_beam.scoring.topk import OPPONENT, PROPONENT, ROLES, SIGNS, Judged, Scored


def scored(places, scores):
    shard, position = np.array(places).T
    count = len(scores)
    return Scored(
        np.zeros(count, int), shard, position, np.array(scores, float), np.empty((count, 0))
    )


def share(truth, found, role, exact):
    return recall(truth, truth.score, found, exact, role)


BEST = scored([(0, 1), (0, 2), (1, 1), (1, 2)], [9.0, 8.0, 7.0, 6.0])


def test_recall_counts_places():
    assert share(BEST, BEST, PROPONENT, None) == 1
    found = scored([(1, 1), (2, 2), (0, 1), (0, 3)], [7.0, 6.5, 9.0, 1.0])
    assert share(BEST, found, PROPONENT, None) == 0.5
    assert share(BEST, scored([(0, 1)], [9.0]), PROPONENT, None) == 0.25
    assert share(BEST, scored([(5, 5)], [9.0]), PROPONENT, None) == 0


def test_equal_scores_stand_for_each_other():
    found = scored([(0, 1), (0, 2), (1, 1), (7, 7)], [0.0] * 4)
    assert share(BEST, found, PROPONENT, np.array([9.0, 8.0, 7.0, 6.0])) == 1
    assert share(BEST, found, PROPONENT, np.array([9.0, 8.0, 7.0, 5.9])) == 0.75
    least = scored([(0, 1), (0, 2)], [-9.0, -8.0])
    found = scored([(0, 1), (3, 3)], [0.0, 0.0])
    assert share(least, found, OPPONENT, np.array([-9.0, -8.0])) == 1
    assert share(least, found, OPPONENT, np.array([-9.0, -7.9])) == 0.5


def judged(queries=3, n=500, step=2, seed=0):
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(queries, n))
    estimate = (exact + 0.3 * rng.normal(size=(queries, n))).round(1)  # with ties
    query, row = np.divmod(np.arange(queries * n), n)
    return Judged(query, row // 100, row % 100, exact.ravel(), estimate.ravel(), row % step == 0)


def table_of(rows, count, drop=0):
    """The exact best of a role, but for the first few of each query."""
    found = {}
    for role in ROLES:
        best = topk.best(rows, rows.exact, count + drop, role)
        best = topk.take(best, topk.ranks_within(best.query) >= drop)
        found[role] = Scored(*best[:4], np.empty((len(best.query), 0)))
    return found


def test_retrieval_is_the_same_from_what_is_kept_of_parts():
    rows = judged()
    table = table_of(rows, 10, drop=2)
    parts = []
    for shard in range(5):
        part = topk.take(rows, rows.shard == shard)
        shape = (3, 100)
        kept = to_keep(part.exact.reshape(shape), part.estimate.reshape(shape), 10, 2)
        parts.append(topk.take(part, kept.ravel()))
    assert sum(len(part.query) for part in parts) < len(rows.query)
    found = retrieval(topk.merge(parts), table, 10, True)
    assert (found["queries"], found["k"]) == (3, 10)
    for role in ROLES:
        assert found[role + "s"]["recall"] == pytest.approx(0.8)
        alone = []
        for query in range(3):
            mine = topk.take(rows, rows.query == query)
            best = set(np.argsort(-SIGNS[role] * mine.exact)[:10])
            # Ties of estimates in the order of places, as in every table.
            alone.append(
                len(best & set(np.argsort(-SIGNS[role] * mine.estimate, kind="stable")[:10])) / 10
            )
        assert found[role + "s"]["recall_projection"] == pytest.approx(np.mean(alone))
    frames = [
        pd.DataFrame({"x": mine.estimate, "y": mine.exact})
        for query in range(3)
        for mine in [topk.take(rows, (rows.query == query) & rows.sampled)]
    ]
    for method in ("pearson", "spearman"):
        expected = np.mean([frame.corr(method).iloc[0, 1] for frame in frames])
        assert found["correlation"][method] == pytest.approx(expected)


def test_a_correlation_that_is_not_defined_is_left_out():
    rows = judged(queries=1, n=5)
    table = table_of(rows, 1)
    rows = rows._replace(estimate=np.zeros(5))
    nothing = retrieval(rows, table, 1, True)["correlation"]
    assert nothing == {"pearson": None, "spearman": None}


def test_ranks_and_correlations():
    assert ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    x = np.arange(5.0)
    assert correlation(x, 2 * x + 1) == pytest.approx(1)
    assert np.isnan(correlation(x, np.ones(5)))
