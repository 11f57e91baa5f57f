import numpy as np

from tracin_beam.scoring import sketch


def test_inner_products_are_kept_on_average():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 3000)).astype(np.float32)
    b += 0.2 * a
    exact = np.sum(a * b, axis=1)
    found = []
    for seed in range(40):
        x, y = sketch.sketch(a, seed), sketch.sketch(b, seed)
        assert x.shape == (30, sketch.DIM)
        assert x.dtype == np.float32
        found.append(np.sum(x * y, axis=1))
    error = np.array(found) - exact
    spread = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) / np.sqrt(sketch.DIM)
    assert np.abs(error.mean(axis=0) / spread).max() < 4 / np.sqrt(40)
    assert 0.7 < np.sqrt(np.mean((error / spread) ** 2)) < 1.3


def test_short_rows_stay():
    rows = np.ones((2, sketch.DIM), np.float32)
    assert sketch.sketch(rows) is rows
