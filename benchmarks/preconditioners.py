"""What --preconditioner costs over a job from scratch, and how good its retrieval is.

    python benchmarks/preconditioners.py --data FOLDER [--train 60000] [--repeats 3]

Fashion-MNIST, a multilayer perceptron 784-128-64-10 with three checkpoints, 100 test examples and
default flags. A job from scratch embeds, searches, scores exactly and states its recall; each is a
process of its own, and the kinds take turns, so that medians of the same minutes are compared. A
second preconditioner on the same output costs a join alone.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=int, default=60_000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path)
    parser.add_argument("--only_prepare", action="store_true")
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
