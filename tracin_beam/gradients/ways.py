"""Which way a weight's gradient takes to its CountSketch: a cost model over shapes.

    tensorsketch   from the two factors by FFT, one position at a time: the CountSketch itself
    blocks         from the two factors by a small product, for one position: the CountSketch itself
    rows           the rows of an embedding that occur: the CountSketch itself
    materialise    the gradient written out, then sketched: the CountSketch itself
    compress       random signs on both sides, then sketched: unbiased too, cheap, less accurate

The cheapest of those that give the CountSketch itself is taken, unless it would cost a large part
of what training pays for the layer. Then a gradient that sums over many positions is compressed:
it is far from rank one, and loses little.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from tracin_beam.errors import InputError
from tracin_beam.gradients import forms
from tracin_beam.gradients.forms import Form, Full, Outer, Rows, Sum, Windowed

WAYS = ("tensorsketch", "blocks", "rows", "materialise", "compress")

# To what a gradient that sums over many positions is compressed: inputs (of a dense layer, patches
# of a convolution) and outputs. benchmarks/projections.py has what it loses.
DENSE = (32, 32)
CONVOLUTION = (16, 64)
# Where a convolution has many positions they cost most, and the gradient is furthest from rank one.
_MANY_POSITIONS = 512

# With fewer positions the mean over the window has too many numbers for what it is of.
_LEAST_POSITIONS = 16

# Per nanosecond on a core or two: multiplications in matrix products (and
# in those of an example by itself), bytes through memory, and
# operations of FFTs. Only their proportions matter.
_PRODUCTS = 80.0
_SMALL_PRODUCTS = 10.0
_BYTES = 10.0
_FFT = 10.0
# Nanoseconds to add a number to its place in the sketch.
_SCATTER = 2.0
# What of a layer's share in a training step its exact sketch may cost.
_SHARE = 0.5
# Positions, where their number is only known when the data is there.
_POSITIONS = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a form: P positions (None if unknown), m × n numbers in the gradient."""

    positions: int | None
    m: int
    n: int


def shape_of(form: Form) -> Shape:
    """The sizes of a gradient in this form; a `Full` one is a column."""
    match form:
        case Outer(left, right):
            return Shape(left.shape[1], left.shape[-1], right.shape[-1])
        case Windowed(_, right, _):
            return Shape(right.shape[1], form.rows, right.shape[-1])
        case Rows(ids, rows):
            return Shape(ids.shape[1], 1, rows.shape[-1])
        case Full(value):
            return Shape(1, value.shape[-1], 1)
        case Sum(parts):
            sizes = [shape_of(part) for part in parts if isinstance(part, Outer)]
            return sizes[0] if sizes else shape_of(parts[0])


def compressed(form: Form) -> tuple[int, int]:
    """The shape (k, l) to which the way "compress" brings a gradient."""
    size = shape_of(form)
    rows, columns = CONVOLUTION if isinstance(form, Windowed) else DENSE
    if isinstance(form, Windowed) and (size.positions or _POSITIONS) > _MANY_POSITIONS:
        rows //= 2
    return min(size.m, rows), min(size.n, columns)


def splits(form: Form) -> bool:
    """Whether a compressed gradient keeps its mean over the window: see `forms.Split`.

    Where the exact norm is cheap there is no need to, and many channels would be too many numbers
    for few positions.
    """
    if not isinstance(form, Windowed) or set(form.window.dilations) != {1}:
        return False
    size, count = shape_of(form), math.prod(form.window.size)
    if count == 1 or compressed(form)[0] >= size.m or forms.gram_is_cheaper(form):
        return False
    return (size.positions or _POSITIONS) >= _LEAST_POSITIONS


