import dataclasses
import itertools
import os
import random
from pathlib import Path

import numpy as np

from tracin_beam.stages import index
from tracin_beam.stages.joining import Join
from tracin_beam.storage import files
from tracin_beam.storage.runs import TRAIN, Output, Shard, ShardResult

UNIT = "0123456789abcdef"


def result(name, rows, rejected=()):
    return ShardResult(
        TRAIN,
        Shard(f"/data/{name}", name, f"{rows}:x"),
        rows,
        tuple((position, "bad") for position in rejected),
    )


def units(results, changed=()):
    return {r.shard.path: UNIT[::-1] if r.shard.name in changed else UNIT for r in results}


def plan(results, index_rows, before=(), changed=()):
    known = {r.shard.path: part.number for part in before for r in part.shards}
    results = list(results)
    random.Random(0).shuffle(results)  # as Beam gives them
    return index.plan(results, units(results, changed), index_rows, known)


def members(partitions):
    return {part.number: [r.shard.name for r in part.shards] for part in partitions}


def test_shards_fill_groups_in_their_order():
    results = [result(name, 40) for name in "abcde"]
    assert members(plan(results, 100)) == {0: ["a", "b"], 1: ["c", "d"], 2: ["e"]}
    assert members(plan(results, 1)) == dict(enumerate(["a"], 0)) | {
        i: [name] for i, name in enumerate("abcde")
    }
    assert members(plan(results, 1000)) == {0: list("abcde")}


def test_a_plan_does_not_depend_on_the_order_of_results():
    results = [result(f"{i:02d}", 10 + i) for i in range(20)]
    known = {f"/data/{i:02d}": i // 7 for i in range(0, 20, 2)}
    plans = []
    for seed in range(10):
        random.Random(seed).shuffle(results)
        plans.append(index.plan(results, units(results), 70, known))
    assert all(other == plans[0] for other in plans)


def test_new_shards_change_the_last_group_only():
    day1 = [result(name, 40) for name in ("b", "d", "f")]
    before = plan(day1, 100)
    assert members(before) == {0: ["b", "d"], 1: ["f"]}
    # The new ones' names come before, between and behind.
    after = plan([*day1, result("a", 40), result("c", 40), result("g", 40)], 100, before)
    assert members(after) == {0: ["b", "d"], 1: ["a", "f"], 2: ["c", "g"]}
    assert after[0] == before[0]
    assert after[1].fingerprint != before[1].fingerprint


def test_shards_that_go_change_their_own_group_only():
    results = [result(name, 40) for name in "abcdef"]
    before = plan(results, 100)
    after = plan([r for r in results if r.shard.name not in "cde"], 100, before)
    assert members(after) == {0: ["a", "b"], 2: ["f"]}
    assert after[0] == before[0]
    assert after[1].fingerprint != before[2].fingerprint
    # What comes next goes to the last one, and no number is given twice.
    later = plan([result(name, 40) for name in "abfxyz"], 100, after)
    assert members(later) == {0: ["a", "b"], 2: ["f", "x"], 3: ["y", "z"]}


def test_a_changed_shard_keeps_its_place():
    results = [result(name, 40) for name in "abcd"]
    before = plan(results, 100)
    after = plan(results, 100, before, changed="b")
    assert members(after) == members(before)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True]
    rejecting = plan([result("a", 40, rejected=[7]), *results[1:]], 100, before)
    assert [a.fingerprint == b.fingerprint for a, b in zip(before, rejecting, strict=True)] == [
        False,
        True,
    ]


def test_a_group_that_has_grown_too_large_is_divided():
    before = plan([result(name, 40) for name in "abcd"], 100)
    after = plan([result("a", 90), *(result(name, 40) for name in "bcd")], 100, before)
    assert members(after)[1] == ["c", "d"]
    assert sorted(itertools.chain(*members(after).values())) == list("abcd")
    assert all(sum(r.used for r in part.shards) <= 100 for part in after)


def test_shards_without_usable_rows_are_left_out_and_large_ones_stand_alone():
    results = [result("a", 0), result("b", 2, rejected=[0, 1]), result("c", 500), result("d", 5)]
    assert members(plan(results, 100)) == {0: ["c"], 1: ["d"]}
    assert plan(results[:2], 100) == []


def test_a_group_with_too_many_rows_is_indexed_in_pieces():
    (group,) = plan([result("c", 500, rejected=[1, 2])], 100)
    pieces = index.pieces(group, 100)
    assert [(p.start, p.stop) for p in pieces] == [
        (0, 99),
        (99, 199),
        (199, 298),
        (298, 398),
        (398, 498),
    ]
    assert len({p.fingerprint for p in pieces}) == 5
    paths = {p.path(Output("out"), "x") for p in pieces}
    assert len(paths) == 5
    (whole,) = index.pieces(group, 498)
    assert whole.path(Output("out"), "x") == "out/index/part-00000/x"


def join_of(tmp_path, results, checkpoints):
    shards = tuple(r.shard for r in results)
    return Join(
        Output(str(tmp_path)),
        shards,
        (),
        "test",
        "loss",
        tuple(checkpoints),
        None,
        units(results),
        "TracInCP",
        16,
        8,
    )


