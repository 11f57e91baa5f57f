"""Linear datamodelling score of every preconditioner, with default flags, and of other methods.

    python benchmarks/lds/score.py --data FOLDER [--problem fashion …] [--runs 3]

Writes what it finds to `scores.json` beside itself, and all that is there as `scoreboard.md`.

Park et al. 2023, section 2: Spearman's correlation, over random halves of the training set, of the
sum of an example's influences on a test example with the test example's loss after training on the
half (see `truth.py`; less loss for more influence), averaged over test examples. Scores are those
of `tracin-beam influence` on one network trained on all examples, with five checkpoints; the other
methods, in `baselines.py`, take the same ones.
"""

import argparse
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import truth
from baselines import BASELINES, Network
from problems import PROBLEMS, Examples, Trainer

import tracin_beam

TASK = """
from problems import PROBLEMS

task = PROBLEMS["{name}"].task()
"""
WAYS = ("none", "projected", "kfac")


def prepare(
    folder: pathlib.Path,
    name: str,
    examples: Examples,
    seed: int,
    checkpoints: int = 5,
    compared: bool = True,
) -> list[Network]:
    """Shards, a task file, and the checkpoints of one training on all examples.

    Returns:
      What other methods take of each checkpoint, if they are to be compared.
    """
    problem = PROBLEMS[name]
    x, y, x_test, y_test = examples
    for side, (features, labels) in {"train": (x, y), "test": (x_test, y_test)}.items():
        path = str(folder / f"{side}-*.tfrecord")
        tracin_beam.write_shards({"features": features, "label": labels}, path)
    (folder / "task.py").write_text(TASK.format(name=name))
    (folder / "checkpoints").mkdir(exist_ok=True)
    trainer = Trainer(problem, x, y)
    wanted = [round(problem.epochs * part / checkpoints) for part in range(1, checkpoints + 1)]
    listing, kept = [], []
    for epoch, (_, rate) in enumerate(trainer.train(np.arange(len(x)), seed), start=1):
        if epoch not in wanted:
            continue
        path = f"{epoch:04d}.weights.h5"
        trainer.model.save_weights(folder / "checkpoints" / path)
        listing.append({"path": path, "step": epoch, "epoch": epoch, "learning_rate": rate})
        if compared:
            kept.append(Network.of(trainer.model, examples, epoch == problem.epochs))
    (folder / "checkpoints" / "checkpoints.json").write_text(json.dumps(listing))
    return kept


