"""Which examples stand out by where they lie in φ: near-duplicates, leaked ones, outliers, shifts.

Every threshold follows from the data's own distribution. Each example gets the probability p of
lying so close, or so far, by chance, from a model whose one parameter is fitted to the bulk of the
data, and those are suspects of which at most a share `LEVEL` is expected to be false (Benjamini and
Hochberg 1995). A suspect's confidence is one less its adjusted p.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.01
OUTLIER_LEVEL = 0.1  # an outlier is a matter of degree
FEWEST = 30  # examples, of which a distribution can be told
_CLOSEST = 0.5  # of the usual distance: what is further away is no near-duplicate, however rare
_FLOOR = 0.05  # of the median distance, below which a usual distance is no measure
_SHIFT_FEWEST = 20  # examples of a class in a shard


def adjusted(p: np.ndarray) -> np.ndarray:
    """The false discovery rate at which each of some tests is a discovery: float64 [n].

    Benjamini and Hochberg 1995.
    """
    order = np.argsort(p)
    rates = p[order] * len(p) / np.arange(1, len(p) + 1)
    found = np.empty(len(p))
    found[order] = np.minimum(np.minimum.accumulate(rates[::-1])[::-1], 1.0)
    return found


@dataclasses.dataclass(frozen=True)
class Closeness:
    """How close two examples must be to be the same.

    Attributes:
      usual: float64 [n], the distance to the k-th nearest of each example, by which its others are
        measured.
      ratio: float64 [n], of the nearest by that.
      rate: float64 [n], at which false discovery rate that is a near-duplicate.
      dimension: of the data around an example.
      limit: the greatest ratio of near-duplicates; −1 if there are none.
      count: k.
    """

    usual: np.ndarray
    ratio: np.ndarray
    rate: np.ndarray
    dimension: float
    limit: float
    count: int


def closeness(nearest: np.ndarray, kth: np.ndarray, k: int) -> Closeness:
    """Which examples have a near-duplicate.

    Where the data has dimension m around an example, the others within its k-th distance lie there
    uniformly, so that the nearest is at a share of at most r of that distance with probability
    1 − (1 − r^m)^(k−1). The dimension follows from that distribution's own quantiles, as in the
    estimator of Facco et al. 2017; of the median and the first tenth the lower is taken, which
    makes small shares the more usual.

    Args:
      nearest: float [n], the distance to the nearest other.
      kth: float [n], to the k-th nearest, k > 1.
      k: see above.
    """
    kth = kth.astype(np.float64)
    finite = np.isfinite(kth)
    typical = float(np.median(kth[finite])) if finite.any() else 0.0
    usual = np.maximum(np.where(finite, kth, np.inf), _FLOOR * typical)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where((usual > 0) & np.isfinite(usual), nearest / usual, 1.0)
    dimension = _dimension(ratio[finite], k)
    rate = np.ones(len(ratio))
    if dimension and k > 1 and finite.sum() >= FEWEST:
        rate = adjusted(crowded(ratio, dimension, k - 1))
    near = (rate <= LEVEL) & (ratio <= _CLOSEST)
    # Copies to the last digit need no distribution, unless most examples are such.
    if dimension and not near.any() and (ratio == 0).any():
        near = ratio == 0
        rate = np.where(near, LEVEL, rate)
    limit = float(ratio[near].max()) if near.any() else -1.0
    return Closeness(usual, ratio, rate, dimension, limit, k)


def crowded(ratio: np.ndarray, dimension: float, others: float) -> np.ndarray:
    """Probability that the nearest of so many others is at this share of a ball or less: [n]."""
    inside = np.clip(ratio, 0, 1 - 1e-12) ** dimension
    return -np.expm1(others * np.log1p(-inside))


def leaks(distance: np.ndarray, close: Closeness, tests: float) -> tuple[np.ndarray, np.ndarray]:
    """How close each training example is to a test example, and at which false discovery rate.

    Were the test examples of the same distribution, and others, some of them would lie within an
    example's usual distance, by which the same model as for near-duplicates tells what is too near.

    Args:
      distance: float [n], to the nearest test example.
      close: of the training examples.
      tests: test examples for each training example.

    Returns:
      float64 [n] each; the ratio is by the usual distance, and the rate 1 where it is not near.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(close.usual > 0, distance / close.usual, 1.0)
    if not close.dimension:
        return ratio, np.ones(len(ratio))
    if len(ratio) < FEWEST:
        return ratio, np.where(ratio == 0, LEVEL, 1.0)
    others = max(1.0, close.count * tests)
    rate = adjusted(crowded(ratio, close.dimension, others))
    return ratio, np.where(ratio <= _CLOSEST, rate, 1.0)


