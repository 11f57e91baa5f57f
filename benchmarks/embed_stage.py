"""What the whole embed stage costs on this machine, against the bare pass over the same examples.

    python embed_stage.py [--model mlp resnet20 transformer] [--flags '--runner=…']

Shards are read and parsed, gradients computed and projected, and embeddings written, at one
checkpoint, on the runner that the launchers take by default. "Stage" is the Beam pipeline, "job"
also the checks before it, "rerun" a job that finds everything done: the start and the end of the
others. The bare pass, forward and backward over all weights at the engine's batch size,
TensorFlow alone, is taken before each and at the end.
"""

import argparse
import dataclasses
import pathlib
import tempfile
import time

import engine as engine_benchmark
import numpy as np
import workloads

import tracin_beam
from tracin_beam.config import Config
from tracin_beam.inputs.task import load_task
from tracin_beam.jobs import launch, options, preflight
from tracin_beam.jobs.registry import JOBS

TASK = """
import keras
import models
import tracin_beam

task = tracin_beam.Task(
    models.{model},
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    tracin_beam.{parser!r},
)
"""
EXAMPLES = {"mlp": 60_000, "resnet20": 20_480, "transformer": 2_048}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--model", nargs="+", default=list(EXAMPLES), choices=list(EXAMPLES))
    parser.add_argument("--examples", type=int, help="of each model, repeated where data ends")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags for the job")
    arguments = parser.parse_args()
    print("| model | examples | what | seconds | ratio to bare pass | examples/s |")
    print("|---|---|---|---|---|---|")
    for name in arguments.model:
        examples = arguments.examples or EXAMPLES[name]
        flags = arguments.flags.split()
        taken = measure(name, arguments.data, examples, arguments.repeats, flags)
        for what, seconds in taken.items():
            print(
                f"| {name} | {examples:,} | {what} | {seconds:.2f} | "
                f"{seconds / taken['bare pass']:.2f} | {examples / seconds:,.0f} |",
                flush=True,
            )


def measure(
    name: str, data: pathlib.Path, examples: int, repeats: int, flags: list[str]
) -> dict[str, float]:
    """Median seconds of stage, job, rerun and bare pass."""
    work = workloads.load(name, data, examples, 1)
    rows = np.arange(examples) % len(work.train[1])
    x, y = work.train[0][rows], work.train[1][rows]
    with tempfile.TemporaryDirectory() as folder:
        parse = tracin_beam.write_shards(
            {"features": x, "label": y}, f"{folder}/train-*.tfrecord", shards=8
        )
        task_file = pathlib.Path(folder) / f"{name}_task.py"
        task_file.write_text(TASK.format(model=name, parser=parse))
        weights = f"{folder}/checkpoint-1.weights.h5"
        task, _ = load_task(f"{task_file}:task")
        model = task.model()
        for variable, value in zip(model.variables, work.values, strict=True):
            variable.assign(value)
        model.save_weights(weights)
        times: dict[str, list[float]] = {"stage": [], "job": [], "rerun": [], "bare pass": []}
        for turn in range(repeats):
            config, beam_options = options.parse(
                [
                    f"--task={task_file}:task",
                    f"--checkpoints={weights}",
                    "--learning_rate=0.1",
                    f"--train={folder}/train-*.tfrecord",
                    f"--output={folder}/out-{turn}",
                    *flags,
                ],
                JOBS["embed"],
            )
            start = time.perf_counter()
            run = prepared(config)
            checked = time.perf_counter()
            engine = run.source.get().engine
            times["bare pass"].append(bare_seconds(name, examples, engine.batch_size))
            resumed = time.perf_counter()
            launch.execute(JOBS["embed"], run, beam_options)
            times["stage"].append(time.perf_counter() - resumed)
            times["job"].append(times["stage"][-1] + checked - start)
            start = time.perf_counter()
            launch.execute(JOBS["embed"], prepared(config), beam_options)
            times["rerun"].append(time.perf_counter() - start)
        times["bare pass"].append(bare_seconds(name, examples, engine.batch_size))
    return {what: float(np.median(seconds)) for what, seconds in times.items()}


def prepared(config: Config) -> preflight.Run:
    with preflight.prepared(config, JOBS["embed"]) as run:
        return dataclasses.replace(run, lease=None)


def bare_seconds(name: str, examples: int, batch_size: int) -> float:
    """Seconds of the bare pass over so many examples."""
    task, task_parser, batch = engine_benchmark.random_batch(name, batch_size)
    config = engine_benchmark.EngineConfig(batch_size=batch_size)
    engine = engine_benchmark.Engine(task, config, task_parser, batch)
    step = engine_benchmark.bare_pass(engine, batch)
    repeats = max(5, min(41, 10_000 // batch_size))
    taken = engine_benchmark.medians({"bare": step}, repeats)["bare"]
    return taken * examples / batch_size


if __name__ == "__main__":
    main()
