import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np

from tracin_beam.stages import index
from tracin_beam.storage import embeddings, files
from tracin_beam.storage.runs import TRAIN, CheckpointFile, Output, Shard, ShardResult

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


def test_shards_fill_partitions_in_their_order():
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


def test_new_shards_change_the_last_partition_only():
    day1 = [result(name, 40) for name in ("b", "d", "f")]
    before = plan(day1, 100)
    assert members(before) == {0: ["b", "d"], 1: ["f"]}
    # The new ones' names come before, between and behind.
    after = plan([*day1, result("a", 40), result("c", 40), result("g", 40)], 100, before)
    assert members(after) == {0: ["b", "d"], 1: ["a", "f"], 2: ["c", "g"]}
    assert after[0] == before[0]
    assert after[1].fingerprint != before[1].fingerprint


def test_shards_that_go_change_their_own_partition_only():
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


def test_a_partition_that_has_grown_too_large_is_divided():
    before = plan([result(name, 40) for name in "abcd"], 100)
    after = plan([result("a", 90), *(result(name, 40) for name in "bcd")], 100, before)
    assert members(after)[1] == ["c", "d"]
    assert sorted(itertools.chain(*members(after).values())) == list("abcd")
    assert all(sum(r.used for r in part.shards) <= 100 for part in after)


def test_shards_without_usable_rows_are_left_out_and_large_ones_stand_alone():
    results = [result("a", 0), result("b", 2, rejected=[0, 1]), result("c", 500), result("d", 5)]
    assert members(plan(results, 100)) == {0: ["c"], 1: ["d"]}
    assert plan(results[:2], 100) == []


def embeddings_of(rng, count, dim):
    vector = rng.normal(size=(count, dim)).astype(np.float32)
    zeros = np.zeros(count, np.float32)
    ids = np.array([b"%d" % i for i in range(count)], object)
    return embeddings.Embeddings(
        ids, np.arange(count), zeros, zeros, zeros, np.square(vector).sum(axis=1), vector
    )


def write_embeddings(tmp_path, rng, results, checkpoints):
    """The embeddings by (shard's name, step)."""
    written = {}
    for r in results:
        for c in checkpoints:
            rows = embeddings_of(rng, r.read, 8)
            path = tmp_path / "embeddings" / "train" / str(c.step) / f"{r.shard.name}.tfrecord"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as handle:
                embeddings.EmbeddingWriter(handle).write(rows)
            written[r.shard.name, c.step] = rows.embedding
    return written


def test_partitions_are_built_once_and_found_again(tmp_path):
    rng = np.random.default_rng(0)
    output = Output(str(tmp_path))
    checkpoints = [
        CheckpointFile(f"{s}.h5", s, None, rate, "x") for s, rate in ((5, 0.5), (9, 0.1))
    ]
    results = [result("a", 30, rejected=[3]), result("b", 20)]
    written = write_embeddings(tmp_path, rng, results, checkpoints)
    (partition,) = index.plan(results, units(results), 100, {})
    index.build(output, partition, checkpoints)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "index").rglob("*") if p.is_file()}
    index.build(output, partition, checkpoints)
    assert made == {p: p.stat().st_mtime_ns for p in made}

    scaled = [
        np.hstack([np.sqrt(c.learning_rate) * written[r.shard.name, c.step] for c in checkpoints])
        for r in results
    ]
    matrix = np.vstack([np.delete(scaled[0], 3, axis=0), scaled[1]])
    places = [("/data/a", i) for i in range(30) if i != 3] + [("/data/b", i) for i in range(20)]
    queries = rng.normal(size=(4, 16)).astype(np.float32)
    with index.loaded(output, partition) as searcher:
        found, scores = searcher.search(queries, 1000)
    assert found.shape == (4, 49)
    expected = queries @ matrix.T
    for row, own, products in zip(found, scores, expected, strict=True):
        assert row.tolist() == np.argsort(-products).tolist()
        np.testing.assert_allclose(own, np.sort(products)[::-1], rtol=1e-4, atol=1e-5)
    got = [(searcher.shards[searcher.code[i]], int(searcher.position[i])) for i in range(49)]
    assert got == places
    # Another rate is another fingerprint, and so another searcher.
    other = dataclasses.replace(partition, fingerprint="other")
    index.build(output, other, checkpoints[:1])
    with index.loaded(output, other) as searcher:
        found, _ = searcher.search(queries[:, :8], 5)
    assert found[0].tolist() == np.argsort(-(matrix[:, :8] @ queries[0, :8]))[:5].tolist()
    assert len(list((tmp_path / "index" / "part-00000").glob("scann*"))) == 1


class Trained:
    """Stands for a searcher: training is not the same twice."""

    count = 0

    def serialize(self, folder, relative_path):
        assert relative_path
        Trained.count += 1
        for name in ("codebook", "hashes"):
            Path(folder, name).write_text(f"training {Trained.count}")


def test_a_retry_while_the_first_attempt_still_writes(tmp_path, monkeypatch):
    output = Output(str(tmp_path))
    checkpoints = [CheckpointFile("5.h5", 5, None, 0.5, "x")]
    results = [result("a", 30)]
    write_embeddings(tmp_path, np.random.default_rng(0), results, checkpoints)
    (partition,) = index.plan(results, units(results), 100, {})
    monkeypatch.setattr(index, "searcher", lambda matrix: Trained())
    upload, retried = files.upload, []

    def interrupted(local, path):
        upload(local, path)
        if not retried:
            retried.append(True)
            index.build(output, partition, checkpoints)

    monkeypatch.setattr(files, "upload", interrupted)
    index.build(output, partition, checkpoints)
    mark = files.read_json(output.partition(0, "partition.json"))
    folder = Path(output.partition(0, mark["folder"]))
    assert len({path.read_text() for path in folder.iterdir()}) == 1
    assert sorted(path.name for path in folder.iterdir()) == mark["files"]


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
