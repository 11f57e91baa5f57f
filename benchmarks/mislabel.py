"""Does a night find wrong labels better than cleanlab does with the same network?

    python mislabel.py --data FOLDER [--problems NAME …] [--seeds 0 1 2] [--sides night cleanlab]

On each data set of `noisy.py` a network is trained once on the given labels, with
`TracInCheckpoint`, and the job `quality` with its default flags gives each example a mislabel
score. Beside it cleanlab's four methods get out-of-sample probabilities of the same network,
trained once more for each of 3 or 5 folds. What each of both gave on a data set and seed is kept in
`--results`, so that the command goes on where it stopped; it starts nothing new after `--seconds`.
`--table` only prints.
"""

import argparse
import contextlib
import io
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import noisy
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from cleanlab import filter as cleanlab_filter
from cleanlab import rank
from cleanlab.regression import rank as regression_rank
from sklearn.metrics import average_precision_score
from sklearn.model_selection import KFold, StratifiedKFold

import tracin_beam

RESULTS = pathlib.Path(__file__).with_name("mislabel.json")
FOLDS = (3, 5)
INSPECTED = (0.05, 0.1, 0.2, 0.3)
DATE = "2026-11-22"
BINS = 5  # of the stated confidence


class Night(NamedTuple):
    """The output directory of a night, and what parses the records of its shards."""

    out: pathlib.Path
    parse: tracin_beam.Parser


