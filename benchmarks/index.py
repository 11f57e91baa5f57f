"""What finding the candidates costs: a whole job against `embed` alone, and both ways by size.

    python index.py [--job] [--large] [--crossover]

`--job`: Fashion-MNIST, an MLP 784-512-256-10, 60,000 training examples, three checkpoints, 100 test
examples, from shards to tables, each command a process of its own; then 1,000 other test examples
on the same embeddings; then nothing new. `--large`: the exact product of a million rows with 1,000
queries. `--crossover`: both ways for more and more queries. All three without a flag.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

import launched
import numpy as np

ROOT = launched.ROOT
TASK = launched.mlp_task(784, (512, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sibling = ROOT.parent / "shared" / "data"
    parser.add_argument("--data", type=pathlib.Path, default=sibling)
    parser.add_argument("--job", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256, help="of --large")
    parser.add_argument("--queries", type=int, default=1_000, help="of --large")
    parser.add_argument("--keep", type=pathlib.Path, help="where to leave what a job wrote")
    arguments = parser.parse_args()
    every = not (arguments.job or arguments.large or arguments.crossover)
    if arguments.job or every:
        job(arguments)
    if arguments.large or every:
        large(arguments.rows, arguments.dim, arguments.queries)
    if arguments.crossover or every:
        crossover()


def job(arguments: argparse.Namespace) -> None:
    """The whole job, a process for each command."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, arguments.data, arguments.examples)
        taken: dict[str, list[tuple[float, float]]] = {}
        for turn in range(arguments.repeats):
            alone, whole = f"{folder}/alone-{turn}", f"{folder}/whole-{turn}"
            for what, command in {
                "embed alone": ["embed", f"--output={alone}"],
                "influence, 100 test examples": [
                    "influence",
                    f"--output={whole}",
                    f"--test={folder}/few-*.tfrecord",
                ],
                "1,000 others, same embeddings": [
                    "influence",
                    f"--output={whole}",
                    f"--test={folder}/more-*.tfrecord",
                    "--test_name=more",
                ],
                "nothing new": [
                    "influence",
                    f"--output={whole}",
                    f"--test={folder}/few-*.tfrecord",
                ],
            }.items():
                found = run(folder, *command)
                print(f"{what}: {found[0]:.1f} s, {found[1]:,.0f} MB", file=sys.stderr, flush=True)
                taken.setdefault(what, []).append(found)
    print("| command | seconds | ratio to embed | peak MB |\n|---|---|---|---|")
    base = float(np.median([seconds for seconds, _ in taken["embed alone"]]))
    for what, runs in taken.items():
        seconds = float(np.median([s for s, _ in runs]))
        peak = max(peak for _, peak in runs)
        print(f"| {what} | {seconds:.1f} | {seconds / base:.2f} | {peak:,.0f} |")


def prepare(folder: pathlib.Path, data: pathlib.Path, examples: int) -> None:
    """Writes the task, the shards and the checkpoints."""
    import keras

    import tracin_beam

    (folder / "index_task.py").write_text(TASK)
    if (folder / "checkpoints").exists():
        return
    with np.load(data / "fashion_mnist.npz") as arrays:
        x, y = arrays["x_train"][:examples], arrays["y_train"][:examples].astype("int64")
        test_x, test_y = arrays["x_test"], arrays["y_test"].astype("int64")
    x, test_x = (a.reshape(len(a), 784).astype("float32") / 255 for a in (x, test_x))
    tracin_beam.write_shards({"features": x, "label": y}, f"{folder}/train-*.tfrecord", shards=8)
    for name, part in (("few", slice(0, 100)), ("more", slice(100, 1100))):
        columns = {"features": test_x[part], "label": test_y[part]}
        tracin_beam.write_shards(columns, f"{folder}/{name}-*.tfrecord", shards=1)
    sys.path.insert(0, str(folder))
    import index_task

    model = index_task.build_model()
    model.compile(keras.optimizers.SGD(0.1), index_task.task.loss)
    callbacks = [tracin_beam.TracInCheckpoint(f"{folder}/checkpoints")]
    model.fit(x, y, batch_size=128, epochs=3, verbose=0, callbacks=callbacks)


