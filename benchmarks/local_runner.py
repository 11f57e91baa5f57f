"""Beam's ways of running on this machine: speed, memory, and whether a stream arrives whole.

    python -m benchmarks.local_runner [--elements 200000] [--streams 40]

Each way runs, in a process of its own, a stage of arithmetic that leaves Python's lock (as
TensorFlow does) and then a join of small elements, which is what the jobs' graphs are made of. The
last lines send elements through Beam's stream with its periodic flush and without, while other
threads are busy.
"""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time

import apache_beam as beam
import numpy as np
from apache_beam.coders import coder_impl
from apache_beam.coders.coders import FastPrimitivesCoder
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.worker.data_plane import ClosableOutputStream

from tracin_beam.jobs import local

WAYS = (
    ("multi_threading", 0),  # the launchers' default
    ("in_memory", 1),
    ("in_memory", 0),
    ("multi_processing", 0),
)


def work(seed: int) -> float:
    """Half a second of matrix products."""
    matrix = np.random.default_rng(seed).normal(size=(512, 512))
    for _ in range(40):
        matrix = matrix @ matrix
        matrix /= np.abs(matrix).max()
    return float(matrix[0, 0])


def run(mode: str, workers: int, elements: int) -> dict[str, float]:
    """Seconds of both parts, and the peak memory in GB of this process."""
    options = PipelineOptions(
        [
            "--runner=FnApiRunner",
            f"--direct_running_mode={mode}",
            f"--direct_num_workers={workers}",
        ]
    )
    local.prepare(options)
    parts = 20
    started = time.time()
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(range(parts)) | beam.Reshuffle() | beam.Map(work)
    arithmetic = time.time() - started
    started = time.time()
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(range(parts))
            | beam.Reshuffle()
            | beam.FlatMap(
                lambda part: (
                    ((part * i) % 5000, (f"shard-{part}", i, i / 3))
                    for i in range(elements // parts)
                )
            )
            | beam.GroupByKey()
            | beam.Map(lambda group: sum(1 for _ in group[1]))
            | beam.CombineGlobally(sum)
            | beam.Map(lambda total: _expect(total, elements // parts * parts))
        )
    join = time.time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"arithmetic": round(arithmetic, 1), "join": round(join, 1), "GB": round(peak, 2)}


def _expect(total: int, wanted: int) -> None:
    if total != wanted:
        raise ValueError(f"{total} elements of {wanted} arrived")


class _Value:
    """A value that is pickled by Python code, where threads take turns."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return _Value, (self.number,)


def stream(limit_ms: int, elements: int, seconds: float) -> tuple[int, int]:
    """Messages of a stream, written for some seconds, and those that do not decode."""
    coder = FastPrimitivesCoder().get_impl()
    messages: list[bytes] = []
    output = ClosableOutputStream.create(messages.append, messages.append, limit_ms)
    end = time.time() + seconds
    while time.time() < end:
        for i in range(elements // 100):
            coder.encode_to_stream((i, f"shard-{i}", _Value(i)), output, True)
        output.maybe_flush()
    output.close()
    bad = 0  # what is read of a cut element may be anything, and of any length
    for message in messages:
        try:
            source = coder_impl.create_InputStream(message)
            while source.size():
                coder.decode_from_stream(source, True)
        except Exception:
            bad += 1
    return len(messages), bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way[0], int(given.way[1]), given.elements)))
        return
    for mode, workers in WAYS:
        command = [sys.executable, "-m", "benchmarks.local_runner", "--way", mode, str(workers)]
        command += [f"--elements={given.elements}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"{mode}, {workers or 'all'} workers: {done.stdout.strip().splitlines()[-1]}")
    stop = threading.Event()
    for _ in range(6):
        threading.Thread(target=_busy, args=(stop,), daemon=True).start()
    for limit in (0, 20):
        count, bad = stream(limit, given.elements, given.seconds)
        print(f"stream, flushed every {limit} ms: {bad} of {count} messages do not decode")
    stop.set()


def _busy(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1000))


if __name__ == "__main__":
    main()
