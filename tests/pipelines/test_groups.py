"""The influence of groups on groups and what slices rest on, against loops over closed forms."""

import numpy as np
import pytest
import tiny as t
from tiny import Tiny

# The group is the last letter of the id, which parse gives as a number.
TASK = t.TASK.replace(
    '"id": example["id"]}',
    '"id": example["id"],\n'
    '        "group": tf.strings.to_number(tf.strings.substr(example["id"], -1, 1), tf.int64) % 3}',
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, launch):
    tiny = Tiny(tmp_path_factory.mktemp("groups"), launch).write_all(train=2, test=2)
    tiny.write("train-1.tfrecord", [*t.rows("train1.", 8, 1), b"garbage"])
    (tiny.folder / "task.py").write_text(TASK)
    return tiny


def sides(tiny):
    return tiny.good("train", {("train-1.tfrecord", 8)}), tiny.good("test")


def group(row):
    return str(int(row.id[-1]) % 3)


def predicted(tiny, some):
    return np.argmax(t.residuals(some, tiny.weights[-1])[2], axis=1)


def check_groups(tiny, name, terms, of_train, of_test):
    """Every number of the table, by a loop over pairs."""
    found = t.table(tiny.out / "group_influence" / name)
    pairs = {(a, b) for a in of_train for b in of_test}
    assert {(row["train_group"], row["test_group"]) for row in found} == pairs
    assert len(found) == len(pairs)
    for row in found:
        i = [k for k, g in enumerate(of_test) if g == row["test_group"]]
        j = [k for k, g in enumerate(of_train) if g == row["train_group"]]
        own = terms[np.ix_(i, j)]
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(row["score_by_checkpoint"], own.sum(axis=(0, 1)), **close)
        np.testing.assert_allclose(row["score_sum"], own.sum(), **close)
        np.testing.assert_allclose(row["score_mean"], own.sum(axis=2).mean(), **close)
        assert (row["train_examples"], row["test_examples"]) == (len(j), len(i))
        each = own.sum(axis=2).mean(axis=0)
        if len(j) > 1:
            error = each.std(ddof=1) / np.sqrt(len(j))
            np.testing.assert_allclose(row["standard_error"], error, rtol=1e-3)
        else:
            assert row["standard_error"] is None


def check_slice(tiny, rows, name, terms, chosen, train):
    mine = [row for row in rows if row["slice"] == name]
    own = terms[chosen].mean(axis=0)
    scores = own.sum(axis=1)
    for role, sign in (("proponent", -1), ("opponent", 1)):
        of_role = [row for row in mine if row["role"] == role]
        order = np.argsort(sign * scores, kind="stable")[: len(of_role)]
        assert [row["rank"] for row in of_role] == list(range(1, len(of_role) + 1))
        assert [row["train_id"] for row in of_role] == [train[i].id for i in order]
        for row, i in zip(of_role, order, strict=True):
            np.testing.assert_allclose(row["score_by_checkpoint"], own[i], rtol=1e-4, atol=1e-5)
            assert row["score"] == pytest.approx(sum(row["score_by_checkpoint"]))
            place = (row["train_shard"], row["train_position"], row["train_label"])
            assert place == (train[i].shard, train[i].position, train[i].y)
            assert row["test_examples"] == np.sum(chosen)
    return len(mine)


def test_groups_and_slices(tiny, capsys):
    slices = ("wrong", "label=1&group=0", "label=2.5")
    flags = {"top_k": 5, "recall_queries": 0}
    config = tiny.folder / "config.yaml"
    config.write_text("slice:\n" + "".join(f"  - {one}\n" for one in slices))
    assert tiny.run("influence", group_by="group", config=config, **flags) == 0
    assert "label=2.5: no test example" in capsys.readouterr().err
    train, test = sides(tiny)
    terms = t.scores(tiny, test, train)
    check_groups(tiny, "test", terms, [*map(group, train)], [*map(group, test)])
    rows = t.table(tiny.out / "slice_influence" / "test")
    wrong = predicted(tiny, test) != [row.y for row in test]
    both = np.array([row.y == 1 and group(row) == "0" for row in test])
    assert wrong.any()
    assert both.any()
    assert check_slice(tiny, rows, "wrong", terms, wrong, train) == 10
    assert check_slice(tiny, rows, "label=1&group=0", terms, both, train) == 10
    assert len(rows) == 20
    state = tiny.run_json()
    assert state["groups"] == {"by": ["group", "group"], "train": 3, "test": 3}
    assert [one["test_examples"] for one in state["slices"]] == [wrong.sum(), both.sum(), 0]
    # A run of other flags keeps the tables, another training set removes them.
    folder = tiny.out / "group_influence"
    before = t.snapshot(folder)
    assert tiny.run("influence", top_k=3, recall_queries=0) == 0
    assert t.snapshot(folder) == before
    assert tiny.run_json()["groups"] == state["groups"]
    # A shard that came costs its own pass alone.
    kept = t.snapshot(tiny.out / "evaluation" / "test" / "sets")
    assert tiny.run("influence", group_by="group", config=config, **flags) == 0
    assert t.snapshot(tiny.out / "evaluation" / "test" / "sets") == kept
    first = tiny.path("train-0*")
    assert tiny.run("influence", train=first, top_k=3, recall_queries=0) == 0
    assert not list(folder.rglob("*.parquet"))
    assert tiny.run_json()["groups"] is None


@pytest.mark.parametrize("kind", ["projected", "kfac"])
def test_of_a_preconditioned_score(tiny, kind):
    flags = {"projection": "none", "preconditioner": kind, "recall_queries": 0}
    out = {"output": tiny.path(kind), "group_by": "shard,label", "slice": "right"}
    assert tiny.run("influence", **flags, **out) == 0
    train, test = sides(tiny)
    terms = []
    for weights, rate in zip(tiny.weights, tiny.rates, strict=True):
        ours, theirs = (
            np.einsum("ni,nj->nij", x, r).reshape(len(some), -1)
            for some in (train, test)
            for r, x, _ in [t.residuals(some, weights)]
        )
        second = t.kronecker(train, weights) if kind == "kfac" else ours.T @ ours / len(ours)
        terms.append(rate * t.damped(second, theirs) @ ours.T)
    terms = np.stack(terms, axis=2)
    other = object.__new__(Tiny)
    other.out = tiny.folder / kind
    check_groups(other, "test", terms, [r.shard for r in train], [str(r.y) for r in test])
    right = predicted(tiny, test) == [row.y for row in test]
    rows = t.table(other.out / "slice_influence" / "test")
    assert check_slice(other, rows, "right", terms, right, train) == 2 * len(train)


def test_misuse(tmp_path, launch, capsys):
    tiny = Tiny(tmp_path, launch).write_all(train=1, test=1)
    for flags, words in (
        ({"group_by": "colour"}, "--group_by=colour: take one of group, label"),
        ({"group_by": "group"}, '--group_by=group,group needs a group: let parse return "group"'),
        ({"slice": "label=cat"}, "'cat' is no number"),
        ({"slice": "bad"}, "--slice=bad: write wrong, right, label=…"),
    ):
        assert tiny.run("influence", **flags) == 2
        assert words in capsys.readouterr().err
    assert not (tiny.out / "embeddings").exists()
