"""How much accuracy does a review of the first tenth by mislabel score win back?

    python cleaning.py --data FOLDER [--problems NAME …] [--seeds 0 1 2] [--seconds 400]

On data sets of `noisy.py` a night runs with default flags. Verdicts with the true labels on the
tenth of the examples with the highest `mislabel_score` go through `quality verdicts` and
`quality apply`, and the network is trained anew on the cleaned shards. What is recovered is its
gain in accuracy on held-out examples over the network of the given labels, as a share of what the
network of the true labels gains. Beside it a tenth at random, and the first tenth by cleanlab's
normalised margin with three folds. Each network is trained `RUNS` times. What was
measured is kept in `--results`, as in mislabel.py.
"""

import contextlib
import io
import json
import pathlib
import tempfile
from typing import Any

import mislabel
import noisy
import numpy as np
import pandas as pd

from tracin_beam.__main__ import main as tracin_beam_command
from tracin_beam.inputs import formats

RESULTS = pathlib.Path(__file__).with_name("cleaning.json")
PROBLEMS = ("fashion-10", "fashion-10-confusable", "news-10")
RUNS = 3

TASK = """
import noisy
from tracin_beam import Parser, Task
task = Task(noisy.PROBLEMS[{name!r}].build, noisy.CROSS_ENTROPY, {parse!r})
"""


def cleaned(name: str, of: noisy.Problem, night: mislabel.Night, rows: np.ndarray) -> np.ndarray:
    """The labels [n] of the shards that `quality apply` writes, once these rows are reviewed."""
    folder = night.out.parent
    (folder / "task.py").write_text(TASK.format(name=name, parse=night.parse))
    signals = pd.read_parquet(night.out / "quality" / mislabel.DATE / "signals.parquet")
    hashes = signals.sort_values("id")["content_hash"].to_numpy()
    lines = []
    for i in rows:
        verdict = {"id": f"{i:06d}", "content_hash": hashes[i].hex(), "verdict": "keep"}
        if of.wrong[i]:
            verdict |= {"verdict": "relabel", "label": float(of.true[i])}
        lines.append(json.dumps(verdict | {"who": "truth", "when": "2026-11-22T08:00:00Z"}))
    (folder / "verdicts.jsonl").write_text("\n".join(lines))
    output = ["--output", str(night.out)]
    add = ["quality", "verdicts", *output, "--add", str(folder / "verdicts.jsonl")]
    apply = ["quality", "apply", *output, "--task", f"{folder / 'task.py'}:task"]
    apply += ["--train", str(folder / "train-*.tfrecord"), "--to", str(folder / "cleaned")]
    for words in (add, apply):
        if tracin_beam_command(words):
            raise RuntimeError(" ".join(words))
    labels = of.given.copy()
    for path in sorted((folder / "cleaned").glob("train-*.tfrecord")):
        for record in formats.read(str(path)):
            example = night.parse([record.data])
            labels[int(example["id"].numpy()[0])] = int(example["label"].numpy()[0])
    return labels


def accuracy(of: noisy.Problem, labels: np.ndarray, seed: int) -> float:
    """On the held-out examples, after training on these labels; a mean over trainings."""
    found = []
    for run in range(RUNS):
        model = noisy.trained(of, of.x, labels, 100 * seed + run)
        found.append((noisy.outputs(of, model, of.x_test).argmax(axis=1) == of.y_test).mean())
    return round(float(np.mean(found)), 5)


def first_tenth(score: np.ndarray) -> np.ndarray:
    return np.argsort(-score, kind="stable")[: len(score) // 10]


def night_cleaned(name: str, seed: int, data: pathlib.Path) -> dict[str, Any]:
    """Accuracy after the review of the first tenth of a night."""
    of = noisy.problem(name, seed, data)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        night = mislabel.night(of, seed, pathlib.Path(folder))
        first = first_tenth(mislabel.signals(of, night.out)["tracin-beam"])
        labels = cleaned(name, of, night, first)
    if (labels != reviewed(of, first)).any():
        raise RuntimeError("the cleaned shards have other labels than were decided")
    return {"tracin-beam": accuracy(of, labels, seed)}


def reviewed(of: noisy.Problem, rows: np.ndarray) -> np.ndarray:
    """The given labels [n], with the true ones of some."""
    labels = of.given.copy()
    labels[rows] = of.true[rows]
    return labels


def others_cleaned(name: str, seed: int, data: pathlib.Path) -> dict[str, Any]:
    """Accuracy of the given labels, the true ones, and after the review of other tenths."""
    of = noisy.problem(name, seed, data)
    margin = mislabel.cleanlab(of, mislabel.out_of_sample(of, seed, 3))["normalized_margin"]
    random = np.random.default_rng(seed).permutation(len(of.x))[: len(of.x) // 10]
    labels = {
        "given": of.given,
        "true": of.true,
        "cleanlab": reviewed(of, first_tenth(margin)),
        "random": reviewed(of, random),
    }
    return {key: accuracy(of, some, seed) for key, some in labels.items()}


SIDES = {"night": night_cleaned, "others": others_cleaned}


def show(results: dict[str, Any], problems: list[str], seeds: list[int]) -> None:
    """Prints the table."""
    heads = ["data set", "seeds", "accuracy: given labels", "true labels"]
    ways = ("tracin-beam", "cleanlab", "random")
    print("\n| " + " | ".join([*heads, *(f"recovered: {way}" for way in ways)]) + " |")
    print("|---" * (len(heads) + len(ways)) + "|")
    for name in problems:
        some = [
            results[f"{name}/{s}/night"] | results[f"{name}/{s}/others"]
            for s in seeds
            if all(f"{name}/{s}/{side}" in results for side in SIDES)
        ]
        if not some:
            continue
        column = {key: np.array([r[key] for r in some]) for key in some[0]}
        gap = column["true"] - column["given"]
        cells = [mislabel.mean_of(column[key]) for key in ("given", "true")]
        for way in ways:
            # Of the mean gap: one seed's own is within the scatter of trainings.
            cells.append(mislabel.mean_of((column[way] - column["given"]) / gap.mean()))
        print(f"| {name} | {len(some)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    mislabel.command(__doc__, RESULTS, PROBLEMS, SIDES, show)
