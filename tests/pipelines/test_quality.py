"""Nights on a problem small enough to do by hand: every label is judged by a fit without it."""

import functools
import json

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny as t

import tracin_beam
from tracin_beam.signals import confidence, ridge
from tracin_beam.storage import features, verdicts

FLAGS = {"test": None, "projection": "none", "dim": None}


@pytest.fixture
def job(tmp_path, launch):
    return t.Tiny(tmp_path, launch).write_all(test=0)


def night(job, date="2026-11-22"):
    folder = job.out / "quality" / date
    return (
        pq.read_table(folder / "signals.parquet").to_pylist(),
        pq.read_table(folder / "suspects.parquet").to_pylist(),
        json.loads((folder / "metrics.json").read_text()),
    )


def softmax(z):
    grown = np.exp(z - z.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def judged(train, weights, features="gradient"):
    """m and q [n, 3] at one checkpoint, by a least-squares fit without each example."""
    x = np.stack([row.x for row in train]).astype(np.float64)
    # The gradient of the sum of the logits: x for each class's weights, and ones for the biases.
    phi = np.concatenate([np.repeat(x, 3, axis=1), np.ones((len(x), 3))], axis=1)
    if features == "inputs":
        phi = x / np.sqrt(x.shape[1])
    width = phi.shape[1]
    y = np.eye(3)[[row.y for row in train]]
    scale = np.var(phi, axis=0).sum() * len(x) / phi.shape[1]
    outputs = []
    for ratio in ridge.LAMBDAS:
        penalty = np.sqrt(scale * ratio) * np.eye(width, width + 1)
        rows = np.concatenate([phi, np.ones((len(x), 1))], axis=1)
        found = []
        for i in range(len(x)):
            kept = np.arange(len(x)) != i
            a = np.concatenate([rows[kept], penalty])
            b = np.concatenate([y[kept], np.zeros((width, 3))])
            found.append(rows[i] @ np.linalg.lstsq(a, b, rcond=None)[0])
        outputs.append(np.array(found))
    best = min(outputs, key=lambda output: ((output - y) ** 2).sum())
    q = max(
        (softmax(best / warmth) for warmth in ridge.TEMPERATURES),
        key=lambda q: np.log(q[y > 0]).sum(),
    )
    *_, logits = t.residuals(train, weights)
    distances = np.linalg.norm(phi[:, None] - phi, axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :10]
    votes = (y[nearest].sum(axis=1) + y.mean(axis=0)) / 11
    parts = (np.maximum(part, 0.1 / 3) for part in (q, softmax(logits), votes))
    m = np.prod([part**w for part, w in zip(parts, (3, 2, 1), strict=True)], axis=0) ** (1 / 6)
    return m / m.sum(axis=1, keepdims=True), q, votes


def confident_joint(q, label):
    """How many of each given class [3] are confidently taken for each class [3]."""
    usual = [np.mean([one[y] for one, y in zip(q, label, strict=True) if y == k]) for k in range(3)]
    joint = np.zeros((3, 3))
    for one, y in zip(q, label, strict=True):
        if reached := [k for k in range(3) if one[k] >= usual[k]]:
            joint[y, max(reached, key=lambda k: one[k])] += 1
    return joint


def preconditioned(job, train, damping):
    """η ⟨g, (R + λ mean eigenvalue I)⁻¹ g⟩ of each example at every checkpoint: [n, C]."""
    found = []
    for weights, rate in zip(job.weights, job.rates, strict=True):
        residual, x, _ = t.residuals(train, weights)
        g = (x[:, :, None] * residual[:, None]).reshape(len(x), -1)
        moments = g.T @ g / len(g)
        scale = damping * np.trace(moments) / len(moments)
        solved = np.linalg.solve(moments + scale * np.eye(len(moments)), g.T).T
        found.append(rate * (g * solved).sum(axis=1))
    return np.stack(found, axis=1)


def test_signals_by_hand(job):
    assert job.run("quality", date="2026-11-22", **FLAGS) == 0
    signals, suspects, metrics = night(job)
    train = job.good("train")
    assert [r["id"] for r in signals] == [row.id for row in train]
    assert [r["position"] for r in signals] == [row.position for row in train]
    m, q, votes = judged(train, job.weights[0])  # the first half of two checkpoints
    label = np.array([row.y for row in train])
    given = m[np.arange(len(train)), label]
    # Probabilities are kept as logs in float16.
    close = {"rtol": 2e-3, "atol": 1e-3}
    assert [r["suggested_label"] for r in signals] == m.argmax(axis=1).tolist()
    others = np.where(np.eye(3)[label] > 0, -1, m).max(axis=1)
    np.testing.assert_allclose([r["best_other_ratio"] for r in signals], others / given, **close)
    score = 1 / (1 + given / np.sqrt(others))
    np.testing.assert_allclose([r["mislabel_score"] for r in signals], score, **close)
    logits = np.stack([t.residuals(train, w)[2] for w in job.weights], axis=1)
    own = np.take_along_axis(logits, label[:, None, None], axis=2)[:, :, 0]
    rest = np.where(np.eye(3)[label][:, None] > 0, -np.inf, logits).max(axis=2)
    np.testing.assert_allclose([r["aum"] for r in signals], (own - rest).mean(axis=1), atol=0.02)
    found = [r["self_influence"] for r in signals]
    products = t.scores(job, train, train)
    expected = [products[i, i].sum() for i in range(len(train))]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    wrong = {row.id for row, ratio in zip(train, others / given, strict=True) if ratio > 1}
    mislabelled = [r for r in suspects if r["kind"] == "mislabelled"]
    assert {r["id"] for r in mislabelled} == wrong
    curve = confidence.judged(score, (q + votes) / 2, label)
    stated = [curve(r["score"]) for r in mislabelled]
    np.testing.assert_allclose([r["confidence"] for r in mislabelled], stated, atol=0.02)
    assert metrics["metrics"]["suspects.mislabelled"] == len(wrong)
    np.testing.assert_allclose([r["others_probability"] for r in signals], q.max(axis=1), rtol=1e-6)
    joint = confident_joint(q, label)
    assert joint.sum() == np.sum([r["confident_label"] is not None for r in signals])
    shares = 1 - np.diag(joint) / np.maximum(joint.sum(axis=1), 1)
    expected = shares[joint.sum(axis=1) > 0] @ np.bincount(label)[joint.sum(axis=1) > 0]
    high = min(24, round(expected + 1.645 * np.sqrt(expected)))
    assert metrics["metrics"]["wrong_labels_high"] == high
    rate, n = np.mean(q.argmax(axis=1) != label), 24
    z = 1.645  # the lower end of Wilson's interval solves (rate - p)² = z² p (1 - p) / n
    lowest = min(np.roots([1 + z**2 / n, -(2 * rate + z**2 / n), rate**2]))
    assert metrics["metrics"]["wrong_labels_low"] == int(n * lowest)
    assert all(r["first_seen"] == "2026-11-22" for r in suspects)

    assert all(r["self_influence_preconditioned"] is None for r in signals)
    by_checkpoint = [r["self_influence_by_checkpoint"] for r in signals]
    np.testing.assert_allclose(np.sum(by_checkpoint, axis=1), found, rtol=1e-6)

    assert (
        job.run(
            "quality",
            date="2026-11-23",
            features="inputs",
            preconditioner="projected",
            damping=0.5,
            **FLAGS,
        )
        == 0
    )
    m, *_ = judged(train, job.weights[0], "inputs")
    signals, *_ = night(job, "2026-11-23")
    expected = preconditioned(job, train, damping=0.5)
    found = [r["self_influence_preconditioned_by_checkpoint"] for r in signals]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    found = [r["self_influence_preconditioned"] for r in signals]
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-3)
    given = m[np.arange(len(train)), label]
    others = np.where(np.eye(3)[label] > 0, -1, m).max(axis=1)
    found = [r["best_other_ratio"] for r in signals]
    np.testing.assert_allclose(found, others / given, **close)


