"""Clusters of handwritten digits, some of them labelled wrongly on purpose.

A small CNN learns scikit-learn's digits, a twentieth of them with a wrong label. `cluster` groups
the training examples by the directions of their gradients: those whose label contradicts what the
model sees pull it the same way, and come together.
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import tracin_beam

WRONG = 0.05  # of the labels
EPOCHS = 10
BATCH_SIZE = 32

parse = tracin_beam.Parser(features=((8, 8, 1), "float32"), label=((), "int64"))


def build_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10),
        ]
    )


task = tracin_beam.Task(
    build_model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), parse
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, default=30)
    parser.add_argument("--examples", type=int, default=1797)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    digits = load_digits()
    images = (digits.images[: args.examples, :, :, None] / 16).astype(np.float32)
    labels = digits.target[: args.examples].astype(np.int64)
    wrong = rng.random(len(labels)) < WRONG
    given = np.where(wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)

    with tempfile.TemporaryDirectory() as folder:
        shards = str(Path(folder, "train-*.tfrecord"))
        tracin_beam.write_shards({"features": images, "label": given}, shards)
        model = build_model()
        model.compile(keras.optimizers.SGD(0.1), task.loss)
        callback = tracin_beam.TracInCheckpoint(
            f"{folder}/ckpts", save_freq=2 * -(-len(images) // BATCH_SIZE)
        )
        model.fit(
            images, given, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0, callbacks=[callback]
        )
        found = tracin_beam.cluster(
            task,
            checkpoints=f"{folder}/ckpts",
            train=shards,
            output=f"{folder}/out",
            clusters=args.clusters,
            cluster_by="direction",
        )
        rows = found.table("arrow").sort_by([("shard", "ascending"), ("position", "ascending")])
    cluster = rows["cluster"].to_numpy()
    size = np.bincount(cluster, minlength=args.clusters)
    errors = np.bincount(cluster[wrong], minlength=args.clusters)
    share = errors / np.maximum(size, 1)

    print(f"\n{wrong.sum()} of {len(wrong)} labels are wrong. The clusters with most of them:")
    print("examples   wrong   digits, and the labels they were given")
    order = np.argsort(-share, kind="stable")
    for k in order[:8]:
        mine = cluster == k
        seen = [
            ", ".join(f"{digit} × {count}" for digit, count in _most(values[mine]))
            for values in (labels, given)
        ]
        print(f"{size[k]:8}{share[k]:8.0%}   {seen[0]}; labelled {seen[1]}")
    looked = np.cumsum(size[order])
    first = looked <= 0.2 * len(wrong)
    caught = errors[order][first].sum() / max(1, wrong.sum())
    print(
        f"The first {first.sum()} clusters hold {looked[first].max(initial=0) / len(wrong):.0%} of "
        f"the examples and {caught:.0%} of the wrong labels."
    )


def _most(values: np.ndarray) -> list[tuple[int, int]]:
    """The two most frequent values, with how many there are."""
    counts = np.bincount(values)
    return [(int(v), int(counts[v])) for v in np.argsort(-counts, kind="stable")[:2] if counts[v]]


if __name__ == "__main__":
    main()
