"""Files of arrays, read by NumPy itself."""

import numpy as np
import pytest

from tracin_beam.storage import arrays, files


def test_what_is_written_is_read(tmp_path):
    path = str(tmp_path / "one.npz")
    named = {"a": np.arange(6.0).reshape(2, 3), "b/c": np.array(7)}
    stamp = arrays.write(path, named)
    assert files.stamp(path) == stamp
    with np.load(path) as stored:
        assert set(stored.files) == set(named)
    for name, value in arrays.read(path).items():
        np.testing.assert_array_equal(value, named[name])


def test_no_pickles(tmp_path):
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        arrays.write(str(tmp_path / "one.npz"), {"a": np.array([{}])})
    assert not list(tmp_path.iterdir())
