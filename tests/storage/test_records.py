import gzip
import io
import struct
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest

from tracin_beam.errors import InputError
from tracin_beam.storage.records import BadRecord, Record, RecordWriter, _headers, read_records

DATA = [b"first", b"", b"the third record", bytes(20), b"last one"]


def framed(records):
    handle = io.BytesIO()
    writer = RecordWriter(handle)
    for data in records:
        writer.write(data)
    return handle.getvalue()


def starts(records):
    return np.cumsum([0] + [16 + len(data) for data in records]).tolist()


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "shard"
        path.write_bytes(content)
        return list(read_records(str(path)))

    return read


def good(items):
    return [item.data for item in items if isinstance(item, Record)]


def test_reads_what_tensorflow_writes_and_the_other_way(tmp_path):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    data = [rng.bytes(size) for size in [0, 1, 3_000_000, *rng.integers(0, 2000, 500)]]
    expected = [Record(i, item) for i, item in enumerate(data)]
    for compression in ("", "GZIP"):
        theirs = str(tmp_path / f"theirs{compression}")
        with tf.io.TFRecordWriter(theirs, compression) as writer:
            for item in data:
                writer.write(item)
        assert list(read_records(theirs)) == expected
    ours = tmp_path / "ours"
    ours.write_bytes(framed(data))
    assert [item.numpy() for item in tf.data.TFRecordDataset(str(ours))] == data


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    for name, content in [
        ("a.gz", framed(DATA)),
        ("b.tfrecord", gzip.compress(framed(DATA))),
        ("c.tfrecord", gzip.compress(framed(DATA[:2])) + gzip.compress(framed(DATA[2:]))),
    ]:
        (tmp_path / name).write_bytes(content)
        assert good(read_records(str(tmp_path / name))) == DATA


def test_a_record_as_long_as_the_gzip_magic(read):
    data = bytes(0x8B1F)  # the length's first bytes are 1f 8b
    assert read(framed([data])) == [Record(0, data)]


def test_an_empty_file_has_no_records(read):
    assert read(b"") == []
    assert read(gzip.compress(b"")) == []


@pytest.mark.parametrize("bit", [0, 7])
def test_every_flipped_bit_costs_at_most_its_own_record(read, bit):
    content, places = framed(DATA), starts(DATA)
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        items = read(bytes(damaged))
        hit = next(i for i in range(len(DATA)) if at < places[i + 1])
        assert [item.position for item in items] == list(range(len(DATA)))
        assert isinstance(items[hit], BadRecord)
        assert f"at byte {places[hit]}" in items[hit].reason
        assert good(items) == DATA[:hit] + DATA[hit + 1 :]


def test_every_truncation_keeps_what_is_whole(read):
    content, places = framed(DATA), starts(DATA)
    for size in range(1, len(content)):
        items = read(content[:size])
        whole = sum(size >= end for end in places[1:])
        assert good(items) == DATA[:whole]
        cut = [BadRecord] if size not in places else []
        assert [type(item) for item in items[whole:]] == cut


def test_every_truncated_or_flipped_byte_of_gzip_is_reported(read):
    rng = np.random.default_rng(3)
    data = [rng.bytes(40) for _ in range(20)]
    content = gzip.compress(framed(data), mtime=0)
    for size in range(12, len(content)):
        items = read(content[:size])
        assert isinstance(items[-1], BadRecord)
        assert good(items) == data[: len(good(items))]
    for at in range(2, len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        items = read(bytes(damaged))
        assert set(good(items)) <= set(data)
        # Some bits change nothing, such as the header's time and those between stream and CRC.
        assert good(items) == data or any(isinstance(item, BadRecord) for item in items)


def test_resynchronises_after_a_long_damaged_stretch(read):
    rng = np.random.default_rng(1)
    before, after = [b"a", b"b"], [b"c" * 5000, b"d", bytes(3_000_000), b"e"]
    for garbage in (
        rng.bytes(2_500_000),
        bytes(2_500_000),
        np.arange(300_000, dtype="<i8").tobytes(),  # much looks like a length
    ):
        items = read(framed(before) + b"\x01" + garbage + framed(after))
        assert [type(item) for item in items] == [Record] * 2 + [BadRecord] + [Record] * 4
        assert good(items) == before + after
        assert [item.position for item in items] == list(range(7))
        assert f"skipped {len(garbage) + 1} bytes" in items[2].reason


def test_resynchronises_past_a_record_that_is_damaged_as_well(read):
    content, places = bytearray(framed(DATA)), starts(DATA)
    content[places[1]] ^= 1  # a length
    content[places[2] + 13] ^= 1  # data
    items = read(bytes(content))
    assert good(items) == [DATA[0], DATA[3], DATA[4]]
    assert [item.position for item in items] == [0, 1, 2, 3]


def test_an_absurd_length_with_a_right_crc_is_a_cut_record(read):
    for length in (10**6, 2**31, 2**62):
        header = struct.pack("<Q", length)
        crc = google_crc32c.value(header)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        items = read(framed(DATA) + header + struct.pack("<I", masked) + b"abc")
        assert good(items) == DATA
        [bad] = items[len(DATA) :]
        assert "cut short" in bad.reason
        assert str(length) in bad.reason


@pytest.mark.parametrize(
    "content",
    [
        b"id,label\n1,2\n" * 100,
        b"\x89PNG\r\n" + bytes(5000),
        gzip.compress(b"text in a gzip file"),
    ],
    ids=["csv", "png", "gzip"],
)
def test_a_file_of_another_format_is_refused(tmp_path, content):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.csv is not a TFRecord file"):
        list(read_records(str(path)))


def test_the_header_search_agrees_with_the_definition():
    rng = np.random.default_rng(2)
    records = [rng.bytes(size) for size in (0, 5, 300, 70_000)]
    content = rng.bytes(1001) + framed(records) + bytes(500)
    found = [
        i
        for i in range(len(content) - 11)
        if content[i + 4 : i + 8] == bytes(4)
        and content[i + 8 : i + 12]
        == framed([bytes(int.from_bytes(content[i : i + 3], "little"))])[8:12]
        and content[i + 3] == 0
    ]
    assert _headers(content) == found == [1001 + place for place in starts(records)[:-1]]
    assert _headers(b"\xff" * 12) == []


def test_needs_no_tensorflow():
    code = "import sys, tracin_beam.storage.records; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
