"""How far off is the recall that `--dim auto` expects? Against that of the whole training set.

    python dim_auto.py [--data ../../shared/data]

Each model's whole training set is scored exactly for 32 test examples at one checkpoint. Of three
random pilots each expects a recall@10, which is compared with the true one. Where a pilot alone
is enough to say ("pilot's own"), and where the model of the tail is needed, the last columns say.

    python dim_auto.py --scann

What a tree takes, the source of some constants in tracin_beam/planning/plan.py and scoring/cost.py.
"""

import argparse
import os
import pathlib
import tempfile
import threading
import time

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
import workloads
from scann.scann_ops.py import scann_ops_pybind

from tracin_beam import Task
from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig
from tracin_beam.planning import dims
from tracin_beam.stages import index

QUERIES, PILOTS, TOP_K = 32, 3, 10
# Model → (training examples, size of a pilot).
SIZES = {"mlp": (60_000, 2048), "housing": (20_000, 2048), "resnet20": (3000, 500)}


class Housing:
    """California's house prices (regression), an MLP of 128 and 64 units."""

    def __init__(self, data: pathlib.Path) -> None:
        table = pd.read_csv(data / "california_housing.csv.gz")
        numbers = table.select_dtypes("number").dropna().to_numpy(np.float32)
        numbers = (numbers - numbers.mean(axis=0)) / numbers.std(axis=0)
        numbers = numbers[np.random.default_rng(0).permutation(len(numbers))]
        self.x, self.y = numbers[:, :-1], numbers[:, -1:]
        keras.utils.set_random_seed(0)
        model = self.build()
        model.compile("adam", "mse")
        model.fit(self.x[:20_000], self.y[:20_000], batch_size=128, epochs=5, verbose=0)
        self.values = [tf.identity(v.value) for v in model.variables]

    def build(self) -> keras.Model:
        layers = keras.layers
        hidden = [layers.Dense(128, activation="relu"), layers.Dense(64, activation="relu")]
        return keras.Sequential([keras.Input((self.x.shape[1],)), *hidden, layers.Dense(1)])

    def engine(self, **config: int) -> tuple[Engine, Batch, Batch]:
        x, y = tf.constant(self.x), tf.constant(self.y)

        def parse(serialised: tf.Tensor) -> dict[str, tf.Tensor]:
            row = tf.strings.to_number(serialised, tf.int32)
            return {"features": tf.gather(x, row), "label": tf.gather(y, row)}

        task = Task(self.build, keras.losses.MeanSquaredError(), parse)
        parser = BatchParser(task)
        every = parser([str(i).encode() for i in range(20_000 + QUERIES)])
        engine = Engine(task, EngineConfig(**config), parser, every.take([0]))
        return engine, every.take(range(20_000)), every.take(range(20_000, 20_000 + QUERIES))


def accuracy(data: pathlib.Path) -> None:
    print(
        "| model | training examples | pilot | candidates | dim | true recall | expected "
        "| pilot's own |\n" + "|---" * 8 + "|"
    )
    errors = []
    for name, (rows, pilot) in SIZES.items():
        work = Housing(data) if name == "housing" else workloads.load(name, data, rows, QUERIES)
        batch_size = 64 if name == "resnet20" else 256
        exact = None
        for dim in (64, 256, 1024):
            engine, train, test = work.engine(batch_size=batch_size, dim=dim)
            if exact is None:
                queries = engine.queries(work.values, test)
                exact = engine.scores(work.values, train, queries).astype(np.float64)
            mine, theirs = engine.embed(work.values, train), engine.embed(work.values, test)
            estimate = mine.embedding @ theirs.embedding.T
            spread = np.sqrt(np.outer(mine.squared_norm, theirs.squared_norm))
            for candidates in (10, 25, 100):
                truth = worse(exact, estimate, candidates)
                expected, own = [], []
                for i in range(PILOTS):
                    some = np.random.default_rng(i).permutation(rows)[:pilot]
                    parts = exact[some], estimate[some], spread[some]
                    expected.append(dims.expected_recall(*parts, rows, TOP_K, candidates))
                    own.append(worse(exact[some], estimate[some], candidates))
                errors += [
                    (candidates, e - truth, o - truth) for e, o in zip(expected, own, strict=True)
                ]
                print(
                    f"| {name} | {rows:,} | {pilot:,} | {candidates} | {dim} | {truth:.3f} "
                    f"| {np.mean(expected):.3f} ± {np.std(expected):.3f} | {np.mean(own):.3f} |",
                    flush=True,
                )
    print("\n| candidates | mean error | mean absolute | highest | lowest | pilot's own, mean |")
    print("|---" * 6 + "|")
    for candidates in (10, 25, 100):
        off = np.array([e for c, e, _ in errors if c == candidates])
        own_off = np.mean([o for c, _, o in errors if c == candidates])
        print(
            f"| {candidates} | {off.mean():+.3f} | {np.abs(off).mean():.3f} | {off.max():+.3f} "
            f"| {off.min():+.3f} | {own_off:+.3f} |"
        )


def worse(exact: np.ndarray, estimate: np.ndarray, candidates: int) -> float:
    """Recall@10 of the role that has less of it."""
    return min(dims.sample_recall(s * exact, s * estimate, TOP_K, candidates) for s in (1, -1))


def scann() -> None:
    print("| rows | width | build s | build memory | bytes | search s |\n" + "|---" * 6 + "|")
    for rows, width in ((15_000, 1024), (30_000, 1024), (30_000, 3072)):
        rng = np.random.default_rng(0)
        matrix = rng.normal(size=(rows, 64)) @ rng.normal(size=(64, width))
        matrix = (matrix + rng.normal(size=matrix.shape)).astype(np.float32)
        with Peak() as peak:
            started = time.perf_counter()
            searcher = index.searcher(matrix)
            build = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            searcher.serialize(folder, relative_path=True)
            stored = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder))
            loaded = scann_ops_pybind.load_searcher(folder)
        started = time.perf_counter()
        loaded.search_batched(matrix[:256], final_num_neighbors=100, pre_reorder_num_neighbors=1000)
        search = (time.perf_counter() - started) / 256
        floats = rows * width
        print(
            f"| {rows:,} | {width} | {build / floats:.1e} × floats "
            f"| {1 + peak.grown / matrix.nbytes:.1f} × rows | {stored / matrix.nbytes:.3f} × rows "
            f"| {search / floats:.1e} × floats |",
            flush=True,
        )


class Peak:
    """The most by which this process's memory grows, in bytes, looked at a hundred times a second.

    Attributes:
      grown: since the start.
    """

    def __enter__(self) -> "Peak":
        self.grown, self._done = 0, False
        self._before = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._done:
            self.grown = max(self.grown, self._now() - self._before)
            time.sleep(0.01)

    def _now(self) -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--scann", action="store_true")
    arguments = parser.parse_args()
    if arguments.scann:
        scann()
    else:
        accuracy(arguments.data)


if __name__ == "__main__":
    main()
