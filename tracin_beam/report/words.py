"""Numbers, ids and other values in words that any page or terminal can show."""

import math
import unicodedata

from tracin_beam.storage import tables

LONGEST_NAME = 200  # characters of an id or a label on a page
_BIDI_CONTROLS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def number(value: float, *, sign: bool = False) -> str:
    """Writes a number with four significant digits, without an exponent where that reads well."""
    plus = "+" if sign else ""
    if not math.isfinite(value):
        return f"{value:{plus}}"
    size = abs(value)
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e7:
        return f"{value:{plus}.3e}"
    decimals = max(0, 3 - math.floor(math.log10(size)))
    return f"{value:{plus},.{decimals}f}"


def shown(value: object) -> str:
    """An id or a label on one line, cut in its middle where it is very long."""
    text = tables.text(value) if isinstance(value, bytes) else str(value)
    if len(text) > LONGEST_NAME:
        head, tail = text[: LONGEST_NAME // 2], text[-LONGEST_NAME // 4 :]
        text = f"{head} … {tail} ({len(text):,} characters)"
    return printable(text)


def printable(value: object) -> str:
    r"""Anything as text, its control and bidirectional characters as \x1b, \u202e …"""
    text = tables.text(value) if isinstance(value, bytes) else str(value)
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or character in _BIDI_CONTROLS
        else character
        for character in text
    )
