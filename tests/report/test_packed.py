"""What a page's script unpacks."""

import base64
import gzip
import json
import struct

import numpy as np
import pytest

from tracin_beam.report import packed


def test_arrays_come_back():
    arrays = {
        "a": np.array([1, 2, 3], np.uint8),
        "b": np.array([0.1, np.nan]),
        "c": np.arange(3, dtype=np.int32),
    }
    whole = gzip.decompress(base64.b64decode(packed.pack({"x": "é</script>"}, arrays)))
    (length,) = struct.unpack("<I", whole[:4])
    header = json.loads(whole[4 : 4 + length])
    assert header["x"] == "é</script>"
    for name, (dtype, start, size) in header["arrays"].items():
        assert start % 8 == 0
        there = np.frombuffer(whole, dtype, size, 4 + length + start)
        np.testing.assert_array_equal(there, arrays[name])


def test_text_is_ascii_of_base64():
    assert set(packed.pack({"x": "<&'\"" * 100}, {})) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
    )


def test_refuses_other_types():
    with pytest.raises(ValueError, match="int64"):
        packed.pack({}, {"a": np.arange(2)})


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e9, 1e300])
def test_halves_keep_three_digits_of_any_size(scale):
    values = np.array([1.0, -0.37, 0.001, np.nan, np.inf, 0.0]) * scale
    halves, factor = packed.halves(values)
    back = halves.astype(np.float64) * factor
    np.testing.assert_allclose(back[:3], values[:3], rtol=5e-4)
    assert np.isnan(back[3:5]).all()
    assert back[5] == 0


def test_halves_of_nothing():
    assert packed.halves(np.array([np.nan]))[1] == 1
