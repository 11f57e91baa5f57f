"""What the flags change in the tables, on a problem small enough to run many times."""

import glob
import os
from pathlib import Path

import brute_force as bf
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import yaml
from sklearn.datasets import load_digits
from tasks import digits

import tracin_beam

TRAIN, TEST = 300, 12


def argmax(output):
    return np.argmax(output, axis=1)


class Problem:
    """Trained digits: shards, checkpoints and the oracle."""

    def __init__(self, folder):
        keras.utils.set_random_seed(2)
        x, y = load_digits(return_X_y=True)
        x = (x[: TRAIN + TEST] / 16).astype(np.float32)
        y = y[: TRAIN + TEST].astype(np.int64)
        self.folder = folder
        self.train, self.test = f"{folder}/train-*", f"{folder}/test-*"
        tracin_beam.write_shards((x[:TRAIN], y[:TRAIN]), f"{folder}/train-*.tfrecord", shards=5)
        tracin_beam.write_shards((x[TRAIN:], y[TRAIN:]), f"{folder}/test-*.tfrecord", shards=2)
        tracin_beam.write_shards({"features": x[TRAIN:]}, f"{folder}/unlabelled-*", shards=1)
        model = digits.build_model()
        model.compile(keras.optimizers.SGD(0.2), digits.loss)
        callbacks = [
            tracin_beam.TracInCheckpoint(str(folder / "ckpts")),
            keras.callbacks.ModelCheckpoint(str(folder / "saved-{epoch}.keras")),
        ]
        model.fit(x[:TRAIN], y[:TRAIN], epochs=2, verbose=0, callbacks=callbacks)
        self.sides = (
            bf.Examples(x[:TRAIN], y[:TRAIN], bf.places(self.train)),
            bf.Examples(x[TRAIN:], y[TRAIN:], bf.places(self.test)),
        )

    def flags(self, out, **more):
        return {
            "task": f"{digits.__file__}:task",
            "checkpoints": self.folder / "ckpts",
            "train": self.train,
            "test": self.test,
            "output": out,
            "recall_queries": 0,
            **more,
        }

    def truth(self, target=None, test=None, variables=None):
        train, labelled = self.sides
        model = digits.build_model()
        return bf.brute_force(
            model,
            bf.keras_loss(digits.loss),
            train,
            test or labelled,
            bf.listed_checkpoints(self.folder / "ckpts"),
            target,
            variables and variables(model),
        )


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return Problem(tmp_path_factory.mktemp("digits"))


def influence(out, name="test"):
    return bf.read_table(Path(out) / "influence" / name / "*.parquet")


def test_without_rescoring_scores_are_those_of_the_embeddings(problem, tmp_path, launch):
    flags = problem.flags(tmp_path, rescore=0, recall_queries=TEST)
    assert launch("influence", **flags) == 0
    rows = influence(tmp_path)
    assert not rows.exact.any()
    truth = problem.truth()
    steps = [c["step"] for c in bf.read_run(tmp_path)["checkpoints"]]
    estimates = bf.estimated_products(tmp_path, "test", truth, steps) * truth.rates
    i, j = truth.test.index(rows, "test_"), truth.train.index(rows, "train_")
    by_checkpoint = np.stack(rows.score_by_checkpoint.to_list())
    np.testing.assert_allclose(by_checkpoint, estimates[i, j], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_checkpoint.sum(axis=1), rows.score, rtol=1e-12)
    totals = estimates.sum(axis=2)
    for (query, role), group in rows.assign(i=i, j=j).groupby(["i", "role"]):
        best = np.argsort(-bf.ROLES[role] * totals[query])[:10]
        np.testing.assert_allclose(group.score, totals[query][best], rtol=1e-5)
        assert len(set(group.j)) == 10
    bf.check_retrieval(tmp_path, rows, truth)


def chosen(values, label):
    return tf.gather(values, label, axis=1)[:, 0]


def rivals(output, label):
    others = tf.one_hot(label, 10, on_value=-np.inf, off_value=0.0)
    return tf.reduce_max(output + others, axis=1)


QUANTITIES = {
    "logit": lambda y, output: -chosen(output, y),
    "probability": lambda y, output: -chosen(tf.nn.softmax(output), y),
    "margin": lambda y, output: rivals(output, y) - chosen(output, y),
    "predicted_loss": lambda y, output: digits.loss(tf.argmax(output, 1), output),
}


@pytest.mark.parametrize("target", QUANTITIES)
def test_targets(problem, tmp_path, launch, target):
    assert launch("influence", **problem.flags(tmp_path, target=target, rescore=TRAIN)) == 0
    truth = problem.truth(lambda y, output, _: QUANTITIES[target](y, output))
    bf.check_influence(influence(tmp_path), truth, argmax)


@pytest.mark.parametrize("target", ["predicted_loss", "margin"])
def test_examples_without_a_label(problem, tmp_path, launch, target):
    pattern = f"{problem.folder}/unlabelled-*"
    flags = problem.flags(tmp_path, target=target, test=pattern, rescore=TRAIN)
    assert launch("influence", **flags) == 0
    labelled = problem.sides[1]
    test = bf.Examples(labelled.features, np.full(TEST, -1), bf.places(pattern))
    truth = problem.truth(
        lambda _, output, __: QUANTITIES[target](tf.argmax(output, 1), output), test
    )
    rows = influence(tmp_path)
    assert rows.test_label.isna().all()
    bf.check_influence(rows, truth, argmax, label=lambda y: np.where(y == -1, np.nan, y))


