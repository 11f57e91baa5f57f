"""How many records do shards hold? Counted where that is cheap, otherwise estimated."""

import dataclasses
import mmap
import struct
import zlib
from collections.abc import Sequence

from tracin_beam.storage import files
from tracin_beam.storage.files import FileInfo
from tracin_beam.storage.records import compression, read_exactly

_LENGTH = struct.Struct("<Q")
_FRAME = 16  # bytes of a record besides its data
_START = 12  # bytes of a record's length and the CRC of it
# How much is read of a file to estimate from, and of how many files.
_HEAD_BYTES = 8 << 20
_SAMPLED = 16
# Records of all files together that are skipped through one by one: some seconds.
_MOST_SKIPPED = 5_000_000


@dataclasses.dataclass(frozen=True)
class Count:
    """Numbers of records.

    Attributes:
      records: of each file, in the order of the files.
      exact: whether all were counted; otherwise some follow from the files' sizes.
    """

    records: tuple[int, ...]
    exact: bool

    @property
    def total(self) -> int:
        return sum(self.records)


def count(shards: Sequence[FileInfo]) -> Count:
    """Counts the records of TFRecord files, plain or compressed.

    Plain local files are skipped through by the lengths of their records. Of other files, and where
    that would take too long, the first bytes of some are read, and the rest follows from the files'
    sizes.
    """
    numbers: list[int | None] = [None] * len(shards)
    exact = True
    skipped = sample_records = sample_bytes = 0
    step = max(1, -(-len(shards) // _SAMPLED))
    for i, shard in enumerate(shards):
        if shard.size and files.is_local(shard.path) and skipped < _MOST_SKIPPED:
            numbers[i] = _skip_through(shard.path)
            skipped += numbers[i] or 0
        if numbers[i] is None and (i % step == 0 or shard.size == 0):
            records, used = _of_head(_head(shard.path))
            whole = used >= shard.size
            exact &= whole
            numbers[i] = records if whole else round(records * shard.size / max(1, used))
        if (number := numbers[i]) is not None:
            sample_records += number
            sample_bytes += shard.size
    exact &= None not in numbers
    density = sample_records / max(1, sample_bytes)
    return Count(
        tuple(
            round(density * shard.size) if number is None else number
            for number, shard in zip(numbers, shards, strict=True)
        ),
        exact,
    )


def _skip_through(path: str) -> int | None:
    """The number of records of a plain local file; None of a compressed file."""
    with (
        open(path, "rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return None if compression(data[:_START]) else _frames(data)[0]


def _head(path: str) -> bytes:
    with files.open_read(path) as handle:
        return read_exactly(handle, _HEAD_BYTES)


def _of_head(head: bytes) -> tuple[int, int]:
    """How many records begin in the first bytes of a file, and how many bytes they take in it."""
    if not compression(head[:_START]):
        records, used = _frames(head)
        return records, len(head) if len(head) < _HEAD_BYTES else used
    plain = b""
    rest = head
    try:
        while rest:  # of members, of which a file may have several
            member = zlib.decompressobj(zlib.MAX_WBITS | 32)
            plain += member.decompress(rest)
            rest = member.unused_data
    except zlib.error:  # what is damaged is not counted
        pass
    return _frames(plain)[0], len(head)


def _frames(data: bytes | mmap.mmap) -> tuple[int, int]:
    """Whole records in the data, and where the last one ends."""
    unpack, size = _LENGTH.unpack_from, len(data)
    records, at = 0, 0
    while at + _FRAME <= size:
        end = at + _FRAME + unpack(data, at)[0]
        if end > size:
            break
        records, at = records + 1, end
    return records, at
