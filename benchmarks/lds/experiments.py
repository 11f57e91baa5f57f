"""What attributions are for, tried: each experiment prints a table.

    python benchmarks/lds/experiments.py --data FOLDER [--only removal …]

On Fashion-MNIST's perceptron of `problems.py`, with images that the scoreboard does not use, and
default flags. `shortcut`: training images with a mark all have one label; whether the images that
explain a marked test image are those. `mislabelled`: a tenth of the labels are wrong; how many are
among the training examples that matter most to themselves. `removal`: the loss of a test example
after training without its top proponents. `random`: whether an untrained network gives other
answers. `cardinality`: how many training examples are in any top k. `checkpoints`: the linear
datamodelling score by how many checkpoints, evenly spread, are summed.
"""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow.parquet as pq
import truth
from baselines import BASELINES, Network
from problems import PROBLEMS, Examples, Trainer, fashion
from score import WAYS, prepare, scores, spearman

import tracin_beam

NAME = "fashion"
RIVALS = (
    "representer points",
    "influence function, CG",
    "influence function, LiSSA",
    "TRAK",
)


def fresh(data: pathlib.Path) -> Examples:
    """Images that no truth is of."""
    return fashion(data, first=20_000, first_test=5_000)


def attributions(folder: pathlib.Path, examples: Examples, seed: int = 100) -> Mapping:
    """Scores of every way here, and of others, by name."""
    networks = prepare(folder, NAME, examples, seed)
    sizes = len(examples[3]), len(examples[1])
    found = {f"`{way}`": scores(folder, way, 1.0, *sizes)[0].sum(axis=2) for way in WAYS}
    return found | {name: BASELINES[name](networks) for name in RIVALS}


def shown(head: str, rows: Mapping[str, list[float]]) -> None:
    print(f"\n| {head} |\n|{'---|' * len(head.split('|'))}")
    for name, numbers in rows.items():
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in numbers)} |", flush=True)


def shortcut(data: pathlib.Path) -> None:
    x, y, x_test, y_test = fresh(data)
    marked = np.random.default_rng(0).choice(len(x), 100, replace=False)
    x[marked, 1:5, 1:5] = 1.0
    y[marked] = 9
    others = y_test != 9
    x_test, y_test = x_test[others][:50].copy(), y_test[others][:50].copy()
    x_test[:, 1:5, 1:5] = 1.0
    # What explains the prediction that the mark makes.
    y_test[:] = 9
    with tempfile.TemporaryDirectory() as name:
        found = attributions(pathlib.Path(name), (x, y, x_test, y_test))
    rows = {}
    for method, own in found.items():
        order = np.argsort(-own, axis=1)
        rows[method] = [float(np.isin(order[:, :k], marked).mean()) for k in (1, 10, 50)]
    shown("marked among the top | 1 | 10 | 50", rows)