def test_a_week(job, capsys):
    assert job.run("quality", date="2026-11-22", **FLAGS) == 0
    first, suspects, _ = night(job)
    before = t.snapshot(job.out, "embeddings/*"), t.snapshot(job.out / "features")
    job.write("train-3.tfrecord", [job.good("train")[4].but(id="copy"), *t.rows("train3.", 7, 9)])
    assert job.run("quality", date="2026-11-23", **FLAGS) == 0
    after = t.snapshot(job.out / "features")
    assert {path: after[path] for path in before[1]} == before[1]
    second, found, metrics = night(job, "2026-11-23")
    assert len(second) == 32
    seen = {(r["id"], r["kind"]): r["first_seen"] for r in found}
    known = {(r["id"], r["kind"]) for r in suspects}
    assert all(date == "2026-11-22" for name, date in seen.items() if name in known)
    # The same example under another id.
    (copy,) = (r for r in found if r["kind"] == "duplicate")
    assert (copy["id"], copy["supporting_ids"]) == ("copy", [job.good("train")[4].id])
    assert metrics["metrics"]["new_suspects"] == sum(d == "2026-11-23" for d in seen.values())
    assert night(job)[0] == first  # stays as it was

    # One that was looked at does not come back.
    reviewed = found[0]
    verdict = {
        **dict.fromkeys(verdicts.SCHEMA.names),
        **{name: reviewed[name] for name in ("id", "content_hash")},
        **{"verdict": "keep", "who": "me", "when": "2026-11-23T08:00:00Z"},
    }
    ledger = pa.Table.from_pylist([verdict], schema=verdicts.SCHEMA)
    pq.write_table(ledger, job.out / "quality" / "verdicts.parquet")
    (job.folder / "train-3.tfrecord").unlink()
    capsys.readouterr()
    gate = {"error_if": "suspects > 1000,examples < 25"}
    assert job.run("quality", date="2026-11-24", **FLAGS, **gate) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("error: examples < 25: ")
    third, rest, _ = night(job, "2026-11-24")
    assert reviewed["id"] not in {r["id"] for r in rest}
    for one, other in zip(third, first, strict=True):  # the shard that came has gone
        assert one["mislabel_score"] == pytest.approx(other["mislabel_score"], rel=1e-6)
    made = t.snapshot(job.out / "quality")
    assert job.run("quality", date="2026-11-24", **FLAGS, **gate) == 3
    assert t.snapshot(job.out / "quality") == made