def costs(form: Form, dim: int) -> dict[str, float]:
    """Nanoseconds for each example of the ways that a gradient of this form can take."""
    if isinstance(form, Sum):
        return _sum_costs(form, dim)
    size = shape_of(form)
    positions, m, n = size.positions or _POSITIONS, size.m, size.n
    if isinstance(form, Full):
        return {"materialise": _SCATTER * m}
    if isinstance(form, Rows):
        return {"rows": _SCATTER * positions * n}
    product = positions * m * n / _PRODUCTS
    # A window is copied out of the input for each position.
    copies = 8 * positions * m / _BYTES if isinstance(form, Windowed) else 0.0
    found = {"materialise": product + copies + _SCATTER * m * n}
    k, l = compressed(form)  # noqa: E741
    if positions > 1 and max(2 * k * l, dim) < m * n:
        products = m * k + k * l + (n * l if l < n else 0)
        traffic = 4 * (min(m, n) + k + l) / _BYTES
        found["compress"] = positions * (products / _PRODUCTS + traffic) + _SCATTER * k * l
        if isinstance(form, Windowed) and splits(form):
            mean = m // math.prod(form.window.size) * n
            found["compress"] += positions * mean / _PRODUCTS + _SCATTER * mean
    if isinstance(form, Outer) and positions == 1:
        found["blocks"] = m * n / _SMALL_PRODUCTS + 16 * dim / _BYTES
    if isinstance(form, Outer) and size.positions is not None:
        one = 2.5 * dim * math.log2(max(dim, 2))
        wide = min(1.0, 2 * min(m, n) / dim)  # the narrower side takes a shorter FFT
        found["tensorsketch"] = positions * (one * (1 + wide) / _FFT + 16 * dim / _BYTES)
    return found


def _sum_costs(form: Sum, dim: int) -> dict[str, float]:
    """As `costs`, for a sum; "materialise" is the CountSketch of each part in its cheapest way."""
    found = {"materialise": 0.0}
    compress = 0.0
    k, l = compressed(form)  # noqa: E741
    for part in form.parts:
        found["materialise"] += min(c for w, c in costs(part, dim).items() if w != "compress")
        size = shape_of(part)
        positions = size.positions or _POSITIONS
        nanoseconds = positions * (size.m * k + k * l + size.n * l) / _PRODUCTS
        compress += nanoseconds + 4 * positions * (k + l) / _BYTES
    outer = next((part for part in form.parts if isinstance(part, Outer)), None)
    if outer is not None and "compress" in costs(outer, dim):
        found["compress"] = compress + _SCATTER * k * l
    return found


def exact(form: Form, dim: int) -> str:
    """The cheapest way to the CountSketch itself."""
    found = costs(form, dim)
    return min((way for way in found if way != "compress"), key=found.__getitem__)


def choose(form: Form, dim: int) -> str:
    """The way that a gradient of this form takes."""
    found = costs(form, dim)
    size = shape_of(form)
    cheapest = exact(form, dim)
    training = 3 * (size.positions or _POSITIONS) * size.m * size.n / _PRODUCTS
    if "compress" in found and found[cheapest] > max(_SHARE * training, found["compress"]):
        return "compress"
    return cheapest


def numbers(form: Form, way: str, dim: int) -> int:
    """How many numbers a way writes for each example, copies included."""
    if isinstance(form, Sum):
        parts = form.parts
        return sum(numbers(p, way if way == "compress" else exact(p, dim), dim) for p in parts)
    size = shape_of(form)
    positions = size.positions or _POSITIONS
    k, l = compressed(form)  # noqa: E741
    small = 3 * k * l
    if way == "compress" and isinstance(form, Windowed) and splits(form):
        channels = int(form.x.shape[-1])
        small = channels * positions + 3 * (channels + k) * size.n
    return {
        "tensorsketch": 3 * positions * (dim + 2),
        "blocks": 3 * dim,
        "rows": 4 * positions * size.n,  # places are twice as long as numbers
        "materialise": 3 * size.m * size.n,  # as it is, with signs, transposed
        "compress": positions * (k + l) + small,
    }[way]


def parse(text: str, paths: Sequence[str]) -> dict[str, str]:
    """Reads "REGEX=WAY,REGEX=WAY": the way of each weight whose path an expression is found in.

    Raises:
      InputError: it is not of that form, or an expression is found in no path.
    """
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, separator, way = part.rpartition("=")
        if not separator or way not in WAYS:
            raise InputError(f"--ways={part}: write REGEX=WAY, WAY one of {', '.join(WAYS)}.")
        try:
            matching = [path for path in paths if re.search(pattern, path)]
        except re.error as error:
            raise InputError(f"--ways={part} is not a regular expression: {error}") from None
        if not matching:
            raise InputError(f"--ways={part} matches none of the weights: {', '.join(paths)}")
        chosen.update(dict.fromkeys(matching, way))
    return chosen
