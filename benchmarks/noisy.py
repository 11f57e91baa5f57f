"""Data sets with wrong labels planted in them, and an ordinary network for each of them."""

import dataclasses
import functools
import pathlib
import re
import zlib
from collections.abc import Callable

import keras
import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer, make_classification
from sklearn.neighbors import NearestNeighbors

layers = keras.layers

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
MEAN_SQUARES = keras.losses.MeanSquaredError()
_WORDS, _LENGTH = 8192, 64
_TEST = 2000  # images and rows of houses that are held out


@dataclasses.dataclass(frozen=True)
class Problem:
    """A training set of which some labels are wrong, and how a network is trained on it.

    Attributes:
      x: the examples [n, ...].
      true: their labels [n], class numbers or targets of a regression.
      given: those that are trained on.
      x_test, y_test: held out, with true labels.
      build: makes the network, whose outputs are logits, or one number.
      epochs, batch: of its training.
      every: after how many epochs a checkpoint is saved.
    """

    x: np.ndarray
    true: np.ndarray
    given: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    build: Callable[[], keras.Model]
    epochs: int
    batch: int
    every: int

    @property
    def wrong(self) -> np.ndarray:
        """Which labels are wrong: bool [n]."""
        return self.true != self.given

    @property
    def regression(self) -> bool:
        return self.true.dtype.kind == "f"

    @property
    def loss(self) -> keras.losses.Loss:
        return MEAN_SQUARES if self.regression else CROSS_ENTROPY


def dense(inputs: int, hidden: tuple[int, ...], outputs: int) -> keras.Model:
    """A multilayer perceptron."""
    inner = [layers.Dense(width, activation="relu") for width in hidden]
    return keras.Sequential([keras.Input((inputs,)), *inner, layers.Dense(outputs)])


def convolutions() -> keras.Model:
    """Three convolutions for 32×32×3 images."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def words() -> keras.Model:
    """The mean of embeddings of a text's words, and a hidden layer."""
    return keras.Sequential(
        [
            keras.Input((_LENGTH,), dtype="int32"),
            layers.Embedding(_WORDS, 64),
            layers.GlobalAveragePooling1D(),
            layers.Dense(64, activation="relu"),
            layers.Dense(4),
        ]
    )


def _fashion(data: pathlib.Path, rng: np.random.Generator) -> dict:
    with np.load(data / "fashion_mnist.npz") as arrays:
        x, y = arrays["x_train"], arrays["y_train"]
        x_test, y_test = arrays["x_test"][:_TEST], arrays["y_test"][:_TEST]
    rows = rng.permutation(len(x))[:6000]
    flat = [a.reshape(len(a), -1).astype(np.float32) / 255 for a in (x[rows], x_test)]
    return {"x": flat[0], "true": y[rows], "x_test": flat[1], "y_test": y_test}


def _cifar(data: pathlib.Path, rng: np.random.Generator) -> dict:
    with np.load(data / "cifar10_first4000_lossless.npz") as arrays:
        names = {arrays[name].ndim: name for name in arrays.files}
        x, y = arrays[names[4]].astype(np.float32) / 255, arrays[names[1]]
    rows = rng.permutation(len(x))
    train, test = rows[:3500], rows[3500:]
    return {"x": x[train], "true": y[train], "x_test": x[test], "y_test": y[test]}


def _news(data: pathlib.Path, rng: np.random.Generator) -> dict:
    table = pd.read_parquet(data / "ag_news_partial.parquet")
    x = np.zeros((len(table), _LENGTH), np.int32)
    for row, text in zip(x, table["text"], strict=True):
        numbers = [
            1 + zlib.crc32(word.encode()) % (_WORDS - 1)
            for word in re.findall(r"[a-z0-9]+", text.lower())[:_LENGTH]
        ]
        row[: len(numbers)] = numbers
    y = table["label"].to_numpy()
    train = rng.permutation(np.flatnonzero(table["split"] != "test"))[:6000]
    test = np.flatnonzero(table["split"] == "test")[:_TEST]
    y = y - y.min()
    return {"x": x[train], "true": y[train], "x_test": x[test], "y_test": y[test]}


def _houses(data: pathlib.Path, rng: np.random.Generator) -> dict:
    table = pd.get_dummies(pd.read_csv(data / "california_housing.csv.gz"), dtype=float)
    y = table.pop("median_house_value").to_numpy(np.float32) / 100_000
    x = table.fillna(table.median()).to_numpy()
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    rows = rng.permutation(len(x))
    train, test = rows[:5000], rows[5000 : 5000 + _TEST]
    return {"x": x[train], "true": y[train], "x_test": x[test], "y_test": y[test]}