def night(of: noisy.Problem, seed: int, folder: pathlib.Path) -> Night:
    """Trains once and runs the job with default flags."""
    steps = -(-len(of.x) // of.batch)
    saving = tracin_beam.TracInCheckpoint(folder / "ckpts", save_freq=of.every * steps)
    noisy.trained(of, of.x, of.given, seed, (saving,))
    ids = np.array([f"{i:06d}" for i in range(len(of.x))])
    parse = tracin_beam.write_shards(
        {"features": of.x, "label": of.given, "id": ids},
        str(folder / "train-*.tfrecord"),
        shards=4,
    )
    tracin_beam.quality(
        tracin_beam.Task(of.build, of.loss, parse),
        train=folder / "train-*.tfrecord",
        checkpoints=folder / "ckpts",
        output=folder / "out",
        date=DATE,
        progress=False,
    )
    return Night(folder / "out", parse)


def signals(of: noisy.Problem, out: pathlib.Path) -> dict[str, np.ndarray]:
    """How bad each label is by the job's columns, in the order of the examples, 1 score each."""
    table = pd.read_parquet(out / "quality" / DATE / "signals.parquet").sort_values("id")
    found = {
        "tracin-beam": table["mislabel_score"],
        "self-influence": table["self_influence"],
        "last loss": table["loss"],
    }
    if not of.regression:
        found["AUM"] = -table["aum"]
        found["mean probability"] = -table["probability_mean"]
    if "neighbour_agreement" in table and table["neighbour_agreement"].notna().any():
        found["k-NN"] = -table["neighbour_agreement"]
    return {name: np.nan_to_num(column.to_numpy()) for name, column in found.items()}


def mean_loss(of: noisy.Problem, out: pathlib.Path) -> dict[str, np.ndarray]:
    """Mean loss over checkpoints, and the margin at the last one: 1 score for each example."""
    logs = []
    for step in sorted((out / "features" / "train").iterdir(), key=lambda path: int(path.name)):
        parts = [pq.read_table(path) for path in sorted(step.glob("*.parquet"))]
        logs.append(np.concatenate([np.stack(t["log_probabilities"].to_numpy()) for t in parts]))
    values = np.stack(logs, axis=1).astype(np.float64)  # [n, C, K]
    if of.regression:
        return {"mean loss": np.square(values[:, :, 0] - of.given[:, None]).mean(axis=1)}
    rows = np.arange(len(of.given))
    own = values[rows, :, of.given]
    values[rows, :, of.given] = -np.inf
    margin = np.exp(own[:, -1]) - np.exp(values[:, -1].max(axis=1))
    return {"mean loss": -own.mean(axis=1), "margin": -margin}


def out_of_sample(of: noisy.Problem, seed: int, folds: int) -> np.ndarray:
    """What networks that were trained without an example make of it: [n, K], or [n]."""
    found = np.zeros(len(of.x) if of.regression else (len(of.x), int(of.given.max()) + 1))
    kind = KFold if of.regression else StratifiedKFold
    split = kind(folds, shuffle=True, random_state=seed).split(of.x, of.given)
    for k, (train, rest) in enumerate(split):
        model = noisy.trained(of, of.x[train], of.given[train], 1000 * folds + 10 * seed + k)
        found[rest] = noisy.outputs(of, model, of.x[rest])
    return found


def cleanlab(of: noisy.Problem, p: np.ndarray) -> dict[str, np.ndarray]:
    """How bad each label is by cleanlab's methods."""
    if of.regression:
        return {
            method: 1
            - regression_rank.get_label_quality_scores(of.given, p, method=method).astype(float)
            for method in ("residual", "outre")
        }
    found = {
        method: 1
        - rank.get_label_quality_scores(
            of.given, p, method=method, adjust_pred_probs=method.startswith("confidence")
        )
        for method in ("self_confidence", "normalized_margin")
    }
    weighted = rank.get_label_quality_scores(of.given, p, method="confidence_weighted_entropy")
    found["confidence_weighted_entropy"] = -weighted
    issues = cleanlab_filter.find_label_issues(of.given, p, n_jobs=1)
    # Those that it lists come before all others.
    found["find_label_issues"] = issues + found["self_confidence"]
    return found


def found_share(score: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Shares of the wrong labels among the first of `INSPECTED`."""
    order = np.argsort(-score, kind="stable")
    shares = [wrong[order[: round(part * len(order))]].sum() / wrong.sum() for part in INSPECTED]
    return [round(float(share), 4) for share in shares]


def suggested_right(of: noisy.Problem, suggested: np.ndarray, score: np.ndarray) -> float:
    """Of the wrong labels among the first tenth, for how many the suggestion is the true one."""
    first = np.argsort(-score, kind="stable")[: len(score) // 10]
    first = first[of.wrong[first]]
    return round(float((suggested[first] == of.true[first]).mean()), 4)


def common(of: noisy.Problem, scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """What is kept of every score."""
    return {
        "ap": {k: round(float(average_precision_score(of.wrong, v)), 4) for k, v in scores.items()},
        "found": {name: found_share(score, of.wrong) for name, score in scores.items()},
    }


def cleanlab_measured(name: str, seed: int, data: pathlib.Path) -> dict[str, Any]:
    """What is kept of cleanlab on a data set and seed."""
    of = noisy.problem(name, seed, data)
    scores, suggested = {}, {}
    with contextlib.redirect_stdout(io.StringIO()):
        for folds in FOLDS:
            p = out_of_sample(of, seed, folds)
            for method, score in cleanlab(of, p).items():
                scores[f"cleanlab {folds}-fold {method}"] = score
                if not of.regression:
                    likeliest = p.argmax(axis=1)
                    suggested[f"cleanlab {folds}-fold {method}"] = suggested_right(
                        of, likeliest, score
                    )
    return {**common(of, scores), "suggested": suggested}


def night_measured(name: str, seed: int, data: pathlib.Path) -> dict[str, Any]:
    """What is kept of a night on a data set and seed."""
    of = noisy.problem(name, seed, data)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = night(of, seed, pathlib.Path(folder)).out
        scores = {**signals(of, out), **mean_loss(of, out)}
        folder_of_night = out / "quality" / DATE
        table = pd.read_parquet(folder_of_night / "signals.parquet").sort_values("id")
        suspects = pd.read_parquet(folder_of_night / "suspects.parquet")
        metrics = json.loads((folder_of_night / "metrics.json").read_text())["metrics"]
    saved = of.epochs // of.every
    result: dict[str, Any] = {"epochs": of.epochs, "checkpoints": saved, "examples": len(of.x)}
    result |= {**common(of, scores), "suggested": {}}
    if not of.regression:
        suggested = table["suggested_label"].to_numpy()
        right = suggested_right(of, suggested, scores["tracin-beam"])
        result["suggested"]["tracin-beam"] = right
        low, high = metrics["wrong_labels_low"], metrics["wrong_labels_high"]
        result["range"] = [int(low), int(of.wrong.sum()), int(high)]
    mislabelled = suspects[suspects["kind"] == "mislabelled"]
    is_wrong = of.wrong[mislabelled["id"].astype(int)]
    confidence = mislabelled["confidence"].to_numpy()
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    result["confidence"] = [
        [
            int((place == b).sum()),
            float(confidence[place == b].sum()),
            int(is_wrong[place == b].sum()),
        ]
        for b in range(BINS)
    ]
    return result


Measure = Callable[[str, int, pathlib.Path], dict[str, Any]]


def command(
    about: str,
    path: pathlib.Path,
    problems: Sequence[str],
    sides: Mapping[str, Measure],
    show: Callable[[dict[str, Any], list[str], list[int]], None],
) -> None:
    """Measures what is not there yet, and prints all.

    Args:
      about: the docstring.
      path: where results are kept.
      problems: names.
      sides: what is measured of each pair of data set and seed, one after the other, by name:
        (name, seed, folder of the data) → what is kept.
      show: (results by "name/seed/side", names, seeds) prints.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../../shared/data"))
    parser.add_argument("--problems", nargs="+", default=list(problems))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", choices=list(sides), default=list(sides))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--results", type=pathlib.Path, default=path)
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()

    def kept() -> dict[str, Any]:
        return json.loads(flags.results.read_text()) if flags.results.exists() else {}

    start = time.monotonic()
    wanted = itertools.product(flags.seeds, flags.problems, flags.sides)
    for name, seed, side in ((n, s, i) for s, n, i in wanted) if not flags.table else ():
        key = f"{name}/{seed}/{side}"
        if key in kept() or time.monotonic() - start > flags.seconds:
            continue
        found = sides[side](name, seed, flags.data)
        print(f"{key}: {time.monotonic() - start:.0f} s", flush=True)
        # Another process may have added to it meanwhile.
        lines = [
            f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted({**kept(), key: found}.items())
        ]
        flags.results.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    show(kept(), flags.problems, flags.seeds)


SIDES: Mapping[str, Measure] = {"night": night_measured, "cleanlab": cleanlab_measured}


def mean_of(values: Sequence[float]) -> str:
    """Mean, and the standard error if there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"


def both(results: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """What is known of a data set and seed; nothing where a side is not measured yet."""
    sides = [results.get(f"{name}/{seed}/{side}") for side in SIDES]
    if None in sides:
        return {}
    ours, theirs = sides
    return ours | {key: ours[key] | theirs[key] for key in ("ap", "found", "suggested")}


def show(results: dict[str, Any], problems: list[str], seeds: list[int]) -> None:
    """Prints the tables."""
    groups = {name: [both(results, name, seed) for seed in seeds] for name in problems}
    groups = {name: [one for one in some if one] for name, some in groups.items()}
    others = ["mean loss", "AUM", "margin", "k-NN", "self-influence"]
    heads = ["data set", "seeds", "tracin-beam", "best of cleanlab", "which", *others]
    print("\n| " + " | ".join(heads) + " | passes: ours, 3-fold, 5-fold |")
    print("|---" * (len(heads) + 1) + "|")
    best = {}
    for name, some in groups.items():
        if not some:
            continue
        rivals = [key for key in some[0]["ap"] if key.startswith("cleanlab")]
        best[name] = max(rivals, key=lambda key: np.mean([r["ap"][key] for r in some]))
        columns = ["tracin-beam", best[name], *others]
        cells = [
            mean_of([r["ap"][key] for r in some]) if key in some[0]["ap"] else "–"
            for key in columns
        ]
        cells.insert(2, best[name].removeprefix("cleanlab "))
        epochs = some[0]["epochs"]
        # A pass is forward and backward over all examples; forward alone is a third of it.
        passes = [
            some[0]["checkpoints"] * 4 / 3,
            *((folds - 1) * epochs + 1 / 3 for folds in FOLDS),
        ]
        cells.append(", ".join(f"{p:.0f}" for p in passes))
        print(f"| {name} | {len(some)} | " + " | ".join(cells) + " |")
    print(
        "\n| data set | found at 5, 10, 20, 30 %, tracin-beam | best of cleanlab "
        "| suggestion right, tracin-beam | cleanlab | wrong labels: low, true, high |"
    )
    print("|---|---|---|---|---|---|")
    for name, rival in best.items():
        some = groups[name]
        cells = [
            ", ".join(f"{x:.2f}" for x in np.mean([r["found"][key] for r in some], axis=0))
            for key in ("tracin-beam", rival)
        ]
        for key in ("tracin-beam", rival):
            known = [r["suggested"][key] for r in some if key in r["suggested"]]
            cells.append(mean_of(known) if known else "–")
        cells.append(
            "; ".join("{}, {}, {}".format(*r["range"]) for r in some if "range" in r) or "–"
        )
        print(f"| {name} | " + " | ".join(cells) + " |")
    heads = [f"{b / BINS:.1f} to {(b + 1) / BINS:.1f}" for b in range(BINS)]
    print(
        "\n| suspects by confidence: number, mean confidence, share wrong | "
        + " | ".join(heads)
        + " |"
    )
    print("|---" * (BINS + 1) + "|")
    for name in best:
        sums = np.sum([r["confidence"] for r in groups[name]], axis=0)
        cells = [f"{n:.0f}, {c / n:.2f}, {w / n:.2f}" if n else "0" for n, c, w in sums]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    command(__doc__, RESULTS, list(noisy.PROBLEMS), SIDES, show)
