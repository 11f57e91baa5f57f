"""Neighbours of all training examples, kept by shard: always those of all pairs there are."""

import dataclasses
import os
import types
import zlib

import numpy as np
import pytest

from tracin_beam.signals import neighbours
from tracin_beam.stages import neighbours as stage
from tracin_beam.storage import arrays, features, sinks
from tracin_beam.storage.runs import TRAIN, Output, Shard, ShardResult

DIM = 6


@dataclasses.dataclass
class Site:
    """Feature files of random examples."""

    folder: str
    kind: str = "classification"
    trusted: tuple = ()

    def __post_init__(self):
        self.output = Output(self.folder)
        self.rows = {}

    def write(self, name, phi, label, set_name=TRAIN):
        shard = Shard(f"{self.folder}/{name}", name, f"{len(phi)}:{zlib.crc32(phi.tobytes())}")
        result = ShardResult(set_name, shard, len(phi), ())
        self.rows[name] = phi, label
        hashes = np.empty(len(phi), object)
        for i, (x, y) in enumerate(zip(phi, label, strict=True)):
            hashes[i] = np.random.default_rng(zlib.crc32(x.tobytes() + bytes([int(y)]))).bytes(16)
        described = features.Features(
            np.arange(len(phi)) * 2,  # every second record could not be used
            hashes,
            np.zeros((len(phi), 2), np.float32),
            phi.astype(np.float32),
            np.asarray(label, np.float32)[:, None],
        )
        schema = features.schema(2, phi.shape[1], 1, True)
        sinks.write_parquet(self.lookout(result), schema, [described.table(schema)])
        return result

    def lookout(self, result):
        return self.output.path("features", result.set_name, result.shard.name + ".parquet")

    def embeddings(self, result):
        return result.shard.name

    def made_from(self, result):
        return f"{result.shard.name}-{result.shard.identity}"[:16]


@pytest.fixture
def site(tmp_path):
    return Site(str(tmp_path))


def search(site, shards):
    for among, group in stage.grouped(site, shards):
        found = stage.Search(site).process((among, group), shards)
        assert list(found) == [s.shard.path for s in group]


def check(site, shards):
    shards = sorted(shards, key=lambda one: one.shard.path)
    phi = [site.rows[one.shard.name][0] for one in shards]
    where = [(s, r) for s, rows in enumerate(phi) for r in range(len(rows))]
    whole = np.concatenate(phi).astype(np.float64)
    far = np.linalg.norm(whole[:, None] - whole[None], axis=2)
    np.fill_diagonal(far, np.inf)
    at = 0
    for result in shards:
        kept = arrays.read(stage.path_of(site, result))
        for i in range(result.read):
            k = min(neighbours.COUNT, len(where) - 1)
            order = np.argsort(far[at], kind="stable")[:k]
            found = list(zip(kept["shard"][i], kept["row"][i], strict=True))
            assert found[: len(order)] == [where[j] for j in order]
            np.testing.assert_allclose(kept["distance"][i, : len(order)], far[at, order], rtol=1e-4)
            at += 1


def test_shards_come_change_and_go(site, monkeypatch):
    monkeypatch.setattr(stage, "_QUERY_BYTES", 60 * DIM * 4)
    rng = np.random.default_rng(0)

    def write(name, size):
        return site.write(name, rng.normal(size=(size, DIM)), rng.integers(2, size=size))

    shards = {name: write(name, 25) for name in "abcde"}
    search(site, list(shards.values()))
    check(site, shards.values())
    compared = []
    add = neighbours.Nearest.add

    def counted(self, rows, shard, places, own=None, only=None):
        compared.append((len(rows) if only is None else len(only)) * len(rows))
        add(self, rows, shard, places, own, only)

    monkeypatch.setattr(neighbours.Nearest, "add", counted)
    search(site, list(shards.values()))  # nothing is new
    assert not compared
    shards["f"] = write("f", 10)
    search(site, list(shards.values()))
    check(site, shards.values())
    assert sum(compared) == 125 * 10 + 10 * 135
    for gone in ("b", "a"):
        del shards[gone]
        search(site, list(shards.values()))
        check(site, shards.values())
    shards["c"] = write("c", 30)
    search(site, list(shards.values()))
    check(site, shards.values())
    # Only with what is left of the others, and few examples.
    for gone in ("c", "d", "e"):
        del shards[gone]
    search(site, list(shards.values()))
    check(site, shards.values())


