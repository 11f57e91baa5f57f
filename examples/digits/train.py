"""Trains a small CNN on scikit-learn's digits, some of them labelled wrongly on purpose.

Writes TFRecord shards to OUTPUT/data, checkpoints to OUTPUT/ckpts and the wrong labels to
OUTPUT/flipped.json.
"""

import argparse
import json
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits
from task import build_model, parse, task

import tracin_beam

SEED = 7
TEST_EXAMPLES = 60
FLIPPED = 0.05  # of the training labels
EPOCHS = 10
BATCH_SIZE = 32


def flip_labels(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gives FLIPPED of the labels another class; returns all labels and which were flipped."""
    flipped = np.sort(rng.choice(len(labels), round(FLIPPED * len(labels)), replace=False))
    given = labels.copy()
    given[flipped] = (labels[flipped] + rng.integers(1, 10, len(flipped))) % 10
    return given, flipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart"))
    output = parser.parse_args().output
    (output / "data").mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(SEED)
    rng = np.random.default_rng(SEED)

    digits = load_digits()
    order = rng.permutation(len(digits.images))
    images = (digits.images[order, :, :, None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    test_images, test_labels = images[:TEST_EXAMPLES], labels[:TEST_EXAMPLES]
    images, true_labels = images[TEST_EXAMPLES:], labels[TEST_EXAMPLES:]
    labels, flipped = flip_labels(true_labels, rng)

    def write(side: str, x: np.ndarray, y: np.ndarray, shards: int) -> list[str]:
        ids = [f"{side}-{number:04d}" for number in range(len(x))]
        written = tracin_beam.write_shards(
            {"features": x, "label": y, "id": np.array(ids)},
            str(output / "data" / f"{side}-*.tfrecord"),
            shards=shards,
        )
        assert written == parse, f"task.py should have: parse = {written}"
        return ids

    ids = write("train", images, labels, shards=4)
    write("test", test_images, test_labels, shards=1)
    record = {
        "seed": SEED,
        "flipped": [
            {"id": ids[i], "true_label": int(true_labels[i]), "given_label": int(labels[i])}
            for i in flipped
        ],
    }
    (output / "flipped.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{len(ids)} training examples, {len(flipped)} of them with a wrong label on purpose.")

    model = build_model()
    model.compile(keras.optimizers.SGD(0.1), task.loss, metrics=["accuracy"])
    steps_per_epoch = -(-len(images) // BATCH_SIZE)
    model.fit(
        images,
        labels,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        verbose=2,
        callbacks=[
            tracin_beam.TracInCheckpoint(str(output / "ckpts"), save_freq=2 * steps_per_epoch)
        ],
    )
    _, accuracy = model.evaluate(test_images, test_labels, verbose=0)
    print(f"Accuracy on the {len(test_images)} test examples: {accuracy:.1%}")


if __name__ == "__main__":
    main()
