"""What the whole embed stage costs on this machine, against the bare pass over the same examples.

    python embed_stage.py [--examples 20480] [--runner_flags '--runner=FnApiRunner …']

An MLP on Fashion-MNIST: shards are read and parsed, gradients computed and projected, and
embeddings written, at one checkpoint, on the runner that the launchers take by default. "Stage" is
the Beam pipeline, "job" also the checks before it. The bare pass is taken before each and at the
end.
"""

import argparse
import json
import pathlib
import tempfile
import time

import engine as engine_benchmark
import numpy as np
import workloads

import tracin_beam
from tracin_beam import launch, options, preflight
from tracin_beam.task import load_task

TASK = """
import keras
import models
import tracin_beam

task = tracin_beam.Task(
    models.mlp,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    {parser!r},
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--examples", type=int, default=20_480)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runner_flags", default="")
    arguments = parser.parse_args()
    work = workloads.load("mlp", arguments.data, arguments.examples, 1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        x, y = work.train
        parse = tracin_beam.write_shards(
            {"features": x, "label": y}, str(folder / "train-*.tfrecord"), shards=8
        )
        text = TASK.replace("{parser!r}", f"tracin_beam.{parse!r}")
        (folder / "mlp_task.py").write_text(text)
        weights = folder / "checkpoint-1.weights.h5"
        task, _ = load_task(f"{folder}/mlp_task.py:task")
        model = task.model()
        for variable, value in zip(model.variables, work.values, strict=True):
            variable.assign(value)
        model.save_weights(weights)
        stages, jobs, bares = [], [], []
        for turn in range(arguments.repeats):
            bares.append(bare_seconds(arguments.examples))
            argv = [
                f"--task={folder}/mlp_task.py:task",
                f"--checkpoints={weights}",
                "--learning_rate=0.1",
                f"--train={folder}/train-*.tfrecord",
                f"--output={folder}/out-{turn}",
                *arguments.runner_flags.split(),
            ]
            config, beam_options = options.parse(argv)
            start = time.perf_counter()
            run = preflight.prepare(config, with_test=False)
            checked = time.perf_counter()
            launch.execute("embed", run, beam_options)
            stages.append(time.perf_counter() - checked)
            jobs.append(time.perf_counter() - start)
        bares.append(bare_seconds(arguments.examples))
    bare = float(np.median(bares))
    for label, seconds in (("stage", np.median(stages)), ("job", np.median(jobs)), ("bare", bare)):
        print(
            json.dumps(
                {
                    "what": label,
                    "seconds": round(float(seconds), 2),
                    "ratio": round(float(seconds) / bare, 2),
                    "examples/s": round(arguments.examples / float(seconds)),
                }
            )
        )


def bare_seconds(examples: int, batch_size: int = 256) -> float:
    """Seconds of the bare pass over so many examples."""
    task, task_parser, batch = engine_benchmark.random_batch("mlp", batch_size)
    config = engine_benchmark.EngineConfig(batch_size=batch_size)
    engine = engine_benchmark.Engine(task, config, task_parser, batch)
    step = engine_benchmark.bare_pass(engine, batch)
    taken = engine_benchmark.medians({"bare": step}, 41)["bare"]
    return taken * examples / batch_size


if __name__ == "__main__":
    main()
