"""Embedding files: a TFRecord for each training or test example at a checkpoint.

A record is a `tf.train.Example` with the columns of `Embeddings`: `id` (bytes), `position` (int64),
`label`, `prediction`, `loss`, `squared_norm`, `norm_error` (float) and `embedding` (bytes: [dim]
little-endian numbers). The numbers are float32 unless the record says otherwise: one that has a
`dtype` (bytes: "float16" or "int8") has a `scale` (float) as well, by which its numbers are to be
multiplied.

They are written straight as protocol buffer bytes, since building a message for each in Python
takes longer than the arithmetic of a small model. They are read as arrays over the bytes of the
file, since the place of every column is known in what we wrote; records that look otherwise go
through TensorFlow's parser. The CRC of every record is checked on every way.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, BinaryIO, NamedTuple, cast

import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.storage import records

_ROWS = 4096
_SCALED_ROWS = 64


class Kind(NamedTuple):
    """How a column lies in the record.

    Attributes:
      kind: "bytes", "int" (int64), "float" (float32) or "vector" (numbers of a `Dtype`, as bytes).
      name: in the record, where it is not the attribute's.
    """

    kind: str
    name: str = ""


class Column(NamedTuple):
    """A column of the record: its name in `Embeddings` and in the record, and its `Kind`."""

    attribute: str
    name: str
    kind: str


class Dtype(NamedTuple):
    """How the numbers of an embedding lie in the record.

    Attributes:
      numbers: NumPy's name of their type.
      largest: what a row's number of the largest magnitude is scaled to; None for no scale.
    """

    numbers: str
    largest: float | None

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return np.dtype(self.numbers).itemsize


# A row whose largest number is m has a rounding error of at most m / 254 in int8, so that an inner
# product's is at most √(dim / 193,548) of what the sketch itself is off by. float16 is scaled as
# well, since gradients late in training are below its smallest number.
DTYPES = {
    "float32": Dtype("<f4", None),
    "float16": Dtype("<f2", 2.0**14),
    "int8": Dtype("i1", 127.0),
}
# The smallest that costs less than half a point of recall, by benchmarks/dtypes.py.
SMALLEST = "int8"


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Rows of an embedding file, in the order of their positions.

    This is the table of the record's columns: the encoder, the readers, the size of a record and
    the layout in the fingerprint follow from it. The one column of bytes comes first, then
    integers, then what has the same size in every record.

    Attributes:
      ids: object [n] of bytes.
      position: int64 [n], place of the record in its shard.
      label, prediction, loss, squared_norm: float32 [n].
      norm_error: float32 [n], the standard error of squared_norm; 0 where that is exact.
      embedding: float32 [n, dim], whatever its dtype in the record.
    """

    ids: Annotated[np.ndarray, Kind("bytes", "id")]
    position: Annotated[np.ndarray, Kind("int")]
    label: Annotated[np.ndarray, Kind("float")]
    prediction: Annotated[np.ndarray, Kind("float")]
    loss: Annotated[np.ndarray, Kind("float")]
    squared_norm: Annotated[np.ndarray, Kind("float")]
    norm_error: Annotated[np.ndarray, Kind("float")]
    embedding: Annotated[np.ndarray, Kind("vector")]

    def __len__(self) -> int:
        return len(self.position)

    def take(self, index: np.ndarray) -> "Embeddings":
        """The rows at these indices, or where a mask is true."""
        return Embeddings(**{c.attribute: getattr(self, c.attribute)[index] for c in COLUMNS})


COLUMNS = tuple(
    Column(field.name, kind.name or field.name, kind.kind)
    for field in dataclasses.fields(Embeddings)
    for kind in cast(Any, field.type).__metadata__
)
# Stands in the fingerprint, so that files of another layout are not taken for these.
LAYOUT = " ".join(f"{column.name}:{column.kind}" for column in COLUMNS)
_BYTES = COLUMNS[0]
_INTEGERS = [column for column in COLUMNS if column.kind == "int"]
_FIXED = [column for column in COLUMNS if column.kind in ("float", "vector")]
_DTYPE, _SCALE = "dtype", Column("scale", "scale", "float")
FLOATS = tuple(column.attribute for column in COLUMNS if column.kind == "float")
# What is computed of an example, besides what tells which it is.
COMPUTED = tuple(column.attribute for column in _FIXED)


