"""How often do a night's gates raise a false alarm, and do they see a bad shard? On Fashion-MNIST.

    python nights.py [--data ../../shared/data]

A network is trained on the first 10,000 examples. Of the other 60,000, in a random order, two
shards arrive on each of up to thirty nights. Scores are those of a leave-one-out ridge on the
network's last hidden layer at an early checkpoint, averaged with its probabilities,
(2 mean q + mean p) / 3. All gates are the defaults. In a second run of each night one per cent of
the labels of one new shard have another class, drawn at random, and the night should raise an
alarm.
"""

import argparse
import pathlib

import keras
import numpy as np
import pyarrow as pa

from tracin_beam.signals import gates, nights

TRAINED, SEEDS, CLASSES = 10_000, 2, 10
SUSPECT = 0.9  # of a mislabel score


def network(x: np.ndarray, y: np.ndarray) -> keras.Model:
    """784-128-64-10 after two epochs, its half of four."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(128, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=64, epochs=2, verbose=0)
    return model


def scores(phi: np.ndarray, p: np.ndarray, y: np.ndarray, sums: tuple) -> np.ndarray:
    """Mislabel scores [n] of some rows, whose own part is in the sums (G, R)."""
    gram, targets = sums
    lam = 0.01 * np.trace(gram) / len(gram)
    inverse = np.linalg.inv(gram + lam * np.eye(len(gram)))
    one_hot = np.eye(CLASSES)[y]
    leverage = np.einsum("nd,de,ne->n", phi, inverse, phi)[:, None]
    out = (phi @ (inverse @ targets) - leverage * one_hot) / (1 - leverage)
    q = np.exp(5 * (out - out.max(axis=1, keepdims=True)))
    q /= q.sum(axis=1, keepdims=True)
    return 1 - ((2 * q + p) / 3)[np.arange(len(y)), y]


def table(score: np.ndarray, p: np.ndarray, y: np.ndarray, cohort: str) -> pa.Table:
    """The columns of `signals.parquet` that metrics are made from."""
    return pa.table(
        {
            "label": y.astype(float),
            "prediction": p.argmax(axis=1).astype(float),
            "loss": -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)),
            "mislabel_score": score,
            "cohort": [cohort] * len(y),
        }
    )


def suspects(shards: dict[str, np.ndarray], labels: dict, first: dict, date: str) -> pa.Table:
    """The columns of `suspects.parquet` that metrics are made from."""
    rows: dict[str, list] = {n: [] for n in ("id", "kind", "label", "shard", "first_seen")}
    for shard, score in shards.items():
        for i in np.flatnonzero(score > SUSPECT):
            identity = f"{shard}#{i}"
            rows["id"].append(identity)
            rows["kind"].append("mislabelled")
            rows["label"].append(float(labels[shard][i]))
            rows["shard"].append(shard)
            rows["first_seen"].append(first.setdefault(identity, date))
    types = {"label": pa.float64()}
    return pa.table({n: pa.array(v, types.get(n, pa.string())) for n, v in rows.items()})


def sums_of(phi: np.ndarray, y: np.ndarray) -> tuple:
    return phi.T @ phi, phi.T @ np.eye(CLASSES)[y]


def simulate(phi: np.ndarray, p: np.ndarray, y: np.ndarray, size: int, seed: int, told: bool):
    """Nights with an alarm, and nights on which the bad shard was seen."""
    rng = np.random.default_rng(seed)
    order = TRAINED + rng.permutation(len(y) - TRAINED)
    conditions = gates.parse_all(None, ())
    whole = sums_of(phi[:TRAINED], y[:TRAINED])
    summaries, score, labels, first, history = {}, {}, {}, {}, []
    for k in range(10 if told else 0):  # the shards that were trained on
        rows = slice(k * 1000, (k + 1) * 1000)
        name = f"trained-{k}"
        score[name], labels[name] = scores(phi[rows], p[rows], y[rows], whole), y[rows]
        summaries[name] = nights.summary(table(score[name], p[rows], y[rows], "trained"), True)
    cohort = "new" if told else "unknown"
    false_alarms, seen = [], []
    for night in range(_nights(size)):
        date = f"{night:02d}"
        arrivals = [order[(2 * night + k) * size : (2 * night + k + 1) * size] for k in range(2)]
        for bad in (True, False):
            given = [y[rows].copy() for rows in arrivals]
            if bad:
                flips = rng.choice(size, size // 100, replace=False)
                given[0][flips] = (given[0][flips] + rng.integers(1, CLASSES, len(flips))) % CLASSES
            parts = [sums_of(phi[r], g) for r, g in zip(arrivals, given, strict=True)]
            now = (whole[0] + sum(a for a, _ in parts), whole[1] + sum(b for _, b in parts))
            tonight, tonight_score, tonight_labels = dict(summaries), dict(score), dict(labels)
            for k, (rows, g) in enumerate(zip(arrivals, given, strict=True)):
                name = f"{date}-{k}"
                tonight_score[name], tonight_labels[name] = scores(phi[rows], p[rows], g, now), g
                tonight[name] = nights.summary(table(tonight_score[name], p[rows], g, cohort), True)
            found = suspects(tonight_score, tonight_labels, dict(first) if bad else first, date)
            made = nights.metrics_of(date, tonight, found, history)
            alarm = any(r["fired"] for r in gates.evaluate(conditions, made, history))
            (seen if bad else false_alarms).append(alarm)
        whole, summaries, score, labels = now, tonight, tonight_score, tonight_labels
        history.append(made)
    return false_alarms, seen


def _nights(size: int) -> int:
    """Nights on which two shards can arrive."""
    return min(30, 60_000 // (2 * size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../../shared/data"))
    data = np.load(parser.parse_args().data / "fashion_mnist.npz")
    x = np.concatenate([data["x_train"], data["x_test"]]).reshape(-1, 784).astype(np.float32) / 255
    y = np.concatenate([data["y_train"], data["y_test"]]).astype(int)
    model = network(x[:TRAINED], y[:TRAINED])
    p = model.predict(x, batch_size=4096, verbose=0).astype(np.float64)
    hidden = keras.Model(model.inputs, model.layers[-1].input)
    phi = hidden.predict(x, batch_size=4096, verbose=0).astype(np.float64)
    phi = np.concatenate([phi - phi[:TRAINED].mean(axis=0), np.ones((len(phi), 1))], axis=1)
    print("| cohorts | examples in a shard | nights | false alarms by run | bad shards seen |")
    print("|---|---|---|---|---|")
    for told in (True, False):
        for size in (1000, 2500, 5000):
            runs = [simulate(phi, p, y, size, seed, told) for seed in range(SEEDS)]
            alarms = [sum(false) for false, _ in runs]
            seen = [s for _, found in runs for s in found]
            print(
                f"| {'known' if told else 'not known'} | {size} | {SEEDS} × {_nights(size)} "
                f"| {', '.join(map(str, alarms))} | {sum(seen)} of {len(seen)} |"
            )


if __name__ == "__main__":
    main()