def test_duplicates(job):
    rows = t.rows("again", 4, 7)
    job.write("train-3.tfrecord", rows)
    task = (job.folder / "task.py").read_text().replace(', "id": example["id"]', "")
    (job.folder / "task.py").write_text(task)
    job.write("train-4.tfrecord", [rows[2], *t.rows("more", 3, 8)])
    assert job.run("quality", date="2026-11-22", **FLAGS) == 0
    _, suspects, metrics = night(job)
    (found,) = [r for r in suspects if r["kind"] == "duplicate"]
    assert found["id"] == "train-4.tfrecord#0"
    assert found["supporting_ids"] == ["train-3.tfrecord#2"]
    assert metrics["metrics"]["suspects.duplicate"] == 1


def test_a_leak_and_what_is_trusted(job, capsys):
    known = job.good("train")[20]
    job.write("test-0.tfrecord", [*t.rows("test", 3, 100), known, known.but(id="again", y=0)])
    flags = {**FLAGS, "test": job.path("test-*"), "date": "2026-11-22"}
    assert job.run("quality", **flags, trusted=job.path("train-0*")) == 2
    assert "8 examples" in capsys.readouterr().err
    assert job.run("quality", **flags, trusted=job.path("train-[01]*")) == 0
    signals, suspects, _ = night(job)
    (leak,) = [r for r in suspects if r["kind"] == "leaked"]
    assert (leak["id"], leak["supporting_ids"], leak["score"]) == (known.id, [known.id], 1)
    wrong = {r["shard"] for r in suspects if r["kind"] == "mislabelled"}
    assert wrong == {job.path("train-2.tfrecord")}
    # Neighbours are trusted ones alone.
    train = job.good("train")
    x = np.stack([row.x for row in train]).astype(np.float64)
    for i, row in enumerate(signals):
        far = [np.linalg.norm(x[i] - x[j]) for j in range(16) if j != i]
        # The gradient of the sum of the logits has x for each of three classes.
        expected = np.sqrt(3) * np.mean(sorted(far)[:10])
        assert row["neighbour_distance"] == pytest.approx(expected, rel=1e-4)
    assert job.run("quality", **flags, trusted=job.path("test-*")) == 2
    assert "5 examples" in capsys.readouterr().err
    assert job.run("quality", **FLAGS, trusted=job.path("test-*")) == 2
    assert "neither --train nor --test names" in capsys.readouterr().err