def test_test_sets_share_one_embedded_training_set(problem, tmp_path, launch):
    assert launch("influence", **problem.flags(tmp_path, rescore=TRAIN)) == 0
    made = {
        path: os.stat(path)
        for path in glob.glob(f"{tmp_path}/embeddings/**/*.tfrecord*", recursive=True)
    }
    tables = {path: os.stat(path) for path in glob.glob(f"{tmp_path}/i*/*/*.parquet")}
    other = problem.flags(
        tmp_path,
        rescore=TRAIN,
        test_name="margins",
        target="margin",
        test=f"{problem.folder}/test-00000*",
    )
    assert launch("influence", **other) == 0
    for path, before in (made | tables).items():
        assert os.stat(path).st_mtime_ns == before.st_mtime_ns, path
    _, test = problem.sides
    bf.check_influence(influence(tmp_path), problem.truth(), argmax)
    half = len(bf.places(other["test"]))
    part = bf.Examples(test.features[:half], test.label[:half], test.places[:half])
    truth = problem.truth(lambda y, output, _: QUANTITIES["margin"](y, output), part)
    bf.check_influence(influence(tmp_path, "margins"), truth, argmax)
    counts = bf.read_run(tmp_path)["counts"]
    assert {name: counts[name]["embedded"] for name in counts} == {
        "train": TRAIN,
        "test": TEST,
        "margins": half,
    }


@pytest.mark.parametrize(
    ("layers", "variables"),
    [
        ("last", lambda model: model.layers[-1].trainable_variables),
        ("^hidden/", lambda model: model.layers[0].trainable_variables),
        ("kernel$", lambda model: [layer.kernel for layer in model.layers]),
    ],
)
def test_layers(problem, tmp_path, launch, layers, variables):
    flags = problem.flags(tmp_path, layers=layers, rescore=TRAIN)
    assert launch("influence", **flags) == 0
    assert launch("self_influence", **flags) == 0
    truth = problem.truth(variables=variables)
    bf.check_influence(influence(tmp_path), truth, argmax)
    table = bf.read_table(tmp_path / "self_influence" / "*.parquet")
    bf.check_self_influence(table, truth, argmax)


@pytest.mark.parametrize("projection", ["countsketch", "kronecker", "gaussian", "none"])
def test_projections(problem, tmp_path, launch, projection):
    # The full gradients need no rescoring: their estimates are exact.
    rescore = 0 if projection == "none" else TRAIN
    flags = problem.flags(tmp_path, projection=projection, rescore=rescore, recall_queries=5)
    assert launch("influence", **flags) == 0
    rows = influence(tmp_path)
    bf.check_influence(rows.assign(exact=True), problem.truth(), argmax)
    correlation = bf.read_run(tmp_path)["retrieval"]["correlation"]["pearson"]
    assert correlation > (0.9999 if projection == "none" else 0.8)


def test_candidates_alone_lead_to_the_same_tables(problem, tmp_path, launch, monkeypatch):
    assert launch("influence", **problem.flags(tmp_path / "pairs")) == 0
    monkeypatch.setattr("tracin_beam.stages.joining.ALL_PAIRS", 0)
    assert launch("influence", **problem.flags(tmp_path / "out", index_rows=70, rescore=60)) == 0
    pd.testing.assert_frame_equal(influence(tmp_path / "pairs"), influence(tmp_path / "out"))


def test_many_partitions_give_the_tables_of_one(problem, tmp_path, launch, monkeypatch):
    monkeypatch.setattr("tracin_beam.stages.joining.ALL_PAIRS", 0)
    assert launch("influence", **problem.flags(tmp_path / "one")) == 0
    for rows, parts in ((70, 5), (30, 10)):  # of whole shards, and of halves of them
        out = tmp_path / f"many-{rows}"
        flags = problem.flags(out, index_rows=rows, index="scann")
        assert launch("influence", **flags) == 0
        assert len(glob.glob(f"{out}/index/part-*")) == parts
        pd.testing.assert_frame_equal(influence(tmp_path / "one"), influence(out))


def test_fewer_training_examples_than_rows_asked_for(problem, tmp_path, launch):
    one = glob.glob(problem.train)[0]
    assert launch("influence", **problem.flags(tmp_path, train=one, top_k=80)) == 0
    count = len(bf.places(one))
    assert count < 80
    assert influence(tmp_path).groupby(["test_id", "role"]).size().tolist() == [count] * 2 * TEST


def test_a_config_file_and_a_flag_that_wins(problem, tmp_path, launch):
    flags = problem.flags(str(tmp_path / "out"), top_k=3, rescore=TRAIN)
    flags = {name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}
    train = flags.pop("train")
    flags["train"] = sorted(glob.glob(train))
    (tmp_path / "influence.yaml").write_text(yaml.safe_dump(flags))
    assert launch("influence", config=tmp_path / "influence.yaml", top_k=4) == 0
    bf.check_influence(influence(tmp_path / "out"), problem.truth(), argmax, top_k=4)


def test_files_of_model_checkpoint(problem, tmp_path, launch):
    flags = problem.flags(tmp_path, checkpoints=f"{problem.folder}/saved-*.keras", rescore=TRAIN)
    assert launch("influence", **flags) == 0
    bf.check_influence(influence(tmp_path), problem.truth(), argmax)


def test_flags_that_are_wrong_end_with_a_sentence(problem, tmp_path, launch, capfd):
    assert launch("influence", **problem.flags(tmp_path, layers="nothing")) == 2
    said = capfd.readouterr().err
    assert "--layers=nothing matches none" in said
    assert "hidden/kernel" in said
    assert "Traceback" not in said
    assert launch("influence", **problem.flags(tmp_path, projection="svd")) == 2
    assert "--projection=svd is not known; take one of countsketch" in capfd.readouterr().err
