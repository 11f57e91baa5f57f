"""What crosses between workers: places, ids and scores, never a gradient."""

import importlib.util
import sys
from pathlib import Path

import pytest
from tiny import Tiny, rows

SHARDS = 3


@pytest.fixture(scope="module")
def scaling():
    path = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
    spec = importlib.util.spec_from_file_location("scaling", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # where workers look for what was pickled
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


@pytest.fixture
def crossing(scaling, tmp_path, monkeypatch):
    """A function that runs a job on so many examples: bytes by what crosses."""
    # As in a large training set, where not all pairs are scored.
    monkeypatch.setattr("tracin_beam.stages.joining.ALL_PAIRS", 0)

    def run(stage, dim, examples=8):
        folder = tmp_path / f"{stage}-{dim}-{examples}"
        folder.mkdir()
        tiny = Tiny(folder)
        for i in range(SHARDS):
            tiny.write(f"train-{i}.tfrecord", rows(f"train{i}.", examples, i))
        tiny.write("test-0.tfrecord", rows("test", 5, 9))
        flags = [
            f"--task={folder}/task.py:task",
            f"--checkpoints={folder}/ckpts",
            f"--train={folder}/train-*",
            f"--test={folder}/test-*",
            f"--output={tiny.out}",
            f"--dim={dim}",
        ]
        counted = scaling.crossing(stage, scaling.prepared(flags, stage))
        return {name: size for name, (_, size) in counted.items()}

    return run


@pytest.mark.parametrize("stage", ["influence", "self_influence"])
def test_nothing_grows_with_the_gradients(crossing, stage):
    small, large = crossing(stage, 100), crossing(stage, 1000)
    assert small.keys() == large.keys()
    assert sum(size > 0 for size in small.values()) >= 5
    for name, size in small.items():
        # The paths that cross have one digit more.
        assert large[name] <= 1.05 * size, name


def test_an_example_costs_its_id_and_place(crossing):
    few, many = crossing("self_influence", 1000), crossing("self_influence", 1000, 100)
    growing = {name for name in few if many[name] > few[name] + 100}
    assert growing == {"Embed/SameId"}
    total = sum(many.values()) - sum(few.values())
    # The id, and the shard's path, which this test's folders make long; a gradient has 4000 bytes.
    assert total / (92 * SHARDS) < 400