def test_a_damaged_file_is_made_again(site):
    rng = np.random.default_rng(0)
    shards = [site.write(n, rng.normal(size=(20, DIM)), np.zeros(20)) for n in "ab"]
    search(site, shards)
    path = stage.path_of(site, shards[0])
    with open(path, "r+b") as handle:
        handle.truncate(100)
    search(site, shards)
    check(site, shards)


def test_a_sample_where_there_are_many(site, monkeypatch):
    monkeypatch.setattr(stage, "MOST_ROWS", 100)
    rng = np.random.default_rng(0)
    shards = [site.write(n, rng.normal(size=(100, DIM)), np.zeros(100)) for n in "abc"]
    assert stage.share_of(300) == 0.25
    search(site, shards)
    seen = set()
    for result in shards:
        kept = arrays.read(stage.path_of(site, result))
        seen |= set(zip(kept["shard"].ravel(), kept["row"].ravel(), strict=True))
        assert (kept["distance"][:, 0] > 0).all()
    assert 40 < len(seen) < 110


def planted(site, rng):
    centres = 8 * rng.normal(size=(2, DIM))
    shards, label = [], {}
    for name in "abcd":
        label[name] = rng.integers(2, size=80)
        phi = centres[label[name]] + rng.normal(size=(80, DIM))
        if name == "d":
            phi[0] = site.rows["a"][0][3]  # another label than that
            phi[1] = site.rows["b"][0][5] + 1e-4
            phi[2] = centres[0] + 200
            label["d"][0] = 1 - label["a"][3]
            label["d"][1] = label["b"][5]
            phi[3:][label["d"][3:] == 1] += 2.5
        shards.append(site.write(name, phi, label[name]))
    return shards


def test_who_stands_out(site):
    shards = planted(site, np.random.default_rng(1))
    search(site, shards)
    found = list(stage.look(site, shards))
    places = {}
    for row in found:
        assert 0 < row["score"] <= 1
        assert 0.9 <= row["confidence"] <= 1
        name, position = os.path.basename(row["shard"]), row["position"]
        places.setdefault(row["kind"], {})[name, position // 2] = row

    def supporting(row):
        return [(os.path.basename(shard), position // 2) for shard, position in row["supporting"]]

    conflicts = places["conflicting duplicate"]
    assert set(conflicts) == {("a", 3), ("d", 0)}
    assert supporting(conflicts["a", 3]) == [("d", 0)]
    assert conflicts["d", 0]["score"] == 1
    assert set(places["duplicate"]) == {("d", 1)}
    assert supporting(places["duplicate"]["d", 1]) == [("b", 5)]
    assert places["duplicate"]["d", 1]["score"] < 1
    assert set(places["outlier"]) == {("d", 2)}
    ((shard, row),) = places["shifted class"]
    assert shard == "d"
    assert site.rows["d"][1][row] == 1
    columns = stage.read_columns(site, shards[3])
    assert columns["neighbour_outlyingness"].argmax() == 2
    assert columns["neighbour_distance"].shape == (80,)


def test_clean_data_is_quiet(site):
    rng = np.random.default_rng(2)
    shards = [site.write(n, rng.normal(size=(80, DIM)), rng.integers(2, size=80)) for n in "abcd"]
    search(site, shards)
    assert list(stage.look(site, shards)) == []


def test_what_is_nearly_in_the_test_set_has_leaked(site, monkeypatch):
    def ids(path, positions):
        positions = np.unique(positions)
        names = [f"{path}#{position}".encode() for position in positions]
        return types.SimpleNamespace(position=positions, ids=names)

    monkeypatch.setattr(stage.embeddings, "read_at", ids)
    rng = np.random.default_rng(4)
    train = [site.write(n, rng.normal(size=(90, DIM)), rng.integers(2, size=90)) for n in "ab"]
    phi, label = rng.normal(size=(60, DIM)), rng.integers(2, size=60)
    phi[7] = site.rows["a"][0][11] + 1e-4 * rng.normal(size=DIM)  # a picture saved once more
    phi[8], label[8] = site.rows["b"][0][5], site.rows["b"][1][5]  # the same bytes
    shards = [*train, site.write("t", phi, label, "test")]
    search(site, shards)
    found = [row for row in stage.look(site, shards) if row["kind"] == "leaked"]
    places = {(os.path.basename(r["shard"]), r["position"] // 2): r for r in found}
    assert set(places) == {("a", 11), ("b", 5)}
    assert places["a", 11]["supporting_ids"] == ["t#14"]
    assert places["b", 5]["supporting_ids"] == ["t#16"]
    assert places["b", 5]["score"] == 1 > places["a", 11]["score"] > 0.9