def record_bytes(dim: int, identity: int, position: int = 10_000, *, dtype: str = "float32") -> int:
    """Bytes of a record in an embedding file, with its framing.

    Args:
      dim: length of the embedding.
      identity: bytes of the id.
      position: how large its position is, and every other integer.
      dtype: of the embedding, one of `DTYPES`.
    """
    digits = len(_varint(position))
    size = len(_bytes_head(_BYTES.name, identity)) + identity + _fixed_dtype(dim, dtype).itemsize
    size += sum(len(_int_head(column.name, digits)) + digits for column in _INTEGERS)
    return records.FRAMING + len(_head(1, size)) + size


def encode(rows: Embeddings, dtype: str = "float32") -> Iterator[bytes]:
    """Serialised `tf.train.Example`s of the rows, their embeddings in one of `DTYPES`."""
    dim = rows.embedding.shape[1]
    fixed = np.empty(len(rows), _fixed_dtype(dim, dtype))
    for column in _fixed(dtype):
        fixed[_head_of(column)] = _fixed_head(column, dim, dtype)
    for column in _FIXED[:-1]:
        fixed[column.name] = getattr(rows, column.attribute)
    if DTYPES[dtype].largest is None:
        fixed[_FIXED[-1].name] = rows.embedding
    else:
        fixed[_SCALE.name] = _scaled(rows.embedding, DTYPES[dtype], fixed[_FIXED[-1].name])
    octets, size = fixed.tobytes(), fixed.dtype.itemsize
    ends = [octets[at : at + size] for at in range(0, len(octets), size)]
    for column in reversed(_INTEGERS):
        entries = _entries(column, getattr(rows, column.attribute))
        ends = list(map(operator.add, entries, ends))
    for identity, end in zip(rows.ids, ends, strict=True):
        yield b"".join((_front_of(len(identity), len(end)), identity, end))


def _scaled(vectors: np.ndarray, dtype: Dtype, out: np.ndarray) -> np.ndarray:
    """Writes the numbers of float32 [n, dim] as they are stored, and gives the scale of every row.

    Rows that are so small that the scale is no normal float32 are stored as zeros.
    """
    most = np.maximum(vectors.max(axis=1, initial=0), -vectors.min(axis=1, initial=0))
    scale = most / np.float32(dtype.largest)
    scale[scale < np.finfo(np.float32).tiny] = 0
    factor = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    is_whole = np.dtype(dtype.numbers).kind == "i"
    # Some rows at a time, which stay in the processor's cache.
    for start in range(0, len(vectors), _SCALED_ROWS):
        some = slice(start, start + _SCALED_ROWS)
        numbers = vectors[some] * factor[some, None]
        if is_whole:
            np.rint(numbers, out=numbers)
        out[some] = numbers
    return scale


def _entries(column: Column, values: np.ndarray) -> list[bytes]:
    """The entries of integers, with their heads."""
    left = values.astype(np.int64).view(np.uint64)
    sizes = 1 + np.sum([left >> np.uint64(7 * place) > 0 for place in range(1, 10)], axis=0)
    found = np.empty(len(values), object)
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        head = np.frombuffer(_int_head(column.name, size), np.uint8)
        entries = np.empty((len(rows), len(head) + size), np.uint8)
        entries[:, : len(head)] = head
        for place in range(size):
            more = 0x80 if place < size - 1 else 0
            octet = left[rows] >> np.uint64(7 * place) & np.uint64(0x7F)
            entries[:, len(head) + place] = octet | np.uint64(more)
        octets, width = entries.tobytes(), entries.shape[1]
        found[rows] = [octets[at : at + width] for at in range(0, len(octets), width)]
    return found.tolist()


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


# The lengths of a file's records, and so these heads, are nearly all the same.
@functools.lru_cache(4096)
def _head(field: int, size: int) -> bytes:
    return _varint(field << 3 | 2) + _varint(size)


def _entry_head(name: str, size: int) -> bytes:
    """What of a `Features.feature` entry comes before its value of so many bytes."""
    key = _head(1, len(name)) + name.encode()
    value_head = _head(2, size)
    return _head(1, len(key) + len(value_head) + size) + key + value_head


