"""How much accuracy does a review of the first tenth by mislabel score win back?

    python cleaning.py --data FOLDER [--problems NAME …] [--seeds 0 1 2] [--seconds 400]

On data sets of `noisy.py` a night runs with default flags. Verdicts with the true labels on the
tenth of the examples with the highest `mislabel_score` go through `quality verdicts` and
`quality apply`, and the network is trained anew on the cleaned shards. What is recovered is its
gain in accuracy on held-out examples over the network of the given labels, as a share of what the
network of the true labels gains. Beside it a tenth at random, and the first tenth by cleanlab's
normalised margin with three folds. Each network is trained `RUNS` times. What a pair of data set
and seed gave is kept in `--results`, as in mislabel.py.
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
            example = night.parse(record.data)
            labels[int(example["id"].numpy())] = int(example["label"].numpy())
    return labels


def accuracy(of: noisy.Problem, labels: np.ndarray, seed: int) -> float:
    """On the held-out examples, after training on these labels; a mean over trainings."""
    found = []
    for run in range(RUNS):
        model = noisy.trained(of, of.x, labels, 100 * seed + run)
        found.append((noisy.outputs(of, model, of.x_test).argmax(axis=1) == of.y_test).mean())
    return float(np.mean(found))


def measured(name: str, seed: int, data: pathlib.Path) -> dict[str, Any]:
    """Accuracy by what the network was trained on."""
    of = noisy.problem(name, seed, data)
    tenth = len(of.x) // 10
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        night = mislabel.night(of, seed, pathlib.Path(folder))
        score = mislabel.signals(of, night.out)["tracin-beam"]
        first = np.argsort(-score, kind="stable")[:tenth]
        ours = cleaned(name, of, night, first)
    reviewed = of.given.copy()
    reviewed[first] = of.true[first]
    if (ours != reviewed).any():
        raise RuntimeError("the cleaned shards have other labels than were decided")
    margin = mislabel.cleanlab(of, mislabel.out_of_sample(of, seed, 3))["normalized_margin"]
    others = {
        "cleanlab": np.argsort(-margin, kind="stable")[:tenth],
        "random": np.random.default_rng(seed).permutation(len(of.x))[:tenth],
    }
    labels = {"given": of.given, "true": of.true, "tracin-beam": ours}
    for other, rows in others.items():
        labels[other] = of.given.copy()
        labels[other][rows] = of.true[rows]
    return {key: round(accuracy(of, some, seed), 5) for key, some in labels.items()}


def show(results: dict[str, Any], problems: list[str], seeds: list[int]) -> None:
    """Prints the table."""
    heads = ["data set", "seeds", "accuracy: given labels", "true labels"]
    ways = ("tracin-beam", "cleanlab", "random")
    print("\n| " + " | ".join([*heads, *(f"recovered: {way}" for way in ways)]) + " |")
    print("|---" * (len(heads) + len(ways)) + "|")
    for name in problems:
        some = [results[f"{name}/{s}"] for s in seeds if f"{name}/{s}" in results]
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
    mislabel.command(__doc__, RESULTS, PROBLEMS, measured, show)