def _table(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> dict:
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    rows = rng.permutation(len(x))
    train, test = rows[: len(x) * 4 // 5], rows[len(x) * 4 // 5 :]
    return {"x": x[train], "true": y[train], "x_test": x[test], "y_test": y[test]}


def _cancer(data: pathlib.Path, rng: np.random.Generator) -> dict:
    return _table(*load_breast_cancer(return_X_y=True), rng)


def _clusters(data: pathlib.Path, rng: np.random.Generator) -> dict:
    """scikit-learn's clusters in 20 columns, four for each of five classes."""
    options = {"n_informative": 10, "n_classes": 5, "n_clusters_per_class": 4, "flip_y": 0}
    x, y = make_classification(5000, random_state=int(rng.integers(1 << 31)), **options)
    return _table(x, y, rng)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is read and made noisy.

    Attributes:
      read: (folder, generator) → fields of a `Problem`.
      build: makes its network.
      rate: share of the labels that are made wrong.
      confusable: whether to the class that is most like it, instead of any other one.
      epochs, batch: of the network's training.
      every: after how many epochs a checkpoint is saved.
    """

    read: Callable
    build: Callable[[], keras.Model]
    rate: float
    confusable: bool = False
    epochs: int = 8
    batch: int = 64
    every: int = 1


_perceptron = functools.partial(dense, 784, (128, 64), 10)

PROBLEMS = {
    "fashion-10": Recipe(_fashion, _perceptron, 0.1),
    "fashion-20": Recipe(_fashion, _perceptron, 0.2),
    "fashion-10-confusable": Recipe(_fashion, _perceptron, 0.1, confusable=True),
    "fashion-20-confusable": Recipe(_fashion, _perceptron, 0.2, confusable=True),
    "cifar-10": Recipe(_cifar, convolutions, 0.1),
    "news-10": Recipe(_news, words, 0.1),
    "houses-10": Recipe(_houses, functools.partial(dense, 13, (64, 64), 1), 0.1, False, 16, 64, 2),
    "clusters-10": Recipe(
        _clusters, functools.partial(dense, 20, (64, 64), 5), 0.1, False, 40, 64, 4
    ),
    "cancer-10": Recipe(_cancer, functools.partial(dense, 30, (32, 16), 2), 0.1, False, 16, 32, 2),
}


def confusable(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """For each class the other one that most of its examples' nearest neighbours have: [K]."""
    flat = x.reshape(len(x), -1)
    search = NearestNeighbors(n_neighbors=11, algorithm="brute").fit(flat)
    near = y[search.kneighbors(flat, return_distance=False)[:, 1:]]
    counts = np.zeros((y.max() + 1,) * 2)
    np.add.at(counts, (np.repeat(y, near.shape[1]), near.ravel()), 1)
    np.fill_diagonal(counts, -1)
    found: np.ndarray = counts.argmax(axis=1)
    return found


def problem(name: str, seed: int, data: pathlib.Path) -> Problem:
    """A data set with wrong labels; the seed says which examples, and which labels are wrong.

    Of a regression a wrong target is that of another example.
    """
    recipe = PROBLEMS[name]
    rng = np.random.default_rng(seed)
    found = recipe.read(data, rng)
    true = found["true"]
    regression = true.dtype.kind == "f"
    true = true.astype(np.float32 if regression else np.int64)
    given, n = true.copy(), len(true)
    rows = rng.choice(n, round(recipe.rate * n), replace=False)
    if regression:
        given[rows] = true[rng.integers(0, n, len(rows))]
    elif recipe.confusable:
        given[rows] = confusable(found["x"], true)[true[rows]]
    else:
        classes = int(true.max()) + 1
        given[rows] = (true[rows] + rng.integers(1, classes, len(rows))) % classes
    fields = {**found, "true": true, "given": given}
    settings = {name: getattr(recipe, name) for name in ("build", "epochs", "batch", "every")}
    return Problem(**fields, **settings)


@functools.lru_cache(1)
def _compiled(build: Callable[[], keras.Model], regression: bool) -> tuple[keras.Model, list]:
    """A network, and what its optimizer starts from: it is traced once for all trainings."""
    loss = MEAN_SQUARES if regression else CROSS_ENTROPY
    model = build()
    model.compile("adam", loss, jit_compile=False, steps_per_execution=16)
    model.optimizer.build(model.trainable_variables)
    return model, [variable.numpy() for variable in model.optimizer.variables]


def trained(
    of: Problem, x: np.ndarray, y: np.ndarray, seed: int, callbacks: tuple = ()
) -> keras.Model:
    """The problem's network, trained on some examples with Adam; good until the next training."""
    model, start = _compiled(of.build, of.regression)
    keras.utils.set_random_seed(seed)
    model.set_weights(of.build().get_weights())
    for variable, value in zip(model.optimizer.variables, start, strict=True):
        variable.assign(value)
    options = {"epochs": of.epochs, "batch_size": of.batch, "verbose": 0}
    model.fit(x, y, callbacks=list(callbacks), **options)
    return model


def outputs(of: Problem, model: keras.Model, x: np.ndarray) -> np.ndarray:
    """Probabilities [n, K], or the numbers [n] of a regression."""
    found = model.predict(x, batch_size=1024, verbose=0).astype(np.float64)
    if of.regression:
        return found[:, 0]
    grown = np.exp(found - found.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)
