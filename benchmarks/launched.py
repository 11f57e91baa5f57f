"""Jobs as processes of their own, timed, and the task that they share."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A process that is started counts the memory of the one that starts it in its peak: this one is
# small. It writes the status and the peak in kilobytes to the file that it is given first.
_STARTER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{status} {usage.ru_maxrss}")
"""


def mlp_task(inputs: int, hidden: Sequence[int]) -> str:
    """A task file: a multilayer perceptron of ten classes."""
    layers = [f"keras.Input(({inputs},))"]
    layers += [f'keras.layers.Dense({width}, activation="relu")' for width in hidden]
    return f"""
import keras
import tracin_beam


def build_model():
    return keras.Sequential([{", ".join([*layers, "keras.layers.Dense(10)"])}])


task = tracin_beam.Task(
    build_model,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    tracin_beam.Parser(features=(({inputs},), "float32"), label=((), "int64")),
)
"""


def run(folder: pathlib.Path, task: str, stage: str, *flags: str) -> tuple[float, float, str]:
    """Seconds of a job, megabytes of its process at most, and what it said."""
    command = [
        sys.executable,
        "-m",
        f"pipelines.{stage}",
        f"--task={folder}/{task}.py:task",
        f"--checkpoints={folder}/checkpoints",
        f"--train={folder}/train-*.tfrecord",
        *flags,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as temporary:
        told = pathlib.Path(temporary) / "told"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _STARTER, str(told), *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=True,
        )
        seconds = time.perf_counter() - started
        status, peak = map(int, told.read_text().split())
    text = done.stdout.decode(errors="replace")
    if status:
        sys.exit(text[-5000:])
    return seconds, peak / 1024, text