def test_pieces_are_built_once_and_found_again(tmp_path, write_rows):
    checkpoints = write_rows.checkpoints
    results = [result("a", 30, rejected=[3]), result("b", 20)]
    written = write_rows(TRAIN, results)
    join = join_of(tmp_path, results, checkpoints)
    (group,) = index.planned_groups(join, results, 100)
    (piece,) = index.pieces(group, 100)
    index.build(join, piece)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "index").rglob("*") if p.is_file()}
    index.build(join, piece)
    assert made == {p: p.stat().st_mtime_ns for p in made}

    scaled = [
        np.hstack([np.sqrt(c.learning_rate) * written[r.shard.name, c.step] for c in checkpoints])
        for r in results
    ]
    matrix = np.vstack([np.delete(scaled[0], 3, axis=0), scaled[1]])
    places = [("/data/a", i) for i in range(30) if i != 3] + [("/data/b", i) for i in range(20)]
    queries = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)

    def check(pieces, rows):
        found = {}
        for piece in pieces:
            with index.loaded(join.output, piece) as searcher:
                hits, scores = searcher.search(queries, 1000)
                shards = [searcher.shards[code] for code in searcher.code]
                at = list(zip(shards, searcher.position.tolist(), strict=True))
            for q in range(4):
                assert scores[q].tolist() == sorted(scores[q].tolist(), reverse=True)
                for hit, score in zip(hits[q], scores[q], strict=True):
                    found[q, at[hit]] = score
        assert len(found) == 4 * 49
        for (q, place), score in found.items():
            expected = queries[q] @ rows[places.index(place)]
            np.testing.assert_allclose(score, expected, rtol=1e-4, atol=0.05)  # they are int8

    check([piece], matrix)
    small = index.pieces(group, 20)
    assert len(small) == 3
    for part in small:
        index.build(join, part)
    check(small, matrix)
    # Another fingerprint is another searcher, and the one before is removed.
    other = dataclasses.replace(group, fingerprint="other")
    changed = write_rows(TRAIN, results)
    (piece,) = index.pieces(other, 100)
    index.build(join, piece)
    scaled = [
        np.hstack([np.sqrt(c.learning_rate) * changed[r.shard.name, c.step] for c in checkpoints])
        for r in results
    ]
    check([piece], np.vstack([np.delete(scaled[0], 3, axis=0), scaled[1]]))
    assert len(list((tmp_path / "index" / "part-00000").glob("scann*"))) == 1


class Trained:
    """Stands for a searcher: training is not the same twice."""

    count = 0

    def serialize(self, folder, relative_path):
        assert relative_path
        Trained.count += 1
        for name in ("codebook", "hashes"):
            Path(folder, name).write_text(f"training {Trained.count}")


def test_a_retry_while_the_first_attempt_still_writes(tmp_path, monkeypatch, write_rows):
    results = [result("a", 30)]
    write_rows(TRAIN, results)
    join = join_of(tmp_path, results, write_rows.checkpoints)
    (group,) = index.planned_groups(join, results, 100)
    (piece,) = index.pieces(group, 100)
    monkeypatch.setattr(index, "searcher", lambda matrix: Trained())
    upload, retried = files.upload, []

    def interrupted(local, path):
        stamp = upload(local, path)
        if not retried:
            retried.append(True)
            index.build(join, piece)
        return stamp

    monkeypatch.setattr(files, "upload", interrupted)
    index.build(join, piece)
    mark = files.read_json(piece.path(join.output, "partition.json"))
    folder = Path(piece.path(join.output, mark["folder"]))
    assert len({path.read_text() for path in folder.iterdir()}) == 1
    named = {os.path.basename(name) for name in mark["files"]}
    assert {path.name for path in folder.iterdir()} == named - {"rows.parquet"}


def clothes_gradients(path, train, test):
    """∇ℓ of a logistic regression on Fashion-MNIST in closed form: x ⊗ (softmax(xW) − y)."""
    with np.load(path) as data:
        x, y = data["x_train"][: train + test], data["y_train"][: train + test]
    pooled = x.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49).astype(np.float32) / 255
    pooled = np.hstack([pooled, np.ones((len(pooled), 1), np.float32)])
    weights = np.zeros((50, 10), np.float32)
    one_hot = np.eye(10, dtype=np.float32)[y]

    def error(weights):
        logits = pooled @ weights
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True) - one_hot

    for _ in range(100):
        weights -= 0.5 * pooled[:train].T @ error(weights)[:train] / train
    gradients = (pooled[:, :, None] * error(weights)[:, None, :]).reshape(len(x), -1)
    return gradients[:train], gradients[train:]


def test_recall_of_a_partitioned_tree_on_real_gradients(shared_data):
    rows, queries = clothes_gradients(shared_data("fashion_mnist.npz"), 21_000, 200)
    searcher = index.Searcher(
        ["s"], np.zeros(len(rows), np.int32), np.arange(len(rows)), index.searcher(rows)
    )
    for sign in (1, -1):
        found, _ = searcher.search(sign * queries, 100)
        best = np.argsort(-sign * (queries @ rows.T), axis=1)[:, :10]
        hits = [len(set(a) & set(b)) for a, b in zip(best, found, strict=True)]
        assert np.mean(hits) / 10 >= 0.95