def test_misuse(job, capsys):
    assert job.run("quality", date="yesterday", **FLAGS) == 2
    assert "--date=yesterday: give a date such as" in capsys.readouterr().err
    assert job.run("quality", date="2026-11-22", error_if="__import__('os')", **FLAGS) == 2
    assert "error_if" in capsys.readouterr().err
    assert not (job.out / "quality").exists()


def test_a_wrong_target_of_a_regression_comes_first(tmp_path):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    y = (x @ [1.0, -2.0, 0.5]).astype(np.float32)
    y[17] += 9
    parse = tracin_beam.write_shards((x, y), str(tmp_path / "train-*.tfrecord"), shards=2)
    build = functools.partial(linear, 3)
    model = build()
    model.set_weights([np.array([[0.8], [-1.5], [0.2]]), np.zeros(1)])
    tracin_beam.save_checkpoint(tmp_path / "ckpts", model, 1, 0.1)
    tracin_beam.quality(
        tracin_beam.Task(build, keras.losses.MeanSquaredError(), parse),
        train=tmp_path / "train-*.tfrecord",
        checkpoints=tmp_path / "ckpts",
        output=tmp_path / "out",
        date="2026-11-22",
        projection="none",
        progress=False,
    )
    folder = tmp_path / "out" / "quality" / "2026-11-22"
    signals = pq.read_table(folder / "signals.parquet").to_pylist()
    score = np.array([r["mislabel_score"] for r in signals])
    assert score.argmax() == 17
    # φ is x and the bias: the suggestion is a least-squares fit without the example itself.
    rest = np.arange(40) != 17
    columns = np.concatenate([x, np.ones((40, 1))], axis=1)
    fitted = columns[17] @ np.linalg.lstsq(columns[rest], y[rest], rcond=None)[0]
    assert signals[17]["suggested_label"] == pytest.approx(fitted, abs=0.2)
    # Its score is by how far off the others are: far more than three standard deviations.
    assert score[17] > 0.75 > np.delete(score, 17).max()
    assert "wrong_labels_low" not in json.loads((folder / "metrics.json").read_text())["metrics"]


