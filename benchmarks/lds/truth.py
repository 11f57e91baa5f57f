"""Ground truth of the linear datamodelling score: losses after training on random halves.

    python benchmarks/lds/truth.py --data FOLDER [--problem fashion] [--seeds 3]

Writes `truth_<problem>.npz` beside itself. A network is trained on each of 50 random halves of
the training examples, several times each from other initial weights. A run that was stopped goes
on after the last seed that is whole.
"""

import argparse
import pathlib

import numpy as np
import problems

HALVES = 50


def path(problem: str) -> pathlib.Path:
    return pathlib.Path(__file__).with_name(f"truth_{problem}.npz")


def halves(train: int, count: int = HALVES, seed: int = 0) -> np.ndarray:
    """Rows of each random half of so many training examples: int64 [count, train / 2]."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(train) for _ in range(count)]
    return np.stack([np.sort(order[: train // 2]) for order in orders])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--problem", choices=problems.PROBLEMS, default="fashion")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    problem = problems.PROBLEMS[arguments.problem]
    x, y, x_test, y_test = problem.examples(arguments.data)
    trainer = problems.Trainer(problem, x, y)
    kept, found = path(arguments.problem), []
    if kept.exists():
        with np.load(kept) as stored:
            found = list(stored["losses"])
    for seed in range(len(found), arguments.seeds):
        own = []
        for number, rows in enumerate(halves(len(x))):
            for _ in trainer.train(rows, 1000 + seed * HALVES + number):
                pass
            own.append(trainer.losses(x_test, y_test))
        found.append(np.stack(own).astype(np.float16))
        np.savez_compressed(kept, losses=np.stack(found))
        print(f"seed {seed}, mean loss {found[-1].mean():.3f}", flush=True)
    print(f"{kept}: {kept.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