def scores(
    folder: pathlib.Path, way: str, damping: str | float, tests: int, trains: int
) -> tuple[np.ndarray, np.ndarray, dict]:
    """A way's scores by checkpoint, float64 [tests, trains, C], the rates, and run.json."""
    tracin_beam.influence(
        f"{folder}/task.py:task",
        checkpoints=f"{folder}/checkpoints",
        train=f"{folder}/train-*.tfrecord",
        test=f"{folder}/test-*.tfrecord",
        output=f"{folder}/out",
        preconditioner=way,
        damping=damping,
        top_k=trains,
        rescore=trains,
        report_examples=0,
    )
    table = pq.read_table(folder / "out" / "influence" / "test")
    table = table.filter(np.asarray(table["role"].to_pylist()) == "proponent")
    place = table["test_position"].to_numpy(), table["train_position"].to_numpy()
    listing = json.loads((folder / "checkpoints" / "checkpoints.json").read_text())
    rates = np.array([entry["learning_rate"] for entry in listing])
    terms = np.stack(table["score_by_checkpoint"].to_numpy())
    found = np.zeros((tests, trains, len(rates)))
    found[place] = terms
    return found, rates, json.loads((folder / "out" / "run.json").read_text())


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x, axis=0), axis=0).astype(np.float64)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column: float64 [n] of [halves, n]."""
    a, b = (r - r.mean(axis=0) for r in map(ranks, (a, b)))
    found: np.ndarray = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return found


def ceiling(losses: np.ndarray) -> float:
    """What the mean over seeds can reach, from how the seeds agree: Spearman and Brown.

    Args:
      losses: float [seeds, halves, tests].
    """
    pairs = itertools.combinations(losses, 2)
    own = np.mean([spearman(one, other).mean() for one, other in pairs])
    count = len(losses)
    return float(np.sqrt(count * own / (1 + (count - 1) * own)))


def distinct(found: np.ndarray, count: int = 10) -> str:
    """Different training examples among the slots of all top tens, of both roles."""
    order = np.argsort(-found, axis=1, kind="stable")
    ends = order[:, :count], order[:, -count:]
    return " / ".join(f"{len(np.unique(end)) / end.size:.2f}" for end in ends)


def measured(name: str, data: pathlib.Path, runs: int, dampings: Sequence[str]) -> dict[str, Any]:
    """What the scoreboard says of a problem."""
    problem = PROBLEMS[name]
    with np.load(truth.path(name)) as stored:
        losses = stored["losses"].astype(np.float64)
    examples = problem.examples(data)
    trains, tests = len(examples[1]), len(examples[3])
    mask = np.zeros((truth.HALVES, trains))
    np.put_along_axis(mask, truth.halves(trains), 1.0, axis=1)
    mean = losses.mean(axis=0)
    found: dict[str, list[np.ndarray]] = {}
    chosen = []
    for run in range(runs):
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            networks = prepare(folder, name, examples, run)
            for way in WAYS:
                for damping in dampings if way != "none" else ["1"]:
                    terms, rates, state = scores(folder, way, damping, tests, trains)
                    shown = f"`{way}`" if damping == "1" else f"`{way} --damping {damping}`"
                    found.setdefault(shown, []).append(terms.sum(axis=2))
                    if problem.cosine:
                        even = (terms / np.where(rates > 0, rates, 1)).sum(axis=2)
                        found.setdefault(f"{shown}, without the rates", []).append(even)
                    if damping == "auto":
                        chosen.append(state["damping"]["value"])
                    print(run, shown, state["distinct"], state.get("damping"), flush=True)
        for method, function in BASELINES.items():
            found.setdefault(method, []).append(function(networks))
    methods = {}
    for method, every in found.items():
        by_test = np.mean([spearman(mask @ one.T, -mean) for one in every], axis=0)
        methods[method] = {
            "lds": by_test.mean(),
            "error": by_test.std() / np.sqrt(tests),
            "summed": spearman(mask @ np.sum(every, axis=0).T, -mean).mean(),
            "distinct": distinct(every[0]),
        }
    return {
        "about": problem.about,
        "trainings": len(losses),
        "runs": runs,
        "ceiling": ceiling(losses),
        "chosen damping": sorted(set(chosen)),
        "methods": methods,
    }


def page(stored: Mapping[str, Any]) -> str:
    """The scoreboard of all problems, in Markdown."""
    names = list(dict.fromkeys(name for one in stored.values() for name in one["methods"]))
    head = [one["about"] for one in stored.values()]
    rule = "|".join(["---"] * (len(head) + 1))

    def table(title: str, cell: Callable[[dict], str], first: Sequence[str] = ()) -> list[str]:
        rows = [f"| {title} | {' | '.join(head)} |", f"|{rule}|", *first]
        for name in names:
            cells = [
                cell(one["methods"][name]) if name in one["methods"] else ""
                for one in stored.values()
            ]
            rows.append(f"| {name} | {' | '.join(cells)} |")
        return [*rows, ""]

    noise = " | ".join(f"{one['ceiling']:.3f}" for one in stored.values())
    made = " | ".join(f"{one['trainings']}; {one['runs']}" for one in stored.values())
    dampings = " | ".join(
        ", ".join(f"{value:g}" for value in one["chosen damping"]) for one in stored.values()
    )
    return "\n".join(
        [
            "# Linear datamodelling scores",
            "",
            "Made by `score.py`, which says what is measured; ± is the standard error over test",
            "examples. Below, of the sum over runs, and the share of different training examples",
            "among the slots of all top tens, proponents / opponents, of one run.",
            "",
            *table(
                "LDS",
                lambda one: f"{one['lds']:.3f} ± {one['error']:.3f}",
                [
                    f"| *noise ceiling* | {noise} |",
                    f"| *trainings of each half; runs* | {made} |",
                    f"| *what `--damping auto` chose* | {dampings} |",
                ],
            ),
            *table("LDS of the sum", lambda one: f"{one['summed']:.3f}"),
            *table("distinct", lambda one: one["distinct"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    known = [name for name in PROBLEMS if truth.path(name).exists()]
    parser.add_argument("--problem", nargs="*", choices=known, default=known)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--damping", nargs="*", default=["1", "auto"])
    arguments = parser.parse_args()
    beside = pathlib.Path(__file__)
    kept = beside.with_name("scores.json")
    stored = json.loads(kept.read_text()) if kept.exists() else {}
    for name in arguments.problem:
        stored[name] = measured(name, arguments.data, arguments.runs, arguments.damping)
        stored = {name: stored[name] for name in PROBLEMS if name in stored}
        kept.write_text(json.dumps(stored, indent=1) + "\n")
        beside.with_name("scoreboard.md").write_text(page(stored))
    print(page(stored))


if __name__ == "__main__":
    main()
