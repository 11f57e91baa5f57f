import gzip

import numpy as np
import pytest
import tiny

from tracin_beam.inputs import counting
from tracin_beam.storage import files

RECORDS = [np.random.default_rng(i).bytes(i % 50) for i in range(3000)]


@pytest.fixture
def shard(tmp_path):
    def write(name, content, remote=False):
        path = tmp_path / name
        path.write_bytes(content)
        prefix = "remote://" if remote else ""
        return files.FileInfo(f"{prefix}{path}", len(content))

    return write


def test_plain_files_are_counted(shard):
    content = tiny.framed(RECORDS)
    shards = [shard("a", content), shard("b", tiny.framed(RECORDS[:7])), shard("c", b"")]
    counted = counting.count(shards)
    assert counted == counting.Count((3000, 7, 0), True)
    assert counted.total == 3007


def test_gzip_files_that_are_read_whole_are_counted(shard):
    content = tiny.framed(RECORDS)
    halves = gzip.compress(content[: len(content) // 2]) + gzip.compress(
        content[len(content) // 2 :]
    )
    shards = [shard("a.gz", gzip.compress(content)), shard("b.gz", halves)]
    assert counting.count(shards) == counting.Count((3000, 3000), True)


def test_a_plain_record_that_begins_as_gzip_does(shard):
    content = tiny.framed([bytes(0x088B1F), b"x"])
    assert content[:3] == b"\x1f\x8b\x08"
    assert counting.count([shard("a", content)]).records == (2,)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_too_long_to_read_is_estimated(shard, monkeypatch, packed):
    monkeypatch.setattr(counting, "_HEAD_BYTES", 20_000)
    monkeypatch.setattr(counting, "_MOST_SKIPPED", 0)
    content = tiny.framed(RECORDS)
    counted = counting.count([shard("a", gzip.compress(content) if packed else content)])
    assert not counted.exact
    assert counted.total == pytest.approx(3000, rel=0.1)


def test_of_many_files_some_are_looked_at(shard, monkeypatch):
    monkeypatch.setattr(counting, "_MOST_SKIPPED", 0)
    content = tiny.framed([b"same size"] * 20)
    counted = counting.count([shard(f"{i:03}", content) for i in range(100)])
    assert counted == counting.Count((20,) * 100, False)


def test_a_file_that_is_cut_short(shard):
    content = tiny.framed(RECORDS)
    assert counting.count([shard("a", content[:-1])]).total == 2999
    assert counting.count([shard("b", gzip.compress(content)[:-20])]).total > 2900
