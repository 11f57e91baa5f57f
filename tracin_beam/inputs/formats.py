"""Formats of the user's data: how shards are counted, read in order and read at positions.

To add one, write a `Format` and put it before the last of `FORMATS`.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from tracin_beam.errors import InputError
from tracin_beam.inputs import counting
from tracin_beam.storage import files, records
from tracin_beam.storage.files import Crc, FileInfo
from tracin_beam.storage.records import BadRecord, Record

_START = 512
_REQUESTS = 16  # to file systems that take their time


class Reader(Protocol):
    def __call__(self, path: str, crc: Crc | None = None) -> Iterator[Record | BadRecord]: ...


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of shards.

    Attributes:
      name: as users know it.
      recognises: whether a file that starts with these bytes, 512 at most, is of this format, whole
        or damaged. The last of `FORMATS` takes what no other does.
      read: path → its records in order, numbered from 0. Reads the file to its end, and tells a
        `Crc`, if one is given, of every byte of it. Damage costs what it touches and no more: a
        `BadRecord` has a number as well, and says why. Raises an `InputError` if the file has
        content and is not of this format.
      count: files → how many records they hold, counted or estimated; damaged ones as may be.
    """

    name: str
    recognises: Callable[[bytes], bool]
    read: Reader
    count: Callable[[Sequence[FileInfo]], counting.Count]

    def read_at(self, path: str, positions: Collection[int]) -> Iterator[Record | BadRecord]:
        """The records at these positions that are there, in order."""
        last = max(positions, default=-1)
        for record in itertools.takewhile(lambda r: r.position <= last, self.read(path)):
            if record.position in positions:
                yield record
            if record.position == last:
                return


TFRECORD = Format("TFRecord", records.begins_as_one, records.read_records, counting.count)
FORMATS = [TFRECORD]


def read(path: str, crc: Crc | None = None) -> Iterator[Record | BadRecord]:
    """The records of a shard, in order (see `Format.read`)."""
    return _of(path).read(path, crc)


def read_at(path: str, positions: Collection[int]) -> Iterator[Record | BadRecord]:
    """The records of a shard at these positions that are there, in order."""
    return _of(path).read_at(path, positions)


def count(shards: Sequence[FileInfo]) -> counting.Count:
    """How many records shards hold, all of one format."""
    return (_of(shards[0].path) if shards else TFRECORD).count(shards)


def check(flag: str, paths: Sequence[str]) -> None:
    """Refuses files that are no shards, by their first bytes.

    Args:
      flag: that names the files, for the message.
      paths: of the files.

    Raises:
      InputError: it names the first such file, says what it is and what to do.
    """

    def foreign(path: str) -> str | None:
        start = _start(path)
        if not start and os.path.basename(path).startswith("_"):
            return "is an empty marker file, as Spark and others write"
        if not start or any(known.recognises(start) for known in FORMATS):
            return None
        for magic, said in _FOREIGN.items():
            if start.startswith(magic):
                return said
        if _is_text(start):
            return (
                "is a text file, such as CSV or JSON: write its data with tracin_beam.write_shards"
            )
        next(read(path), None)  # a shard whose first record is damaged, or an InputError
        return None

    with ThreadPoolExecutor(_REQUESTS) as pool:
        for path, said in zip(paths, pool.map(foreign, paths), strict=True):
            if said:
                others = "" if len(paths) == 1 else f", one of the {len(paths)} files that it names"
                known = " or ".join(known.name for known in FORMATS)
                raise InputError(
                    f"--{flag}: {path}{others}, is not a {known} file: it {said}. "
                    "Name the shards alone, or take the file out."
                )


def _of(path: str) -> Format:
    if len(FORMATS) > 1:
        start = _start(path)
        for known in FORMATS[:-1]:
            if known.recognises(start):
                return known
    return FORMATS[-1]


def _start(path: str) -> bytes:
    with files.open_read(path) as handle:
        return records.read_exactly(handle, _START)


_DECOMPRESS = "decompress it, or compress the shards with gzip or zlib, which are read as they are"
_WRITE = "write its data with tracin_beam.write_shards"
_FOREIGN = {
    b"BZh": f"is compressed with bzip2: {_DECOMPRESS}",
    b"\x28\xb5\x2f\xfd": f"is compressed with zstd: {_DECOMPRESS}",
    b"\xff\x06\x00\x00sNaPpY": f"is compressed with snappy: {_DECOMPRESS}",
    b"\x04\x22\x4d\x18": f"is compressed with lz4: {_DECOMPRESS}",
    b"\xfd7zXZ\x00": f"is compressed with xz: {_DECOMPRESS}",
    b"\x1f\x8b": f"is gzip of something else: {_WRITE}",
    b"PAR1": f"is a Parquet file: {_WRITE}",
    b"ARROW1": f"is an Arrow file: {_WRITE}",
    b"Obj\x01": f"is an Avro file: {_WRITE}",
    b"ORC": f"is an ORC file: {_WRITE}",
    b"\x93NUMPY": f"is a NumPy file: {_WRITE}",
    b"PK\x03\x04": f"is a zip archive (npz, keras, xlsx and others are): {_WRITE}",
    b"\x89HDF": f"is an HDF5 file: {_WRITE}",
    b"SQLite format 3": f"is a SQLite database: {_WRITE}",
    b"\x89PNG": f"is a PNG image: {_WRITE}",
    b"\xff\xd8\xff": f"is a JPEG image: {_WRITE}",
}


def _is_text(start: bytes) -> bool:
    """Whether these bytes are text in UTF-8, but for a character that is cut at the end."""
    text = start.decode(errors="replace").rstrip("\ufffd")
    return "\ufffd" not in text and all(c.isprintable() or c in "\r\n\t\ufeff" for c in text)
