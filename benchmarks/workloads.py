"""Real data and models really trained on it, for benchmarks; trained once and kept."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import keras
import models
import numpy as np
import pandas as pd
import tensorflow as tf

from tracin_beam import Task
from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.gradients.engine import Engine, EngineConfig

CLASSES = {"mlp": 10, "resnet20": 10, "transformer": 4}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A trained model and its data.

    Attributes:
      name: of the model.
      train, test: (features, labels).
      values: weights at one checkpoint, after half of the training, by variable.
    """

    name: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    values: list[tf.Tensor]

    def task(self) -> Task:
        """The task, whose records are row numbers: the training set's, then the test set's."""
        features = tf.constant(np.concatenate([self.train[0], self.test[0]]))
        labels = tf.constant(np.concatenate([self.train[1], self.test[1]]))

        def parse(serialised: tf.Tensor) -> dict[str, tf.Tensor]:
            row = tf.strings.to_number(serialised, tf.int32)
            return {"features": tf.gather(features, row), "label": tf.gather(labels, row)}

        return Task(models.MODELS[self.name], LOSS, parse)

    def engine(self, **config: Any) -> tuple[Engine, Batch, Batch]:
        """An engine, and the training and test examples as batches."""
        task = self.task()
        parser = BatchParser(task)
        rows = [str(i).encode() for i in range(len(self.train[1]) + len(self.test[1]))]
        everything = parser(rows)
        count = len(self.train[1])
        engine = Engine(task, EngineConfig(**config), parser, everything.take([0]))
        return engine, everything.take(range(count)), everything.take(range(count, len(rows)))


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load(name: str, data: pathlib.Path, train: int, test: int) -> Workload:
    """Trains a model, or takes it from the cache, and cuts examples for a benchmark.

    Args:
      name: mlp (Fashion-MNIST), resnet20 (CIFAR-10) or transformer (AG News).
      data: folder of the data sets.
      train, test: numbers of examples.
    """
    (x, y), (x_test, y_test) = {"mlp": _fashion, "resnet20": _cifar, "transformer": _news}[name](
        data
    )
    cached = pathlib.Path(tempfile.gettempdir()) / f"tracin-benchmark-{name}.weights.h5"
    keras.utils.set_random_seed(0)
    model = models.MODELS[name]()
    if not cached.exists():
        if name == "transformer":
            optimizer, epochs, size = keras.optimizers.Adam(3e-4), 1, 16
        else:
            optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
            epochs, size = {"mlp": 2, "resnet20": 8}[name], 64
        model.compile(optimizer, LOSS, metrics=["accuracy"])
        model.fit(x, y, batch_size=size, epochs=epochs, verbose=2, validation_data=(x_test, y_test))
        model.save_weights(cached)
    model.load_weights(cached)
    values = [tf.identity(v.value) for v in model.variables]
    return Workload(name, (x[:train], y[:train]), (x_test[:test], y_test[:test]), values)


Split = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _fashion(data: pathlib.Path) -> Split:
    with np.load(data / "fashion_mnist.npz") as arrays:
        images = [arrays[f"x_{part}"] for part in ("train", "test")]
        labels = [arrays[f"y_{part}"].astype("int64") for part in ("train", "test")]
    flat = [x.reshape(len(x), -1).astype("float32") / 255 for x in images]
    return (flat[0], labels[0]), (flat[1], labels[1])


def _cifar(data: pathlib.Path) -> Split:
    with np.load(data / "cifar10_first4000_lossless.npz") as arrays:
        x = (arrays["x_train"].astype("float32") - 120) / 64
        y = arrays["y_train"].astype("int64")
    return (x[:3500], y[:3500]), (x[3500:], y[3500:])


def _news(data: pathlib.Path) -> Split:
    table = pd.read_parquet(data / "ag_news_partial.parquet")
    words = table["text"].str.lower().str.findall(r"[a-z0-9]+")
    ids = np.zeros((len(table), 128), np.int32)
    for row, found in enumerate(words):
        hashed = [hash_word(word) for word in found[:128]]
        ids[row, : len(hashed)] = hashed
    label = table["label"].to_numpy().astype("int64")
    test = (table["split"] == "test").to_numpy()
    order = np.random.default_rng(0).permutation(int((~test).sum()))
    return (ids[~test][order], label[~test][order]), (ids[test], label[test])


def hash_word(word: str) -> int:
    """A word's id in a vocabulary of 8192 buckets; 0 is for padding."""
    value = 0
    for byte in word.encode():
        value = (value * 257 + byte) % 1_000_003
    return value % 8191 + 1
