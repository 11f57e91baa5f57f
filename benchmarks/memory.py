"""What embedding takes of memory, over TensorFlow, the model and one batch.

    python memory.py [--model mlp resnet20 transformer]

Each figure comes from a process of its own: peak resident memory while 20 batches are computed,
less what was resident when the model was built and one batch was there.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys

import engine as engine_benchmark
import tensorflow as tf

MODELS = ("mlp", "resnet20", "transformer")
WAYS = ("sketched norms", "exact norms", "bare pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        batch_size, parameters, grown = measure(arguments.model[0], arguments.way)
        print(f"| {arguments.model[0]} | {batch_size} | {arguments.way} | {parameters} | {grown} |")
        return
    print("| model | batch | way | weights, MB | memory, MB |\n|---|---|---|---|---|")
    for name in arguments.model:
        for way in WAYS:
            command = [sys.executable, __file__, "--model", name, "--way", way]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            print(found.stdout.splitlines()[-1], flush=True)


def measure(name: str, way: str) -> tuple[int, int, int]:
    """The batch size that the engine chooses, MB of weights, and MB of memory over the model."""
    task, parser, example = engine_benchmark.random_batch(name, 1)
    chosen = engine_benchmark.Engine(
        task, engine_benchmark.EngineConfig(), parser, example
    ).batch_size
    task, parser, batch = engine_benchmark.random_batch(name, chosen)
    norms = "exact" if way == "exact norms" else "sketched"
    config = engine_benchmark.EngineConfig(batch_size=chosen, norms=norms)
    engine = engine_benchmark.Engine(task, config, parser, batch)
    values = [tf.identity(v.value) for v in engine.model.variables]
    before = memory("VmRSS")
    if way == "bare pass":
        step = engine_benchmark.bare_pass(engine, batch)
        for _ in range(20):
            step()
    else:
        for _ in range(20):
            engine.embed(values, batch)
    parameters = sum(w.size for w in engine.weights) * 4
    return chosen, parameters >> 20, (memory("VmHWM") - before) >> 10


def memory(field: str) -> int:
    """kB that this process holds (VmRSS) or has held (VmHWM)."""
    status = pathlib.Path(f"/proc/{os.getpid()}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found
    return int(found[1])


if __name__ == "__main__":
    main()
