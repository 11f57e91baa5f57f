"""Every public name has an example in its docstring, which does what it says."""

import doctest

import pytest
from tiny import Tiny

import tracin_beam

NAMES = [name for name in tracin_beam.__all__ if not name.startswith("__")]


@pytest.fixture(scope="module")
def examples(tmp_path_factory, launch):
    """What the examples stand on: flags of a small run, and its output."""
    tiny = Tiny(tmp_path_factory.mktemp("doctests"), launch).write_all()
    flags = tiny.flags("influence", top_k=15)
    test = flags.pop("test")
    tracin_beam.influence(**flags, test=test, progress=False)
    tracin_beam.self_influence(**flags, progress=False)
    return {
        "example_inputs": {k: v for k, v in flags.items() if k not in ("top_k", "recall_queries")},
        "example_test": test,
        "example_output": flags["output"],
    }


@pytest.mark.parametrize("name", [*NAMES, "FinishedRun"])
def test_example(name, examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = getattr(tracin_beam, name, None) or getattr(tracin_beam.api, name)
    [test] = doctest.DocTestFinder(recurse=False).find(public, name)
    assert test.examples, f"{name} has no example"
    test.globs.update(examples)
    said = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not failed, "".join(said)
