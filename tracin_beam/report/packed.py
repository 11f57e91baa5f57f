"""Columns as a page carries them: compressed, and read by its script without parsing numbers."""

import base64
import gzip
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

_DTYPES = ("uint8", "int32", "float16", "float64")


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Packs arrays and what JSON can hold into base64 text, gzipped.

    Args:
      header: anything under names other than "arrays".
      arrays: of uint8, int32, float16 or float64.

    Returns:
      base64 of gzip of: the length of a JSON text, uint32 little-endian; that text, `header` with
      "arrays" ({name: [dtype, start in bytes after the text, length]}); the arrays, each aligned to
      eight bytes.

    Raises:
      ValueError: an array has another dtype.
    """
    places: dict[str, list[Any]] = {}
    body = bytearray()
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{name} is of {array.dtype}")
        places[name] = [array.dtype.name, len(body), array.size]
        body += np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
        body += bytes(-len(body) % 8)
    text = json.dumps({**header, "arrays": places}, ensure_ascii=False, allow_nan=False)
    content = text.encode("utf-8", errors="backslashreplace")
    whole = struct.pack("<I", len(content)) + content + bytes(body)
    return base64.b64encode(gzip.compress(whole, 9, mtime=0)).decode("ascii")


def halves(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Numbers as float16, scaled by a power of two so that the largest has all its digits.

    Returns:
      float16 [n], NaN for what is not finite, and the factor that gives the values back.
    """
    finite = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    largest = np.nanmax(np.abs(finite)) if np.isfinite(finite).any() else 0.0
    exponent = int(np.clip(np.floor(np.log2(largest)) - 14, -1000, 1009)) if largest > 0 else 0
    scale = 2.0**exponent
    return (finite / scale).astype(np.float16), scale
