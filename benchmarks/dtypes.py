"""What smaller numbers of embeddings cost in recall, norms and preconditioned scores.

    python dtypes.py [--data ../../shared/data] [--model mlp resnet20 transformer] [--dim 512 1024]

On the models and data of projections.py, against exact inner products of whole gradients; "norm" is
the root mean square relative error of the stored row's squared norm and "product" the correlation
of the estimates with those of float32. "Preconditioned" is recall of the ten best g (R + λI)⁻¹ g'
among ten estimates and among a hundred, worse role: the truth is of whole gradients, by the kernel
matrix of the training set (Woodbury's identity), λ in both the mean eigenvalue of the sketch's R.
It takes all pairs of training examples; --precondition names the models it is computed for.
Bytes are those of the vector and its scale.
"""

import argparse
import pathlib

import numpy as np
import workloads
from projections import SIZES, exact_scores, found

from tracin_beam.storage import embeddings
from tracin_beam.storage.embeddings import DTYPES, FLOATS, Embeddings


def stored(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """The vectors as they are read back."""
    zeros = np.zeros(len(vectors), np.float32)
    ids = np.full(len(vectors), b"", object)
    rows = Embeddings(ids, np.arange(len(vectors)), *[zeros] * len(FLOATS), vectors)
    return embeddings.decode(list(embeddings.encode(rows, dtype))).embedding


def preconditioned(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Estimates [train, test] with (R + λI)⁻¹ on the test side."""
    rows = train.astype(np.float64)
    second = rows.T @ rows / len(rows) + mean_eigenvalue(train) * np.eye(rows.shape[1])
    return rows @ np.linalg.solve(second, test.T.astype(np.float64))


def mean_eigenvalue(train: np.ndarray) -> float:
    """Of the second moments of rows [n, dim]."""
    return float(np.sum(train.astype(np.float64) ** 2) / train.size)


def exactly_preconditioned(kernel: np.ndarray, scores: np.ndarray, damping: float) -> np.ndarray:
    """The same of whole gradients, from their inner products [train, train] and [train, test]."""
    held = kernel.astype(np.float64)
    shifted = held + len(held) * damping * np.eye(len(held))
    return (scores - held @ np.linalg.solve(shifted, scores)) / damping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sibling = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--dim", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--precondition", nargs="*", default=list(SIZES), choices=list(SIZES))
    arguments = parser.parse_args()
    print(
        "| model | dim | dtype | bytes | proponents 10@10 | 10@100 | opponents 10@10 | 10@100 "
        "| norm | product | preconditioned 10@10 | 10@100 |\n" + "|---" * 12 + "|"
    )
    for name in arguments.model:
        count, queries, batch_size = SIZES[name]
        work = workloads.load(name, arguments.data, count, queries)
        engine, train, test = work.engine(batch_size=batch_size)
        scores, _ = exact_scores(engine, work.values, train, test)
        kernel = None
        if name in arguments.precondition:
            kernel, _ = exact_scores(engine, work.values, train, train)
        for dim in arguments.dim:
            engine, train, test = work.engine(batch_size=batch_size, dim=dim, norms="sketched")
            mine = engine.embed(work.values, train).embedding
            theirs = engine.embed(work.values, test).embedding
            whole = mine @ theirs.T
            best = None
            if kernel is not None:
                best = exactly_preconditioned(kernel, scores, mean_eigenvalue(mine))
            for dtype, kind in DTYPES.items():
                rows, tests = stored(mine, dtype), stored(theirs, dtype)
                estimates = rows @ tests.T
                cells = [
                    f"{found(sign * scores, sign * estimates, among):.3f}"
                    for sign in (1, -1)
                    for among in (10, 100)
                ]
                norm = np.sum(rows**2, axis=1) / np.sum(mine**2, axis=1) - 1
                product = np.corrcoef(estimates.ravel(), whole.ravel())[0, 1]
                cells += [f"{np.sqrt(np.mean(norm**2)):.5f}", f"{product:.6f}"]
                for among in (10, 100) if best is not None else ():
                    again = preconditioned(rows, tests)
                    share = min(found(sign * best, sign * again, among) for sign in (1, -1))
                    cells.append(f"{share:.3f}")
                size = dim * kind.size + 4 * (kind.largest is not None)
                print(f"| {name} | {dim} | {dtype} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
