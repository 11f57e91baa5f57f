"""How often do a night's gates raise a false alarm, and do they see a bad shard? On Fashion-MNIST.

    python nights.py [--data ../../shared/data]

A network is trained on the first 10,000 examples. Of the other 60,000, in a random order, two
shards arrive on each of up to thirty nights; where the cohorts are known, the model has not seen
them. All gates are the defaults. In a second run of each night one per cent of the labels of one
new shard have another class, drawn at random, and the night should raise an alarm. On the first
three nights there is little to compare with; they are counted by themselves.

A second table says how often a new shard of 1,000 is seen by how many labels are wrong in all
shards, and how many more in it: fourteen others that the model has not seen either are compared
with, and the probability is below half of the gate's, as on a night on which two come.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import keras
import numpy as np
import pyarrow as pa

import tracin_beam
from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig
from tracin_beam.inputs.checkpoints import read_checkpoints
from tracin_beam.signals import gates, mislabel, nights, ridge

TRAINED, SEEDS, CLASSES, EPOCHS, DIM, FIRST = 10_000, 2, 10, 8, 256, 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Described:
    """What checkpoints make of all examples.

    Attributes:
      y: int [n], labels.
      logs: [n, C, K], log-probabilities.
      phi: [n, C', D], features at some checkpoints of the first half.
    """

    y: np.ndarray
    logs: np.ndarray
    phi: np.ndarray


def network() -> keras.Model:
    layers = keras.layers
    inner = [layers.Dense(width, activation="relu") for width in (128, 64)]
    return keras.Sequential([keras.Input((784,)), *inner, layers.Dense(CLASSES)])


def describe(x: np.ndarray, y: np.ndarray, folder: str) -> Described:
    """Trains, and takes from the engine what the job takes."""
    keras.utils.set_random_seed(0)
    model = network()
    model.compile("adam", LOSS)
    saving = tracin_beam.TracInCheckpoint(folder)
    model.fit(x[:TRAINED], y[:TRAINED], batch_size=64, epochs=EPOCHS, verbose=0, callbacks=[saving])
    parse = tracin_beam.write_shards((x[:4], y[:4]), f"{folder}/example-*.tfrecord")
    task = tracin_beam.Task(network, LOSS, parse)
    few = Batch(x[:4], y[:4], None, None)
    engine = Engine(task, EngineConfig(dim=DIM), BatchParser(task), few)
    half = mislabel.first_half(EPOCHS)
    places = sorted({half - 1, (half - 1) // 2})
    logs, phi = [], []
    for place, checkpoint in enumerate(read_checkpoints(folder)):
        values = engine.values(checkpoint.path)
        wanted, pieces = place in places, []
        for at in range(0, len(x), 1000):
            batch = Batch(x[at : at + 1000], y[at : at + 1000], None, None)
            pieces.append(engine.describe(values, batch, wanted))
        logs.append(np.concatenate([piece[0] for piece in pieces]))
        if wanted:
            phi.append(np.concatenate([piece[1] for piece in pieces]))
    return Described(y, np.stack(logs, axis=1).astype(np.float64), np.stack(phi, axis=1))


def mixed(of: Described, rows: np.ndarray, given: np.ndarray, whole: list) -> np.ndarray:
    """m [n, K] of some rows, whose own part is in the sums."""
    target, q = np.eye(CLASSES)[given], []
    for place, sums in enumerate(whole):
        phi, fit = of.phi[rows, place], ridge.fit(sums)
        best = int(ridge.errors(fit, phi, target).argmin())
        output = ridge.leave_one_out(fit, best, phi, target)
        warmth = ridge.TEMPERATURES[int(ridge.tempered(output, target)[0].argmax())]
        q.append(ridge.probabilities(output, warmth))
    early = np.exp(of.logs[rows, : mislabel.first_half(of.logs.shape[1])])
    return mislabel.mixed(np.stack(q, axis=1), early)


def sums_of(of: Described, rows: np.ndarray, given: np.ndarray) -> list:
    return [ridge.sums(of.phi[rows, k], np.eye(CLASSES)[given]) for k in range(of.phi.shape[1])]


def table(m: np.ndarray, logs: np.ndarray, given: np.ndarray, name: str, cohort: str) -> pa.Table:
    """The columns of `signals.parquet` that metrics and suspects are made from."""
    return pa.table(
        {
            "id": [f"{name}#{i}" for i in range(len(given))],
            "shard": [name] * len(given),
            "label": given.astype(float),
            "prediction": logs[:, -1].argmax(axis=1).astype(float),
            "loss": -logs[np.arange(len(given)), -1, given],
            "mislabel_score": mislabel.scores(m, given),
            "best_other_ratio": mislabel.best_other_ratio(m, given),
            "cohort": [cohort] * len(given),
        }
    )


def arrived(
    of: Described, rows: np.ndarray, given: np.ndarray, whole: list, name: str, cohort: str
) -> tuple[dict, list[str]]:
    """What is kept of a shard, and the ids of its suspects."""
    m, logs = mixed(of, rows, given, whole), of.logs[rows]
    signals = table(m, logs, given, name, cohort)
    kept = nights.kept_surprises(logs, m, cohort, given)
    wrong = np.flatnonzero(signals["best_other_ratio"].to_numpy() > 1)
    return {**nights.summary(signals, True, name), **kept, "model": "one"}, [
        f"{name}#{i}" for i in wrong
    ]


def suspects_of(ids: dict[str, list[str]], labels: dict, date: dict[str, str]) -> pa.Table:
    rows = [(name, one) for name, some in ids.items() for one in some]
    at = [int(one.rpartition("#")[2]) for _, one in rows]
    return pa.table(
        {
            "id": pa.array([one for _, one in rows], pa.string()),
            "kind": pa.array(["mislabelled"] * len(rows), pa.string()),
            "label": pa.array(
                [float(labels[n][i]) for (n, _), i in zip(rows, at, strict=True)], pa.float64()
            ),
            "shard": pa.array([name for name, _ in rows], pa.string()),
            "first_seen": pa.array([date[name] for name, _ in rows], pa.string()),
        }
    )


def simulate(
    of: Described, size: int, seed: int, told: bool, each: int = 2
) -> tuple[list[bool], list[bool]]:
    """Nights with an alarm, and nights on which the bad shard was seen; so many come each night."""
    rng = np.random.default_rng(seed)
    order = TRAINED + rng.permutation(len(of.y) - TRAINED)
    conditions = gates.parse_all(None, ())
    whole = sums_of(of, np.arange(TRAINED), of.y[:TRAINED])
    shards, ids, labels, date, history = {}, {}, {}, {}, []
    for k in range(10):  # the shards that were trained on
        rows, name = np.arange(k * 1000, (k + 1) * 1000), f"trained-{k}"
        labels[name], date[name] = of.y[rows], "00"
        cohort = "trained" if told else "unknown"
        shards[name], ids[name] = arrived(of, rows, of.y[rows], whole, name, cohort)
    made = nights.metrics_of("00", shards, suspects_of(ids, labels, date), history)
    history.append(made)
    cohort = "new" if told else "unknown"
    false_alarms, seen = [], []
    for night in range(1, _nights(size, each) + 1):
        today = f"{night:02d}"
        names = [f"{today}-{k}" for k in range(each)]
        rows = {n: order[(each * (night - 1) + k) * size :][:size] for k, n in enumerate(names)}
        for bad in (True, False):
            given = {name: of.y[rows[name]].copy() for name in names}
            if bad:
                some = rng.choice(size, size // 100, replace=False)
                first = given[names[0]]
                first[some] = (first[some] + rng.integers(1, CLASSES, len(some))) % CLASSES
            now = whole
            for name in names:
                parts = sums_of(of, rows[name], given[name])
                now = [a + b for a, b in zip(now, parts, strict=True)]
            tonight, these = dict(shards), dict(ids)
            for name in names:
                tonight[name], these[name] = arrived(of, rows[name], given[name], now, name, cohort)
            dates = {**date, **dict.fromkeys(names, today)}
            found = suspects_of(these, {**labels, **given}, dates)
            made = nights.metrics_of(today, tonight, found, history)
            alarm = any(r["fired"] for r in gates.evaluate(conditions, made, history))
            (seen if bad else false_alarms).append(alarm)
        whole, shards, ids, date = now, tonight, these, dates
        labels |= given
        history.append(made)
    return false_alarms, seen


def flipped(y: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Labels of which some, drawn at random, are another class."""
    given = y.copy()
    some = rng.choice(len(y), round(share * len(y)), replace=False)
    given[some] = (given[some] + rng.integers(1, CLASSES, len(some))) % CLASSES
    return given


def power(of: Described, base: float, more: float, draws: int = 200, size: int = 1000) -> float:
    """The share of shards that are seen, some labels wrong in all of them and more in one."""
    rng = np.random.default_rng(0)
    surprise = nights.surprise(of.logs[TRAINED:], np.zeros(0), "new")
    y = of.y[TRAINED:]
    seen = 0
    for _ in range(draws):
        shards = rng.permutation(len(y))[: 15 * size].reshape(15, size)
        shares = [base + more] + [base] * 14
        one, *others = [
            nights.surprises(surprise[rows], flipped(y[rows], share, rng))
            for rows, share in zip(shards, shares, strict=True)
        ]
        seen += nights.surprise_probability(one, others) < nights.LEVEL / 2
    return seen / draws


def _nights(size: int, each: int) -> int:
    """Nights on which so many shards can arrive."""
    return min(30, 60_000 // (each * size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)))
    args = parser.parse_args()
    data = np.load(args.data / "fashion_mnist.npz")
    x = np.concatenate([data["x_train"], data["x_test"]]).reshape(-1, 784).astype(np.float32) / 255
    y = np.concatenate([data["y_train"], data["y_test"]]).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        of = describe(x, y, folder)
    print(
        "| cohorts | examples in a shard | nights | false alarms by run | seen, first nights ",
        end="",
    )
    print("| seen, later |\n|---|---|---|---|---|---|")
    for told in (True, False):
        for size in (1000, 2500, 5000):
            runs = [simulate(of, size, seed, told) for seed in args.seeds]
            alarms = [sum(false) for false, _ in runs]
            early = [s for _, found in runs for s in found[:FIRST]]
            late = [s for _, found in runs for s in found[FIRST:]]
            print(
                f"| {'known' if told else 'not known'} | {size} | {len(runs)} × {_nights(size)} "
                f"| {', '.join(map(str, alarms))} | {sum(early)} of {len(early)} "
                f"| {sum(late)} of {len(late)} |",
                flush=True,
            )
    more = (0.0, 0.005, 0.01, 0.02, 0.04)
    print("\n| wrong in all shards |", " | ".join(f"{m:.1%} more" for m in more), "|")
    print("|---" * (1 + len(more)) + "|")
    for base in (0.0, 0.01, 0.02, 0.05, 0.1):
        shares = [f"{power(of, base, extra):.3f}" for extra in more]
        print(f"| {base:.0%} |", " | ".join(shares), "|", flush=True)


if __name__ == "__main__":
    main()
