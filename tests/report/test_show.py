"""What is shown of an example."""

import base64
import io
import wave

import numpy as np
import pytest
from PIL import Image

from tracin_beam.report.show import LONGEST_TEXT, MOST_FEATURES, Shown, show_example, show_features


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
        assert show_features(np.zeros(shape), b"").kind == "features"

    def test_strings(self):
        assert show_features(np.asarray(b"caf\xc3\xa9 \xff", object), b"").content == "café \ufffd"
        words = np.asarray([b"one", b"two"], object)
        assert show_features(words, b"").content == "one two"
        review = np.asarray(b"Good.<br /><br />Bad. <BR>x", object)
        assert show_features(review, b"").content == "Good.\n\nBad.\nx"
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
        assert show_features(np.asarray([1.23456, 20000.0, 3.0]), raw).value == (
            ("0", "1.235"),
            ("1", "2e+04"),
            ("2", "3"),
        )
        features = {"rooms": np.float64(6.98413), "income": np.asarray([8.25, 1])}
        assert show_features(features, raw).content == "rooms: 6.984, income: 8.25 1"
        assert show_features(np.zeros((1, 2)), raw).content == "value: [1×2] 0 0"

    def test_long_content_is_cut(self):
        content = show_features(np.asarray(b"word " * 1000, object), b"").content
        assert len(content) <= LONGEST_TEXT
        assert content.endswith("…")
        rows = show_features(np.zeros(100_000), b"").value
        assert len(rows) == MOST_FEATURES + 1
        assert rows[-1] == ("…", "and 99,968 more")
        ((_, value),) = show_features(np.zeros((3, 3000)), b"").value
        assert len(value) <= LONGEST_TEXT

    def test_control_characters_are_replaced(self):
        text = np.asarray(b"a\0b\x1b[31mc\nd", object)
        assert show_features(text, b"").content == "a\ufffdb\ufffd[31mc\nd"

    def test_sounds(self):
        times = np.arange(16_000) / 16_000
        wave_ = 0.5 * np.sin(2 * np.pi * 440 * times)
        for samples in (wave_.astype(np.float32), (wave_ * 32767).astype(np.int16)):
            shown = show_features({"sound": samples}, b"")
            assert shown.kind == "audio"
            expected = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(8000) + 0.25) / 8000)
            np.testing.assert_allclose(shown.value / 32767, expected, atol=0.01)
            with wave.open(io.BytesIO(shown.wav)) as file:
                assert (file.getframerate(), file.getnframes()) == (8000, 8000)
        assert show_features(np.abs(wave_), b"").kind == "features"


class TestTaskShow:
    """What a task's own function gives."""

    @pytest.mark.parametrize(
        ("given", "kind", "value"),
        [
            ("words", "text", "words"),
            (b"words", "text", "words"),
            ({"rooms": 3, "town": "X"}, "features", (("rooms", "3"), ("town", "X"))),
        ],
        ids=["str", "bytes", "mapping"],
    )
    def test_texts_and_features(self, given, kind, value):
        shown = show_example(np.zeros((8, 8)), b"raw", lambda features, raw: given)
        assert (shown.kind, shown.value) == (kind, value)

    def test_pictures(self):
        array = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
        for given in (array, Image.fromarray(array)):
            shown = show_example(None, b"", lambda features, raw, given=given: given)
            np.testing.assert_array_equal(pixels(shown), array)

    @pytest.mark.parametrize("rate", [4000, 8000, 32000])
    def test_sounds(self, rate):
        samples = np.zeros((rate, 2), np.float32)
        samples[:, 0] = 1.0
        shown = show_example(None, b"", lambda features, raw: (samples, rate))
        assert shown.kind == "audio"
        assert len(shown.value) == 8000
        assert (shown.value == 16384).all()

    @pytest.mark.parametrize(
        "show", [lambda features, raw: 1 / 0, lambda features, raw: np.zeros((2, 2, 2))]
    )
    def test_a_mistake_in_it_ends_nothing(self, show, caplog):
        assert show_example(np.asarray([1, 2]), b"", show).content == "0: 1, 1: 2"
        assert "Task.show failed" in caplog.text
