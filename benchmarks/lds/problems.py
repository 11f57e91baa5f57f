"""Data sets and networks that the linear datamodelling score is measured on."""

import csv
import dataclasses
import gzip
import itertools
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

TRAIN, TEST = 2000, 100

Examples = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A multilayer perceptron on a data set, and how it is trained: by SGD with momentum.

    Attributes:
      about: what it is, in a line.
      examples: from the folder of data: features float32 [n, m] and labels of the training set,
        int64 [n] of classes or float32 [n, 1], and those of the test set.
      widths: of the layers, inputs first.
      rate, momentum, batch, epochs: of the training.
      cosine: whether the rate falls to zero along half a cosine, instead of staying.
    """

    about: str
    examples: Callable[[pathlib.Path], Examples]
    widths: tuple[int, ...]
    rate: float
    epochs: int
    momentum: float = 0.9
    batch: int = 64
    cosine: bool = False

    @property
    def regression(self) -> bool:
        return self.widths[-1] == 1


def fashion(data: pathlib.Path, first: int = 0, first_test: int = 0) -> Examples:
    """Images of Fashion-MNIST."""
    with np.load(data / "fashion_mnist.npz") as arrays:
        mine, asked = slice(first, first + TRAIN), slice(first_test, first_test + TEST)
        x, y = arrays["x_train"][mine], arrays["y_train"][mine]
        x_test, y_test = arrays["x_test"][asked], arrays["y_test"][asked]
    flat = [a.reshape(len(a), -1).astype(np.float32) / 255 for a in (x, x_test)]
    return flat[0], y.astype(np.int64), flat[1], y_test.astype(np.int64)


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


PROBLEMS = {
    "fashion": Problem("Fashion-MNIST, 15 epochs", fashion, (784, 128, 64, 10), 0.01, 15),
    "fashion_long": Problem(
        "Fashion-MNIST, five times the rate, 20 epochs", fashion, (784, 128, 64, 10), 0.05, 20
    ),
    "fashion_cosine": Problem(
        "Fashion-MNIST, rate falling from 0.02 to 0",
        fashion,
        (784, 128, 64, 10),
        0.02,
        15,
        cosine=True,
    ),
    "housing": Problem("California housing, regression", housing, (8, 64, 64, 1), 0.01, 30),
}


def initial(problem: Problem, models: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Glorot's uniform kernels, and biases of zero: float32 [models, ...] each."""
    found = []
    for m, n in itertools.pairwise(problem.widths):
        limit = np.sqrt(6 / (m + n))
        found.append(rng.uniform(-limit, limit, (models, m, n)).astype(np.float32))
        found.append(np.zeros((models, 1, n), np.float32))
    return found


def forward(weights: list, x: tf.Tensor) -> tf.Tensor:
    """Outputs [models, n, k] of inputs [models, n, m]."""
    for i in range(0, len(weights), 2):
        x = tf.matmul(x, weights[i]) + weights[i + 1]
        x = tf.nn.relu(x) if i + 2 < len(weights) else x
    return x


def loss_of(labels: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    """Cross-entropy or squared error: [models, n]."""
    if outputs.shape[-1] == 1:
        return tf.square(outputs[..., 0] - labels[..., 0])
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)


def losses(weights: list, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 [models, n] of the examples at networks side by side."""
    models = len(weights[0])
    outputs = forward(weights, tf.constant(np.broadcast_to(x, (models, *x.shape))))
    found: np.ndarray = loss_of(tf.constant(np.broadcast_to(y, (models, *y.shape))), outputs)
    return np.asarray(found)


def trained(
    problem: Problem, x: np.ndarray, y: np.ndarray, rows: np.ndarray, seed: int
) -> list[tuple[list[np.ndarray], float]]:
    """Weights of networks trained side by side, after every epoch, with the last step's rate.

    Args:
      problem: how.
      x, y: the training set.
      rows: int64 [models, n], which of it each is trained on.
      seed: of initial weights and of the order.
    """
    rng = np.random.default_rng(seed)
    weights = [tf.Variable(w) for w in initial(problem, len(rows), rng)]
    speeds = [tf.Variable(tf.zeros_like(w)) for w in weights]
    inputs, labels = tf.constant(x), tf.constant(y)

    @tf.function(reduce_retracing=True)
    def step(batch: tf.Tensor, rate: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            outputs = forward(weights, tf.gather(inputs, batch))
            each = loss_of(tf.gather(labels, batch), outputs)
            total = tf.reduce_sum(tf.reduce_mean(each, axis=1))
        gradients = tape.gradient(total, weights)
        for weight, speed, gradient in zip(weights, speeds, gradients, strict=True):
            speed.assign(problem.momentum * speed - rate * gradient)
            weight.assign_add(speed)

    steps = problem.epochs * -(-rows.shape[1] // problem.batch)
    found, done, rate = [], 0, problem.rate
    for _ in range(problem.epochs):
        order = np.stack([rng.permutation(own) for own in rows])
        for start in range(0, order.shape[1], problem.batch):
            if problem.cosine:
                rate = problem.rate * 0.5 * (1 + np.cos(np.pi * done / steps))
            step(
                tf.constant(order[:, start : start + problem.batch]), tf.constant(rate, tf.float32)
            )
            done += 1
        found.append(([w.numpy() for w in weights], float(rate)))
    return found