def run(folder: pathlib.Path, stage: str, *flags: str) -> tuple[float, float]:
    """Seconds of a command, and megabytes of its process at most."""
    seconds, peak, said = launched.run(folder, "index_task", stage, *flags)
    if os.environ.get("SHOW"):
        print(said, file=sys.stderr)
    return seconds, peak


def rows_of(rows: int, numbers: int, seed: int) -> np.ndarray:
    """Rows with few strong directions, as gradients have: float32 [rows, numbers]."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(0).normal(size=(64, numbers)).astype(np.float32)
    strong = rng.standard_normal((rows, 64), np.float32) * np.geomspace(1, 0.02, 64, dtype="f4")
    return strong @ basis + 0.1 * rng.standard_normal((rows, numbers), np.float32)


def product(rows: np.ndarray, queries: np.ndarray, count: int) -> list[np.ndarray]:
    """Places of both roles' best by the exact product: int64 [queries, count] each."""
    from tracin_beam.scoring import methods, topk
    from tracin_beam.stages import joining

    score = methods.make("TracInCP", [1.0])
    ends = topk.Ends(np.arange(len(queries)), count)
    weighted = score.queries(queries)
    size = joining.block_rows(rows.shape[1])
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        scores = score.estimates(weighted, block)
        ends.add(scores, np.zeros(len(block), np.int32), np.arange(start, start + len(block)))
    return [ends.of(role).position.reshape(len(queries), -1) for role in topk.ROLES]


def large(rows: int, dim: int, queries: int) -> None:
    """The exact product of many rows and queries, without the reading of the rows."""
    matrix, asked = rows_of(rows, dim, 1), rows_of(queries, dim, 2)
    product(matrix[:1000], asked[:1], 1)  # imports
    started = time.perf_counter()
    product(matrix, asked, 100)
    taken = time.perf_counter() - started
    pair = 1e9 * taken / (rows * queries)
    print("\n| rows | numbers | queries | seconds, both roles | ns for a pair |")
    print("|---|---|---|---|---|")
    print(f"| {rows:,} | {dim:,} | {queries:,} | {taken:.1f} | {pair:.1f} |")


def crossover(rows: int = 50_000, numbers: int = 3_072) -> None:
    """Both ways for rising numbers of queries, beside what `scoring.cost` expects."""
    from tracin_beam.scoring import cost, sketch
    from tracin_beam.stages import index

    matrix = rows_of(rows, numbers, 1)
    index.searcher(matrix[:100])  # imports
    started = time.perf_counter()
    searcher = index.searcher(np.concatenate([sketch.sketch(m) for m in np.split(matrix, 10)]))
    build = time.perf_counter() - started
    print(
        f"\n{rows:,} rows of {numbers:,} numbers, a tree over their sketches built in {build:.1f} s"
    )
    print(
        "\n| queries | product, s | expected, s | scann, s | expected, s | found of the best 10 |"
    )
    print("|---|---|---|---|---|---|")
    for count in (100, 300, 1_000, 3_000):
        asked = rows_of(count, numbers, 2)
        started = time.perf_counter()
        best = product(matrix, asked, 100)
        exact = time.perf_counter() - started
        started = time.perf_counter()
        hits = []
        for sign, truth in zip((1, -1), best, strict=True):
            found, _ = searcher.search_batched(
                np.float32(sign) * sketch.sketch(asked),
                final_num_neighbors=cost.MORE * 100,
                pre_reorder_num_neighbors=1000,
            )
            for query, places, wanted in zip(asked, found, truth, strict=True):
                scores = sign * (matrix[places] @ query)  # ranked again by the whole rows
                kept = places[np.argsort(-scores)[:100]]
                hits.append(len(set(kept) & set(wanted[:10])))
        scann = build + time.perf_counter() - started
        expected = (
            cost.exact_seconds(rows, numbers, count),
            cost.scann_seconds(rows, numbers, count, 100),
        )
        print(
            f"| {count:,} | {exact:.1f} | {expected[0]:.1f} | {scann:.1f} | {expected[1]:.1f} | "
            f"{np.mean(hits) / 10:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
