"""Data sets and networks that the linear datamodelling score is measured on."""

import collections
import csv
import dataclasses
import functools
import gzip
import pathlib
import re
from collections.abc import Callable, Iterator

import keras
import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf

import tracin_beam

TRAIN, TEST = 2000, 100
WORDS, LENGTH = 2000, 32

Examples = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Weights = list[np.ndarray]


def fashion(data: pathlib.Path, first: int = 0, first_test: int = 0) -> Examples:
    """Images of Fashion-MNIST: 28×28×1, from 0 to 1."""
    with np.load(data / "fashion_mnist.npz") as arrays:
        mine, asked = slice(first, first + TRAIN), slice(first_test, first_test + TEST)
        x, y = arrays["x_train"][mine], arrays["y_train"][mine]
        x_test, y_test = arrays["x_test"][asked], arrays["y_test"][asked]
    x, x_test = (a[..., None].astype(np.float32) / 255 for a in (x, x_test))
    return x, y.astype(np.int64), x_test, y_test.astype(np.int64)


def cifar(data: pathlib.Path, first: int = 0) -> Examples:
    """Images of CIFAR-10: 32×32×3, from -1 to 1."""
    with np.load(data / "cifar10_first4000_lossless.npz") as arrays:
        x = arrays["x_train"].astype(np.float32) / 127.5 - 1
        y = arrays["y_train"].astype(np.int64)
    mine, asked = slice(first, first + TRAIN), slice(len(x) - TEST, len(x))
    return x[mine], y[mine], x[asked], y[asked]


def digits(data: pathlib.Path) -> Examples:
    """Handwritten digits of scikit-learn: 64 numbers, from 0 to 1; 1,600 to train on."""
    del data
    import sklearn.datasets

    x, y = sklearn.datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32) / 16, y[order].astype(np.int64)
    mine = slice(TEST, TEST + 1600)
    return x[mine], y[mine], x[:TEST], y[:TEST]


