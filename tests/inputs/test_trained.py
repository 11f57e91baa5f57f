"""Which shards a training has seen, and what that says of the shards of a night."""

import json

import pytest
from training import compiled, fit, listing

from tracin_beam.errors import InputError
from tracin_beam.inputs import trained
from tracin_beam.inputs.callback import TracInCheckpoint, save_checkpoint
from tracin_beam.inputs.checkpoints import read_checkpoints
from tracin_beam.storage import runs


def shards(folder, **contents):
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return str(folder / "*")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shards(folder, a=b"first", b=b"second!")
    return folder


def cohorts(folder, checkpoints, pattern=""):
    found = runs.find_shards(str(folder / "*"), "train", {})
    names = {shard.path: shard.name for shard in found}
    return {
        names[path]: cohort
        for path, cohort in trained.cohorts(found, str(checkpoints), pattern).items()
    }


def test_the_callback_tells_what_it_trains_on(data, tmp_path):
    directory = tmp_path / "ckpts"
    fit(compiled(0.1), TracInCheckpoint(directory, train=str(data / "*")), epochs=2)
    first, second = listing(directory)
    assert [shard["path"] for shard in first["train"]] == [str(data / "a"), str(data / "b")]
    assert [shard["identity"][:2] for shard in first["train"]] == ["5:", "7:"]
    assert "train" not in second
    assert len(read_checkpoints(str(directory))) == 2

    assert set(cohorts(data, directory).values()) == {"trained"}
    shards(data, b=b"changed", c=b"came")
    (data / "a").rename(data / "moved")
    assert cohorts(data, directory) == {"moved": "trained", "b": "unknown", "c": "new"}
    assert cohorts(data, directory, str(data / "c")) == {"moved": "new", "b": "new", "c": "trained"}
    with pytest.raises(InputError, match="--trained: "):
        cohorts(data, directory, str(data / "d*"))


def test_all_stages_of_a_training_count(data, tmp_path):
    model, directory = compiled(0.1), tmp_path / "ckpts"
    save_checkpoint(directory, model, 1, 0.1, train=[data / "a"])
    save_checkpoint(directory, model, 2, 0.1, train=[data / "a"])
    assert cohorts(data, directory) == {"a": "trained", "b": "new"}
    save_checkpoint(directory, model, 3, 0.1)
    assert cohorts(data, directory) == {"a": "trained", "b": "unknown"}
    save_checkpoint(directory, model, 4, 0.1, train=data / "b")
    assert ["train" in entry for entry in listing(directory)] == [True, False, True, True]
    shards(data, c=b"came")
    assert cohorts(data, directory) == {"a": "trained", "b": "trained", "c": "unknown"}


def test_what_is_not_known(data, tmp_path):
    directory = tmp_path / "ckpts"
    save_checkpoint(directory, compiled(0.1), 1, 0.1)
    assert "train" not in listing(directory)[0]
    assert set(cohorts(data, directory).values()) == {"unknown"}
    # A copy in a bucket, whose checksum is another one, may be the shard that was trained on.
    entries = listing(directory)
    entries[0]["train"] = [{"path": "gs://bucket/a", "identity": "5:AAAAAA=="}]
    (directory / "checkpoints.json").write_text(json.dumps(entries))
    assert cohorts(data, directory) == {"a": "unknown", "b": "new"}
    entries[0]["train"] = ["a"]
    (directory / "checkpoints.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"Entry 0 of .*: 'train' must be a list of shards"):
        cohorts(data, directory)
    with pytest.raises(InputError, match="nowhere"):
        fit(compiled(0.1), TracInCheckpoint(tmp_path / "other", train=str(tmp_path / "nowhere*")))
