"""What a projected per-example gradient costs, against a plain forward and backward pass.

    python benchmarks/engine.py [--model mlp resnet20 transformer]

Each row is the median of interleaved runs as a ratio to the bare pass: forward and backward over
all weights of the same model, same batch, TensorFlow alone.
"""

import argparse
import functools
import time
from collections.abc import Callable

import models
import numpy as np
import tensorflow as tf
from workloads import LOSS

from tracin_beam import Task
from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig

WAYS = {
    "sketched norms": {"norms": "sketched"},
    "exact norms": {"norms": "exact"},
    "--gradient adam": {"gradient": "adam"},
}
BATCHES = {"mlp": (256, 1024), "resnet20": (64,), "transformer": (16,)}


def random_batch(name: str, size: int) -> tuple[Task, BatchParser, Batch]:
    """A model's task on random examples: speed does not depend on what they hold."""
    rng = np.random.default_rng(0)
    features = {
        "mlp": lambda: rng.random((size, 784), dtype=np.float32),
        "resnet20": lambda: rng.random((size, 32, 32, 3), dtype=np.float32),
        "transformer": lambda: rng.integers(1, 8192, (size, 128), dtype=np.int32),
    }[name]()
    x, y = tf.constant(features), tf.constant(rng.integers(0, 4, size))

    def parse(serialised: tf.Tensor) -> dict[str, tf.Tensor]:
        row = tf.strings.to_number(serialised, tf.int32)
        return {"features": tf.gather(x, row), "label": tf.gather(y, row)}

    task = Task(models.MODELS[name], LOSS, parse)
    parser = BatchParser(task)
    return task, parser, parser([str(i).encode() for i in range(size)])


def bare_pass(engine: Engine, batch: Batch) -> Callable[[], object]:
    """Forward and backward over all weights."""
    model = engine.model

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=False))
        return tape.gradient(loss, model.trainable_variables)

    def run() -> object:
        gradients = step(batch.features, batch.label)
        return [tf.convert_to_tensor(g)[:1].numpy() for g in gradients if g is not None]

    return run


def medians(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turns after two warm-ups."""
    for run in ways.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(BATCHES), choices=list(BATCHES))
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    print("| model | batch | way | ratio to bare pass | examples/s |")
    print("|---|---|---|---|---|")
    for name in arguments.model:
        for size in BATCHES[name]:
            task, task_parser, batch = random_batch(name, size)
            ways: dict[str, Callable[[], object]] = {}
            for way, changed in WAYS.items():
                config = EngineConfig(dim=arguments.dim, batch_size=size, **changed)
                engine = Engine(task, config, task_parser, batch)
                values = [tf.identity(v.value) for v in engine.model.variables]
                if config.gradient == "adam":
                    values += [tf.ones(w.shape) for w in engine.weights]
                ways[way] = functools.partial(engine.embed, values, batch)
            ways["bare pass"] = bare_pass(engine, batch)
            taken = medians(ways, arguments.repeats)
            for way, seconds in taken.items():
                ratio = seconds / taken["bare pass"]
                print(
                    f"| {name} | {size} | {way} | {ratio:.2f} | {size / seconds:,.0f} |", flush=True
                )


if __name__ == "__main__":
    main()
