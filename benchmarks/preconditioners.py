"""What --preconditioner costs over a job from scratch, and how good its retrieval is.

    python benchmarks/preconditioners.py --data FOLDER [--train 60000] [--repeats 3]

Fashion-MNIST, a multilayer perceptron 784-128-64-10 with three checkpoints, 100 test examples and
default flags. A job from scratch embeds, searches, scores exactly and states its recall; each is a
process of its own, and the kinds take turns, so that medians of the same minutes are compared. A
second preconditioner on the same output costs a join alone.

    python benchmarks/preconditioners.py --data FOLDER --only_recall [--train 60000]

The table of `kfac` against scores of all pairs that NumPy computes from the same factors, and how
many of their top ten are among so many candidates of a query.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import pyarrow.parquet as pq

import tracin_beam
from tracin_beam.storage import embeddings

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
KINDS = ("none", "projected", "kfac")


def prepare(folder: pathlib.Path, data: pathlib.Path, train: int, test: int) -> None:
    """Shards, a task file, and the checkpoints of a training."""
    with np.load(data / "fashion_mnist.npz") as stored:
        arrays = {name: stored[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    x, x_test = (
        arrays[name].reshape(-1, 784).astype(np.float32) / 255 for name in ("x_train", "x_test")
    )
    sets = {
        "train": (x[:train], arrays["y_train"][:train]),
        "test": (x_test[:test], arrays["y_test"][:test]),
    }
    for name, (features, labels) in sets.items():
        columns = {"features": features, "label": labels.astype(np.int64)}
        shards = 6 if name == "train" else 1
        tracin_beam.write_shards(columns, str(folder / f"{name}-*.tfrecord"), shards=shards)
    (folder / "task.py").write_text(TASK)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, activation="relu") for n in (128, 64)]
    model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    saving = tracin_beam.TracInCheckpoint(str(folder / "checkpoints"))
    model.fit(*sets["train"], batch_size=64, epochs=3, callbacks=[saving], verbose=0)


def run(folder: pathlib.Path, output: str, kind: str, *flags: str) -> tuple[float, dict]:
    """Seconds of a job in a process of its own, and its run.json."""
    command = [sys.executable, "-m", "tracin_beam", "influence", f"--task={folder}/task.py:task"]
    command += [f"--checkpoints={folder}/checkpoints", f"--train={folder}/train-*.tfrecord"]
    command += [f"--test={folder}/test-*.tfrecord", f"--output={folder / output}"]
    command += [f"--preconditioner={kind}", *flags]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    return seconds, json.loads((folder / output / "run.json").read_text())


def backward(
    weights: list[np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every layer's inputs with a one, [n, m + 1], and output gradients, [n, k]: float32."""
    inputs, outputs = [x], x
    for i in range(0, len(weights), 2):
        outputs = inputs[-1] @ weights[i] + weights[i + 1]
        inputs.append(np.maximum(outputs, 0))
    delta = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    delta /= delta.sum(axis=1, keepdims=True)
    delta[np.arange(len(y)), y] -= 1
    deltas = [delta]
    for i in range(len(weights) - 2, 0, -2):
        delta = (delta @ weights[i].T) * (inputs[i // 2] > 0)
        deltas.insert(0, delta)
    ones = np.ones((len(x), 1), np.float32)
    return [np.concatenate([a, ones], axis=1) for a in inputs[:-1]], deltas


def brute_force(folder: pathlib.Path, data: pathlib.Path, train: int, asked: np.ndarray) -> tuple:
    """K-FAC's scores of all pairs, and those by which candidates are found: float32 [q, train]."""
    with np.load(data / "fashion_mnist.npz") as stored:
        x, y = stored["x_train"][:train], stored["y_train"][:train]
        x_test, y_test = stored["x_test"][asked], stored["y_test"][asked]
    x, x_test = (a.reshape(len(a), -1).astype(np.float32) / 255 for a in (x, x_test))
    layers = [keras.layers.Dense(n) for n in (128, 64, 10)]
    model = keras.Sequential([keras.Input((784,)), *layers])
    exact = np.zeros((len(asked), train), np.float32)
    estimated = np.zeros_like(exact)
    listing = json.loads((folder / "checkpoints" / "checkpoints.json").read_text())
    for entry in listing:
        model.load_weights(folder / "checkpoints" / entry["path"])
        weights = [w.numpy() for w in model.weights]
        ours, theirs = backward(weights, x, y), backward(weights, x_test, y_test)
        curvature = folder / "kfac" / "curvature" / "kfac" / str(entry["step"]) / "moments.npz"
        means = np.load(curvature)
        for i, (a, d, b, e) in enumerate(zip(*ours, *theirs, strict=True)):
            left, right = (np.linalg.eigh(means[f"{2 * i}+{2 * i + 1}/{side}"]) for side in "AB")
            values = np.outer(left[0], right[0])
            query = (b @ left[1])[:, :, None] * (e @ right[1])[:, None]
            query = left[1] @ (query / (values + values.mean())) @ right[1].T
            for row, own in zip(exact, query.astype(np.float32), strict=True):
                row += entry["learning_rate"] * np.einsum("nk,nk->n", a @ own, d)
        # The embeddings in the order of the shards.
        sides = []
        for side in ("train", "test"):
            place = folder / "kfac" / "embeddings" / side / str(entry["step"])
            paths = sorted(place.glob("*.tfrecord"))
            parts = [part.embedding for path in paths for part in embeddings.read(str(path))]
            sides.append(np.concatenate(parts))
        r = means["R"] + np.trace(means["R"]) / len(means["R"]) * np.eye(len(means["R"]))
        solved = np.linalg.solve(r, sides[1][asked].T.astype(np.float64)).T
        estimated += entry["learning_rate"] * solved.astype(np.float32) @ sides[0].T
    return exact, estimated


def recall_table(folder: pathlib.Path, data: pathlib.Path, train: int, queries: int) -> None:
    asked = np.arange(queries)
    exact, estimated = brute_force(folder, data, train, asked)
    columns = ["test_position", "role", "rank", "train_shard", "train_position"]
    table = pq.read_table(folder / "kfac" / "influence" / "test", columns=columns).to_pylist()
    shards = sorted(path.name for path in folder.glob("train-*.tfrecord"))
    first = {path: i * (train // len(shards)) for i, path in enumerate(shards)}
    counts = (10, 30, 100, 300, 1000, 3000)
    print(f"| role | in the table | {' | '.join(f'among {n:,}' for n in counts)} |")
    print(f"|{'---|' * (2 + len(counts))}")
    for role, sign in (("proponent", 1), ("opponent", -1)):
        top = np.argsort(-sign * exact, axis=1)[:, :10]
        order = np.argsort(np.argsort(-sign * estimated, axis=1), axis=1)
        place = np.take_along_axis(order, top, axis=1)
        listed: dict[int, set[int]] = {}
        for row in table:
            if row["role"] == role and row["rank"] <= 10:
                own = first[pathlib.Path(row["train_shard"]).name] + row["train_position"]
                listed.setdefault(row["test_position"], set()).add(own)
        found = np.mean([len(listed[i] & set(top[i].tolist())) / 10 for i in asked])
        among = " | ".join(f"{(place < n).mean():.3f}" for n in counts)
        print(f"| {role}s | {found:.3f} | {among} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=int, default=60_000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--only_prepare", action="store_true")
    parser.add_argument("--only_recall", action="store_true")
    parser.add_argument("--timings", action="store_true", help="print what the workers counted")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or pathlib.Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "checkpoints").exists():
            prepare(folder, arguments.data, arguments.train, arguments.test)
        if arguments.only_prepare:
            return
        if arguments.only_recall:
            if not (folder / "kfac").exists():
                run(folder, "kfac", "kfac", *flags)
            recall_table(folder, arguments.data, arguments.train, arguments.test)
            return
        seconds: dict[str, list[float]] = {}
        states: dict[str, dict] = {}
        for _ in range(arguments.repeats):
            for kind in arguments.kinds:
                shutil.rmtree(folder / kind, ignore_errors=True)
                taken, states[kind] = run(folder, kind, kind, *flags)
                seconds.setdefault(kind, []).append(taken)
                print(kind, round(taken, 1), flush=True)
        for kind in arguments.kinds[1:]:
            taken, _ = run(folder, arguments.kinds[0], kind, *flags)
            seconds.setdefault(f"{kind}, on embeddings of another", []).append(taken)
        if arguments.timings:
            print(json.dumps({kind: state["timings"] for kind, state in states.items()}, indent=1))
    base = statistics.median(seconds[arguments.kinds[0]])
    print("| preconditioner | seconds, median | over none | recall@10, proponents | opponents |")
    print("|---|---|---|---|---|")
    for kind, taken in seconds.items():
        found = states.get(kind, {}).get("retrieval")
        recalls = (
            [f"{found[role]['recall']:.3f}" for role in ("proponents", "opponents")]
            if found
            else ["", ""]
        )
        median = statistics.median(taken)
        share = "" if kind not in states else f"{median / base - 1:+.0%}"
        print(f"| {kind} | {median:.1f} | {share} | {recalls[0]} | {recalls[1]} |")


if __name__ == "__main__":
    main()