@functools.lru_cache(4096)
def _bytes_head(name: str, size: int) -> bytes:
    # Feature.bytes_list = 1, BytesList.value = 1.
    inner = _head(1, size)
    outer = _head(1, len(inner) + size)
    return _entry_head(name, len(outer) + len(inner) + size) + outer + inner


@functools.lru_cache(4096)
def _front_of(identity: int, end: int) -> bytes:
    """What comes before an id of so many bytes, and what follows it, of so many."""
    front = _bytes_head(_BYTES.name, identity)
    return _head(1, len(front) + identity + end) + front  # Example.features = 1


@functools.lru_cache(64)
def _int_head(name: str, size: int) -> bytes:
    # Feature.int64_list = 3, Int64List.value = 1, packed.
    inner = _head(1, size)
    outer = _head(3, len(inner) + size)
    return _entry_head(name, len(outer) + len(inner) + size) + outer + inner


def _fixed(dtype: str) -> list[Column]:
    """The columns of fixed size, in the order of the record."""
    scaled = DTYPES[dtype].largest is not None
    return [*_FIXED[:-1], *([_SCALE] if scaled else []), _FIXED[-1]]


def _fixed_head(column: Column, dim: int, dtype: str) -> np.ndarray:
    """What comes before the value of a column of fixed size: uint8 [k]."""
    if column.kind == "float":  # Feature.float_list = 2, FloatList.value = 1, packed: four bytes
        head = _entry_head(column.name, 8) + _head(2, 6) + _head(1, 4)
    else:
        head = _bytes_head(column.name, dim * DTYPES[dtype].size)
    if column is _SCALE:  # behind the dtype, which is the same in all records
        head = _bytes_head(_DTYPE, len(dtype)) + dtype.encode() + head
    return np.frombuffer(head, np.uint8)


def _head_of(column: Column) -> str:
    return f"{column.name} head"


@functools.lru_cache(16)
def _fixed_dtype(dim: int, dtype: str) -> np.dtype:
    """The end of every record: the columns of fixed size, each behind its head."""
    parts: list[Any] = []
    for column in _fixed(dtype):
        parts.append((_head_of(column), "u1", (len(_fixed_head(column, dim, dtype)),)))
        is_vector = column.kind == "vector"
        value = (DTYPES[dtype].numbers, (dim,)) if is_vector else ("<f4",)
        parts.append((column.name, *value))
    return np.dtype(parts)