def test_many_classes_are_judged_as_all_of_them_are(tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(101, 4))
    y = np.arange(202) % 101
    x = (centres[y] + 0.1 * rng.normal(size=(202, 4))).astype(np.float32)
    y[7] = (y[7] + 50) % 101
    parse = tracin_beam.write_shards((x, y), str(tmp_path / "train-*.tfrecord"), shards=2)
    build = functools.partial(linear, 4, 101)
    model = build()
    for step, scale in ((1, 4.0), (2, 8.0)):
        model.set_weights([scale * centres.T, -scale * (centres**2).sum(axis=1) / 2])
        tracin_beam.save_checkpoint(tmp_path / "ckpts", model, step, 0.1)
    found = []
    for most in (features.ALL_CLASSES, 1000):
        monkeypatch.setattr(features, "ALL_CLASSES", most)
        tracin_beam.quality(
            tracin_beam.Task(
                build, keras.losses.SparseCategoricalCrossentropy(from_logits=True), parse
            ),
            train=tmp_path / "train-*.tfrecord",
            checkpoints=tmp_path / "ckpts",
            output=tmp_path / f"out-{most}",
            date="2026-11-22",
            projection="none",
            progress=False,
        )
        folder = tmp_path / f"out-{most}" / "quality" / "2026-11-22"
        found.append(pq.read_table(folder / "signals.parquet"))
    few, every = found
    for name in ("aum", "probability_mean", "el2n", "mislabel_score", "others_probability"):
        np.testing.assert_allclose(few[name], every[name], atol=0.01, err_msg=name)
    for name in ("suggested_label", "confident_label", "forgetting"):
        np.testing.assert_array_equal(few[name].to_numpy(), every[name].to_numpy(), err_msg=name)
    assert np.argmax(few["mislabel_score"]) == 7


def linear(inputs, outputs=1):
    return keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(outputs)])


def test_what_speaks_for_and_against_a_label(job):
    assert job.run("quality", date="2026-11-22", **FLAGS) == 0
    _, suspects, _ = night(job)
    train = job.good("train")
    number = {row.id: i for i, row in enumerate(train)}
    scores = t.scores(job, train, train).sum(axis=2)
    np.fill_diagonal(scores, 0)
    wrong = [row for row in suspects if row["kind"] == "mislabelled"]
    assert wrong
    for row in wrong:
        own = scores[number[row["id"]]]
        order = np.argsort(-own)
        names = [train[i].id for i in order]
        for name, expected in (("proponents", names[:3]), ("opponents", names[:-4:-1])):
            sign = 1 if name == "proponents" else -1
            expected = [one for one in expected if sign * own[number[one]] > 0]
            assert row[name] == expected
        labels = {train[number[one]].y for one in row["supporting_ids"]}
        assert labels <= {int(row["suggested_label"])}


def test_one_output_for_two_classes_and_a_ledger_that_is_damaged(tmp_path):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(30, 3)).astype(np.float32)
    weights = np.array([[2.0], [-1.0], [1.0]])
    y = (x @ weights > 0).astype(np.float32)[:, 0]
    y[4] = 1 - y[4]
    parse = tracin_beam.write_shards((x, y), str(tmp_path / "train-*.tfrecord"))
    build = functools.partial(linear, 3)
    model = build()
    model.set_weights([weights, np.zeros(1)])
    tracin_beam.save_checkpoint(tmp_path / "ckpts", model, 1, 0.1)
    run = functools.partial(
        tracin_beam.quality,
        tracin_beam.Task(build, keras.losses.BinaryCrossentropy(from_logits=True), parse),
        train=tmp_path / "train-*.tfrecord",
        checkpoints=tmp_path / "ckpts",
        output=tmp_path / "out",
        projection="none",
        progress=False,
    )
    run(date="2026-11-22")
    folder = tmp_path / "out" / "quality" / "2026-11-22"
    signals = pq.read_table(folder / "signals.parquet")
    assert signals["prediction"].to_pylist() == (x @ weights > 0)[:, 0].astype(float).tolist()
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert metrics["accuracy"] == metrics["accuracy_first_checkpoint"] == pytest.approx(29 / 30)
    (tmp_path / "out" / "quality" / "verdicts.parquet").write_bytes(b"no table")
    with pytest.raises(
        tracin_beam.InputError, match=r"no ledger of verdicts .*: restore it from a copy"
    ):
        run(date="2026-11-23")
    assert not (tmp_path / "out" / "quality" / "2026-11-23").exists()
