"""TFRecord files, read and written without TensorFlow, and read past their damage.

A record is framed as: length (uint64), masked CRC-32C of the length (uint32), data, masked CRC-32C
of the data (uint32), all little-endian.
"""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.storage.files import Crc, open_read

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8
_CHUNK = 1 << 20
_MAX_READ = 1 << 24
_MAX_LENGTH = (1 << 31) - 1  # a protocol buffer cannot be longer
_LENGTHS = 4096  # of records that are known by their header
_PIECE = 1 << 20  # as large as a processor's cache, and larger than most records
FRAMING = 16  # bytes of a record besides its data


class Record(NamedTuple):
    """The data of one record, and its place in the file counted from 0."""

    position: int
    data: bytes


class BadRecord(NamedTuple):
    """A record that cannot be read, and why."""

    position: int
    reason: str


def content_hash(data: bytes) -> bytes:
    """Tells a record from any other: 16 bytes (BLAKE2b) of its serialised data."""
    return hashlib.blake2b(data, digest_size=16).digest()


class DamageError(Exception):
    """A file that this package wrote is not as it was written."""


class Piece(NamedTuple):
    """Whole records of a plain TFRecord file, one at least.

    Attributes:
      data: bytes of the file.
      starts, ends: int64 [n], where in them the data of each record begins and ends.
    """

    data: bytes
    starts: np.ndarray
    ends: np.ndarray


class RecordWriter:
    """Writes records to any binary handle, which stays the caller's to close."""

    def __init__(self, handle: BinaryIO | gzip.GzipFile):
        self._write = handle.write

    def write(self, data: bytes) -> None:
        """Appends one record."""
        self.write_all([data])

    def write_all(self, records: Iterable[bytes]) -> None:
        """Appends records, in one piece: they should fit in memory together."""
        pieces: list[bytes] = []
        pack, crc32c = _CRC.pack, google_crc32c.value
        for data in records:
            crc = crc32c(data)
            masked = ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
            pieces += (_header(len(data)), data, pack(masked))
        self._write(b"".join(pieces))


def read_records(path: str, crc: Crc | None = None) -> Iterator[Record | BadRecord]:
    """Streams the records of a TFRecord file: plain, gzip or ZLIB, told by content and not by name.

    Damage costs what it touches and no more: data with a wrong CRC is one `BadRecord`. Where a
    length is damaged the file is searched for the next sound record; the stretch between counts as
    one record, so positions after it are lower than they were if it held several. A file cut short,
    or a compressed stream that is corrupt, ends with a `BadRecord`. An empty file has no records.

    Holds about one record, or 1 MiB, in memory.

    Args:
      path: of the file.
      crc: takes all bytes of the file as they are read, and is that of the file at the end.

    Raises:
      InputError: the file has content but no record, so it is not a TFRecord file.
    """
    with open_read(path) as opened:
        handle = opened if crc is None else _Checked(opened, crc)
        head = read_exactly(handle, _HEADER.size)
        kind = compression(head)
        whole = _Prefixed(head, handle)
        source: _Prefixed | _Inflated | gzip.GzipFile = whole
        if kind == "gzip":
            source = gzip.GzipFile(fileobj=whole)  # type: ignore[call-overload]
        elif kind == "ZLIB":
            source = _Inflated(whole)
        yield from _frames(_Source(source, kind), path)
        if crc is not None:
            while handle.read(_CHUNK):  # what follows the end of a gzip stream
                pass


class _Checked:
    """A handle whose bytes a `Crc` takes too."""

    def __init__(self, handle: BinaryIO, crc: Crc):
        self._handle, self._crc = handle, crc

    def read(self, size: int) -> bytes:
        data = self._handle.read(size)
        self._crc.update(data)
        return data


def read_pieces(path: str) -> Iterator[Piece]:
    """Reads a plain TFRecord file in pieces of some MiB, checking every CRC.

    For files that we wrote ourselves: damage is an error and not a record, and no record is copied.

    Raises:
      DamageError: the file is damaged.
    """
    unpack_header, unpack_crc, crc32c = _HEADER.unpack, _CRC.unpack_from, google_crc32c.value
    lengths: dict[bytes, int] = {}  # by header, of which most are the same
    rest = b""
    with open_read(path) as handle:
        wanted = _PIECE
        while more := handle.read(wanted):
            data = rest + more if rest else more
            at, size, wanted = 0, len(data), _PIECE
            starts, ends = [], []
            while at + FRAMING <= size:
                header = data[at : at + 12]
                length = lengths.get(header, -1)
                if length < 0:
                    length = unpack_header(header)[0]
                    if not _valid_header(header) or length > _MAX_LENGTH:
                        raise DamageError(_damage(path))
                    lengths[header] = length
                start = at + 12
                end = start + length
                if end + 4 > size:
                    wanted = max(_PIECE, end + 4 - size)
                    break
                crc = crc32c(data[start:end])
                if ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF != unpack_crc(data, end)[0]:
                    raise DamageError(_damage(path))
                starts.append(start)
                ends.append(end)
                at = end + 4
            rest = data[at:]
            if starts:
                yield Piece(data, np.array(starts, np.int64), np.array(ends, np.int64))
    if rest:
        raise DamageError(_damage(path))