def _dimension(ratio: np.ndarray, k: int) -> float:
    """The dimension around the examples; 0 where their distances tell nothing."""
    if len(ratio) < 2 or k < 2:
        return 0.0
    found = []
    for share in (0.1, 0.5):
        at = float(np.quantile(ratio, share))
        if 0 < at < 1:
            found.append(np.log(-np.expm1(np.log1p(-share) / (k - 1))) / np.log(at))
        elif share == 0.5:
            return 0.0
    return float(min(found)) if found else 0.0


def outlier_rates(distance: np.ndarray, outlyingness: np.ndarray) -> np.ndarray:
    """At which false discovery rate each example is an outlier: float64 [n].

    By its distance to its nearest others (Ramaswamy, Rastogi and Shim 2000), which a group of
    outliers that are near each other has as well, or by that over the same of those others, which
    finds one beside a dense class. Both are taken to have a Pareto tail above their upper tenth,
    whose slope is that up to the upper fortieth; outliers further up do not touch it.

    Args:
      distance: float [n], see `neighbours.neighbour_distance`; NaN counts for nothing.
      outlyingness: float [n], see `neighbours.outlyingness`; the same.
    """
    known = np.isfinite(distance) & np.isfinite(outlyingness)
    rates = np.ones(len(distance))
    if known.sum() >= FEWEST:
        least = np.minimum(_tail(distance[known]), _tail(outlyingness[known]))
        rates[known] = adjusted(np.minimum(2 * least, 1))
    return rates


