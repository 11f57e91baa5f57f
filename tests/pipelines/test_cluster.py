"""`cluster`: the whole job, against scikit-learn's k-means of closed forms from the same start."""

import numpy as np
import pytest
import tiny as t
from sklearn.cluster import KMeans
from tiny import Tiny

import tracin_beam
from tracin_beam.scoring import clusters
from tracin_beam.stages import cluster as stage
from tracin_beam.storage import arrays

FLAGS = {"test": None, "projection": "none", "clusters": 3, "rounds": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, launch):
    tiny = Tiny(tmp_path_factory.mktemp("cluster"), launch).write_all()
    tiny.write("train-1.tfrecord", [*t.rows("train1.", 8, 1), b"garbage"])
    return tiny


@pytest.fixture(scope="module")
def train(tiny):
    return tiny.good("train", {("train-1.tfrecord", 8)})


def gradients(tiny, train):
    """By checkpoint √η ∇ℓ: float64 [n, N], in the order of kernel and bias."""
    found = []
    for weights, rate in zip(tiny.weights, tiny.rates, strict=True):
        r, x, _ = t.residuals(train, weights)
        kernel = (x[:, :-1, None] * r[:, None]).reshape(len(r), -1)
        found.append(np.sqrt(rate) * np.concatenate([kernel, r], axis=1))
    return found


def centres(tiny, turn):
    return arrays.read(str(tiny.out / "_state" / "clusters" / f"round-{turn:04d}.npz"))["centres"]


def check(tiny, train, rows, rounds):
    """Tables are what scikit-learn makes of these rows, from the same first centres."""
    start = centres(tiny, 0)
    assert all(np.linalg.norm(rows - one, axis=1).min() < 1e-4 for one in start)
    want = KMeans(len(start), init=start, n_init=1, max_iter=rounds, tol=0, algorithm="lloyd")
    want.fit(rows)
    last = tiny.run_json()["clusters"]["rounds"]
    np.testing.assert_allclose(centres(tiny, last), want.cluster_centers_, rtol=1e-4, atol=1e-4)
    far = np.linalg.norm(rows[:, None] - want.cluster_centers_, axis=2)
    nearest = np.argmin(far, axis=1)
    found = t.table(tiny.out / "clusters")
    assert [(r["id"], r["label"]) for r in found] == [(r.id, r.y) for r in train]
    assert [(r["shard"], r["position"]) for r in found] == [(r.shard, r.position) for r in train]
    assert [r["cluster"] for r in found] == nearest.tolist()
    np.testing.assert_allclose([r["distance"] for r in found], far.min(axis=1), atol=1e-4)
    summary = t.table(tiny.out / "cluster_summary")
    assert [row["cluster"] for row in summary] == list(range(len(start)))
    for k, row in enumerate(summary):
        mine = np.flatnonzero(nearest == k)
        mine = mine[np.argsort(far[mine, k])]
        assert row["examples"] == len(mine)
        assert row["nearest_ids"] == [train[i].id for i in mine[:12]]
        assert row["nearest_positions"] == [train[i].position for i in mine[:12]]
        assert [r["id"] for r in found if r["medoid"] and r["cluster"] == k] == [train[mine[0]].id]
        np.testing.assert_allclose(row["mean_distance"], far[mine, k].mean(), atol=1e-4)
        counted = dict(zip(row["labels"], row["label_counts"], strict=True))
        assert counted == {y: n for y in range(3) if (n := sum(train[i].y == y for i in mine))}
        assert row["mean_label"] is None


def test_clusters_page_and_going_on(tiny, train, capsys):
    assert tiny.run("cluster", **FLAGS) == 0
    tiny.check_counts({("train-1.tfrecord", 8): "parse"})
    check(tiny, train, np.concatenate(gradients(tiny, train), axis=1), 4)
    page = (tiny.out / "reports" / "clusters" / "report.html").read_text()
    for row in t.table(tiny.out / "cluster_summary"):
        assert f"Cluster {row['cluster']}<" in page
        assert all(f"<bdi>{name}</bdi>" in page for name in row["nearest_ids"])
    before, tables = t.snapshot(tiny.out), t.table(tiny.out / "clusters")
    assert tiny.run("cluster", **FLAGS) == 0  # nothing is made again
    assert t.snapshot(tiny.out) == before
    # As if it had been killed after the second round, which is not made again either.
    for turn in (3, 4):
        (tiny.out / "_state" / "clusters" / f"round-{turn:04d}.npz").unlink(missing_ok=True)
    (tiny.out / "_state" / "cluster.json").unlink()
    assert tiny.run("cluster", **FLAGS) == 0
    assert t.table(tiny.out / "clusters") == tables
    after = t.snapshot(tiny.out)
    second = "_state/clusters/round-0002.npz"
    assert after[second] == before[second]


def test_preconditioned_directions_with_parts_of_the_rows(tiny, train, monkeypatch):
    monkeypatch.setattr(stage, "_ROUND_ROWS", 12)
    more = {"preconditioner": "projected", "cluster_by": "direction", "rounds": 2}
    assert tiny.run("cluster", **{**FLAGS, **more}) == 0
    products = np.zeros((len(train), len(train)))
    for rows, rate in zip(gradients(tiny, train), tiny.rates, strict=True):
        second = rows.T @ rows / rate / len(rows)  # of gradients, without the rate
        ridge = np.trace(second) / len(second) * np.eye(len(second))
        products += rows @ np.linalg.inv(second + ridge) @ rows.T
    lengths = np.sqrt(np.diag(products))
    # Any rows with these inner products are as good.
    values, vectors = np.linalg.eigh(products / lengths / lengths[:, None])
    own = vectors * np.sqrt(np.maximum(values, 0))
    rng = np.random.default_rng(0)
    rng.choice(len(own), len(own), replace=False)
    at, seen = clusters.seeds(own.astype(np.float32), 3, rng), np.zeros(3)
    for turn in (1, 2):
        mine = np.arange(len(own)) % 2 == turn % 2
        nearest = np.argmin(np.linalg.norm(own[mine][:, None] - at, axis=2), axis=1)
        for k in range(3):
            given = own[mine][nearest == k]
            if len(given):
                at[k] = (at[k] * seen[k] + given.sum(axis=0)) / (seen[k] + len(given))
                seen[k] += len(given)
    far = np.linalg.norm(own[:, None] - at, axis=2)
    found = t.table(tiny.out / "clusters")
    assert [r["cluster"] for r in found] == np.argmin(far, axis=1).tolist()
    np.testing.assert_allclose([r["distance"] for r in found], far.min(axis=1), atol=1e-3)


def test_misuse(tiny, train, capsys):
    for changed, said in (
        ({"clusters": 30}, f"--clusters=30: there are {len(train)} usable training examples"),
        ({"clusters": 0}, "--clusters=0 must be at least 1"),
        ({"cluster_by": "label"}, "--cluster_by=label is not known"),
        ({"preconditioner": "kfac"}, "cluster goes by embeddings"),
        ({"preconditioner": "projected", "damping": "auto"}, "give a number"),
    ):
        assert tiny.run("cluster", **{**FLAGS, **changed}) == 2
        assert said in capsys.readouterr().err


def test_as_a_function(tiny):
    result = tracin_beam.cluster(**tiny.flags("cluster", **FLAGS), progress=False)
    assert result.table("arrow").to_pylist() == t.table(tiny.out / "clusters")
    assert "Cluster 0" in result._repr_html_()
    assert result.run.cluster_summary().table("arrow").num_rows == 3
