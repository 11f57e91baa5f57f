import os

import numpy as np
import pytest
import tiny as t
from tiny import Tiny

from tracin_beam.stages import total


@pytest.fixture
def problem(tmp_path, launch):
    tiny = Tiny(tmp_path, launch).write_all(train=2)
    bad = t.rows("bad", 1, 9)[0].but(x=np.full(4, np.nan, np.float32))
    tiny.write("test-9.tfrecord", [*t.rows("test9.", 3, 110), bad])
    return tiny


def check(tiny, rejected, test_name="test"):
    train, test = tiny.good("train", rejected), tiny.good("test", rejected)
    expected = t.scores(tiny, test, train).sum(axis=0)
    rows = t.table(tiny.out / "total_influence" / test_name)
    assert [row["train_id"] for row in rows] == [example.id for example in train]
    close = {"rtol": 1e-4, "atol": 1e-5 * np.abs(expected).max()}
    found = np.array([row["score_by_checkpoint"] for row in rows])
    np.testing.assert_allclose(found, expected, **close)
    sums = np.array([row["score_sum"] for row in rows])
    np.testing.assert_allclose(sums, found.sum(axis=1))
    np.testing.assert_allclose([r["score_mean"] for r in rows], sums / len(test))
    predicted = np.argmax(t.residuals(train, tiny.weights[-1])[2], axis=1)
    for row, example, prediction in zip(rows, train, predicted, strict=True):
        assert (row["train_shard"], row["train_position"]) == (example.shard, example.position)
        assert (row["train_label"], row["train_prediction"]) == (example.y, prediction)


REJECTED = {("test-9.tfrecord", 3): "the loss is nan"}


def test_sums_over_the_test_set_by_closed_form(problem):
    assert problem.run("influence", total=True) == 0
    check(problem, REJECTED)
    folder = problem.out / "total_influence/test"
    assert len(os.listdir(folder)) == 2
    before = t.snapshot(folder)
    # Only what a new training shard needs is computed, and all after a change of the test set.
    problem.write("train-01.tfrecord", t.rows("new", 5, 50))
    assert problem.run("influence", total=True) == 0
    check(problem, REJECTED)
    sums = set(problem.out.glob("evaluation/test/gradients/*/*.npy"))
    assert len(os.listdir(folder)) == 3
    problem.write("test-1.tfrecord", t.rows("other", 6, 51))
    assert problem.run("influence", total=True) == 0
    check(problem, REJECTED)
    after = set(problem.out.glob("evaluation/test/gradients/*/*.npy"))
    assert len(after) == len(sums)
    assert after != sums
    assert before


def test_without_the_flag_there_is_no_such_table(problem):
    assert problem.run("influence") == 0
    assert not (problem.out / "total_influence").exists()
    # Asked for later, it is made of what is there.
    before = t.snapshot(problem.out / "embeddings")
    assert problem.run("influence", total=True) == 0
    check(problem, REJECTED)
    assert t.snapshot(problem.out / "embeddings") == before


def test_a_training_shard_without_usable_examples(problem):
    problem.write("train-5.tfrecord", [t.rows("bad", 1, 9)[0].but(x=np.full(4, np.nan, "f4"))])
    assert problem.run("influence", total=True) == 0
    check(problem, {**REJECTED, ("train-5.tfrecord", 0): "the loss is nan"})
    assert len(os.listdir(problem.out / "total_influence/test")) == 3


def test_left_out_later_they_stay_as_long_as_they_hold(problem):
    assert problem.run("influence", total=True) == 0
    folder = problem.out / "total_influence/test"
    before = t.snapshot(folder)
    assert problem.run("influence", top_k=3) == 0
    assert t.snapshot(folder) == before
    check(problem, REJECTED)
    # They are of the run's results: a damaged one is not said to be whole.
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert problem.run("influence", top_k=3) == 0
    assert not list(folder.iterdir())
    assert problem.run("influence", total=True) == 0
    check(problem, REJECTED)


@pytest.mark.parametrize("name", ["test-0.tfrecord", "train-7.tfrecord"])
def test_left_out_later_they_go_with_what_they_were_of(problem, name):
    assert problem.run("influence", total=True, recall_queries=0) == 0
    problem.write(name, t.rows("other", 5, 60))
    assert problem.run("influence", recall_queries=0) == 0
    assert not list((problem.out / "total_influence/test").glob("*"))
    assert not list((problem.out / "_state/total_influence/test").glob("train-0*"))


@pytest.mark.parametrize("name", ["train-0.tfrecord", "test-0.tfrecord"])
def test_nothing_is_kept_of_a_shard_that_changes_after_it_was_embedded(
    problem, name, monkeypatch, capsys
):
    path, other = (
        problem.folder / name,
        t.framed(t.rows("train0." if "train" in name else "test0.", 8, 9)),
    )
    content = path.read_bytes()
    original = total.parts_of

    def replaced(*args):
        path.write_bytes(other)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(total, "parts_of", replaced)
        assert problem.run("influence", total=True) == 2
    assert f"{name} changed while it was used" in capsys.readouterr().err
    path.write_bytes(content)
    assert problem.run("influence", total=True) == 0
    check(problem, REJECTED)
    problem.check(REJECTED, tables=["influence"])
    clean = t.contents(problem.out)["run.json"]["retrieval"]
    assert problem.run("influence", total=True, overwrite=True) == 0
    assert t.contents(problem.out)["run.json"]["retrieval"] == clean
