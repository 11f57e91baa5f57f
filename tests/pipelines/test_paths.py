"""Folders and files with names that are patterns elsewhere."""

import os

import pytest
from tiny import Tiny

ODD = "proj [lr=0.1], {a,b} 50%25 #1 ünï=x"


@pytest.fixture
def problem(tmp_path, launch, monkeypatch):
    """A problem in such a folder, which is the current directory."""
    (tmp_path / ODD).mkdir()
    problem = Tiny(tmp_path / ODD, launch).write_all()
    monkeypatch.chdir(tmp_path / ODD)
    return problem


def test_whole_jobs_in_an_odd_folder(problem):
    relative = {"task": "task.py:task", "checkpoints": "ckpts", "output": "out"}
    for queries in (2, 3):  # the second time over the tables that are there
        flags = {**relative, "train": "train-*", "test": "./test-*", "recall_queries": queries}
        assert problem.run("influence", **flags) == 0
        assert problem.run("self_influence", **relative, train="train-*") == 0
        problem.check()
    assert problem.run("self_influence", **relative, train="train-*", seed=1, overwrite=True) == 0
    problem.check(tables=["self_influence"])


def test_the_same_by_full_paths_and_from_home(problem, monkeypatch):
    assert problem.run("influence") == 0
    problem.check(tables=["influence"])
    monkeypatch.setenv("HOME", str(problem.folder))
    monkeypatch.chdir("/")
    home = {"task": "~/task.py:task", "checkpoints": "~/ckpts", "output": "~/out"}
    assert problem.run("self_influence", **home, train="~/train-*") == 0
    problem.check()


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\udcffb"])
def test_names_that_cannot_be_written_down_are_refused_at_once(problem, capsys, name):
    for flag in ("output", "test_name", "checkpoints", "train"):
        assert problem.run("influence", **{flag: name}) == 2
        said = capsys.readouterr().err
        assert flag in said
        assert "rename it" in said
    assert not os.path.exists("out")


def test_names_as_long_as_they_may_be(problem):
    [*_, shard] = [name for name in sorted(os.listdir()) if name.startswith("train")]
    long = "train-" + "ü" * 124
    os.rename(shard, long)
    assert problem.run("self_influence") == 0
    assert any(name.startswith("train-üü") for name in os.listdir("out/embeddings/train/10"))
