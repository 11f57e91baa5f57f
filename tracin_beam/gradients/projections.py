"""Random projections of gradients, linear maps S with E[⟨Su, Sv⟩] = ⟨u, v⟩.

Each weight of the model has a map of its own, drawn from the seed, the weight's path and its
shape alone, and the projections of all weights are added up into one vector of `dim` numbers.
Maps of different weights are independent, so the sum is unbiased for the inner product of whole
gradients, and spends its `dim` numbers where the gradient's energy is.

To add a projection, write a class with a `__call__` like those here and put `@projection("name")`
on it.
"""

import dataclasses
import functools
import hashlib
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import forms, ways
from tracin_beam.gradients.forms import Form, Full, Outer, Rows, Split, Sum, Windowed


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What a projection's randomness depends on, besides the seed."""

    path: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Projection(Protocol):
    """Projects the gradients of a batch.

    Attributes:
      dim: length of the projected vectors.
    """

    dim: int

    def __call__(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> tf.Tensor:
        """float32 [B, dim], the sum of the weights' projections."""

    def prepare(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> list[tuple[WeightSpec, Any]]:
        """Takes gradients apart where norms can be estimated from what is projected.

        Returns:
          The same, with a `forms.Split` in place of some; it may be called with them.
        """

    def numbers(self, spec: WeightSpec, form: Form) -> int:
        """How many numbers it writes for each example to project a gradient of this form."""

    def choose_ways(self, chosen: str, paths: Sequence[str]) -> None:
        """Takes the user's choice, "REGEX=WAY,…".

        Raises:
          InputError: the projection has one way only, or not these; see `ways.parse`.
        """


class _OneWay:
    """The shared methods of projections that write every gradient out."""

    def prepare(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> list[tuple[WeightSpec, Any]]:
        return list(gradients)

    def numbers(self, spec: WeightSpec, form: Form) -> int:
        del form
        return spec.size

    def choose_ways(self, chosen: str, paths: Sequence[str]) -> None:
        del chosen, paths
        kind = type(self).__name__.lower()
        raise InputError(f"--ways is for --projection=countsketch; {kind} has one way only.")


Factory = Callable[[int, int, Sequence[WeightSpec]], Projection]

_PROJECTIONS: dict[str, Factory] = {}


def projection(name: str) -> Callable[[Factory], Factory]:
    """Registers a class, called with (dim, seed, specs of all weights), under this name."""

    def register(factory: Factory) -> Factory:
        _PROJECTIONS[name] = factory
        return factory

    return register


def make(
    name: str, dim: int, seed: int, weights: Sequence[WeightSpec], chosen_ways: str = ""
) -> Projection:
    """The projection of this name for a model with these weights.

    Raises:
      InputError: there is none, or it does not know these ways; see `ways.parse`.
    """
    if name not in _PROJECTIONS:
        raise InputError(f"--projection={name} is not known; take one of {', '.join(names())}.")
    made = _PROJECTIONS[name](dim, seed, weights)
    if chosen_ways:
        made.choose_ways(chosen_ways, [spec.path for spec in weights])
    return made


def names() -> list[str]:
    """Names of the registered projections."""
    return sorted(_PROJECTIONS)


def random_signs(count: int, seed: int, spec: WeightSpec, role: str) -> np.ndarray:
    """float32 [count] of ±1, the same on every machine."""
    bits = hashlib.shake_256(_key(seed, spec, role)).digest((count + 7) // 8)
    return 1.0 - 2.0 * np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(np.float32)


def _key(seed: int, spec: WeightSpec, role: str) -> bytes:
    shape = "x".join(map(str, spec.shape))
    return f"{seed}\0{spec.path}\0{shape}\0{role}".encode()


# Into so many stretches at most a gradient is cut, to be added up as they are.
_MOST_TURNS = 16


@projection("countsketch")
class CountSketch:
    """CountSketch, and TensorSketch where the gradient is an outer product.

    The entry (i, j) of a gradient G of shape [m, n] is added, with sign s(i) s'(j), to the
    entry o + h(i) + h'(j) mod dim (Charikar, Chen and Farach-Colton, ICALP 2002; for outer
    products Pham and Pagh, KDD 2013). The signs are random; the places need not be, for the
    estimate to be unbiased: h(i) = i on the wider side, and h'(j) = q·j on the narrower, with q
    the largest that lets them all fit. The weight's offset o is random, or else all biases would
    share the first few places.

    For one outer product a ⊗ g the sketch is the circular convolution of those of a and g,
    computed by FFT, and the sketches of all such weights are added up as spectra, so that one
    inverse FFT is enough. As h' leaves q − 1 zeros between entries, the spectrum of g's sketch is
    that of a vector q times shorter, repeated, if q divides dim.

    A gradient that sums over many positions, of a convolution or of a dense layer over tokens, may
    first be compressed from both sides, A G B with random signs in A and B, before it is written
    out: unbiased all the same, and as such gradients are far from rank one, nearly as accurate. Of
    a convolution's gradient the mean over the window is kept as it is, and only what differs from
    it is compressed: neighbouring pixels are alike, so that the mean has nine tenths of the energy.
    `ways` has the cost model that decides.

    Attributes:
      ways: by path of a weight, the way it takes whatever it costs.
    """

    ways: Mapping[str, str] = types.MappingProxyType({})

    def __init__(self, dim: int, seed: int, weights: Sequence[WeightSpec]) -> None:
        del weights
        self.dim = dim
        self._seed = seed

    def choose_ways(self, chosen: str, paths: Sequence[str]) -> None:
        self.ways = ways.parse(chosen, paths)

    def way(self, spec: WeightSpec, form: Form) -> str:
        """The way that a gradient takes, one of `ways.costs`."""
        chosen = self.ways.get(spec.path) or ways.choose(form, self.dim)
        possible = ways.costs(form, self.dim)
        if chosen not in possible:
            raise InputError(
                f"--ways: {spec.path} cannot take {chosen}; it can take {', '.join(possible)}."
            )
        return chosen

    def numbers(self, spec: WeightSpec, form: Form) -> int:
        return ways.numbers(form, self.way(spec, form), self.dim)

    def prepare(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> list[tuple[WeightSpec, Any]]:
        """Splits convolutions that are compressed; see `ways.splits`."""
        return [(spec, self._split(spec, form)) for spec, form in gradients]

    def __call__(self, gradients: Sequence[tuple[WeightSpec, Any]]) -> tf.Tensor:
        pieces: list[_Piece] = []
        whole: list[tf.Tensor] = []
        products: list[tuple[WeightSpec, Outer]] = []

        def place(found: "tf.Tensor | list[_Piece]") -> None:
            if isinstance(found, list):
                pieces.extend(found)
            else:
                whole.append(found)

        for spec, form in self.prepare(gradients):
            if isinstance(form, Split):
                channels, filters = int(form.mean.shape[1]), int(form.mean.shape[2])
                mean = WeightSpec(f"{spec.path}, mean", (channels, filters))
                place(self._full(mean, forms.full(form.mean)))
                rows = WeightSpec(spec.path, (int(form.rest.shape[1]), filters))
                place(self._full(rows, forms.full(form.rest)))
                continue
            way = self.way(spec, form)
            shape = forms.matrix_shape(form, spec.shape) if isinstance(form, Sum) else None
            for part in forms.parts_of(form):
                # The parts of a sum need one map, the CountSketch or a compression, for all.
                mine = way
                if isinstance(form, Sum) and way != "compress":
                    mine = ways.exact(part, self.dim)
                match mine, part:
                    case "tensorsketch", Outer():
                        products.append((spec, part))
                    case "blocks", Outer():
                        place(self._blocks(spec, part))
                    case "rows", Rows():
                        place(self._rows(spec, part, shape))
                    case "compress", _:
                        small = ways.compressed(form)
                        place(self._full(*self._compressed(spec, part, shape, small)))
                    case _:
                        place(self._full(spec, part, shape))
        if products:
            whole.append(self._convolved(products))
        if pieces:
            whole.append(_laid_together(pieces, self.dim))
        return tf.add_n(whole)

    def _convolved(self, products: Sequence[tuple[WeightSpec, Outer]]) -> tf.Tensor:
        """The sum of the sketches of outer products, with one inverse FFT for all."""
        specs = [spec for spec, _ in products]

        def compute(factors: Sequence[Outer]) -> tf.Tensor:
            spectra = []
            for spec, form in zip(specs, factors, strict=True):
                matrix = self._matrix(spec, form)
                left = _spectrum(form.left * matrix.row_signs, matrix.row_step, self.dim)
                right = _spectrum(form.right * matrix.column_signs, matrix.column_step, self.dim)
                spectra.append(tf.reduce_sum(left * right, axis=1) * matrix.shift)
            return tf.signal.irfft(sum(spectra[1:], spectra[0]), [self.dim])

        if not tf.executing_eagerly():
            # The many small steps are worth compiling into one.
            compute = tf.function(compute, jit_compile=True, autograph=False)
        return compute([form for _, form in products])

    def _blocks(self, spec: WeightSpec, form: Outer) -> "list[_Piece]":
        """The circular convolution of the two sketches, as a small product for each example.

        The wider side lies in the sketch as it is, cut into blocks as long as the narrower side's
        entries are apart: block a of it and entry j of the other meet in block a + j.
        """
        matrix = self._matrix(spec, form)
        wide, narrow = form.left[:, 0] * matrix.row_signs, form.right[:, 0] * matrix.column_signs
        step = matrix.column_step
        if matrix.m < matrix.n:
            wide, narrow, step = narrow, wide, matrix.row_step
        length, count = wide.shape[-1], narrow.shape[-1]
        blocks = -(-length // step)
        wide = tf.reshape(tf.pad(wide, [[0, 0], [0, blocks * step - length]]), [-1, blocks, step])
        # By block of the result and of the wider side, which entry of the narrower, or a zero.
        entry = np.arange(blocks + count - 1)[:, None] - np.arange(blocks)
        entry = np.where((entry >= 0) & (entry < count), entry, count)
        shifted = tf.gather(tf.pad(narrow, [[0, 0], [0, 1]]), entry, axis=1)
        sketch = tf.reshape(tf.matmul(shifted, wide), [-1, len(entry) * step])
        return [_Piece(matrix.offset, sketch)]

    def _compressed(
        self,
        spec: WeightSpec,
        form: Form,
        shape: tuple[int, int] | None,
        small: tuple[int, int],
    ) -> tuple[WeightSpec, Form]:
        """A G B of shape `small`, with random signs in A, and in B where G has more columns."""
        if shape is None:
            size = ways.shape_of(form)
            shape = size.m, size.n
        (m, n), (rows, columns) = shape, small
        signs = random_signs(n * columns, self._seed, spec, "right").reshape(n, columns)
        right_matrix = signs / np.float32(math.sqrt(columns))
        signs = random_signs(m * rows, self._seed, spec, "left").reshape(m, rows)
        left_matrix = signs / np.float32(math.sqrt(rows))
        if rows == m:
            left_matrix = np.eye(m, dtype=np.float32)
        match form:
            case Outer(_, right) | Windowed(_, right, _):
                left = forms.project_left(form, left_matrix)
            case Rows(ids, right):
                left = tf.gather(tf.constant(left_matrix), ids)
            case Full(value):
                # The identity's rows and the gradient's: one position for each row.
                right = tf.reshape(value, [-1, m, n])
                batch = tf.shape(right)[0]
                left = tf.broadcast_to(tf.constant(left_matrix), [batch, m, rows])
            case _:
                raise TypeError(f"{type(form).__name__} cannot be compressed")
        if columns < n:
            right = tf.tensordot(right, right_matrix, 1)
        value = tf.reshape(tf.matmul(left, right, transpose_a=True), [-1, rows * columns])
        return WeightSpec(spec.path, (rows, columns)), Full(value)

    def _matrix(
        self, spec: WeightSpec, form: Form, shape: tuple[int, int] | None = None
    ) -> "_Matrix":
        m, n = shape or forms.matrix_shape(form, spec.shape)
        return _Matrix(self.dim, self._seed, spec, m, n)

    def _split(self, spec: WeightSpec, form: Any) -> Any:
        """What all positions in the window have in common as it is, and signs' sums of the rest."""
        if not isinstance(form, Windowed):
            return form
        if self.way(spec, form) != "compress" or not ways.splits(form):
            return form
        rows, _ = ways.compressed(form)
        channels, positions = int(form.x.shape[-1]), math.prod(form.window.size)
        signs = random_signs(form.rows * rows, self._seed, spec, "left")
        matrix = signs.reshape(positions, channels, rows) / np.float32(math.sqrt(rows))
        matrix -= matrix.mean(axis=0)
        rest = forms.project_left(form, matrix.reshape(-1, rows))
        return Split(
            tf.matmul(forms.window_mean(form), form.right, transpose_a=True),
            tf.matmul(rest, form.right, transpose_a=True),
        )

    def _full(
        self, spec: WeightSpec, form: Form, shape: tuple[int, int] | None = None
    ) -> "tf.Tensor | list[_Piece]":
        matrix = self._matrix(spec, form, shape)
        value = forms.materialise(form, spec.shape)
        if len(spec.shape) == 1 and spec.size <= self.dim:
            return [_Piece(matrix.offset, value, matrix.row_signs)]
        signs = np.outer(matrix.row_signs, matrix.column_signs)
        pieces = self._turned(value, signs, matrix)
        if pieces is not None:
            return pieces
        places = matrix.row_places[:, None] + matrix.column_places[None, :]
        summed = tf.math.unsorted_segment_sum(
            tf.transpose(value * signs.reshape(-1)), places.reshape(-1) % self.dim, self.dim
        )
        return tf.transpose(summed)

    def _turned(
        self, value: tf.Tensor, signs: np.ndarray, matrix: "_Matrix"
    ) -> "list[_Piece] | None":
        """Takes [B, m·n] apart into stretches that lie in the sketch as they are.

        The narrower side's entries are q places apart. So q numbers of the wider side at a time
        lie, with all of the narrower, in places of their own. None where there are too many.
        """
        m, n = matrix.m, matrix.n
        wide, narrow = max(m, n), min(m, n)
        step = matrix.column_step if m >= n else matrix.row_step
        turns = -(-wide // step)
        if narrow * step > self.dim or turns > _MOST_TURNS:
            return None
        value, signs = tf.reshape(value, [-1, m, n]), signs.reshape(1, m, n)
        if m >= n and narrow > 1:
            value, signs = tf.transpose(value, [0, 2, 1]), signs.transpose(0, 2, 1)
        elif m >= n:
            value, signs = tf.reshape(value, [-1, 1, m]), signs.reshape(1, 1, m)
        spare = turns * step - wide
        if narrow == 1:
            spare = 0
        if spare:
            value = tf.pad(value, [[0, 0], [0, 0], [0, spare]])
            signs = np.pad(signs, [[0, 0], [0, 0], [0, spare]])
        stretches = [slice(i * step, min((i + 1) * step, wide + spare)) for i in range(turns)]
        return [
            _Piece(
                (matrix.offset + own.start) % self.dim,
                tf.reshape(value[:, :, own], [-1, signs[0, :, own].size]),
                signs[0, :, own].reshape(-1),
            )
            for own in stretches
        ]

    def _rows(
        self, spec: WeightSpec, form: Rows, shape: tuple[int, int] | None = None
    ) -> tf.Tensor:
        matrix = self._matrix(spec, form, shape)
        ids = tf.cast(form.ids, tf.int64)
        signs = tf.gather(tf.constant(matrix.row_signs), ids)
        value = form.rows * matrix.column_signs * signs[..., None]
        places = (matrix.offset + ids * matrix.row_step)[..., None] + matrix.column_places
        batch = tf.shape(ids, out_type=tf.int64)[0]
        places = places % self.dim + (tf.range(batch) * self.dim)[:, None, None]
        summed = tf.math.unsorted_segment_sum(
            tf.reshape(value, [-1]), tf.reshape(places, [-1]), batch * self.dim
        )
        return tf.reshape(summed, [-1, self.dim])


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Numbers that lie in a sketch one after the other, round its end to its beginning.

    Attributes:
      place: of the first of them, in [0, dim).
      value: float32 [B, L].
      signs: float32 [L], by which they are still to be multiplied.
    """

    place: int
    value: tf.Tensor
    signs: np.ndarray | None = None


def _laid_together(pieces: Sequence[_Piece], dim: int) -> tf.Tensor:
    """The sum of pieces of a sketch: [B, dim].

    They are laid end to end, each at its place modulo dim with zeros before it where there is a
    gap, and what is dim apart is added up. So all weights together take three passes over their
    numbers, and not as many as each of them did by itself over all of dim.
    """
    left = sorted(pieces, key=lambda piece: piece.place)
    batch = tf.shape(pieces[0].value)[0]
    values: list[tf.Tensor] = []
    signs: list[np.ndarray] = []
    end = 0

    def zeros(count: int) -> None:
        nonlocal end
        if count:
            values.append(tf.zeros([batch, count]))
            signs.append(np.ones(count, np.float32))
            end += count

    while left:
        following = [i for i, piece in enumerate(left) if piece.place >= end % dim]
        piece = left.pop(following[0] if following else 0)
        zeros((piece.place - end) % dim)
        size = int(piece.value.shape[1])
        values.append(piece.value)
        signs.append(np.ones(size, np.float32) if piece.signs is None else piece.signs)
        end += size
    zeros(-end % dim)
    together = tf.concat(values, axis=1) * np.concatenate(signs).astype(np.float32)
    return tf.reduce_sum(tf.reshape(together, [-1, end // dim, dim]), axis=1)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """The hash functions of one weight, seen as a matrix [m, n]."""

    dim: int
    seed: int
    spec: WeightSpec
    m: int
    n: int

    @property
    def row_step(self) -> int:
        return _stride(self.m, self.dim) if self.m < self.n else 1

    @property
    def column_step(self) -> int:
        return _stride(self.n, self.dim) if self.m >= self.n else 1

    @functools.cached_property
    def row_signs(self) -> np.ndarray:
        return random_signs(self.m, self.seed, self.spec, "rows")

    @functools.cached_property
    def column_signs(self) -> np.ndarray:
        return random_signs(self.n, self.seed, self.spec, "columns")

    @property
    def offset(self) -> int:
        digest = hashlib.blake2b(_key(self.seed, self.spec, "offset"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.dim

    @property
    def shift(self) -> np.ndarray:
        """The offset in the frequency domain: complex64 [dim//2 + 1]."""
        bins = np.arange(self.dim // 2 + 1)
        return np.exp(-2j * np.pi * (bins * self.offset % self.dim) / self.dim).astype(np.complex64)

    @property
    def row_places(self) -> np.ndarray:
        return self.offset + np.arange(self.m, dtype=np.int64) * self.row_step

    @property
    def column_places(self) -> np.ndarray:
        return np.arange(self.n, dtype=np.int64) * self.column_step


def _stride(length: int, dim: int) -> int:
    """How far apart length places may lie to fit into dim; a divisor of it, if one comes near."""
    most = max(dim // length, 1)
    return next((q for q in range(most, most // 2, -1) if dim % q == 0), most)


def _spectrum(x: tf.Tensor, step: int, dim: int) -> tf.Tensor:
    """Spectrum of a sketch with places step·i mod dim: [B, P, m] to complex64 [B, P, dim//2+1]."""
    divides = dim % step == 0
    if not divides:
        apart = tf.pad(x[..., None], [[0, 0], [0, 0], [0, 0], [0, step - 1]])
        x = tf.reshape(apart, [*_leading(x), x.shape[-1] * step])
    short = dim // step if divides else dim
    length = x.shape[-1]
    folds = -(-length // short)
    x = tf.pad(x, [[0, 0], [0, 0], [0, folds * short - length]])
    if folds > 1:
        x = tf.reduce_sum(tf.reshape(x, [*_leading(x), folds, short]), axis=2)
    if short == dim:
        return tf.signal.rfft(x)
    half = tf.signal.rfft(x)
    mirrored = tf.math.conj(half[..., (short - 1) // 2 : 0 : -1])
    bins = dim // 2 + 1
    return tf.tile(tf.concat([half, mirrored], axis=-1), [1, 1, -(-bins // short)])[..., :bins]


def _leading(x: tf.Tensor) -> list[Any]:
    shape = tf.shape(x)
    return [shape[0], shape[1]]


@projection("kronecker")
class Kronecker(_OneWay):
    """Two-sided Gaussian projection A G B of each gradient matrix G to k × l, k·l = dim.

    What LoGra (Choe et al., 2024, arXiv 2405.13954) and others do, with the layers added up
    instead of concatenated. Cheap, but the variance is that of two projections to k and l
    dimensions: a relative error of √((1 + 2/k)(1 + 2/l) − 1) for gradients of rank one.
    """

    def __init__(self, dim: int, seed: int, weights: Sequence[WeightSpec]) -> None:
        del weights
        self.dim = dim
        self._seed = seed
        self._k = next(k for k in range(math.isqrt(dim), 0, -1) if dim % k == 0)

    def __call__(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> tf.Tensor:
        return tf.add_n(
            [
                self._one(spec, part, forms.matrix_shape(form, spec.shape))
                for spec, form in gradients
                for part in forms.parts_of(form)
            ]
        )

    def _one(self, spec: WeightSpec, form: Form, shape: tuple[int, int]) -> tf.Tensor:
        k, width = self._k, self.dim // self._k
        if isinstance(form, Outer):
            a = self._gaussian(spec, "rows", form.left.shape[-1], k)
            b = self._gaussian(spec, "columns", form.right.shape[-1], width)
            left, right = tf.tensordot(form.left, a, 1), tf.tensordot(form.right, b, 1)
            projected = tf.matmul(left, right, transpose_a=True)
        elif isinstance(form, Rows):
            # Rows of A by id, so that the vocabulary is never multiplied through.
            a = self._gaussian(spec, "rows", shape[0], k)
            b = self._gaussian(spec, "columns", shape[1], width)
            left, right = tf.gather(a, form.ids), tf.tensordot(form.rows, b, 1)
            projected = tf.matmul(left, right, transpose_a=True)
        else:
            value = forms.materialise(form, spec.shape)
            if len(spec.shape) < 2:
                return tf.matmul(value, self._gaussian(spec, "whole", spec.size, self.dim))
            m, n = shape
            a = self._gaussian(spec, "rows", m, k)
            b = self._gaussian(spec, "columns", n, width)
            matrix = tf.reshape(value, [-1, m, n])
            projected = tf.einsum("bmn,mk,nl->bkl", matrix, a, b)
        return tf.reshape(projected, [-1, self.dim])

    def _gaussian(self, spec: WeightSpec, role: str, rows: int, columns: int) -> tf.Tensor:
        return _gaussian_block(self._seed, spec, role, rows, columns, 0) / math.sqrt(columns)


@projection("gaussian")
class Gaussian(_OneWay):
    """A dense matrix of independent N(0, 1/dim) entries; the yardstick, and slow.

    The matrix has as many rows as the model has weights and is drawn anew, in blocks, for each
    batch, since it would seldom fit in memory.
    """

    _BLOCK = 4096

    def __init__(self, dim: int, seed: int, weights: Sequence[WeightSpec]) -> None:
        del weights
        self.dim = dim
        self._seed = seed

    def __call__(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> tf.Tensor:
        return tf.add_n([self._one(spec, form) for spec, form in gradients])

    def _one(self, spec: WeightSpec, form: Form) -> tf.Tensor:
        value = forms.materialise(form, spec.shape)
        size = min(spec.size, self._BLOCK)
        blocks = -(-spec.size // size)
        value = tf.pad(value, [[0, 0], [0, blocks * size - spec.size]])

        def add(i: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            block = _gaussian_block(self._seed, spec, "whole", size, self.dim, i)
            part = value[:, i * size : (i + 1) * size]
            return i + 1, total + tf.matmul(part, block)

        start = tf.zeros([tf.shape(value)[0], self.dim])
        shapes = [tf.TensorShape([]), tf.TensorShape([None, self.dim])]
        _, total = tf.while_loop(
            lambda i, _: i < blocks, add, [tf.constant(0), start], shape_invariants=shapes
        )
        return total / math.sqrt(self.dim)


def _gaussian_block(
    seed: int, spec: WeightSpec, role: str, rows: int, columns: int, block: int | tf.Tensor
) -> tf.Tensor:
    # Philox by name: left to itself TensorFlow picks a generator by device.
    digest = hashlib.blake2b(_key(seed, spec, role), digest_size=4).digest()
    key = int.from_bytes(digest, "little", signed=True)
    return tf.random.stateless_normal(
        [rows, columns], tf.stack([tf.constant(key), tf.cast(block, tf.int32)]), alg="philox"
    )


@projection("none")
class Whole(_OneWay):
    """The gradient itself, all weights concatenated; dim is the number of weights."""

    def __init__(self, dim: int, seed: int, weights: Sequence[WeightSpec]) -> None:
        del dim, seed
        self._weights = list(weights)
        self.dim = sum(spec.size for spec in weights)

    def __call__(self, gradients: Sequence[tuple[WeightSpec, Form]]) -> tf.Tensor:
        given = {spec: forms.materialise(form, spec.shape) for spec, form in gradients}
        batch = tf.shape(next(iter(given.values())))[0]
        parts = [given.get(spec, tf.zeros([batch, spec.size])) for spec in self._weights]
        return tf.concat(parts, axis=1)
