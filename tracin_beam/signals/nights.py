"""The metrics of a night, from mergeable sums of its shards, and the shards that stand out.

A shard's summary is made from its signals alone, so that a shard that did not change costs nothing
on the next night. Nothing here reads or writes files.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Bins of the mislabel score, equally wide in its logit: fine where suspects are. Bin 0 is below
# all edges.
_EDGES = 1 / (1 + np.exp(-np.linspace(-2.0, 10.0, 97)))
BINS = len(_EDGES) + 1
# Edges of the bins of −log of a label's probability.
_SURPRISES = np.arange(1, 81) * 0.25
SURPRISE_BINS = len(_SURPRISES) + 1
# The share of labels, drawn at random, that shards are tested for.
_WRONG = 0.01
_GRID = 1 << 14  # steps of the statistic whose distribution is wanted
_OF_ARRIVALS = ("cohort", "identity", "model", "late", "scores", "surprises", "if_wrong")
_LISTS = ("scores", "surprises", "if_wrong", "unseen_surprises", "unseen_if_wrong")
# Shares of the worst scores in which a shard may have too many: what few but certain mistakes
# look like, and what many uncertain ones do.
_TAILS = (0.0005, 0.002, 0.01, 0.04)
LEVEL = 0.01  # of all tests of a night together: a false alarm in a hundred nights at most
_ADDED = ("examples", "loss", "losses", "right", "judged", "first_right", "first_judged")
_MOST_CLASSES = 1000
_NIGHTS = 30  # whose arrivals are still compared with

SUSPECT_KINDS = (
    *("mislabelled", "duplicate", "conflicting duplicate", "leaked"),
    *("outlier", "shifted class"),
)


def summary(
    signals: pa.Table,
    classification: bool,
    identity: str = "",
    first: np.ndarray | None = None,
) -> dict[str, Any]:
    """What is kept of a shard, or of some of its rows.

    Args:
      signals: rows of `signals.parquet` of one shard, whose "cohort" is one.
      classification: whether labels and predictions are classes, so that there is an accuracy.
      identity: of the shard's content, so that a shard that changed counts as one that came.
      first: [n], predictions of the first checkpoint.

    Returns:
      Sums that can be added: "examples", "loss" and "losses" (sum, and how many there are),
      "right" and "judged" (labels that are predicted, and labels), "first_right" and
      "first_judged" (by the first checkpoint), "scores" (counts by bin of the
      mislabel score) and "classes" ({class: [examples, right]}), with "cohort" and "identity". JSON
      can hold it.
    """
    loss = _floats(signals, "loss")
    finite = np.isfinite(loss)
    found: dict[str, Any] = {
        "cohort": signals["cohort"][0].as_py() if len(signals) else "unknown",
        "identity": identity,
        "examples": len(signals),
        "loss": float(loss[finite].sum()),
        "losses": int(finite.sum()),
        "right": 0,
        "judged": 0,
        "first_right": 0,
        "first_judged": 0,
        "scores": histogram(_floats(signals, "mislabel_score")),
        "classes": {},
    }
    if classification:
        label, prediction = _floats(signals, "label"), _floats(signals, "prediction")
        known = np.isfinite(label) & np.isfinite(prediction)
        right = label == prediction
        found["right"], found["judged"] = int((known & right).sum()), int(known.sum())
        if first is not None:
            both = np.isfinite(label) & np.isfinite(first)
            found["first_right"] = int((both & (label == first)).sum())
            found["first_judged"] = int(both.sum())
        classes, at = np.unique(label[known], return_inverse=True)
        totals = np.bincount(at, minlength=len(classes))
        rights = np.bincount(at, right[known], minlength=len(classes))
        found["classes"] = {
            f"{name:g}": [int(total), int(hits)]
            for name, total, hits in zip(classes, totals, rights, strict=True)
        }
    return found


def surprise(logs: np.ndarray, m: np.ndarray, cohort: str) -> np.ndarray:
    """How unlikely each class of an example is, −log of its probability: float64 [n, K].

    What says most of a new example's label is the network, which has not seen it, at the second
    half of the checkpoints, which know most; of others, what the mislabel score is made of.

    Args:
      logs: [n, C, K], log-probabilities at each checkpoint.
      m: [n, K], see `mislabel.mixed`.
      cohort: of the examples.
    """
    if cohort == "new":
        late: np.ndarray = -logs[:, logs.shape[1] // 2 :].mean(axis=1)
        return late
    return -np.log(np.maximum(m, 1e-12))


def kept_surprises(
    logs: np.ndarray, m: np.ndarray, cohort: str, label: np.ndarray
) -> dict[str, Any]:
    """What `surprises` gives; of a shard of which nothing is known also as if it was not seen.

    Args:
      logs, m, cohort: as of `surprise`.
      label: int [n], the given class; −1 where there is none.
    """
    found = surprises(surprise(logs, m, cohort), label)
    if cohort == "unknown":
        unseen = surprises(surprise(logs, m, "new"), label)
        found |= {f"unseen_{name}": counts for name, counts in unseen.items()}
    return found


def surprises(surprise: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """What is kept of a shard, or of some of its rows, to tell whether it has wrong labels.

    Args:
      surprise: [n, K], how unlikely each class is, −log of its probability.
      label: int [n], the given class; −1 where there is none.

    Returns:
      "surprises", counts by bin of the given labels' surprise, and "if_wrong", those of all other
      labels' instead: what they would be if labels were drawn at random.
    """
    rows = np.flatnonzero(label >= 0)
    others = np.ones((len(rows), surprise.shape[1]), bool)
    others[np.arange(len(rows)), label[rows]] = False
    return {
        "surprises": _counts(surprise[rows, label[rows]]),
        "if_wrong": _counts(surprise[rows][others]),
    }


def _counts(surprise: np.ndarray) -> list[int]:
    """Counts by bin, [`SURPRISE_BINS`]."""
    bins = np.searchsorted(_SURPRISES, surprise, side="right")
    return [int(count) for count in np.bincount(bins, minlength=SURPRISE_BINS)]


def merged(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of summaries; the cohort is the first one's."""
    whole: dict[str, Any] = {}
    classes: dict[str, list[int]] = {}
    for one in summaries:
        if not whole:
            whole = {**one, **{name: list(one[name]) for name in _LISTS if name in one}}
        else:
            for name in _ADDED:
                whole[name] += one[name]
            for name in _LISTS:
                if name in whole:
                    whole[name] = [a + b for a, b in zip(whole[name], one[name], strict=True)]
        for name, (total, right) in one["classes"].items():
            kept = classes.setdefault(name, [0, 0])
            kept[0], kept[1] = kept[0] + total, kept[1] + right
    return {**whole, "classes": classes} if whole else {}


