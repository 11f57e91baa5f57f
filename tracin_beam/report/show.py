"""One example as a reader sees it: a picture, a text, a table of its features, or a sound."""

import base64
import io
import logging
import re
import unicodedata
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from tracin_beam.report import words

LONGEST_TEXT = 400  # characters
MOST_FEATURES = 32  # rows of a table
_SIDES = (4, 2048)  # pixels: what may be a picture
_LARGEST_PICTURE = 256  # pixels: larger ones are scaled down, a page holds hundreds
_PIXELATED_UP_TO = 64  # pixels: below this a reader wants to see the pixels
_NOT_CONTENT = {"id", "label"}  # features of a tf.train.Example that a report shows elsewhere
_SHORTEST_SOUND = 4000  # samples: a shorter vector is taken for a table's row
_GUESSED_RATE = 16_000  # of what looks like a sound
_LONGEST_SOUND = 4  # seconds
_RATE = 8_000  # samples a second that a page plays; faster ones are thinned out

_log = logging.getLogger(__name__)

Show = Callable[[Any, bytes], Any]


@dataclass(frozen=True, eq=False)
class Shown:
    """What a report shows for one example.

    Attributes:
      kind: "image", "text", "features" or "audio".
      value: of an image uint8 pixels [H, W], [H, W, 3] or [H, W, 4]; the text itself, unescaped; of
        features (name, value) pairs, both unescaped text; of a sound int16 samples [n] at 8 kHz.
    """

    kind: Literal["image", "text", "features", "audio"]
    value: Any

    @property
    def pixelated(self) -> bool:
        """Whether it is a picture so small that it is to be enlarged without smoothing."""
        return self.kind == "image" and max(self.value.shape[:2]) <= _PIXELATED_UP_TO

    @property
    def content(self) -> str:
        """Text, or a picture or a sound as a `data:` URI."""
        if self.kind == "image":
            png = io.BytesIO()
            Image.fromarray(self.value).save(png, "PNG", optimize=True)
            return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
        if self.kind == "audio":
            return "data:audio/wav;base64," + base64.b64encode(self.wav).decode("ascii")
        if self.kind == "features":
            return ", ".join(f"{name}: {value}" for name, value in self.value)
        return str(self.value)

    @property
    def wav(self) -> bytes:
        """A sound as a file, of eight bits a sample."""
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(1)
            writer.setframerate(_RATE)
            writer.writeframes(
                ((self.value.astype(np.int32) + 32768) >> 8).astype(np.uint8).tobytes()
            )
        return file.getvalue()


def show_example(features: Any, raw: bytes, show: Show | None = None) -> Shown:
    """Shows one example as its task says, or as `show_features` guesses.

    Args:
      features: one example's parsed features without a batch dimension.
      raw: the serialized record.
      show: `Task.show`, or None. Where it fails the guess is shown, and a warning logged.
    """
    if show is None:
        return show_features(features, raw)
    try:
        return _shown(show(features, raw))
    except Exception as error:
        _log.warning(
            "Task.show failed for an example, which is shown as shapes and dtypes suggest: %s: %s",
            type(error).__name__,
            words.shown(error),
        )
        return show_features(features, raw)


def _shown(value: Any) -> Shown:
    """What a task's `show` gave: see `Task`."""
    if isinstance(value, str | bytes):
        return Shown("text", _cut(_value(value)))
    if isinstance(value, Image.Image):
        return _picture(np.asarray(value if value.mode in ("L", "RGBA") else value.convert("RGB")))
    if isinstance(value, Mapping):
        return _table(_named(value))
    if isinstance(value, tuple) and len(value) == 2 and np.ndim(value[1]) == 0:
        return _sound(np.asarray(value[0]), float(value[1]))
    array = np.asarray(value)
    if _is_picture(array):
        return _picture(array)
    raise TypeError(
        f"it gave {type(value).__name__} of shape {array.shape}, which is no picture [H, W], "
        "[H, W, 1], [H, W, 3] or [H, W, 4], no text, no mapping and no (samples, rate)"
    )


def show_features(features: Any, raw: bytes) -> Shown:
    """Shows one example by a guess from shapes and dtypes.

    An array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with sides of 4 to 2048 is a picture. A
    vector of thousands of integers of 16 bits, or of numbers on both sides of 0 and within
    [-1, 1], is a sound at 16 kHz. A string alone is a text; several features with a string among
    them are a table. Otherwise text found in the record itself is shown (models mostly get token
    ids, whose text often still stands beside them); failing that, a table of numbers.

    Args:
      features: one example's parsed features without a batch dimension: an array, or a mapping or
        sequence of arrays. Numbers of any dtype, or strings as `bytes` or `str`.
      raw: the serialized record, looked into only if `features` is neither a picture nor text.
    """
    named = _named(features)
    for array in named.values():
        if _is_picture(array):
            return _picture(array)
    for array in named.values():
        if _is_sound(array):
            return _sound(array, _GUESSED_RATE)
    if any(_is_text(array) for array in named.values()):
        return Shown("text", _cut(_written(named))) if len(named) == 1 else _table(named)
    text = _text_in_record(raw)
    return Shown("text", _cut(text)) if text else _table(named)