def mislabelled(data: pathlib.Path) -> None:
    x, y, x_test, y_test = fresh(data)
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(x), len(x) // 10, replace=False)
    y[wrong] = (y[wrong] + rng.integers(1, 10, len(wrong))) % 10
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        networks = prepare(folder, NAME, (x, y, x_test, y_test), 100)
        ranking = {}
        for way in WAYS:
            output = folder / way
            tracin_beam.self_influence(
                f"{folder}/task.py:task",
                checkpoints=f"{folder}/checkpoints",
                train=f"{folder}/train-*.tfrecord",
                output=str(output),
                preconditioner=way,
            )
            table = pq.read_table(output / "self_influence", columns=["position", "self_influence"])
            own = np.empty(len(x))
            own[table["position"].to_numpy()] = table["self_influence"].to_numpy()
            ranking[f"`{way}`"] = own
    last = networks[-1]
    ranking["influence function"] = own_influence(last)
    ranking["representer points"] = np.abs(last.train.of_loss()).max(axis=1)
    ranking["gradient norm, last checkpoint"] = last.norms[0]
    for method, own in ranking.items():
        order = np.argsort(-own)
        hit = np.isin(order, wrong)
        precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
        shares = [float(hit[: len(x) * part // 100].sum() / len(wrong)) for part in (5, 10, 20)]
        rows[method] = [*shares, float(precision[hit].mean())]
    shown("wrong labels found in the top | 5 % | 10 % | 20 % | average precision", rows)


def own_influence(network: Network, damping: float = 0.01) -> np.ndarray:
    """gᵀ (F + λ I)⁻¹ g of training examples, by Woodbury's identity; see `baselines.Fisher`."""
    fisher = network.fisher
    assert fisher is not None
    count = len(fisher.gram)
    inner = fisher.gram + count * damping * np.eye(count)
    solved = np.linalg.solve(inner, fisher.own)
    found: np.ndarray = (np.square(network.norms[0]) - (fisher.own * solved).sum(axis=0)) / damping
    return found


def removal(data: pathlib.Path, tests: int = 12, seeds: int = 2, removed: int = 100) -> None:
    x, y, x_test, y_test = fresh(data)
    x_test, y_test = x_test[:tests], y_test[:tests]
    with tempfile.TemporaryDirectory() as name:
        found = dict(attributions(pathlib.Path(name), (x, y, x_test, y_test)))
    found["at random"] = np.random.default_rng(0).normal(size=(tests, len(x)))
    trainer = Trainer(PROBLEMS[NAME], x, y)

    def losses(rows: np.ndarray, seed: int) -> np.ndarray:
        for _ in trainer.train(rows, seed):
            pass
        return trainer.losses(x_test, y_test)

    whole = np.mean([losses(np.arange(len(x)), 200 + seed) for seed in range(seeds)], axis=0)
    rows = {}
    for method, own in found.items():
        rises = []
        for i, order in enumerate(np.argsort(-own, axis=1)):
            left = np.sort(order[removed:])
            after = np.mean([losses(left, 200 + seed)[i] for seed in range(seeds)])
            rises.append(after - whole[i])
        rows[method] = [np.mean(rises), np.std(rises) / np.sqrt(tests), np.median(rises)]
    shown(f"rise of the loss without the top {removed} | mean | standard error | median", rows)


def random(data: pathlib.Path) -> None:
    examples = fresh(data)
    sizes = len(examples[3]), len(examples[1])
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder, NAME, examples, 100, compared=False)
        trained = {way: scores(folder, way, 1.0, *sizes)[0].sum(axis=2) for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder, NAME, examples, 101, compared=False)
        again = {way: scores(folder, way, 1.0, *sizes)[0].sum(axis=2) for way in WAYS}
        trainer = Trainer(PROBLEMS[NAME], *examples[:2])
        next(trainer.train(np.arange(1), 102))
        trainer.model.set_weights(PROBLEMS[NAME].build().get_weights())
        listing = folder / "checkpoints" / "checkpoints.json"
        first = json.loads(listing.read_text())[0]
        trainer.model.save_weights(folder / "checkpoints" / first["path"])
        listing.write_text(json.dumps([first]))
        (folder / "out").rename(folder / "before")
        untrained = {way: scores(folder, way, 1.0, *sizes)[0].sum(axis=2) for way in WAYS}
    for way in WAYS:
        rows[f"`{way}`"] = [
            *likeness(trained[way], again[way]),
            *likeness(trained[way], untrained[way]),
        ]
    shown(
        "correlation, and share of the same top 10 | with another training | | untrained | ", rows
    )


def likeness(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation of scores by test example, and the share of the top 10 in common."""
    tops = (np.argsort(-scored, axis=1)[:, :10] for scored in (one, other))
    common = [len(np.intersect1d(a, b)) / 10 for a, b in zip(*tops, strict=True)]
    return float(spearman(one.T, other.T).mean()), float(np.mean(common))


def cardinality(data: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        found = attributions(pathlib.Path(name), fresh(data))
    rows = {}
    for method, own in found.items():
        order = np.argsort(-own, axis=1)
        rows[method] = [
            len(np.unique(end)) / min(end.size, own.shape[1])
            for k in (1, 10, 50)
            for end in (order[:, :k], order[:, -k:])
        ]
    head = " | ".join(f"{k}, proponents | {k}, opponents" for k in (1, 10, 50))
    shown(f"different examples in the top, as a share of what could be | {head}", rows)


def checkpoints(data: pathlib.Path) -> None:
    problem = PROBLEMS[NAME]
    examples = problem.examples(data)
    sizes = len(examples[3]), len(examples[1])
    with np.load(truth.path(NAME)) as stored:
        mean = stored["losses"].astype(np.float64).mean(axis=0)
    mask = np.zeros((truth.HALVES, sizes[1]))
    np.put_along_axis(mask, truth.halves(sizes[1]), 1.0, axis=1)
    rows: dict[str, list[float]] = {}
    counts = (1, 2, 3, 5, 8, problem.epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder, NAME, examples, 0, problem.epochs, compared=False)
        for way in WAYS:
            terms = scores(folder, way, 1.0, *sizes)[0]
            own = rows.setdefault(f"`{way}`", [])
            for count in counts:
                some = [round(problem.epochs * part / count) - 1 for part in range(1, count + 1)]
                own.append(spearman(mask @ terms[..., some].sum(axis=2).T, -mean).mean())
    shown(f"LDS by checkpoints | {' | '.join(map(str, counts))}", rows)


EXPERIMENTS: dict[str, Callable[[pathlib.Path], None]] = {
    function.__name__: function
    for function in (shortcut, mislabelled, removal, random, cardinality, checkpoints)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    arguments = parser.parse_args()
    for name in arguments.only:
        EXPERIMENTS[name](arguments.data)


if __name__ == "__main__":
    main()
