"""One example as a reader sees it: a picture, a text, or its numbers."""

import base64
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

LONGEST_TEXT = 400  # characters
_SIDES = (4, 2048)  # pixels: what may be a picture
_LARGEST_PICTURE = 256  # pixels: larger ones are scaled down, a page holds hundreds
_PIXELATED_UP_TO = 64  # pixels: below this a reader wants to see the pixels
_NOT_CONTENT = {"id", "label"}  # features of a tf.train.Example that a report shows elsewhere


@dataclass(frozen=True)
class Shown:
    """What a report shows for one example.

    Attributes:
      kind: "image" or "text".
      content: for an image a `data:image/png;base64,…` URI, for text the text itself, unescaped.
      pixelated: the image is so small that it is to be enlarged without smoothing.
    """

    kind: Literal["image", "text"]
    content: str
    pixelated: bool = False


def show_features(features: Any, raw: bytes) -> Shown:
    """Shows one example.

    An array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with sides of 4 to 2048 is a picture.
    Otherwise string features are shown as text; failing that, text found in the record itself
    (models mostly get token ids, whose text often still stands beside them); failing that, numbers.

    Args:
      features: one example's parsed features without a batch dimension: an array, or a mapping or
        sequence of arrays. Numbers of any dtype, or strings as `bytes` or `str`.
      raw: the serialized record, looked into only if `features` is neither a picture nor text.
    """
    named = _named(features)
    for array in named.values():
        if _is_picture(array):
            return _picture(array)
    if any(_is_text(array) for array in named.values()):
        return Shown("text", _cut(_written(named)))
    return Shown("text", _cut(_text_in_record(raw) or _written(named)))


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


def _picture(array: np.ndarray) -> Shown:
    pixels = _to_bytes(array)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    image.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii")
    return Shown("image", uri, pixelated=max(array.shape[:2]) <= _PIXELATED_UP_TO)


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
    text = _clean(text)
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"