def _damage(path: str) -> str:
    for record in read_records(path):
        if isinstance(record, BadRecord):
            return f"{record.reason} at record {record.position}"
    return "it changed while it was read"


class _Prefixed:
    """A handle with the bytes that were already read from it put back in front."""

    def __init__(self, head: bytes, handle: "BinaryIO | _Checked"):
        self._head, self._handle = head, handle

    def read(self, size: int) -> bytes:
        if not self._head:
            return self._handle.read(size)
        data, self._head = self._head[:size], self._head[size:]
        return data

    read1 = read


class _Inflated:
    """A handle of a ZLIB stream, decompressed."""

    def __init__(self, handle: _Prefixed):
        self._handle = handle
        self._inflate = zlib.decompressobj()

    def read1(self, size: int) -> bytes:
        """Some bytes, `size` at most; none at the end.

        Raises:
          zlib.error: the stream is corrupt.
          EOFError: it ends before its end.
        """
        while not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._handle.read(_CHUNK)
            data = self._inflate.decompress(packed, size)
            if data:
                return data
            if not packed:
                raise EOFError("it ends before the end-of-stream marker was reached")
        if self._inflate.unused_data or self._handle.read(1):
            raise zlib.error("bytes follow after its end")
        return b""


class _Source:
    """A window on a stream of bytes: `buffer[at:]` is what is read and not yet used."""

    def __init__(self, handle: "_Prefixed | _Inflated | gzip.GzipFile", kind: str):
        self._read = handle.read1
        self._kind = kind
        self._ended = False
        self.buffer = b""
        self.at = 0
        self.base = 0  # where in the stream the buffer begins
        self.error: str | None = None  # why the stream ended before its end

    @property
    def offset(self) -> int:
        return self.base + self.at

    def fill(self, size: int) -> bool:
        """Reads on until `size` bytes are in the window; False when the stream ends before."""
        have = len(self.buffer) - self.at
        if have >= size or self._ended:
            return have >= size
        pieces = [self.buffer[self.at :]]
        while have < size:
            try:
                piece = self._read(min(max(size - have, _CHUNK), _MAX_READ))
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                self.error, piece = f"the {self._kind} stream is corrupt: {error}", b""
            if not piece:
                self._ended = True
                break
            pieces.append(piece)
            have += len(piece)
        self.base += self.at
        self.buffer, self.at = b"".join(pieces), 0
        return have >= size


def _frames(source: _Source, path: str) -> Iterator[Record | BadRecord]:
    unpack_header, unpack_crc, crc32c = _HEADER.unpack_from, _CRC.unpack_from, google_crc32c.value
    position, sound = 0, False
    lengths: dict[bytes, int] = {}  # by header, of which most are the same
    while source.fill(_HEADER.size):
        buffer, at = source.buffer, source.at
        # Sound records that are in the window as a whole; any other goes the way below.
        size = len(buffer)
        while (length := lengths.get(buffer[at : at + 12], size)) <= size - at - FRAMING:
            end = at + 12 + length
            data = buffer[at + 12 : end]
            crc = crc32c(data)
            if ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF != unpack_crc(buffer, end)[0]:
                break
            yield Record(position, data)
            position += 1
            at = end + 4
        source.at = at
        if not source.fill(_HEADER.size):
            break
        buffer, at = source.buffer, source.at
        length, length_crc = unpack_header(buffer, at)
        crc = crc32c(buffer[at : at + 8])
        if ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF != length_crc:
            start = source.offset
            found = _resynchronise(source)
            if not (found or sound or source.error):
                raise InputError(
                    f"{path} is not a TFRecord file: it has content but no record with a valid "
                    "CRC. Check the path, or write the data with tracin_beam.write_shards"
                )
            after = f"skipped {source.offset - start} bytes" if found else "no sound record follows"
            yield BadRecord(position, f"the record at byte {start} has a damaged length: {after}")
            position += 1
            if not found:
                break
            continue
        sound = True
        if len(lengths) < _LENGTHS:
            lengths[buffer[at : at + 12]] = length
        if length > _MAX_LENGTH or not source.fill(length + 16):
            if not source.error:
                yield BadRecord(
                    position,
                    f"the record at byte {source.offset} is cut short: it claims {length} bytes",
                )
            source.at = len(source.buffer)
            break
        buffer, begin = source.buffer, source.at + 12
        end = begin + length
        data = buffer[begin:end]
        crc = crc32c(data)
        if ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF == unpack_crc(buffer, end)[0]:
            yield Record(position, data)
        else:
            yield BadRecord(
                position, f"the data of the record at byte {source.offset} has a wrong CRC"
            )
        source.at = end + 4
        position += 1
    if source.error:
        yield BadRecord(position, source.error)
    elif source.at < len(source.buffer):
        yield BadRecord(position, f"the record at byte {source.offset} is cut short")


