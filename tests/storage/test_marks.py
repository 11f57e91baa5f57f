"""Marks vouch for files as they were, and for nothing outside of their folder."""

import json
import os
import time
from pathlib import Path

import pytest
import remote_files

from tracin_beam.errors import InputError
from tracin_beam.storage import files, marks, runs


@pytest.fixture(params=["", remote_files.PREFIX], ids=["local", "remote"])
def root(request, tmp_path):
    """A folder with two files and their mark."""
    folder = f"{request.param}{tmp_path}/out"
    made = {}
    for name in ("a", "b"):
        path = files.join(folder, "results", name)
        with files.atomic_write(path) as handle:
            handle.write(name.encode() * 1000)
        made[path] = handle.stamp
    marks.write(files.join(folder, "mark.json"), folder, "made of this", made, rows=2)
    return folder


def read(root, fingerprint="made of this", **given):
    return marks.read(files.join(root, "mark.json"), root, fingerprint, **given)


def local(root, *names):
    return os.path.join(root.removeprefix(remote_files.PREFIX), *names)


def test_what_is_as_it_was_can_be_used(root):
    stored = read(root)
    assert stored["rows"] == 2
    assert set(stored["files"]) == {files.join(root, "results", name) for name in "ab"}
    assert read(root, "made of that") is None
    assert read(root, wanted={files.join(root, "results", "c")}) is None


@pytest.mark.parametrize(
    "content", [None, b"", b"a" * 999, bytes(1000), b"a" * 500 + b"b" + b"a" * 499, b"b" * 1000]
)
def test_what_is_not_cannot(root, content, caplog):
    path = local(root, "results", "a")
    os.remove(path)
    if content is not None:
        with open(path, "wb") as handle:
            handle.write(content)
    with caplog.at_level("WARNING", "tracin_beam"):
        assert read(root) is None


def test_content_that_is_written_again_is_the_same(root):
    path = local(root, "results", "a")
    content = Path(path).read_bytes()
    os.remove(path)
    with open(path, "wb") as handle:
        handle.write(content)
    assert read(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda mark: [],
        lambda mark: None,
        lambda mark: {},
        lambda mark: {**mark, "rows": 3},
        lambda mark: {**mark, "files": []},
        lambda mark: {**mark, "files": {"results/a": 7}},
        lambda mark: {**mark, "files": {"results/a": ["1", 2, None]}},
        lambda mark: {**mark, "fingerprint": 5},
        lambda mark: {**mark, "checksum": True},
    ],
)
def test_a_mark_of_another_shape(root, change):
    path = local(root, "mark.json")
    mark = json.loads(Path(path).read_text())
    with open(path, "w") as handle:
        json.dump(change(mark), handle)
    assert read(root) is None
    assert marks.named(files.join(root, "mark.json"), root) <= {
        files.join(root, "results", name) for name in "ab"
    }


@pytest.mark.parametrize("name", ["../x", "/x", "results/../../x", "a//x", "./a", "a\0b", ""])
def test_a_mark_that_leads_out_of_its_folder(root, name):
    path = local(root, "mark.json")
    mark = json.loads(Path(path).read_text())
    mark["files"] = {name: mark["files"]["results/a"]}
    del mark["checksum"]
    mark["checksum"] = marks._checksum(mark)
    with open(path, "w") as handle:
        json.dump(mark, handle)
    assert read(root) is None
    assert marks.named(files.join(root, "mark.json"), root) == set()


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"sets": []},
        {"sets": {"train": {"shards": ["a"]}}},
        {"sets": {"train": {"shards": {"/data/a": "../../a"}}}},
        {"sets": {"train": {"shards": {"/data/a": "/etc/passwd"}}}},
        {"sets": {"train": {"shards": {"/data/a": "b"}}}},
        {"sets": {"../train": {"shards": {}}}},
        {"fingerprint": {"dim": "many"}},
        {"fingerprint": {"dim": 5}},
        {"counts": {"train": {"read": "x"}}},
        {"timings": {"embed": 5}},
    ],
)
def test_a_run_json_that_is_not_ours(tmp_path, state):
    output = runs.Output(str(tmp_path))
    files.write_json(output.run, state)
    with pytest.raises(InputError, match=r"run\.json is not as this program writes it"):
        runs.read_run(output)


def test_a_target_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    # As where the first rename fails for want of a connection, and the second too.
    from apache_beam.io.filesystem import BeamIOError

    path = f"{remote_files.PREFIX}{tmp_path}/file"
    with files.atomic_write(path) as handle:
        handle.write(b"old")
    rename = remote_files.RemoteFileSystem.rename

    def fails(self, sources, targets):
        if targets == [path] and not sources[0].endswith(".old.tmp"):
            raise BeamIOError("no connection", {})
        rename(self, sources, targets)

    monkeypatch.setattr(remote_files.RemoteFileSystem, "rename", fails)
    with pytest.raises(OSError, match="no connection"), files.atomic_write(path) as handle:
        handle.write(b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("root", [""], ids=["local"], indirect=True)
def test_what_is_certainly_as_it_was_is_not_read(root, monkeypatch):
    monkeypatch.setattr(files, "_read_crc", lambda path: pytest.fail(f"{path} was read"))
    assert read(root)


def written_into(path):
    with open(path, "r+b") as handle:
        handle.write(b"b")


def zeroed(path):
    with open(path, "r+b") as handle:
        handle.write(bytes(1000))


def replaced(path):
    with open(path + ".new", "wb") as handle:
        handle.write(b"b" * 1000)
    os.replace(path + ".new", path)


def exchanged(path):
    other = os.path.join(os.path.dirname(path), "b")
    os.rename(path, path + ".old")
    os.rename(other, path)
    os.rename(path + ".old", other)


@pytest.mark.parametrize("change", [written_into, zeroed, replaced, exchanged])
@pytest.mark.parametrize("coarse", [False, True], ids=["", "coarse"])
def test_what_was_changed_with_the_old_time_is_read(tmp_path, monkeypatch, change, coarse):
    """Of the same size and the same time of writing; also where files have whole seconds only."""
    stat = os.stat

    def in_seconds(path, *args, **kwargs):
        found = stat(path, *args, **kwargs)
        if not str(path).startswith(str(tmp_path)):
            return found
        return os.stat_result(found[:10], {"st_mtime_ns": 10**18, "st_ctime_ns": 10**18})

    if coarse:
        monkeypatch.setattr(files.os, "stat", in_seconds)
    folder = str(tmp_path)
    made = {}
    for name in ("a", "b"):
        path = files.join(folder, name)
        with files.atomic_write(path) as handle:
            handle.write(name.encode() * 1000)
        made[path] = handle.stamp
    assert bool(made[path].version) != coarse
    marks.write(files.join(folder, "mark.json"), folder, "made of this", made)
    assert marks.read(files.join(folder, "mark.json"), folder, "made of this")
    time.sleep(0.02)  # the tick of an older kernel's clock
    path = files.join(folder, "a")
    before = stat(path)
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert marks.read(files.join(folder, "mark.json"), folder, "made of this") is None
