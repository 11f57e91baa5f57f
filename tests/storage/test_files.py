import gzip
import json
import os

import google_crc32c
import pytest
from remote_files import PREFIX

from tracin_beam.errors import InputError
from tracin_beam.storage import files


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else PREFIX + str(tmp_path)


def put(folder, *names):
    for name in names:
        with files.atomic_write(files.join(folder, name)) as handle:
            handle.write(name.encode())


def test_list_folder_is_no_pattern(folder, tmp_path):
    put(folder, "b.x", ".a.tmp", "sub/c.x")
    assert [i.path for i in files.list_folder(folder)] == [f"{folder}/.a.tmp", f"{folder}/b.x"]
    assert files.list_folder(folder, deep=True)[-1] == files.FileInfo(f"{folder}/sub/c.x", 7)
    assert files.list_folder(f"{folder}/none") == []
    for name in ("run[1]", "a*", "a,b", "{a,b}", "it's 50%25 #1=?", "-x", "~", "ünïcode"):
        odd = files.join(str(tmp_path), name)
        put(odd, "file", "in/file")
        assert [i.path for i in files.list_folder(odd)] == [f"{odd}/file"]
        assert len(files.list_folder(odd, deep=True)) == 2


def test_checksum_is_of_the_content(tmp_path):
    path = tmp_path / "file"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    before = files.checksum(str(path))
    assert before == f"{google_crc32c.value(content):08x}"
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert files.checksum(str(path)) != before
    assert files.checksum(f"{PREFIX}{path}") == f"etag-{files.checksum(str(path))}"


def test_open_read_does_not_decompress(folder):
    packed = gzip.compress(b"content")
    with files.atomic_write(f"{folder}/a.gz") as handle:
        handle.write(packed)
    with files.open_read(f"{folder}/a.gz") as handle:
        assert handle.read() == packed


def test_local_copy_keeps_the_name_and_is_removed(folder):
    put(folder, "model.weights.h5")
    path = f"{folder}/model.weights.h5"
    with files.local_copy(path) as local:
        assert os.path.basename(local) == "model.weights.h5"
        with open(local, "rb") as handle:
            assert handle.read() == b"model.weights.h5"
    assert os.path.exists(local) == (local == path)


def test_atomic_write_shows_nothing_until_it_is_done(folder, tmp_path):
    path = f"{folder}/new/data.tfrecord"
    with files.atomic_write(path) as handle:
        handle.write(b"one")
        assert not files.exists(path)
        [unfinished] = os.listdir(tmp_path / "new")
        assert not unfinished.endswith(".tfrecord")
    with files.atomic_write(path) as handle:
        handle.write(b"two")
        with files.open_read(path) as old:
            assert old.read() == b"one"
    with files.open_read(path) as new:
        assert new.read() == b"two"
    assert os.listdir(tmp_path / "new") == ["data.tfrecord"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_that_fails_leaves_what_was_there(folder, tmp_path, error):
    put(folder, "kept")

    def write():
        with files.atomic_write(f"{folder}/kept") as handle:
            handle.write(b"half")
            raise error

    with pytest.raises(error):
        write()
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_json_round_trip_and_damage(folder):
    path = f"{folder}/run.json"
    value = {"b": [1, 2.5, None], "a": "é"}
    files.write_json(path, value)
    assert files.read_json(path) == value
    with files.open_read(path) as handle:
        text = handle.read().decode()
    assert text == json.dumps(value, indent=1) + "\n"
    for damaged in (text[:-5].encode(), b"\xff\xfe"):
        with files.atomic_write(path) as handle:
            handle.write(damaged)
        with pytest.raises(InputError, match=r"run\.json is not valid JSON"):
            files.read_json(path)


def test_remove_ignores_what_is_missing(folder, tmp_path):
    put(folder, "a", "b", "c")
    files.remove([f"{folder}/{name}" for name in ("a", "missing", "c")])
    assert os.listdir(tmp_path) == ["b"]


def test_join(folder):
    assert files.join(folder, "a", "b") == f"{folder}/a/b"
    with pytest.raises(InputError, match="nowhere://x"):
        files.join("nowhere://x", "a")


def test_names_as_long_as_they_may_be(folder):
    name = "ü" * 127
    put(folder, name)
    assert files.exists(f"{folder}/{name}")


def test_full_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert files.full("~/a") == "/home/me/a"
    assert files.full("./~/a") == str(tmp_path / "~" / "a")
    assert files.full("data/a") == str(tmp_path / "data" / "a")
    assert files.full("/data/a") == "/data/a"
    assert files.full("gs://bucket/a") == "gs://bucket/a"
