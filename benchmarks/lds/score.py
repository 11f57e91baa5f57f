"""Linear datamodelling score of every preconditioner, with the product's default flags.

    python benchmarks/lds/score.py --data FOLDER [--runs 3]

Park et al. 2023, section 2: Spearman's correlation, over random halves of the training set, of the
sum of an example's influences on a test example with the test example's loss after training on the
half (see `truth.py`; less loss for more influence), averaged over test examples. Scores are those
of `tracin-beam influence` on one network trained on all examples, with five checkpoints.
"""

import argparse
import json
import pathlib
import tempfile

import keras
import numpy as np
import pyarrow.parquet as pq
import truth

import tracin_beam

TASK = """
import keras
import tracin_beam


def build_model():
    layers = [keras.layers.Dense(n, activation="relu") for n in (128, 64)]
    return keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])


task = tracin_beam.Task(
    build_model,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    tracin_beam.Parser(features=((784,), "float32"), label=((), "int64")),
)
"""
CHECKPOINTS = (4, 8, 12, 16, 20)  # epochs
WAYS = (("none", 1.0), ("projected", 1.0), ("kfac", 1.0))


def prepare(folder: pathlib.Path, data: pathlib.Path, seed: int) -> None:
    """Shards, a task file, and the checkpoints of one training on all examples."""
    x, y, x_test, y_test = truth.examples(data)
    arrays = {"train": (x, y), "test": (x_test, y_test)}
    for name, (images, labels) in arrays.items():
        path = str(folder / f"{name}-*.tfrecord")
        tracin_beam.write_shards({"features": images, "label": labels}, path)
    (folder / "task.py").write_text(TASK)
    every = truth.trained(x, y, np.arange(truth.TRAIN)[None], seed)
    layers = [keras.layers.Dense(n, activation="relu") for n in (128, 64)]
    model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    (folder / "checkpoints").mkdir(exist_ok=True)
    listing = []
    for epoch in CHECKPOINTS:
        model.set_weights(
            [w[0].reshape(v.shape) for w, v in zip(every[epoch - 1], model.weights, strict=False)]
        )
        name = f"{epoch:04d}.weights.h5"
        model.save_weights(folder / "checkpoints" / name)
        listing.append({"path": name, "step": epoch, "epoch": epoch, "learning_rate": truth.RATE})
    (folder / "checkpoints" / "checkpoints.json").write_text(json.dumps(listing))


def scores(folder: pathlib.Path, way: str, damping: float) -> tuple[np.ndarray, dict]:
    """A way's scores, float64 [TEST, TRAIN], and its distinct shares."""
    tracin_beam.influence(
        f"{folder}/task.py:task",
        checkpoints=f"{folder}/checkpoints",
        train=f"{folder}/train-*.tfrecord",
        test=f"{folder}/test-*.tfrecord",
        output=f"{folder}/out",
        preconditioner=way,
        damping=damping,
        top_k=truth.TRAIN,
        rescore=truth.TRAIN,
        report_examples=0,
    )
    table = pq.read_table(folder / "out" / "influence" / "test")
    table = table.filter(np.asarray(table["role"].to_pylist()) == "proponent")
    found = np.zeros((truth.TEST, truth.TRAIN))
    found[table["test_position"].to_numpy(), table["train_position"].to_numpy()] = table["score"]
    return found, json.loads((folder / "out" / "run.json").read_text())["distinct"]


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x, axis=0), axis=0).astype(np.float64)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column: float64 [n] of [halves, n]."""
    a, b = (r - r.mean(axis=0) for r in map(ranks, (a, b)))
    found: np.ndarray = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--damping", type=float)
    arguments = parser.parse_args()
    with np.load(truth.PATH) as stored:
        losses = stored["losses"].astype(np.float64)
    halves = truth.halves()
    mask = np.zeros((truth.HALVES, truth.TRAIN))
    np.put_along_axis(mask, halves, 1.0, axis=1)
    mean = losses.mean(axis=0)
    # Two halves' mean of the seeds cannot agree better than the seeds do with one another.
    own = np.mean([spearman(losses[i], losses[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))])
    ceiling = np.sqrt(3 * own / (1 + 2 * own))
    print(f"noise ceiling {ceiling:.3f}")
    print("| run | preconditioner | κ | LDS | standard error | distinct, proponents / opponents |")
    print("|---|---|---|---|---|---|")
    for run in range(arguments.first_seed, arguments.first_seed + arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            prepare(folder, arguments.data, run)
            for way, default in WAYS:
                damping = arguments.damping or default
                found, distinct = scores(folder, way, damping)
                each = spearman(mask @ found.T, -mean)
                shares = " / ".join(f"{d['share']:.2f}" for d in distinct.values())
                error = each.std() / np.sqrt(len(each))
                print(
                    f"| {run} | {way} | {damping:g} | {each.mean():.3f} | {error:.3f} | {shares} |"
                )


if __name__ == "__main__":
    main()
