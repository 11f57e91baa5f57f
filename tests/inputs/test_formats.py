import bz2
import gzip
import os
import socket
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from tracin_beam.errors import InputError
from tracin_beam.inputs import counting, formats
from tracin_beam.storage import files
from tracin_beam.storage.records import BadRecord, Record

RECORDS = [bytes([i]) * (i * 37 % 300) for i in range(200)]
PLAIN = tiny.framed(RECORDS)
PACKINGS = {"plain": bytes, "gzip": gzip.compress, "zlib": zlib.compress}


@pytest.fixture
def file(tmp_path):
    def file(content, name="train-0"):
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    return file


@pytest.mark.parametrize("packing", PACKINGS)
def test_records_are_read_in_order_and_at_positions_and_counted(file, packing):
    path = file(PACKINGS[packing](PLAIN))
    assert list(formats.read(path)) == [Record(i, data) for i, data in enumerate(RECORDS)]
    found = list(formats.read_at(path, {199, 3, 70, 5000}))
    assert found == [Record(i, RECORDS[i]) for i in (3, 70, 199)]
    assert list(formats.read_at(path, set())) == []
    info = files.FileInfo(path, os.path.getsize(path))
    assert formats.count([info]) == counting.Count((200,), True)
    formats.check("train", [path])


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_zlib_of_any_level(file, level):
    path = file(zlib.compress(PLAIN, level))
    assert [r.data for r in formats.read(path)] == RECORDS


def test_damage_of_a_zlib_file(file):
    packed = zlib.compress(PLAIN)
    for content in (packed[:-20], packed[:2000] + b"\xff" * 50 + packed[2050:], packed + b"more"):
        *good, bad = formats.read(file(content))
        assert isinstance(bad, BadRecord)
        assert "the ZLIB stream is corrupt" in bad.reason
        assert [r.data for r in good] == RECORDS[: len(good)]


def test_a_damaged_record_keeps_its_position(file):
    content = bytearray(PLAIN)
    content[len(tiny.framed(RECORDS[:70])) + 12] ^= 1
    path = file(bytes(content))
    found = list(formats.read_at(path, {69, 70, 71}))
    assert [record.position for record in found] == [69, 70, 71]
    assert isinstance(found[1], BadRecord)
    assert found[2].data == RECORDS[71]


def test_a_plain_file_that_looks_compressed(file):
    # A length of 0x9C78 is the beginning of a ZLIB stream, one of 0x8B1F of gzip.
    for length in (0x9C78, 0x0178, 0x8B1F):
        content = tiny.framed([bytes(length), b"x"])
        path = file(content)
        assert [len(r.data) for r in formats.read(path)] == [length, 1]
        formats.check("train", [path])
        damaged = file(content[:4] + b"\xff" + content[5:])
        if length != 0x8B1F:
            assert list(formats.read(damaged))[-1].data == b"x"


FOREIGN = {
    "README.md": (b"# Data\n\nOf last year.\n", "is a text file"),
    "data.csv": ("größe,label\n1,2\n".encode() * 60, "is a text file"),
    "_SUCCESS": (b"", "is an empty marker file"),
    "a.bz2": (bz2.compress(PLAIN), "compressed with bzip2: decompress it"),
    "a.zst": (b"\x28\xb5\x2f\xfd" + b"\xff\x00" * 50, "compressed with zstd"),
    "a.sz": (b"\xff\x06\x00\x00sNaPpY\x01\x02\xff", "compressed with snappy"),
    "a.lz4": (b"\x04\x22\x4d\x18\x64\x40", "compressed with lz4"),
    "a.csv.gz": (gzip.compress(b"a,b\n1,2\n" * 50), "is gzip of something else"),
    "a.npy": (b"\x93NUMPY\x01\x00", "is a NumPy file"),
    "a.bin": (bytes(range(256)) * 4, "not a TFRecord file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_among_shards_is_named(file, name):
    content, said = FOREIGN[name]
    paths = [file(PLAIN), file(b"", "empty"), file(content, name)]
    with pytest.raises(InputError, match=rf"{name}.*{said}"):
        formats.check("train", paths)


def test_a_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a")
    with pytest.raises(InputError, match=r"--train: .*/a, is not .* is a Parquet file: write its"):
        formats.check("train", [str(tmp_path / "a")])


def test_a_shard_whose_first_record_is_damaged_is_one(file):
    formats.check("train", [file(b"\xff" * 20 + PLAIN)])


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name, said in (("pipe", "a FIFO"), ("socket", "a socket")):
            for use in (formats.read, files.checksum):
                with pytest.raises(InputError, match=f"{name} is {said}, and not a file"):
                    list(use(str(tmp_path / name)))
    with pytest.raises(InputError, match="is a device"):
        files.checksum("/dev/zero")


def test_another_format_is_one_entry(file, monkeypatch):
    def lines(path, crc=None):
        with files.open_read(path) as handle:
            for i, line in enumerate(handle):
                yield Record(i, line.strip()) if line.isascii() else BadRecord(i, "not ASCII")

    def count(shards):
        return counting.Count(tuple(sum(1 for _ in lines(s.path)) for s in shards), True)

    other = formats.Format("lines", lambda start: start.startswith(b"#"), lines, count)
    monkeypatch.setattr(formats, "FORMATS", [other, formats.TFRECORD])
    path = file(b"# head\none\n\xff\n")
    assert list(formats.read(path)) == [
        Record(0, b"# head"),
        Record(1, b"one"),
        BadRecord(2, "not ASCII"),
    ]
    assert list(formats.read_at(path, {1})) == [Record(1, b"one")]
    formats.check("train", [path])
    assert formats.count([files.FileInfo(path, 3)]).total == 3
    assert [r.data for r in formats.read(file(PLAIN, "b"))] == RECORDS