def _resynchronise(source: _Source) -> bool:
    """Moves to the next record whose CRCs are both right; if there is none returns False."""
    source.at += 1
    while source.fill(_HEADER.size):
        source.fill(_CHUNK)
        begin = source.offset
        chunk = source.buffer[source.at : source.at + _CHUNK]
        for start in _headers(chunk):
            source.at = begin + start - source.base
            length = _HEADER.unpack_from(source.buffer, source.at)[0]
            if length > _MAX_LENGTH or not source.fill(length + 16):
                continue
            end = source.at + 12 + length
            if (
                _masked_crc(source.buffer[source.at + 12 : end])
                == _CRC.unpack_from(source.buffer, end)[0]
            ):
                return True
        source.at = begin + len(chunk) - _HEADER.size + 1 - source.base
    source.at = len(source.buffer)
    return False


def _headers(data: bytes) -> list[int]:
    """The offsets in `data` of headers with a valid CRC and a length below 2^32."""
    octets = np.frombuffer(data, np.uint8)
    zero = octets[4:-4] == 0
    starts = np.flatnonzero(zero[:-3] & zero[1:-2] & zero[2:-1] & zero[3:])
    crc, tables = _crc_tables()
    crcs = np.full(len(starts), crc, np.uint32)
    for place, table in enumerate(tables):
        crcs ^= table[octets[starts + place]]
    stored = octets[starts[:, None] + np.arange(8, 12)].view("<u4")[:, 0]
    return starts[(crcs >> 15 | crcs << 17) + np.uint32(_MASK_DELTA) == stored].tolist()


@cache
def _crc_tables() -> tuple[int, list[np.ndarray]]:
    """The CRC of eight zero bytes, and what each value of the first four bytes flips in it.

    A CRC is affine over GF(2), so the CRCs of many headers take a few look-ups in these four
    tables [256] of uint32.
    """
    crc = google_crc32c.value
    zero = crc(bytes(8))
    flips = [
        [crc(bytes(place) + bytes([value]) + bytes(7 - place)) ^ zero for value in range(256)]
        for place in range(4)
    ]
    return zero, [np.array(flip, np.uint32) for flip in flips]


def compression(start: bytes) -> str:
    """How a file that starts with these bytes, twelve at least, is compressed: gzip, ZLIB or ""."""
    if _valid_header(start):
        return ""
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    # RFC 1950: deflate with a window of up to 32 KiB, and a check of the first two bytes.
    if len(start) < 2 or start[0] & 0x8F != 8 or (start[0] << 8 | start[1]) % 31:
        return ""
    try:
        zlib.decompressobj().decompress(start)
    except zlib.error:  # a plain file whose first bytes are damaged
        return ""
    return "ZLIB"


def begins_as_one(start: bytes) -> bool:
    """Whether the first bytes of a file, some hundred, are those of a sound TFRecord file."""
    if compression(start):
        try:
            start = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(start, _HEADER.size)
        except zlib.error:
            return False
    return _valid_header(start)


def read_exactly(handle: "BinaryIO | _Checked", size: int) -> bytes:
    """So many bytes, or what there is until the end."""
    data = b""
    while len(data) < size and (piece := handle.read(size - len(data))):
        data += piece
    return data


@lru_cache(4096)
def _header(length: int) -> bytes:
    """What comes before a record of so many bytes."""
    octets = struct.pack("<Q", length)
    return octets + _CRC.pack(_masked_crc(octets))


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _valid_header(data: bytes) -> bool:
    """Whether these bytes begin as a plain TFRecord file does."""
    return len(data) >= 12 and _masked_crc(data[:8]) == _CRC.unpack_from(data, 8)[0]
