"""Linear datamodelling score of every preconditioner, with default flags, and of other methods.

    python benchmarks/lds/score.py --data FOLDER [--problem fashion] [--runs 3]

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

import keras
import numpy as np
import pyarrow.parquet as pq
import truth
from baselines import BASELINES, Network
from problems import PROBLEMS, TEST, TRAIN, Examples, Problem, trained

import tracin_beam

TASK = """
import keras
import tracin_beam


def build_model():
    layers = [keras.layers.Dense(n, activation="relu") for n in {hidden}]
    return keras.Sequential([keras.Input(({inputs},)), *layers, keras.layers.Dense({outputs})])


task = tracin_beam.Task(
    build_model,
    {loss},
    tracin_beam.Parser(features=(({inputs},), "float32"), label={label}),
)
"""
CLASSES = {
    "loss": "keras.losses.SparseCategoricalCrossentropy(from_logits=True)",
    "label": '((), "int64")',
}
NUMBERS = {"loss": "keras.losses.MeanSquaredError()", "label": '((1,), "float32")'}
WAYS = ("none", "projected", "kfac")


def prepare(folder: pathlib.Path, problem: Problem, examples: Examples, seed: int) -> list:
    """Shards, a task file, and the checkpoints of one training on all examples, which it gives."""
    x, y, x_test, y_test = examples
    arrays = {"train": (x, y), "test": (x_test, y_test)}
    for name, (features, labels) in arrays.items():
        path = str(folder / f"{name}-*.tfrecord")
        tracin_beam.write_shards({"features": features, "label": labels}, path)
    inputs, *hidden, outputs = problem.widths
    known = NUMBERS if problem.regression else CLASSES
    task = TASK.format(inputs=inputs, hidden=tuple(hidden), outputs=outputs, **known)
    (folder / "task.py").write_text(task)
    every = trained(problem, x, y, np.arange(TRAIN)[None], seed)
    layers = [keras.layers.Dense(n, activation="relu") for n in hidden]
    model = keras.Sequential([keras.Input((inputs,)), *layers, keras.layers.Dense(outputs)])
    (folder / "checkpoints").mkdir(exist_ok=True)
    listing, kept = [], []
    for epoch in (round(problem.epochs * part / 5) for part in range(1, 6)):
        weights, rate = every[epoch - 1]
        own = [w[0].reshape(v.shape) for w, v in zip(weights, model.weights, strict=True)]
        model.set_weights(own)
        name = f"{epoch:04d}.weights.h5"
        model.save_weights(folder / "checkpoints" / name)
        listing.append({"path": name, "step": epoch, "epoch": epoch, "learning_rate": rate})
        kept.append(Network.of(own, examples))
    (folder / "checkpoints" / "checkpoints.json").write_text(json.dumps(listing))
    return kept


def scores(
    folder: pathlib.Path, way: str, damping: str | float
) -> tuple[np.ndarray, np.ndarray, dict]:
    """A way's scores, float64 [TEST, TRAIN], without the rates too, and what run.json says."""
    tracin_beam.influence(
        f"{folder}/task.py:task",
        checkpoints=f"{folder}/checkpoints",
        train=f"{folder}/train-*.tfrecord",
        test=f"{folder}/test-*.tfrecord",
        output=f"{folder}/out",
        preconditioner=way,
        damping=damping,
        top_k=TRAIN,
        rescore=TRAIN,
        report_examples=0,
    )
    table = pq.read_table(folder / "out" / "influence" / "test")
    table = table.filter(np.asarray(table["role"].to_pylist()) == "proponent")
    place = table["test_position"].to_numpy(), table["train_position"].to_numpy()
    listing = json.loads((folder / "checkpoints" / "checkpoints.json").read_text())
    rates = np.array([entry["learning_rate"] for entry in listing])
    terms = np.stack(table["score_by_checkpoint"].to_numpy())
    found, even = np.zeros((2, TEST, TRAIN))
    found[place] = table["score"]
    even[place] = (terms / np.where(rates > 0, rates, 1)).sum(axis=1)
    return found, even, json.loads((folder / "out" / "run.json").read_text())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--problem", choices=PROBLEMS, default="fashion")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--damping", nargs="*", default=["1"])
    arguments = parser.parse_args()
    problem = PROBLEMS[arguments.problem]
    with np.load(truth.path(arguments.problem)) as stored:
        losses = stored["losses"].astype(np.float64)
    mask = np.zeros((truth.HALVES, TRAIN))
    np.put_along_axis(mask, truth.halves(), 1.0, axis=1)
    mean = losses.mean(axis=0)
    examples = problem.examples(arguments.data)
    each: dict[str, list[np.ndarray]] = {}
    all_found: dict[str, list[np.ndarray]] = {}

    def note(name: str, found: np.ndarray) -> None:
        each.setdefault(name, []).append(spearman(mask @ found.T, -mean))
        all_found.setdefault(name, []).append(found)

    for run in range(arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            networks = prepare(folder, problem, examples, run)
            for way in WAYS:
                for damping in arguments.damping if way != "none" else ["1"]:
                    found, even, state = scores(folder, way, damping)
                    shown = way if damping == "1" else f"{way}, --damping {damping}"
                    note(f"`{shown}`", found)
                    if problem.cosine:
                        note(f"`{shown}`, without the rates", even)
                    print(run, shown, state["distinct"], state.get("damping"), flush=True)
        for method, function in BASELINES.items():
            note(method, function(networks))
    print(f"{problem.about}: {len(losses)} trainings of each half, ceiling {ceiling(losses):.3f}\n")
    print("| method | LDS | standard error | of the sum over runs | distinct |")
    print("|---|---|---|---|---|")
    for name, runs in each.items():
        by_test = np.mean(runs, axis=0)
        error = by_test.std() / np.sqrt(len(by_test))
        summed = spearman(mask @ np.sum(all_found[name], axis=0).T, -mean).mean()
        shares = distinct(all_found[name][0])
        print(f"| {name} | {by_test.mean():.3f} | {error:.3f} | {summed:.3f} | {shares} |")


if __name__ == "__main__":
    main()