class EmbeddingWriter:
    """Writes rows to a binary handle as TFRecords, their embeddings in one of `DTYPES`."""

    def __init__(self, handle: BinaryIO, dtype: str = "float32") -> None:
        self._writer = records.RecordWriter(handle)
        self._dtype = dtype

    def write(self, rows: Embeddings) -> None:
        self._writer.write_all(encode(rows, self._dtype))


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Rows of all parts, one after the other."""
    names = [column.attribute for column in COLUMNS]
    return Embeddings(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def decode(serialised: Sequence[bytes]) -> Embeddings:
    """The inverse of `encode`, for the messages of any program.

    Raises:
      InputError: embeddings of a dtype that is not known.
    """
    import tensorflow as tf

    types = {"int": tf.int64, "float": tf.float32}
    spec = {c.name: tf.io.FixedLenFeature([], types.get(c.kind, tf.string)) for c in COLUMNS}
    spec[_DTYPE] = tf.io.FixedLenFeature([], tf.string, "float32")
    spec[_SCALE.name] = tf.io.FixedLenFeature([], tf.float32, 1.0)
    parsed = {
        name: value.numpy() for name, value in tf.io.parse_example(list(serialised), spec).items()
    }
    columns = {column.attribute: parsed[column.name] for column in COLUMNS}
    vector = _FIXED[-1]
    parts = []
    for octets, scale, name in zip(
        parsed[vector.name], parsed[_SCALE.name], parsed[_DTYPE], strict=True
    ):
        dtype = DTYPES.get(name.decode(errors="replace"))
        if dtype is None:
            raise InputError(
                f"an embedding of the dtype {name!r}, which is none of {', '.join(DTYPES)}"
            )
        parts.append(np.frombuffer(octets, dtype.numbers) * scale)
    columns[vector.attribute] = np.stack(parts).astype(np.float32, copy=False)
    return Embeddings(**columns)


def _views(piece: records.Piece, columns: Sequence[Column]) -> dict[str, np.ndarray]:
    """Columns of the records of a piece, found in its bytes.

    The columns of fixed size end where their record ends, so that they are found from there
    whatever the length of its id. Integers come before them, and the id is what is left.

    Returns:
      By attribute. Floats and vectors are views on the bytes (not aligned, not to be written to)
      where the records lie at equal distances. Vectors are as they are stored; with those that
      have a scale, "scale" comes as well.

    Raises:
      ValueError: a record is not as `encode` writes it.
    """
    dim, dtype = _form(piece)
    fixed = _fixed_dtype(dim, dtype)
    starts = piece.ends - fixed.itemsize
    if (starts < piece.starts).any():
        raise ValueError("too short for a record")
    wanted = [*columns, _SCALE] if _FIXED[-1] in columns else columns
    views = {}
    for column in _fixed(dtype):
        _demand(
            _at(piece.data, starts, *fixed.fields[_head_of(column)][:2]),  # type: ignore[index]
            _fixed_head(column, dim, dtype),
        )
        if column in wanted:
            views[column.attribute] = _at(piece.data, starts, *fixed.fields[column.name][:2])  # type: ignore[index]
    for column in reversed(_INTEGERS):
        views[column.attribute], starts = _integers(piece, column, starts)
    if _BYTES in columns:
        views[_BYTES.attribute] = _identities(piece, starts)
    return {c.attribute: views[c.attribute] for c in wanted if c.attribute in views}


def _form(piece: records.Piece) -> tuple[int, str]:
    """Numbers in the embedding of the first record, and their dtype."""
    column = _FIXED[-1]
    key = _head(1, len(column.name)) + column.name.encode()
    start, end = int(piece.starts[0]), int(piece.ends[0])
    found = piece.data.rfind(key, start, end)
    if found < 0:
        raise ValueError("no embedding")
    after = found + len(key)
    for head in range(4, 20):
        size = end - after - head
        expected = _bytes_head(column.name, max(size, 0))
        if size >= 0 and piece.data.startswith(expected, after + head - len(expected)):
            for name, dtype in DTYPES.items():
                dim, left = divmod(size, dtype.size)
                first = _fixed(name)[0]
                begin = end - _fixed_dtype(dim, name).itemsize
                front = _fixed_head(first, dim, name).tobytes()
                # What is at the place of the first column tells which dtype it is.
                if not left and begin >= start and piece.data.startswith(front, begin):
                    return dim, name
    raise ValueError("no embedding at the end of a record")


def _at(data: bytes, starts: np.ndarray, dtype: np.dtype, offset: int) -> np.ndarray:
    """Values of a dtype that lie so many bytes after each start: [n, …]."""
    base, shape = dtype.base, dtype.shape
    inner = (base.itemsize,) * len(shape)
    steps = np.diff(starts)
    if not len(steps) or (steps == steps[0]).all():
        step = int(steps[0]) if len(steps) else dtype.itemsize
        first = int(starts[0]) + offset
        return np.ndarray((len(starts), *shape), base, data, first, (step, *inner))
    everywhere = len(data) - dtype.itemsize + 1
    return np.ndarray((everywhere, *shape), base, data, 0, (1, *inner))[starts + offset]


def _demand(found: np.ndarray, expected: np.ndarray) -> None:
    if (found != expected).any():
        raise ValueError("not the bytes of this record's layout")


def _integers(
    piece: records.Piece, column: Column, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Integers whose entries end at these places: int64 [n], and where the entries begin."""
    octets = np.frombuffer(piece.data, np.uint8)
    values = np.zeros(len(ends), np.uint64)
    sizes = np.zeros(len(ends), np.int64)
    # A number's last byte is below 128 and all before it are not, nor is its head's last byte.
    for place in range(10):
        at = ends - 1 - place
        if (at < piece.starts).any():
            raise ValueError("too short for a number")
        octet = octets[at]
        going = (sizes == place) & ((octet > 0x7F) == (place > 0))
        if not going.any():
            break
        values[going] = values[going] << np.uint64(7) | octet[going] & np.uint64(0x7F)
        sizes += going
    begins = np.empty_like(ends)
    for size in np.unique(sizes).tolist():
        rows = sizes == size
        head = np.frombuffer(_int_head(column.name, size), np.uint8)
        begins[rows] = ends[rows] - size - len(head)
        if (begins[rows] < piece.starts[rows]).any():
            raise ValueError("too short for a number")
        _demand(octets[begins[rows][:, None] + np.arange(len(head))], head)
    return values.view(np.int64), begins