def _named(features: Any) -> dict[str, np.ndarray]:
    """Flattens features to {name: array}; one without a name is called "" or by its number."""
    if isinstance(features, Mapping):
        return {str(name): np.asarray(value) for name, value in features.items()}
    if isinstance(features, Sequence) and not isinstance(features, str | bytes):
        return {str(number): np.asarray(value) for number, value in enumerate(features)}
    return {"": np.asarray(features)}


def _is_text(array: np.ndarray) -> bool:
    return array.dtype.kind in "OSU"


def _is_picture(array: np.ndarray) -> bool:
    lowest, highest = _SIDES
    return (
        array.dtype.kind in "buif"
        and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))
        and all(lowest <= side <= highest for side in array.shape[:2])
    )


def _is_sound(array: np.ndarray) -> bool:
    if array.size != max(array.shape, default=0) or array.size < _SHORTEST_SOUND:
        return False
    if array.dtype == np.int16:
        return True
    return (
        array.dtype.kind == "f"
        and bool(np.isfinite(array).all())
        and -1 <= float(array.min()) < 0 < float(array.max()) <= 1
    )


def _sound(samples: np.ndarray, rate: float) -> Shown:
    """Samples [n], or [n, channels] whose mean is taken, as int16 at the page's rate."""
    if samples.dtype.kind not in "iuf" or samples.ndim not in (1, 2) or not rate > 0:
        raise TypeError(
            f"samples of {samples.dtype} {samples.shape} at a rate of {rate} are no sound"
        )
    values = samples.astype(np.float64)
    if samples.dtype == np.uint8:
        values = values / 128 - 1
    elif samples.dtype.kind in "iu":
        values = values / float(np.iinfo(samples.dtype).max)
    if values.ndim == 2:
        values = values.mean(axis=1)
    values = np.nan_to_num(values[: int(rate * _LONGEST_SOUND)]).clip(-1, 1)
    seconds = len(values) / rate
    ends = np.linspace(0, len(values), max(1, round(seconds * _RATE)) + 1).astype(int)
    if rate > _RATE and len(values):  # the mean of what falls together keeps whistles away
        sums = np.concatenate([[0.0], values.cumsum()])
        values = np.diff(sums[ends]) / np.diff(ends).clip(1)
    elif len(values):
        values = values[ends[:-1]]
    return Shown("audio", (values * 32767).round().astype(np.int16))


def _table(named: Mapping[str, np.ndarray]) -> Shown:
    """Features by name; the values of a single vector by their number."""
    if len(named) == 1 and (only := next(iter(named.values()))).ndim == 1 and only.size > 1:
        name = next(iter(named))
        prefix = f"{name} " if name else ""
        rows = [(f"{prefix}{i}", _value(v)) for i, v in enumerate(only[:MOST_FEATURES].tolist())]
        hidden = only.size - len(rows)
    else:
        items = list(named.items())
        rows = [(name or "value", _values(array)) for name, array in items[:MOST_FEATURES]]
        hidden = len(items) - len(rows)
    if hidden:
        rows.append(("…", f"and {hidden:,} more"))
    return Shown("features", tuple((_cut(name), _cut(value)) for name, value in rows))


def _picture(array: np.ndarray) -> Shown:
    pixels = _to_bytes(array)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    image.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE), Image.Resampling.LANCZOS)
    return Shown("image", np.asarray(image))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """Maps values to 0..255 by the convention they seem to follow: [0, 1], [-1, 1] or [0, 255].

    Values that follow none of them (standardised ones, say) are spread over their own range.
    """
    if array.dtype == np.uint8:
        return array
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= -1 and high <= 1:
        low, high = -1.0, 1.0
    elif low >= 0 and 64 < high <= 255:  # a lower maximum means another scale, such as 0..16
        low, high = 0.0, 255.0
    scaled = (values - low) / (high - low or 1.0) * 255
    return np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255).round().astype(np.uint8)


def _text_in_record(raw: bytes) -> str | None:
    """The longest readable bytes feature of a serialized `tf.train.Example`, if there is one."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        record = tf.train.Example.FromString(raw)
    except DecodeError:
        return None
    texts = [
        text
        for name, feature in record.features.feature.items()
        if name not in _NOT_CONTENT and len(feature.bytes_list.value) == 1
        if (text := _readable(feature.bytes_list.value[0]))
    ]
    return max(texts, key=len, default=None)


def _readable(value: bytes) -> str | None:
    """Decodes UTF-8 text; None for binary data, and for what has no letter in it."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return None
    readable = _clean(text) == text and any(character.isalpha() for character in text)
    return text if readable else None


def _written(named: Mapping[str, np.ndarray]) -> str:
    if len(named) == 1:
        return _values(next(iter(named.values())))
    return ", ".join(f"{name}: {_values(array)}" for name, array in named.items())


def _values(array: np.ndarray) -> str:
    shape = f"[{'×'.join(map(str, array.shape))}] " if array.ndim > 1 else ""
    return shape + " ".join(map(_value, array.ravel()[:LONGEST_TEXT].tolist()))


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clean(text: str) -> str:
    """Replaces what a page cannot hold: control characters and lone surrogates."""
    return "".join(
        "\ufffd" if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\r\n"
        else character
        for character in text
    )  # fmt: skip


def _cut(text: str) -> str:
    # Reviews and scraped pages come with marks of HTML's lines, which are no words.
    text = _clean(re.sub(r"(?i)\s*<br\s*/?>\s*", "\n", text[: 4 * LONGEST_TEXT]))
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"
