"""How far estimated norms are off, and what they cost against exact ones.

    python benchmarks/norms.py [--model mlp resnet20 transformer] [--seeds N]

For each model, trained, at one checkpoint, over seeds of the projection: the root mean square of
the relative error of ‖∇ℓ‖² over examples and seeds, its mean (the bias), that of its standard
error as stated, the share of examples within two of these, and the ratio to the bare pass of
embedding with estimated and with exact norms.
"""

import argparse
import functools
import pathlib

import numpy as np
import workloads
from engine import bare_pass, medians

SIZES = {"mlp": 256, "resnet20": 64, "transformer": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print("| model | error | bias | stated | within two | estimated, cost | exact, cost |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.model:
        work = workloads.load(name, arguments.data, arguments.examples, 1)
        exact, train, _ = work.engine(batch_size=SIZES[name], norms="exact")
        truth = exact.embed(work.values, train).squared_norm
        errors, stated = [], []
        for seed in range(arguments.seeds):
            engine, _, _ = work.engine(batch_size=SIZES[name], seed=seed)
            found = engine.embed(work.values, train)
            errors.append(found.squared_norm / truth - 1)
            stated.append(found.norm_error / truth)
        one = train.take(range(SIZES[name]))
        ways = {
            "estimated": functools.partial(engine.embed, work.values, one),
            "exact": functools.partial(exact.embed, work.values, one),
            "bare": bare_pass(engine, one),
        }
        taken = medians(ways, arguments.repeats) if arguments.repeats else dict.fromkeys(ways, 1)
        off, said = np.array(errors), np.array(stated)
        cells = [
            f"{np.sqrt(np.mean(off**2)):.4f}",
            f"{off.mean():+.4f}",
            f"{np.sqrt(np.mean(said**2)):.4f}",
            f"{np.mean(np.abs(off) <= 2 * said + 1e-5):.3f}",
            *(f"{taken[way] / taken['bare']:.2f}" for way in ("estimated", "exact")),
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