def _tail(values: np.ndarray) -> np.ndarray:
    """Probability of at least each value, of a Pareto tail above the upper tenth; 1 below it."""
    logs = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    tenth, last = np.quantile(logs, [0.9, 0.975])
    slope = (last - tenth) / np.log(4)
    if not slope > 0:
        return np.ones(len(values))
    found: np.ndarray = np.where(logs > tenth, 0.1 * np.exp(-(logs - tenth) / slope), 1.0)
    return found


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the examples of each class in a shard.

    Attributes:
      classes: float64 [c].
      count: int64 [c].
      total: float64 [c, d], Σ x of their features, sketched.
      squares: float64 [c], Σ |x|².
      scatter: float64 [d, d], Σ (x − x̄)(x − x̄)ᵀ about the mean of its class.
    """

    classes: np.ndarray
    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    scatter: np.ndarray


def class_sums(features: np.ndarray, label: np.ndarray) -> Sums:
    """The sums of a shard.

    An example that is more than thrice as far from the middle of its class as is usual there counts
    as if it were that far, so that outliers hide no shift, and are none.

    Args:
      features: float [n, d].
      label: float [n]; those that are NaN are left out.
    """
    known = np.isfinite(label)
    classes, place = np.unique(label[known], return_inverse=True)
    x = features[known].astype(np.float64)
    for number in range(len(classes)):
        x[place == number] = _within(x[place == number])
    member = np.zeros((len(classes), len(x)))
    member[place, np.arange(len(x))] = 1
    count, total = member.sum(axis=1), member @ x
    scatter = x.T @ x - (total / np.maximum(count, 1)[:, None]).T @ total
    squares = member @ np.square(x).sum(axis=1)
    return Sums(classes, count.astype(np.int64), total, squares, scatter)


def _within(x: np.ndarray) -> np.ndarray:
    """Examples of a class, [n, d], drawn in to thrice the median distance from their median."""
    middle = np.median(x, axis=0)
    far = np.linalg.norm(x - middle, axis=1)
    most = 3 * np.median(far)
    shrunk = np.minimum(1, most / np.maximum(far, 1e-300)) if most > 0 else np.ones(len(x))
    drawn: np.ndarray = middle + (x - middle) * shrunk[:, None]
    return drawn


@dataclasses.dataclass(frozen=True)
class Shift:
    """A class whose examples in a shard lie elsewhere than in the other shards.

    Attributes:
      shard: its number.
      label: the class.
      score: the share of the examples' spread that the shift explains, in [0, 1].
      rate: false discovery rate.
    """

    shard: int
    label: float
    score: float
    rate: float


def shifted(shards: Sequence[Sums]) -> list[Shift]:
    """The classes of shards that lie elsewhere than the same class in the other shards.

    The squared distance of the means, by what it would be by chance, which is Dempster's test for
    many dimensions (1958): with d the effective number of dimensions it has a χ² distribution with
    d degrees of freedom, divided by d. Where shards differ among themselves by more than chance, it
    is divided by their usual value. The worst of a class is set aside, and the others compared
    again, so that one shifted shard does not make the others look shifted; never more than half of
    a class's examples.

    Args:
      shards: sums of each.
    """
    found: list[Shift] = []
    probabilities: list[float] = []
    tests = 0
    dimension = _effective_dimension(sum((one.scatter for one in shards), np.zeros((1, 1))))
    for label in sorted({float(c) for one in shards for c in one.classes}):
        places, rows = [], []
        for number, one in enumerate(shards):
            for at in np.flatnonzero(one.classes == label):
                places.append(number)
                rows.append((one.count[at], one.total[at], one.squares[at]))
        count = np.array([row[0] for row in rows], np.float64)
        total = np.array([row[1] for row in rows])
        squares = np.array([row[2] for row in rows])
        tests += int((count >= _SHIFT_FEWEST).sum()) if len(rows) > 1 else 0
        inside = np.ones(len(rows), bool)
        while inside.sum() > 1:
            by_chance, share = _distances(count, total, squares, inside)
            others = by_chance[inside & (count >= _SHIFT_FEWEST)]
            if len(others) == 0:
                break
            usual = max(1.0, float(np.median(others))) if len(others) > 2 else 1.0
            movable = inside & (count >= _SHIFT_FEWEST)
            movable &= count[inside].sum() - count >= count.sum() / 2
            if not movable.any():
                break
            furthest = by_chance[movable].max()
            # Of two, which are equally far from each other, the one that came later.
            worst = int(np.flatnonzero(movable & (by_chance >= furthest * (1 - 1e-9)))[-1])
            p = _at_least(by_chance[worst] / usual, dimension)
            if p > LEVEL:
                break
            found.append(Shift(places[worst], label, float(share[worst]), p))
            probabilities.append(p)
            inside[worst] = False
    # Tests that found nothing count as well.
    rates = adjusted(np.array([*probabilities, *[1.0] * (tests - len(found))]))
    return [
        dataclasses.replace(one, rate=float(rate))
        for one, rate in zip(found, rates, strict=False)
        if rate <= LEVEL
    ]


def _distances(
    count: np.ndarray, total: np.ndarray, squares: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each shard's mean from that of the others that are inside, by chance and by the spread."""
    counts, totals, whole = count[inside].sum(), total[inside].sum(0), squares[inside].sum()
    rest = np.maximum(counts - count, 1)
    apart = np.square(total / count[:, None] - (totals - total) / rest[:, None]).sum(axis=1)
    # The spread within shards, which a shift between them does not widen.
    within = whole - (np.square(total[inside]).sum(1) / count[inside]).sum()
    spread = max(within / max(counts - inside.sum(), 1), 1e-30)
    return apart / (spread * (1 / count + 1 / rest)), apart / (apart + spread)


def _at_least(value: float, dimension: float) -> float:
    """P(χ²_d / d ≥ value), by Wilson and Hilferty's cube root (1931)."""
    variance = 2 / (9 * max(dimension, 1e-9))
    z = (np.cbrt(value) - (1 - variance)) / np.sqrt(variance)
    return float(_normal_tail(z))


def _normal_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))


def _effective_dimension(scatter: np.ndarray) -> float:
    """tr(S)² / tr(S²) of a scatter matrix [d, d]: how many dimensions its spread has."""
    squares = float(np.square(scatter).sum())
    return float(np.trace(scatter)) ** 2 / squares if squares > 0 else 1.0
