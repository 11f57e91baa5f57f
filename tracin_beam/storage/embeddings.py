"""Embedding files: a TFRecord for each training or test example at a checkpoint.

A record is a `tf.train.Example`: `id` (bytes), `position` (int64), `label`, `prediction`, `loss`,
`squared_norm` (float) and `embedding` (bytes: little-endian float32 [dim]). They are written
straight as protocol buffer bytes, since building a message for each in Python takes longer than
the arithmetic of a small model.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.storage import records

FLOATS = ("label", "prediction", "loss", "squared_norm")


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Rows of an embedding file, in the order of their positions.

    Attributes:
      ids: object [n] of bytes.
      position: int64 [n], place of the record in its shard.
      label, prediction, loss, squared_norm: float32 [n].
      embedding: float32 [n, dim].
    """

    ids: np.ndarray
    position: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    loss: np.ndarray
    squared_norm: np.ndarray
    embedding: np.ndarray

    def __len__(self) -> int:
        return len(self.position)

    def take(self, index: np.ndarray) -> "Embeddings":
        """The rows at these indices, or where a mask is true."""
        return Embeddings(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def encode(rows: Embeddings) -> Iterator[bytes]:
    """Serialised `tf.train.Example`s of the rows."""
    floats = np.stack([getattr(rows, name) for name in FLOATS], axis=1).astype("<f4")
    label, prediction, loss, squared_norm = (_entry_head(name, 8) + _FLOAT_HEAD for name in FLOATS)
    vectors = np.ascontiguousarray(rows.embedding, "<f4")
    vector_head = _bytes_head("embedding", vectors.shape[1] * 4)
    for i in range(len(rows)):
        identity = bytes(rows.ids[i])
        number = _varint(int(rows.position[i]))
        raw = floats[i].tobytes()
        parts = (
            _bytes_head("id", len(identity)),
            identity,
            _position_head(len(number)),
            number,
            label,
            raw[0:4],
            prediction,
            raw[4:8],
            loss,
            raw[8:12],
            squared_norm,
            raw[12:16],
            vector_head,
            vectors[i].tobytes(),
        )
        # Example.features = 1
        yield b"".join((_head(1, sum(map(len, parts))), *parts))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


# Of a file's records the lengths, and so these, are nearly all the same.
@functools.lru_cache(4096)
def _head(field: int, size: int) -> bytes:
    return _varint(field << 3 | 2) + _varint(size)


# Feature.float_list = 2, FloatList.value = 1, packed: four bytes.
_FLOAT_HEAD = _head(2, 6) + _head(1, 4)


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


@functools.lru_cache(16)
def _position_head(size: int) -> bytes:
    # Feature.int64_list = 3, Int64List.value = 1, packed.
    inner = _head(1, size)
    outer = _head(3, len(inner) + size)
    return _entry_head("position", len(outer) + len(inner) + size) + outer + inner


class EmbeddingWriter:
    """Writes rows to a binary handle as TFRecords."""

    def __init__(self, handle: BinaryIO) -> None:
        self._writer = records.RecordWriter(handle)

    def write(self, rows: Embeddings) -> None:
        self._writer.write_all(encode(rows))


def read(path: str, rows: int = 4096) -> Iterator[Embeddings]:
    """Reads an embedding file, some rows at a time.

    Raises:
      InputError: the file is damaged.
    """
    batch: list[bytes] = []
    for record in records.read_records(path):
        if isinstance(record, records.BadRecord):
            raise InputError(
                f"{path}: {record.reason} at record {record.position}. "
                "Delete the file and run again: it will be computed anew."
            )
        batch.append(record.data)
        if len(batch) == rows:
            yield decode(batch)
            batch = []
    if batch:
        yield decode(batch)


def read_at(path: str, positions: np.ndarray) -> Embeddings:
    """A file's rows at these positions, each of which it must have; at least one.

    Raises:
      InputError: it lacks one, or is damaged.
    """
    found = [part.take(np.isin(part.position, positions)) for part in read(path)]
    if sum(map(len, found)) != len(np.unique(positions)):
        raise InputError(f"{path} lacks some examples. Delete it and run again.")
    return concatenate([part for part in found if len(part)])


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Rows of all parts, one after the other."""
    names = [f.name for f in dataclasses.fields(Embeddings)]
    return Embeddings(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def decode(serialised: Sequence[bytes]) -> Embeddings:
    """The inverse of `encode`."""
    import tensorflow as tf

    spec = {name: tf.io.FixedLenFeature([], tf.float32) for name in FLOATS}
    spec["position"] = tf.io.FixedLenFeature([], tf.int64)
    spec["id"] = spec["embedding"] = tf.io.FixedLenFeature([], tf.string)
    parsed = tf.io.parse_example(list(serialised), spec)
    return Embeddings(
        ids=parsed["id"].numpy(),
        position=parsed["position"].numpy(),
        embedding=tf.io.decode_raw(parsed["embedding"], tf.float32).numpy(),
        **{name: parsed[name].numpy() for name in FLOATS},
    )


def read_checkpoints(paths: Sequence[str], excluded: Sequence[int]) -> Iterator[list[Embeddings]]:
    """The same examples at every checkpoint, some thousand at a time.

    Args:
      paths: one shard's embedding files, a file for each checkpoint.
      excluded: positions to leave out, those rejected at any checkpoint among them.

    Yields:
      For each checkpoint the embeddings of the same positions.
    """
    readers = [_without(read(path), np.asarray(excluded, np.int64)) for path in paths]
    for parts in zip(*readers, strict=True):
        if any(not np.array_equal(parts[0].position, part.position) for part in parts[1:]):
            raise InputError(
                f"{', '.join(paths)} do not hold the same examples. "
                "Delete them and run again: they will be computed anew."
            )
        yield list(parts)


def _without(parts: Iterator[Embeddings], excluded: np.ndarray) -> Iterator[Embeddings]:
    """Leaves rows out and fills up again, so that all checkpoints' parts have the same rows."""
    waiting: list[Embeddings] = []
    size = 4096
    for part in parts:
        kept = part.take(~np.isin(part.position, excluded))
        if len(kept):
            waiting.append(kept)
        if sum(map(len, waiting)) >= size:
            rows = concatenate(waiting)
            yield rows.take(np.arange(size))
            waiting = [rows.take(np.arange(size, len(rows)))] if len(rows) > size else []
    if waiting:
        yield concatenate(waiting)
