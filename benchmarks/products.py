"""Why the bare pass of a small model is slow: the rate of its matrix products by batch size.

    python products.py

The first layer of the MLP, forward (x W) and backward (xᵀ g), by TensorFlow, by TensorFlow
compiled with XLA, and by NumPy's BLAS, which shows what the machine can do. Medians; NumPy by
itself, as its threads keep the cores busy for a while after each product.
"""

import functools
import time

import tensorflow as tf
from engine import medians


def product(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    return tf.matmul(x, y)


def main() -> None:
    compiled = tf.function(product, jit_compile=True)
    plain = tf.function(product)
    print("| batch | product | TensorFlow, GFLOP/s | with XLA | NumPy |\n|---|---|---|---|---|")
    for batch in (64, 256, 1024, 4096):
        x, w = tf.random.normal([batch, 784]), tf.random.normal([784, 512])
        turned, g = tf.transpose(x), tf.random.normal([batch, 512])
        for label, left, right in (("forward", x, w), ("backward", turned, g)):
            arrays = left.numpy(), right.numpy()
            ways = {
                "plain": lambda a=left, b=right: plain(a, b)[0, 0].numpy(),
                "compiled": lambda a=left, b=right: compiled(a, b)[0, 0].numpy(),
            }
            alone = {"numpy": functools.partial(arrays[0].__matmul__, arrays[1])}
            taken = medians(ways, 41) | medians(alone, 41)
            operations = 2 * batch * 784 * 512
            rates = [f"{operations / seconds / 1e9:.0f}" for seconds in taken.values()]
            time.sleep(0.5)
            print(f"| {batch} | {label} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