def _identities(piece: records.Piece, ends: np.ndarray) -> np.ndarray:
    """The ids, which with the head of the message lie between its start and these places."""
    found = np.empty(len(ends), object)
    places = (piece.starts.tolist(), ends.tolist(), piece.ends.tolist())
    for i, (start, end, last) in enumerate(zip(*places, strict=True)):
        head = _front(end - start, last - start)
        if not piece.data.startswith(head, start):
            raise ValueError("not the bytes of an id")
        found[i] = piece.data[start + len(head) : end]
    return found


@functools.lru_cache(4096)
def _front(size: int, message: int) -> bytes:
    """What comes before an id that ends after so many bytes of a message of this length."""
    for outer in range(2, 8):
        head = _head(1, max(message - outer, 0))
        for inner in range(10, 30):
            length = size - outer - inner
            front = head + _bytes_head(_BYTES.name, max(length, 0))
            if length >= 0 and len(head) == outer and len(front) == outer + inner:
                return front
    raise ValueError("too short for an id")


class _Rows:
    """Some columns of a file's rows, one stretch after the other.

    Attributes:
      path: of the file.
    """

    def __init__(
        self,
        path: str,
        columns: Sequence[Column],
        excluded: np.ndarray,
        only: np.ndarray | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
          path: of the file.
          columns: which to read.
          excluded: positions to leave out.
          only: positions to read, or None for all.
        """
        self.path = path
        self._columns = columns
        self._excluded, self._only = np.unique(excluded), only
        self._parts = self._kept()
        self._part: dict[str, np.ndarray] = {}
        self._at = 0

    def stretches(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The next so many rows, fewer only at the end of the file.

        Yields:
          Parts of them: columns by attribute, as `_views` gives them; vectors as they are stored.
        """
        while count and self._fill():
            part = {name: c[self._at : self._at + count] for name, c in self._part.items()}
            size = len(part["position"])
            self._at += size
            count -= size
            yield part

    def _fill(self) -> bool:
        """Reads on if nothing is left of what was read; whether there is anything then."""
        if not self._part or self._at == len(self._part["position"]):
            self._part, self._at = next(self._parts, {}), 0
        return bool(self._part)

    def width(self, attribute: str) -> int:
        """Numbers in a row of a vector; 0 if there are no rows."""
        return self._part[attribute].shape[1] if self._fill() else 0

    def _kept(self) -> Iterator[dict[str, np.ndarray]]:
        for part in self._decoded():
            position = part["position"]
            if self._only is not None:
                kept = np.isin(position, self._only)
            else:
                kept = np.ones(len(position), bool)
            if len(self._excluded):
                kept &= ~np.isin(position, self._excluded)
            if kept.all():
                yield part
            elif kept.any():
                yield {name: column[kept] for name, column in part.items()}

    def _decoded(self) -> Iterator[dict[str, np.ndarray]]:
        try:
            for piece in records.read_pieces(self.path):
                try:
                    yield _views(piece, self._columns)
                except ValueError:
                    places = zip(piece.starts.tolist(), piece.ends.tolist(), strict=True)
                    rows = decode([piece.data[start:end] for start, end in places])
                    yield {c.attribute: getattr(rows, c.attribute) for c in self._columns}
        except records.DamageError as error:
            raise InputError(
                f"{self.path}: {error}. Delete the file and run again: it will be computed anew."
            ) from error


def read(path: str, rows: int = _ROWS) -> Iterator[Embeddings]:
    """Reads an embedding file, some rows at a time.

    Raises:
      InputError: the file is damaged.
    """
    return _parts(_Rows(path, COLUMNS, np.empty(0, np.int64)), rows)


def _parts(source: _Rows, rows: int) -> Iterator[Embeddings]:
    while parts := list(source.stretches(rows)):
        for part in parts:
            if (scale := part.pop(_SCALE.attribute, None)) is not None:
                name = _FIXED[-1].attribute
                part[name] = np.multiply(part[name], scale[:, None], dtype=np.float32)
        yield Embeddings(**{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def read_at(path: str, positions: np.ndarray) -> Embeddings:
    """A file's rows at these positions, each of which it must have; at least one.

    Raises:
      InputError: it lacks one, or is damaged.
    """
    wanted = np.unique(positions)
    source = _Rows(path, COLUMNS, np.empty(0, np.int64), wanted)
    found = list(_parts(source, len(wanted)))
    if sum(map(len, found)) != len(wanted):
        raise InputError(f"{path} lacks some examples. Delete it and run again.")
    return concatenate(found)


def read_checkpoints(
    paths: Sequence[str], excluded: Sequence[int], rows: int = _ROWS
) -> Iterator[list[Embeddings]]:
    """The same examples at every checkpoint, some thousand at a time.

    Args:
      paths: one shard's embedding files, a file for each checkpoint.
      excluded: positions to leave out, those rejected at any checkpoint among them.
      rows: how many at a time; the last part may have fewer.

    Yields:
      For each checkpoint the embeddings of the same positions.
    """
    left_out = np.asarray(excluded, np.int64)
    readers = [_parts(_Rows(path, COLUMNS, left_out), rows) for path in paths]
    for parts in itertools.zip_longest(*readers):
        positions = [np.empty(0) if part is None else part.position for part in parts]
        _demand_same(paths, positions)
        yield list(parts)


class MatrixReader:
    """One shard's embeddings at every checkpoint side by side, read into arrays that are given.

    A row is [s_1 e_1, …, s_C e_C] over the C checkpoints. With s_c = √η_c the inner product of two
    rows is TracInCP in the projection (Pruthi et al. 2020, section 3).

    Holds some MiB for each file, whatever its size. Bytes are read, checked (every CRC) and copied
    once, at about the speed at which they come from the disk.
    """

    def __init__(
        self,
        paths: Sequence[str],
        excluded: Sequence[int] | np.ndarray = (),
        *,
        only: Sequence[int] | np.ndarray | None = None,
        scales: Sequence[float] | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
          paths: one shard's embedding files, a file for each checkpoint.
          excluded: positions to leave out.
          only: positions to read, in the order of the file; None for all.
          scales: s_c, 1 if not given.
        """
        position, vector = (
            next(c for c in COLUMNS if c.attribute == name) for name in ("position", "embedding")
        )
        left_out = np.asarray(excluded, np.int64)
        wanted = None if only is None else np.asarray(only, np.int64)
        self._files = [_Rows(path, [position, vector], left_out, wanted) for path in paths]
        self._scales = [1.0] * len(paths) if scales is None else list(scales)

    @property
    def width(self) -> int:
        """Numbers in a row, checkpoints × dim; 0 if there are no rows."""
        return sum(source.width("embedding") for source in self._files)

    def read(self, out: np.ndarray) -> np.ndarray:
        """Reads the next rows, as many as there is room for.

        Args:
          out: float32 [n, width]; rows after the last one read stay as they are.

        Returns:
          int64 [m], positions of the rows read, m < n only at the end.

        Raises:
          InputError: a file is damaged, or they do not hold the same examples.
        """
        found = []
        column = 0
        for source, scale in zip(self._files, self._scales, strict=True):
            positions = []
            row = width = 0
            for part in source.stretches(len(out)):
                vectors = part["embedding"]
                width = vectors.shape[1]
                target = out[row : row + len(vectors), column : column + width]
                own = part.get(_SCALE.attribute)
                if own is not None:
                    factor = own[:, None] * np.float32(scale)
                    np.multiply(vectors, factor, out=target, dtype=np.float32)
                elif scale == 1:
                    target[...] = vectors
                else:
                    np.multiply(vectors, np.float32(scale), out=target)
                positions.append(part["position"])
                row += len(vectors)
            found.append(np.concatenate([np.empty(0, np.int64), *positions]))
            column += width
        _demand_same([source.path for source in self._files], found)
        return found[0]


def _demand_same(paths: Sequence[str], positions: Sequence[np.ndarray]) -> None:
    if any(not np.array_equal(positions[0], other) for other in positions[1:]):
        raise InputError(
            f"{', '.join(paths)} do not hold the same examples. "
            "Delete them and run again: they will be computed anew."
        )
