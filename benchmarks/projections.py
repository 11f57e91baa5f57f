"""Projections compared: how well they find the exact top 10, and what they cost.

    python projections.py [--data ../../shared/data] [--model mlp resnet20 transformer]

On Fashion-MNIST, CIFAR-10 and AG News, with models trained on them, at one checkpoint. Against
exact inner products of whole gradients:

- 10@10 and 10@100: the share of the exact top 10 among the projected top 10 and top 100;
- Spearman: rank correlation of all projected with all exact scores, mean over the queries;
- self-influence: root mean square relative error of ‖S∇ℓ‖² as an estimate of ‖∇ℓ‖²;
- cost: embedding with sketched norms, as a ratio to the bare pass (see engine.py).

"exact" is CountSketch without compression on the way, `--ways kernel=materialise`.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import workloads
from engine import bare_pass, medians

from tracin_beam.gradients.batches import Batch
from tracin_beam.gradients.engine import Engine
from tracin_beam.scoring.recall import correlation, ranks

SIZES = {"mlp": (3000, 100, 256), "resnet20": (1000, 60, 64), "transformer": (600, 40, 16)}
# Kind, dim and ways.
KINDS = [
    ("countsketch", 256, ""),
    ("countsketch", 512, ""),
    ("countsketch", 1024, ""),
    ("countsketch", 2048, ""),
    ("countsketch", 4096, ""),
    ("countsketch", 1024, "kernel=materialise"),
    ("kronecker", 1024, ""),
    ("kronecker", 4096, ""),
    ("gaussian", 1024, ""),
]


def exact_scores(
    engine: Engine, values: list[tf.Tensor], train: Batch, test: Batch
) -> tuple[np.ndarray, np.ndarray]:
    """Exact ⟨∇ℓ(z), ∇ℓ(z')⟩ [train, test], and ‖∇ℓ(z)‖² [train]."""
    blocks = []
    for start in range(0, test.size, engine.batch_size):
        part = test.take(range(start, min(start + engine.batch_size, test.size)))
        blocks.append(engine.scores(values, train, engine.queries(values, part)))
    return np.concatenate(blocks, axis=1), engine.embed(values, train).squared_norm


def found(exact: np.ndarray, estimate: np.ndarray, among: int) -> float:
    """Share of the exact top 10 of each column among the estimated top so many."""
    best = np.argsort(-exact, axis=0)[:10]
    near = np.argsort(-estimate, axis=0)[:among]
    shares = [len(set(best[:, i]) & set(near[:, i])) / 10 for i in range(exact.shape[1])]
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(
        "| model | projection | dim | bytes | proponents 10@10 | 10@100 | opponents 10@10 | 10@100 "
        "| Spearman | self-influence | cost |\n" + "|---" * 11 + "|"
    )
    for name in arguments.model:
        count, queries, batch_size = SIZES[name]
        work = workloads.load(name, arguments.data, count, queries)
        engine, train, test = work.engine(batch_size=batch_size)
        scores, norms = exact_scores(engine, work.values, train, test)
        one = train.take(range(batch_size))
        for kind, dim, chosen in KINDS:
            if kind == "gaussian" and name == "transformer":
                continue  # its matrix has five billion entries
            if chosen and name == "mlp":
                continue  # its default is exact as well
            engine, train, test = work.engine(
                batch_size=batch_size, projection=kind, dim=dim, norms="sketched", ways=chosen
            )
            mine = engine.embed(work.values, train)
            theirs = engine.embed(work.values, test)
            estimates = mine.embedding @ theirs.embedding.T
            rank = np.mean(
                [
                    correlation(ranks(estimates[:, i]), ranks(scores[:, i]))
                    for i in range(scores.shape[1])
                ]
            )
            error = np.sqrt(np.mean((mine.squared_norm / norms - 1) ** 2))
            ways: dict[str, Callable[[], object]] = {
                "embed": functools.partial(engine.embed, work.values, one),
                "bare": bare_pass(engine, one),
            }
            taken = medians(ways, arguments.repeats)
            cells = [
                f"{found(sign * scores, sign * estimates, among):.3f}"
                for sign in (1, -1)
                for among in (10, 100)
            ]
            cells += [f"{rank:.3f}", f"{error:.3f}", f"{taken['embed'] / taken['bare']:.2f}"]
            label = f"{kind}, exact" if chosen else kind
            print(f"| {name} | {label} | {dim} | {4 * dim} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
