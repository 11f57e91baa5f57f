import numpy as np
import pytest
import tiny as t
from tiny import Tiny

from tracin_beam.scoring.topk import Scored
from tracin_beam.stages import joining, search
from tracin_beam.stages.influence import ranked


def test_ranks_count_from_one():
    def rows(*places):
        query, shard, position = map(np.array, zip(*places, strict=True))
        score = np.arange(len(query)) * 1.0
        return Scored(query, shard, position, score, np.stack([score, -score], axis=1))

    picked = ranked((rows((0, 4, 9), (0, 2, 6), (1, 2, 6)), rows((1, 4, 9))))
    assert picked.query.tolist() == [0, 0, 1, 1]
    assert picked.role.tolist() == [0, 0, 0, 1]
    assert picked.rank.tolist() == [1, 2, 1, 1]
    assert picked.by_checkpoint.tolist() == [[0, 0], [1, -1], [2, -2], [0, 0]]


@pytest.fixture(scope="module")
def problem(tmp_path_factory, launch):
    return Tiny(tmp_path_factory.mktemp("influence"), launch).write_all()


@pytest.mark.parametrize("way", ["exact", "scann"])
@pytest.mark.parametrize("index_rows", [50_000, 8, 3])
def test_every_way_to_the_candidates_gives_the_same_table(problem, monkeypatch, way, index_rows):
    monkeypatch.setattr(joining, "ALL_PAIRS", 0)
    monkeypatch.setattr(joining, "_FILE_ROWS", 300)  # less than a test shard's rows
    name = f"{way}-{index_rows}"
    assert problem.run("influence", index=way, index_rows=index_rows, test_name=name) == 0
    t.check_influence(problem, problem.good("train"), problem.good("test"), name)
    state = problem.run_json()
    assert state["index"]["index"] == way
    assert state["method"] == "TracInCP"
    assert len(list((problem.out / "influence" / name).glob("*.parquet"))) == 8
    if way == "scann":
        assert len(list(problem.out.glob("index/part-*/scann-*"))) >= 24 // index_rows


def test_nothing_is_searched_where_all_pairs_are_scored(problem, monkeypatch):
    monkeypatch.setattr(search, "by_index", None)
    monkeypatch.setattr(search, "by_product", None)
    for way in ("exact", "scann"):
        assert problem.run("influence", index=way, test_name="few") == 0
    t.check_influence(problem, problem.good("train"), problem.good("test"), "few")


@pytest.mark.parametrize("way", ["exact", "scann"])
def test_estimates_are_those_of_the_embeddings(problem, way):
    flags = {"index": way, "rescore": 0, "top_k": 5, "projection": "none"}
    out = str(problem.folder / f"estimates-{way}")
    assert problem.run("influence", output=out, **flags) == 0
    rows = t.table(f"{out}/influence/test")
    assert not any(row["exact"] for row in rows)
    # Without a projection the estimates are the scores.
    train, test = problem.good("train"), problem.good("test")
    expected = t.scores(problem, test, train)
    train_ids, test_ids = [r.id for r in train], [r.id for r in test]
    assert len(rows) == len(test) * 2 * 5
    for row in rows:
        own = expected[test_ids.index(row["test_id"]), train_ids.index(row["train_id"])]
        np.testing.assert_allclose(row["score_by_checkpoint"], own, rtol=1e-4, atol=1e-6)
        assert row["score"] == pytest.approx(sum(row["score_by_checkpoint"]))