def histogram(scores: np.ndarray) -> list[int]:
    """Counts of mislabel scores by bin, [`BINS`]; scores that are no number are left out."""
    values = np.asarray(scores, np.float64)
    bins = np.searchsorted(_EDGES, values[np.isfinite(values)], side="right")
    return [int(count) for count in np.bincount(bins, minlength=BINS)]


def metrics_of(
    date: str,
    shards: Mapping[str, Mapping[str, Any]],
    suspects: pa.Table,
    history: Sequence[Mapping[str, Any]] = (),
    extra: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """All that a night's `metrics.json` holds but its gates and changes.

    Args:
      date: of the night.
      shards: the summary of each training shard, by path.
      suspects: rows of `suspects.parquet`, without those that a verdict holds for.
      history: what earlier nights' `metrics.json` hold, oldest first.
      extra: other metrics, by name, such as the range of the number of wrong labels.

    Returns:
      "date", "metrics" ({name: number}), "by_class", "by_shard" and "by_cohort" ({key: {name:
      number}}), "arrivals" (the bins of the shards that came or changed tonight, for the
      nights to come) and "known" (which shards there were).
    """
    earlier = [night for night in history if night.get("date") != date]
    before = _known(earlier)
    shards = _with_lateness(shards, earlier)
    probabilities = shard_probabilities(date, shards, history)
    new_suspicious = {path for path, p in probabilities.items() if p is not None and p < LEVEL}
    suspicious = new_suspicious | {
        path
        for path, one in shards.items()
        if _is_known(path, one, before) and before[path].get("suspicious")
    }
    whole = merged(shards.values())
    kinds = suspects["kind"].to_pylist()
    is_new = [first == date for first in suspects["first_seen"].to_pylist()]
    by_kind = collections.Counter(kinds)
    new_by_kind = collections.Counter(k for k, new in zip(kinds, is_new, strict=True) if new)
    cohorts = collections.Counter[str]()
    for one in shards.values():
        cohorts[one["cohort"]] += one["examples"]
    examples = whole.get("examples", 0)
    distinct = pc.count_distinct(suspects["id"]).as_py() if len(suspects) else 0
    metrics: dict[str, float | None] = {
        "examples": examples,
        "examples_new": cohorts["new"],
        "shards": len(shards),
        "suspects": len(kinds),
        "new_suspects": sum(is_new),
        "suspects_rate": distinct / examples if examples else None,
    }
    for kind in dict.fromkeys([*SUSPECT_KINDS, *sorted(by_kind)]):
        metrics[f"suspects.{kind}"] = by_kind[kind]
        metrics[f"new_suspects.{kind}"] = new_by_kind[kind]
    metrics["mean_loss"] = whole["loss"] / whole["losses"] if whole.get("losses") else None
    if whole.get("judged"):
        metrics["accuracy"] = whole["right"] / whole["judged"]
    seen = merged(one for one in shards.values() if one["cohort"] != "new")
    if seen.get("first_judged"):
        metrics["accuracy_first_checkpoint"] = seen["first_right"] / seen["first_judged"]
    metrics["suspicious_shards"] = len(suspicious)
    metrics["new_suspicious_shards"] = len(new_suspicious)
    metrics.update(extra or {})
    arrivals = {
        path: {
            **{name: one[name] for name in _OF_ARRIVALS if name in one},
            "suspicious": path in suspicious,
        }
        for path, one in shards.items()
        if not _is_known(path, one, before)
    }
    return {
        "date": date,
        "metrics": metrics,
        "by_class": _by_class(whole, suspects),
        "by_shard": _by_shard(shards, suspects, probabilities),
        "by_cohort": _by_cohort(shards, suspects),
        "arrivals": arrivals,
        "known": {
            path: {
                **{name: one.get(name) for name in ("identity", "late")},
                "suspicious": path in suspicious,
            }
            for path, one in shards.items()
        },
        "model": next((one.get("model") for one in shards.values()), None),
    }


def shard_probabilities(
    date: str,
    shards: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]] = (),
) -> dict[str, float | None]:
    """How probable by chance as many surprising labels are as each shard has, for a night's tests.

    Of classes see `surprise_probability`. Where there is no such thing, as of a regression, or no
    shards of the cohort to compare with, `_tail_probability` of the mislabel scores is taken. That
    times the number of shards tested is the result (Bonferroni).

    A shard that came after a night with the same checkpoints cannot have been trained on. Cohort or
    not, it is compared with others of which the same is known.

    A shard is compared with the other shards of its cohort tonight, and with those of its cohort
    that came on earlier nights, as they were then. Where these have fewer examples than the shard
    itself, the mislabel scores of all other shards are taken, and the dispersion that is assumed is
    at least 2, as values of examples that were trained on are better.

    Args:
      date: of the night; its own entries in the history are left out.
      shards: as of `metrics_of`.
      history: as of `metrics_of`.

    Returns:
      By path of the shards that came or changed, in [0, 1]; None where there is nothing to compare
      with.
    """
    nights_before = [night for night in history if night.get("date") != date]
    earlier, known = _arrivals(nights_before), _known(nights_before)
    shards = _with_lateness(shards, nights_before)
    # A shard that was there before was tested when it came.
    tested = [path for path, one in shards.items() if not _is_known(path, one, known)]
    bad = {path for path, one in [*known.items(), *earlier.items()] if one.get("suspicious")}
    bad -= set(tested)
    found: dict[str, float | None] = {}
    for path in tested:
        one = shards[path]
        others = [s for other, s in shards.items() if other != path and other not in bad]
        others += [s for other, s in earlier.items() if other not in shards and other not in bad]
        same = [s for s in others if _kin(s) == _kin(one)]
        alike = [s for s in same if "surprises" in s and s.get("model") == one.get("model")]
        size = sum(one.get("surprises", ()))
        if size and sum(sum(s["surprises"]) for s in alike) >= size:
            p: float | None = surprise_probability(one, alike)
        else:
            least = 1.0
            if sum(sum(s["scores"]) for s in same) < sum(one["scores"]):
                same, least = others, 2.0
            own = np.array(one["scores"])
            p = _tail_probability(own, [np.array(s["scores"]) for s in same], least)
        found[path] = None if p is None else min(1.0, p * len(tested))
    return found


