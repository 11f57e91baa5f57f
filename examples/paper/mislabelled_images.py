"""Finding wrong labels among images, the experiment of section 4.1 of the TracIn paper.

A tenth of the labels becomes the class that a first model likes best after the right one. A second
model is trained on them, and its training examples are looked at, the most suspicious first: by
self-influence, as in the paper, by their loss, and by tracin-beam's own mislabel score.
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np

import tracin_beam

WRONG = 0.1  # of the labels
EPOCHS = 10
BATCH_SIZE = 64
INSPECTED = [0.05, 0.1, 0.2, 0.3]

parse = tracin_beam.Parser(features=((28, 28, 1), "float32"), label=((), "int64"))


def build_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, strides=2, activation="relu"),
            layers.Conv2D(32, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


task = tracin_beam.Task(
    build_model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), parse
)


def train(images: np.ndarray, labels: np.ndarray, callbacks: list | None = None) -> keras.Model:
    model = build_model()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), task.loss)
    model.fit(images, labels, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0, callbacks=callbacks)
    return model


def confuse(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives WRONG of the labels the likeliest other class; returns all labels, and which."""
    wrong = np.random.default_rng(seed).random(len(labels)) < WRONG
    logits = train(images, labels).predict(images, verbose=0)
    logits[np.arange(len(labels)), labels] = -np.inf
    return np.where(wrong, logits.argmax(1), labels), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="Fashion-MNIST as .npz; by default Keras downloads it")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data:
        with np.load(args.data) as data:
            images, labels = data["x_train"], data["y_train"]
    else:
        (images, labels), _ = keras.datasets.fashion_mnist.load_data()
    images = images[: args.examples, :, :, None].astype("float32") / 255
    labels = labels[: args.examples].astype("int64")

    keras.utils.set_random_seed(args.seed)
    given, wrong = confuse(images, labels, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        shards = str(Path(folder, "train-*.tfrecord"))
        tracin_beam.write_shards({"features": images, "label": given}, shards)
        every_second = 2 * -(-len(images) // BATCH_SIZE)
        callback = tracin_beam.TracInCheckpoint(f"{folder}/ckpts", save_freq=every_second)
        train(images, given, [callback])
        night = tracin_beam.quality(
            task, checkpoints=f"{folder}/ckpts", train=shards, output=f"{folder}/out"
        )
        rows = night.run.signals().table().sort_values(["shard", "position"])

    print(f"\n{wrong.sum()} of {len(wrong)} labels are wrong. Share of them found:")
    print("looked at       " + "".join(f"{share:>7.0%}" for share in INSPECTED))
    for signal in ["self_influence", "loss", "mislabel_score"]:
        found = wrong[np.argsort(-rows[signal].to_numpy())]
        shares = [found[: round(share * len(found))].sum() / wrong.sum() for share in INSPECTED]
        print(f"{signal:16}" + "".join(f"{share:>7.0%}" for share in shares))
    right = rows["suggested_label"].to_numpy()[wrong] == labels[wrong]
    print(f"The suggested label is the right one for {right.mean():.0%} of the wrong labels.")


if __name__ == "__main__":
    main()