def news(data: pathlib.Path) -> Examples:
    """The first words of AG News, numbered by how often the training set has them; 0 is none."""
    rows = pq.read_table(data / "ag_news_partial.parquet")
    order = np.random.default_rng(0).permutation(rows.num_rows)[: TRAIN + TEST]
    texts = [rows["text"][int(i)].as_py().lower() for i in order]
    split = [re.findall(r"[a-z]+", text)[:LENGTH] for text in texts]
    counts = collections.Counter(word for words in split[:TRAIN] for word in words)
    numbers = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(WORDS - 2))}
    x = np.zeros((len(split), LENGTH), np.int32)
    for row, words in zip(x, split, strict=True):
        row[: len(words)] = [numbers.get(word, 1) for word in words]
    y = rows["label"].to_numpy()[order].astype(np.int64)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def housing(data: pathlib.Path) -> Examples:
    """Districts of California, standardised, and the logarithm of the value of a house."""
    with gzip.open(data / "california_housing.csv.gz", "rt") as lines:
        rows = list(csv.reader(lines))[1:]
    numbers = np.array([row[:9] for row in rows if all(row[:9])], np.float64)
    numbers = np.random.default_rng(0).permutation(numbers)[: TRAIN + TEST]
    x, y = numbers[:, :8], np.log(numbers[:, 8:])
    x[:, 3:7] = np.log1p(x[:, 3:7])
    x, y = ((a - a[:TRAIN].mean(0)) / a[:TRAIN].std(0) for a in (x, y))
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def perceptron(shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> keras.Model:
    """Dense layers after one another."""
    layers = [keras.layers.Dense(n, activation="relu") for n in hidden]
    ends = [keras.layers.Flatten(), *layers, keras.layers.Dense(outputs)]
    return keras.Sequential([keras.Input(shape), *ends])


def convolutions() -> keras.Model:
    """Two convolutions and a dense layer."""
    kinds = functools.partial(keras.layers.Conv2D, kernel_size=3, strides=2, activation="relu")
    layers = [kinds(16, padding="same"), kinds(32, padding="same"), keras.layers.Flatten()]
    return keras.Sequential([keras.Input((28, 28, 1)), *layers, keras.layers.Dense(10)])


def residual() -> keras.Model:
    """A residual network of seven convolutions with batch normalization (He et al. 2016)."""

    def normalized(x: keras.KerasTensor, width: int, size: int, stride: int) -> keras.KerasTensor:
        x = keras.layers.Conv2D(width, size, stride, padding="same", use_bias=False)(x)
        # The default momentum of 0.99 would not follow so short a training.
        return keras.layers.BatchNormalization(momentum=0.9)(x)

    image = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(normalized(image, 8, 3, 2))
    for width in (16, 32):
        short = normalized(x, width, 1, 2)
        x = keras.layers.ReLU()(normalized(x, width, 3, 2))
        x = keras.layers.ReLU()(keras.layers.Add()([short, normalized(x, width, 3, 1)]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(10)(x))


def attention() -> keras.Model:
    """One block of attention over words and their places, and the mean over places."""
    words = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(WORDS, 32)(words)
    own = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(2, 16)(own, own)
    own = keras.layers.Dense(64, activation="relu")(keras.layers.LayerNormalization()(x))
    x = keras.layers.GlobalAveragePooling1D()(x + keras.layers.Dense(32)(own))
    return keras.Model(words, keras.layers.Dense(4)(x))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network on a data set, and how it is trained: by SGD with momentum.

    Attributes:
      about: what it is, in a line.
      examples: from the folder of data: features [n, ...] and labels of the training set,
        int64 [n] of classes or float32 [n, 1], and those of the test set.
      build: the network.
      rate, momentum, batch, epochs: of the training.
      cosine: whether the rate falls to zero along half a cosine, instead of staying.
    """

    about: str
    examples: Callable[[pathlib.Path], Examples]
    build: Callable[[], keras.Model]
    rate: float
    epochs: int
    momentum: float = 0.9
    batch: int = 64
    cosine: bool = False

    def task(self) -> tracin_beam.Task:
        model = self.build()
        inputs = model.inputs[0]
        number = model.output_shape[-1] == 1
        loss: Callable[[], keras.losses.Loss] = keras.losses.MeanSquaredError
        if not number:
            loss = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
        features = (tuple(inputs.shape[1:]), inputs.dtype)
        label = ((1,), "float32") if number else ((), "int64")
        parse = tracin_beam.Parser(features=features, label=label)
        return tracin_beam.Task(self.build, loss(), parse)


IMAGES = functools.partial(perceptron, (28, 28, 1), (128, 64), 10)
PROBLEMS = {
    "fashion": Problem("Fashion-MNIST, perceptron", fashion, IMAGES, 0.01, 15),
    "fashion_long": Problem(
        "Fashion-MNIST, perceptron, five times the rate, 20 epochs", fashion, IMAGES, 0.05, 20
    ),
    "fashion_cosine": Problem(
        "Fashion-MNIST, perceptron, rate falling from 0.02 to 0",
        fashion,
        IMAGES,
        0.02,
        15,
        cosine=True,
    ),
    "convolutions": Problem("Fashion-MNIST, convolutions", fashion, convolutions, 0.01, 15),
    "residual": Problem(
        "CIFAR-10, residual network, rate falling to 0", cifar, residual, 0.03, 8, cosine=True
    ),
    "attention": Problem("AG News, attention", news, attention, 0.02, 5),
    "housing": Problem(
        "California housing, regression",
        housing,
        functools.partial(perceptron, (8,), (64, 64), 1),
        0.01,
        30,
    ),
    "digits": Problem(
        "Digits of scikit-learn, perceptron",
        digits,
        functools.partial(perceptron, (64,), (64, 32), 10),
        0.02,
        15,
    ),
}


def loss_of(labels: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Cross-entropy or squared error: [n]."""
    if outputs.shape[-1] == 1:
        return tf.square(outputs[:, 0] - labels[:, 0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)


class Trainer:
    """Trains a problem's network on one subset of its training set after another."""

    def __init__(self, problem: Problem, x: np.ndarray, y: np.ndarray) -> None:
        self.problem = problem
        self.model = problem.build()
        self.inputs, self.labels = tf.constant(x), tf.constant(y)
        weights = self.model.trainable_variables
        speeds = [tf.Variable(tf.zeros_like(w.value)) for w in weights]
        self._speeds = speeds

        @tf.function(reduce_retracing=True)
        def step(batch: tf.Tensor, rate: tf.Tensor) -> None:
            with tf.GradientTape() as tape:
                outputs = self.model(tf.gather(self.inputs, batch), training=True)
                loss = tf.reduce_mean(loss_of(tf.gather(self.labels, batch), outputs))
            for weight, speed, gradient in zip(
                weights, speeds, tape.gradient(loss, [w.value for w in weights]), strict=True
            ):
                speed.assign(problem.momentum * speed - rate * tf.convert_to_tensor(gradient))
                weight.assign_add(speed)

        self._step = step
        self._outputs = tf.function(lambda x: self.model(x, training=False), reduce_retracing=True)

    def train(self, rows: np.ndarray, seed: int) -> Iterator[tuple[Weights, float]]:
        """Weights after every epoch, and the last step's rate.

        Args:
          rows: int64 [n], which of the training set the network is trained on.
          seed: of initial weights and of the order.
        """
        problem, rng = self.problem, np.random.default_rng(seed)
        keras.utils.set_random_seed(seed)
        self.model.set_weights(problem.build().get_weights())
        for speed in self._speeds:
            speed.assign(tf.zeros_like(speed))
        steps = problem.epochs * -(-len(rows) // problem.batch)
        done, rate = 0, problem.rate
        for _ in range(problem.epochs):
            order = rng.permutation(rows)
            for start in range(0, len(order), problem.batch):
                if problem.cosine:
                    rate = problem.rate * 0.5 * (1 + np.cos(np.pi * done / steps))
                batch = tf.constant(order[start : start + problem.batch])
                self._step(batch, tf.constant(rate, tf.float32))
                done += 1
            yield self.model.get_weights(), float(rate)

    def losses(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """float32 [n] of examples at the network as it is."""
        return np.asarray(loss_of(tf.constant(y), self._outputs(tf.constant(x))))
