"""How far estimated norms are off, and what they cost against exact ones.

    python benchmarks/norms.py [--model mlp resnet20 transformer wide_cnn MobileNetV2 …] [--seeds N]

For each model, over seeds of the projection (mlp, resnet20 and transformer trained, at one
checkpoint; any other of the zoo with random weights and random examples): the root mean square of
the relative error of ‖∇ℓ‖² over examples and seeds, below what 95 % of them are, its mean (the
bias), that of its standard error as stated, the share of examples within two of these, and the
ratio to the bare pass of embedding with estimated and with exact norms.
"""

import argparse
import functools
import pathlib

import numpy as np
import tensorflow as tf
import workloads
import zoo
from engine import bare_pass, medians

from tracin_beam.gradients.batches import Batch
from tracin_beam.gradients.engine import Engine, EngineConfig

SIZES = {"mlp": 256, "resnet20": 64, "transformer": 16}


def engines(
    name: str, data: pathlib.Path, examples: int, seeds: int
) -> tuple[list[tf.Tensor], Batch, Engine, list[Engine]]:
    """A model's weights, examples, its engine with exact norms, and those with estimated ones."""
    if name in SIZES:
        work = workloads.load(name, data, examples, 1)
        exact, batch, _ = work.engine(batch_size=SIZES[name], norms="exact")
        options = [{"batch_size": SIZES[name], "seed": seed} for seed in range(seeds)]
        return work.values, batch, exact, [work.engine(**given)[0] for given in options]
    task, parser, batch = zoo.task_and_batch(zoo.ZOO[name], examples)
    exact = Engine(task, EngineConfig(norms="exact"), parser, batch)
    size = exact.batch_size
    configs = [EngineConfig(seed=seed, batch_size=size) for seed in range(seeds)]
    estimating = [Engine(task, config, parser, batch) for config in configs]
    rng = np.random.default_rng(0)
    values = [
        v + tf.cast(0.02 * rng.normal(size=v.shape), v.dtype)
        for v in (variable.value for variable in exact.model.variables)
    ]
    return values, batch, exact, estimating


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=[*SIZES, *zoo.ZOO])
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    columns = ["error", "95 % below", "bias", "stated", "within two", "estimated", "exact"]
    print(f"| model | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name in arguments.model:
        values, batch, exact, estimating = engines(
            name, arguments.data, arguments.examples, arguments.seeds
        )
        truth = exact.embed(values, batch).squared_norm
        errors, stated = [], []
        for engine in estimating:
            found = engine.embed(values, batch)
            errors.append(found.squared_norm / truth - 1)
            stated.append(found.norm_error / truth)
        one = batch.take(range(min(batch.size, exact.batch_size)))
        ways = {
            "estimated": functools.partial(estimating[-1].embed, values, one),
            "exact": functools.partial(exact.embed, values, one),
            "bare": bare_pass(exact, one),
        }
        taken = medians(ways, arguments.repeats) if arguments.repeats else dict.fromkeys(ways, 1)
        off, said = np.array(errors), np.array(stated)
        cells = [
            f"{np.sqrt(np.mean(off**2)):.4f}",
            f"{np.quantile(np.abs(off), 0.95):.4f}",
            f"{off.mean():+.4f}",
            f"{np.sqrt(np.mean(said**2)):.4f}",
            f"{np.mean(np.abs(off) <= 2 * said + 1e-5):.3f}",
            *(f"{taken[way] / taken['bare']:.2f}" for way in ("estimated", "exact")),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
