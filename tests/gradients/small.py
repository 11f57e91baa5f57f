"""Small data of which many tests' models are made, and the comparison with the oracle."""

import keras
import numpy as np
from oracle import check_model

N = 6
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rng = np.random.default_rng(0)
VECTORS = rng.normal(size=(N, 5)).astype("float32")
SEQUENCES = rng.normal(size=(N, 4, 5)).astype("float32")
IDS = rng.integers(0, 11, (N, 4))
IDS[:, -1] = 0
CLASSES = rng.integers(0, 3, N)


def check(build, features=VECTORS, label=CLASSES, loss=CROSSENTROPY, **options):
    """`check_model`, by default of vectors and classes."""
    return check_model(build, features, label, loss, **options)
