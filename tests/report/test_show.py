"""What is shown of an example."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tracin_beam.report.show import LONGEST_TEXT, Shown, show_features


def pixels(shown: Shown) -> np.ndarray:
    assert shown.kind == "image"
    prefix = "data:image/png;base64,"
    assert shown.content.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.content.removeprefix(prefix)))))


def serialized(**features: bytes) -> bytes:
    import tensorflow as tf

    return tf.train.Example(
        features=tf.train.Features(
            feature={
                name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for name, value in features.items()
            }
        )
    ).SerializeToString()


class TestShowFeatures:
    @pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3), (8, 9, 4)])
    def test_bytes_are_shown_as_they_are(self, shape):
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        expected = array[..., 0] if shape[2:] == (1,) else array
        np.testing.assert_array_equal(pixels(show_features(array, b"")), expected)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.0, 0.25, 0.5], [0, 64, 128]),  # [0, 1]
            ([-0.5, 0.0, 0.5], [64, 128, 191]),  # [-1, 1]
            ([0.0, 100.0, 200.0], [0, 100, 200]),  # [0, 255]
            ([0.0, 8.0, 16.0], [0, 128, 255]),  # its own range
            ([-2.0, 0.0, 3.0], [0, 102, 255]),
            ([np.nan, 0.5, np.inf], [0, 128, 255]),
            ([5.0, 5.0, 5.0], [0, 0, 0]),
        ],
    )
    def test_floats_are_scaled_by_convention(self, values, expected):
        array = np.resize(np.asarray(values, np.float32), (6, 6, 1))
        np.testing.assert_array_equal(
            pixels(show_features(array, b"")), np.resize(expected, (6, 6))
        )

    def test_a_picture_among_other_features(self):
        features = {"age": np.float32(4), "picture": np.full((5, 5, 1), 7, np.uint8)}
        assert (pixels(show_features(features, b"")) == 7).all()
        assert (pixels(show_features(tuple(features.values()), b"")) == 7).all()

    def test_large_pictures_are_scaled_down_and_small_ones_pixelated(self):
        large = show_features(np.zeros((1000, 500, 3), np.uint8), b"")
        assert pixels(large).shape == (256, 128, 3)
        assert not large.pixelated
        assert show_features(np.zeros((8, 8), np.uint8), b"").pixelated

    @pytest.mark.parametrize("shape", [(3, 8), (8, 8, 2), (4000, 8), (8,), (1, 8, 8, 3)])
    def test_other_shapes_are_not_pictures(self, shape):
        assert show_features(np.zeros(shape), b"").kind == "text"

    def test_strings(self):
        assert show_features(np.asarray(b"caf\xc3\xa9 \xff", object), b"").content == "café \ufffd"
        words = np.asarray([b"one", b"two"], object)
        assert show_features(words, b"").content == "one two"
        features = {"title": np.asarray(b"Storm", object), "year": np.int64(2004)}
        assert show_features(features, b"").content == "title: Storm, year: 2004"

    def test_text_beside_the_features(self):
        raw = serialized(
            id=b"an id that is longer than the text itself",
            image=b"\x89PNG\r\n\x1a\n\0\0\0",
            text="Muddy waters – still".encode(),
        )
        ids = np.asarray([4, 8, 15, 0, 0])
        assert show_features(ids, raw).content == "Muddy waters – still"

    @pytest.mark.parametrize(
        "raw",
        [b"", b"\xff\xfe not an example", serialized(id=b"train-1", x=b"\0\x01\x80?")],
        ids=["empty", "no example", "an example"],
    )
    def test_numbers(self, raw):
        assert show_features(np.asarray([1.23456, 20000.0, 3.0]), raw).content == "1.235 2e+04 3"
        features = {"rooms": np.float64(6.98413), "income": np.asarray([8.25, 1])}
        assert show_features(features, raw).content == "rooms: 6.984, income: 8.25 1"
        assert show_features(np.zeros((1, 2)), raw).content == "[1×2] 0 0"

    def test_long_content_is_cut(self):
        for features in (np.zeros(100_000), np.asarray(b"word " * 1000, object)):
            content = show_features(features, b"").content
            assert len(content) <= LONGEST_TEXT
            assert content.endswith("…")

    def test_control_characters_are_replaced(self):
        text = np.asarray(b"a\0b\x1b[31mc\nd", object)
        assert show_features(text, b"").content == "a\ufffdb\ufffd[31mc\nd"