def surprise_probability(one: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> float:
    """How probable a shard's labels are to be as surprising as they are, if it is like others.

    The statistic is the log-likelihood ratio of a hundredth of labels that are drawn at random to
    none, Σ log(1 + ε (r(s) − 1)) over the examples' surprises s. The ratio r of the densities of
    surprises of other labels than the given one to those of given labels is from all shards
    together, in bins, and rises with s. Given all of their surprises, the shard's are a sample
    without replacement; the statistic's distribution over such samples is had from its
    characteristic function: the probability is that of a permutation test, but for rounding. If
    shards differ among themselves by more than chance, counts are divided by that dispersion.

    Args:
      one: of the shard, with what `surprises` gives.
      others: the same of shards that it is compared with, with as many examples at least.

    Returns:
      In [0, 1].
    """
    own = np.array(one["surprises"], np.float64)
    rest = np.array([other["surprises"] for other in others], np.float64)
    every = own + rest.sum(axis=0)
    wrong = np.sum([other["if_wrong"] for other in [one, *others]], axis=0, dtype=np.float64)
    given = (every + 0.5) / (every + 0.5).sum()
    ratio = _rising((wrong + 0.5) / (wrong + 0.5).sum() / given, given)
    gain = np.log1p(_WRONG * (ratio - 1))
    gain -= gain @ every / every.sum()
    spread = max(1.0, _overdispersion(rest @ gain, rest.sum(axis=1), gain**2 @ every / every.sum()))
    drawn = own.sum() / every.sum()
    deviation = math.sqrt(max(drawn * (1 - drawn) * (gain**2 @ every), 1e-300) / spread)
    # So fine a grid that its length is 64 standard deviations.
    unit = max(64 * deviation / _GRID, (gain.max() - gain.min()) / 1000, 1e-300)
    steps = np.round(gain / unit).astype(int)
    middle = drawn * (every @ steps) / spread
    at = int(np.ceil(own @ steps / spread - 1e-9))
    if at <= middle:
        return 1.0
    if at - middle > _GRID / 2:
        return 0.0
    values, which = np.unique(steps, return_inverse=True)
    counts = np.bincount(which, every) / spread
    frequencies = 2 * np.pi * np.arange(_GRID // 2 + 1) / _GRID
    turned = np.exp(1j * np.outer(frequencies, values))
    characteristic = np.exp(np.log(1 - drawn + drawn * turned) @ counts)
    density = np.fft.irfft(characteristic.conj(), _GRID)
    above = np.arange(at, int(middle + _GRID / 2))
    return float(np.clip(density[above % _GRID].sum(), 0, 1))


def _rising(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rising sequence with the least weighted squared error (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            both = before[1] + block[1]
            mean = (before[0] * before[1] + block[0] * block[1]) / both
            block = (mean, both, before[2] + block[2])
        blocks.append(block)
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def _overdispersion(sums: np.ndarray, sizes: np.ndarray, variance: float) -> float:
    """How much sums over shards vary, over what they would by chance; 1 if that is no wonder.

    Args:
      sums: over each shard, of a number whose mean over all is 0.
      sizes: examples of each.
      variance: of the number.
    """
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    if len(sums) < 5 or not variance:
        return 1.0
    return _beyond_chance(sums**2 / (sizes * variance))


def _tail_probability(own: np.ndarray, others: Sequence[np.ndarray], least: float) -> float | None:
    """Bonferroni's probability over `_TAILS` that a shard is like the others."""
    size = int(own.sum())
    if not size or not others or sum(int(o.sum()) for o in others) < size:
        return None
    counts = np.stack([own, *others])
    tails = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # examples in the bin or above
    total = int(tails[:, 0].sum())
    probabilities = []
    for share in _TAILS:
        above = tails.sum(axis=0)
        edge = int(np.argmax(above <= max(share * total, 1)))
        if above[edge] > max(share * total, 1) or not above[edge]:
            continue
        spread = max(least, _dispersion(tails[1:, edge], tails[1:, 0]))
        in_tail = round(above[edge] / spread)
        drawn, here = round(size / spread), math.floor(tails[0, edge] / spread)
        probabilities.append(_at_least(here, round(total / spread), in_tail, drawn))
    return min(1.0, min(probabilities) * len(_TAILS)) if probabilities else 1.0


def _at_least(hits: int, total: int, marked: int, drawn: int) -> float:
    """P(X >= hits) of the hypergeometric distribution, where `marked` of `total` are hits."""
    lowest, highest = max(0, drawn + marked - total), min(marked, drawn)
    if hits <= lowest:
        return 1.0
    if hits > highest:
        return 0.0

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    first = log_choose(marked, hits) + log_choose(total - marked, drawn - hits)
    first -= log_choose(total, drawn)
    k = np.arange(hits, highest, dtype=np.float64)
    ratios = np.log((marked - k) * (drawn - k) / ((k + 1) * (total - marked - drawn + k + 1)))
    return float(min(1.0, np.exp(first + np.concatenate([[0.0], ratios.cumsum()])).sum()))


def _dispersion(hits: np.ndarray, sizes: np.ndarray) -> float:
    """Pearson's dispersion of shares of shards; 1 where they are few or differ by chance."""
    hits, sizes = hits[sizes > 0], sizes[sizes > 0]
    expected = sizes * hits.sum() / max(sizes.sum(), 1)
    if len(hits) < 5 or expected.min() < 1:
        return 1.0
    share = hits.sum() / sizes.sum()
    squares = (hits - expected) ** 2 / (expected * max(1 - share, 1e-9))
    return _beyond_chance(squares)


def _beyond_chance(squares: np.ndarray) -> float:
    """The mean of squared deviations over their variances; 1 where that is no wonder."""
    freedom = len(squares) - 1
    # One bad shard among them must not make all others' differences look usual.
    rest = (squares.sum() - squares.max()) / max(freedom - 1, 1)
    chance = 1 + 2 * math.sqrt(2 / freedom)
    return float(rest) if rest > chance else 1.0


def _arrivals(history: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Shards of recent nights as they were when they came, or last changed, by path."""
    found: dict[str, Mapping[str, Any]] = {}
    for night in history[-_NIGHTS:]:
        for path, one in night.get("arrivals", {}).items():
            if len(one["scores"]) == BINS:
                found[path] = one
    return found


def _known(history: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Shards that were tested, by path: those of the last night, and that came of late."""
    last: Mapping[str, Any] = history[-1].get("known", {}) if history else {}
    return {**_arrivals(history), **last}


def _with_lateness(
    shards: Mapping[str, Mapping[str, Any]], history: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Shards with "late", whether they came when there had been a night with the same model."""
    known = _known(history)
    last = history[-1].get("model") if history else None
    models = {night.get("model") for night in history}
    found: dict[str, Mapping[str, Any]] = {}
    for path, one in shards.items():
        model = one.get("model")
        late = model is not None and model in models
        if _is_known(path, one, known):
            late = model == last and bool(known[path].get("late"))
        as_unseen = {
            name: one[f"unseen_{name}"]
            for name in ("surprises", "if_wrong")
            if late and f"unseen_{name}" in one
        }
        found[path] = {**one, **as_unseen, "late": late}
    return found


def _kin(one: Mapping[str, Any]) -> tuple[Any, bool]:
    """What shards have in common that are compared."""
    return one["cohort"], bool(one.get("late")) and one["cohort"] == "unknown"


def _is_known(path: str, one: Mapping[str, Any], arrivals: Mapping[str, Mapping[str, Any]]) -> bool:
    return path in arrivals and arrivals[path].get("identity") == one.get("identity")


def _by_class(whole: Mapping[str, Any], suspects: pa.Table) -> dict[str, dict[str, float]]:
    labels = collections.Counter(
        f"{label:g}"
        for label, kind in zip(
            suspects["label"].to_pylist(), suspects["kind"].to_pylist(), strict=True
        )
        if kind == "mislabelled" and isinstance(label, float)
    )
    counted: Mapping[str, Sequence[int]] = whole.get("classes", {})
    largest = sorted(counted, key=lambda name: -counted[name][0])[:_MOST_CLASSES]
    return {
        name: {
            "examples": counted[name][0],
            "accuracy": counted[name][1] / counted[name][0],
            "suspects": labels[name],
            "suspects_rate": labels[name] / counted[name][0],
        }
        for name in sorted(largest, key=float)
    }


def _by_shard(
    shards: Mapping[str, Mapping[str, Any]],
    suspects: pa.Table,
    probabilities: Mapping[str, float | None],
) -> dict[str, dict[str, Any]]:
    counts = collections.Counter(suspects["shard"].to_pylist())
    return {
        path: {**_row(one, counts[path]), "probability": probabilities.get(path)}
        for path, one in shards.items()
    }


def _by_cohort(
    shards: Mapping[str, Mapping[str, Any]], suspects: pa.Table
) -> dict[str, dict[str, Any]]:
    counts = collections.Counter(shards[path]["cohort"] for path in suspects["shard"].to_pylist())
    cohorts = sorted({one["cohort"] for one in shards.values()})
    of = {name: [one for one in shards.values() if one["cohort"] == name] for name in cohorts}
    return {name: _row(merged(of[name]), counts[name]) for name in cohorts}


def _row(one: Mapping[str, Any], suspects: int) -> dict[str, Any]:
    """What is told of some examples, of which so many are suspects."""
    row: dict[str, Any] = {
        "examples": one["examples"],
        "suspects": suspects,
        "suspects_rate": suspects / one["examples"] if one["examples"] else None,
        "mean_loss": one["loss"] / one["losses"] if one["losses"] else None,
    }
    if one["judged"]:
        row["accuracy"] = one["right"] / one["judged"]
    return row


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN where it is null, a list, or not there."""
    if name not in table.column_names or pa.types.is_list(table.schema.field(name).type):
        return np.full(len(table), np.nan)
    return np.asarray(table[name].cast(pa.float64()).to_numpy(), np.float64)
