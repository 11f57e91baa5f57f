"""How good is the retrieval? From exact and estimated scores to recall and correlation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tracin_beam.scoring import topk
from tracin_beam.scoring.topk import ROLES, SIGNS, Judged, Scored


def to_keep(exact: np.ndarray, estimate: np.ndarray, count: int, step: int) -> np.ndarray:
    """The scores of some training examples that `retrieval` needs: a sample, and all ends.

    Args:
      exact, estimate: float [queries, n], scores.
      count: how many of each end.
      step: of so many training examples one is in the sample.

    Returns:
      bool [queries, n].
    """
    kept = np.zeros(exact.shape, bool)
    kept[:, ::step] = True
    for role in ROLES:
        for scores in (exact, estimate):
            kept[topk.ends(scores, count, role)] = True
    return kept


def retrieval(judged: Judged, table: dict[str, Scored], top_k: int, exact: bool) -> dict[str, Any]:
    """The "retrieval" entry of run.json.

    Args:
      judged: of all training examples, as far as `to_keep` says so, for the sampled queries.
      table: the rows of the influence table for the same queries, by role.
      top_k: the k of recall@k.
      exact: whether the scores of the table are exact.
    """
    queries = np.unique(judged.query)
    found: dict[str, Any] = {"queries": len(queries), "k": top_k}
    for role in ROLES:
        of_table, of_projection = [], []
        for query in queries:
            mine = topk.take(judged, judged.query == query)
            truth = topk.best(mine, mine.exact, top_k, role)
            estimated = topk.best(mine, mine.estimate, top_k, role)
            rows = topk.take(table[role], table[role].query == query)
            own = rows.score if exact else None
            of_table.append(recall(truth, truth.exact, rows, own, role))
            of_projection.append(recall(truth, truth.exact, estimated, estimated.exact, role))
        found[role + "s"] = {
            "recall": float(np.mean(of_table)),
            "recall_projection": float(np.mean(of_projection)),
        }
    sample = topk.take(judged, judged.sampled)
    pairs = [sample.query == query for query in queries]
    estimates = [sample.estimate[mine] for mine in pairs if mine.sum() > 1]
    scores = [sample.exact[mine] for mine in pairs if mine.sum() > 1]
    found["correlation"] = {
        "pearson": _mean([correlation(a, b) for a, b in zip(estimates, scores, strict=True)]),
        "spearman": _mean(
            [correlation(ranks(a), ranks(b)) for a, b in zip(estimates, scores, strict=True)]
        ),
    }
    return found


def recall(
    truth: Judged | Scored,
    score: np.ndarray,
    found: Judged | Scored,
    exact: np.ndarray | None,
    role: str,
) -> float:
    """Share of one query's exact best that was found.

    Args:
      truth: the best by exact score.
      score: float64 [n], their exact scores.
      found: what was found.
      exact: float64 [m], exact scores of what was found, where known: examples with equal scores
        then stand for each other.
      role: proponent or opponent.
    """
    places = set(zip(truth.shard.tolist(), truth.position.tolist(), strict=True))
    hit = np.array(
        [p in places for p in zip(found.shard.tolist(), found.position.tolist(), strict=True)],
        bool,
    )
    if exact is not None:
        sign = SIGNS[role]
        worst = float(np.min(sign * score))
        hit |= sign * exact >= worst - 1e-6 * abs(worst)
    return min(int(hit.sum()), len(places)) / len(places)


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.mean(finite)) if finite else None


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; NaN where either side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean rank: float64, of the shape of x, [n]."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[inverse]
