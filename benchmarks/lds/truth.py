"""Ground truth of the linear datamodelling score: losses after training on random halves.

    python benchmarks/lds/truth.py --data FOLDER [--problem fashion] [--seeds 5]

Writes `truth_<problem>.npz` beside itself. A network is trained on each of 50 random halves of
2,000 training examples, several times each from other initial weights, all of a seed at once.
"""

import argparse
import pathlib

import numpy as np
import problems

HALVES = 50


def path(problem: str) -> pathlib.Path:
    return pathlib.Path(__file__).with_name(f"truth_{problem}.npz")


def halves(count: int = HALVES, seed: int = 0) -> np.ndarray:
    """Rows of each random half: int64 [count, TRAIN / 2]."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(problems.TRAIN) for _ in range(count)]
    return np.stack([np.sort(order[: problems.TRAIN // 2]) for order in orders])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--problem", choices=problems.PROBLEMS, default="fashion")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    problem = problems.PROBLEMS[arguments.problem]
    x, y, x_test, y_test = problem.examples(arguments.data)
    found = []
    for seed in range(arguments.seeds):
        weights, _ = problems.trained(problem, x, y, halves(), 1000 + seed)[-1]
        found.append(problems.losses(weights, x_test, y_test))
        print(f"seed {seed}", flush=True)
    kept = path(arguments.problem)
    np.savez_compressed(kept, losses=np.stack(found).astype(np.float16))
    print(f"{kept}: {kept.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
