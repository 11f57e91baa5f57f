"""Ground truth of the linear datamodelling score: losses after training on random halves.

    python benchmarks/lds/truth.py --data FOLDER

Writes `truth.npz` beside itself. A multilayer perceptron 784-128-64-10 is trained on each of 50
random halves of 2,000 images of Fashion-MNIST, three times each from other initial weights, with
SGD of momentum 0.9, rate 0.05, batches of 64 and 20 epochs; all networks of a seed at once.
"""

import argparse
import itertools
import pathlib

import numpy as np
import tensorflow as tf

TRAIN, TEST, HALVES, SEEDS = 2000, 100, 50, 3
WIDTHS = (784, 128, 64, 10)
RATE, MOMENTUM, BATCH, EPOCHS = 0.05, 0.9, 64, 20
PATH = pathlib.Path(__file__).with_name("truth.npz")


def examples(data: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, and those of the test set."""
    with np.load(data / "fashion_mnist.npz") as arrays:
        x, y = arrays["x_train"][:TRAIN], arrays["y_train"][:TRAIN]
        x_test, y_test = arrays["x_test"][:TEST], arrays["y_test"][:TEST]
    flat = [a.reshape(len(a), -1).astype(np.float32) / 255 for a in (x, x_test)]
    return flat[0], y.astype(np.int64), flat[1], y_test.astype(np.int64)


def halves(count: int = HALVES, seed: int = 0) -> np.ndarray:
    """Rows of each random half: int64 [count, TRAIN / 2]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.permutation(TRAIN)[: TRAIN // 2]) for _ in range(count)])


def initial(models: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Glorot's uniform kernels, and biases of zero: float32 [models, ...] each."""
    found = []
    for m, n in itertools.pairwise(WIDTHS):
        limit = np.sqrt(6 / (m + n))
        found.append(rng.uniform(-limit, limit, (models, m, n)).astype(np.float32))
        found.append(np.zeros((models, 1, n), np.float32))
    return found


def forward(weights: list, x: tf.Tensor) -> tf.Tensor:
    """Logits [models, n, 10] of inputs [models, n, 784]."""
    for i in range(0, len(weights), 2):
        x = tf.matmul(x, weights[i]) + weights[i + 1]
        x = tf.nn.relu(x) if i + 2 < len(weights) else x
    return x


def trained(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, seed: int, epochs: int = EPOCHS
) -> list[list[np.ndarray]]:
    """Weights of networks trained side by side, after every epoch.

    Args:
      x, y: the training set.
      rows: int64 [models, n], which of it each is trained on.
      seed: of initial weights and of the order.
      epochs: passes.
    """
    rng = np.random.default_rng(seed)
    weights = [tf.Variable(w) for w in initial(len(rows), rng)]
    speeds = [tf.Variable(tf.zeros_like(w)) for w in weights]
    inputs, labels = tf.constant(x), tf.constant(y)

    @tf.function(reduce_retracing=True)
    def step(batch: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            logits = forward(weights, tf.gather(inputs, batch))
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                tf.gather(labels, batch), logits
            )
            total = tf.reduce_sum(tf.reduce_mean(losses, axis=1))
        gradients = tape.gradient(total, weights)
        for weight, speed, gradient in zip(weights, speeds, gradients, strict=True):
            speed.assign(MOMENTUM * speed - RATE * gradient)
            weight.assign_add(speed)

    found = []
    for _ in range(epochs):
        order = np.stack([rng.permutation(own) for own in rows])
        for start in range(0, order.shape[1], BATCH):
            step(tf.constant(order[:, start : start + BATCH]))
        found.append([w.numpy() for w in weights])
    return found


def losses(weights: list, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cross-entropy [models, n] of the test set."""
    models = len(weights[0])
    logits = forward(weights, tf.constant(np.broadcast_to(x, (models, *x.shape))))
    labels = np.broadcast_to(y, (models, len(y)))
    found: np.ndarray = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits).numpy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    x, y, x_test, y_test = examples(parser.parse_args().data)
    rows = halves()
    found = [losses(trained(x, y, rows, 1000 + seed)[-1], x_test, y_test) for seed in range(SEEDS)]
    np.savez_compressed(PATH, losses=np.stack(found).astype(np.float16))
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
