"""--gradient adam: gradients scaled as Adam scales them on both sides, against a tape."""

import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny as t

import tracin_beam

# Tokens by rows, a convolution, a dense layer over one position, normalisation.
TASK = """
import keras, tensorflow as tf
import tracin_beam

def build_model():
    layers = keras.layers
    return keras.Sequential([
        keras.Input((6,), dtype="int32"),
        layers.Embedding(9, 4),
        layers.Conv1D(3, 2, activation="tanh", name="conv"),
        layers.Flatten(),
        layers.LayerNormalization(name="norm"),
        layers.Dense(3, name="scores"),
    ])

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
parse = tracin_beam.Parser(features=((6,), "int32"), label=((), "int64"))
task = tracin_beam.Task(build_model, loss, parse)
"""


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adam")
    scope = {}
    exec(TASK, scope)
    (folder / "task.py").write_text(TASK)
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (20, 6)).astype(np.int32), rng.integers(0, 3, 20)
    tracin_beam.write_shards((x[:14], y[:14]), f"{folder}/train-*", shards=2)
    tracin_beam.write_shards((x[14:], y[14:]), f"{folder}/test-*", shards=1)
    model, kept = scope["build_model"](), []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            optimizer = self.model.optimizer
            v = [np.asarray(v, np.float64) for v in optimizer._velocities]
            correction = 1 - optimizer.beta_2 ** int(optimizer.iterations)
            # Adam's step is η m̂ √(1 − β₂ᵗ) / (√v + ε).
            scales = [np.sqrt(correction) / (np.sqrt(x) + optimizer.epsilon) for x in v]
            kept.append(([np.array(w) for w in model.get_weights()], scales))

    for run in range(2):
        optimizer = keras.optimizers.Adam(0.01, epsilon=1e-3, beta_2=(0.999, 0.9)[run])
        model.compile(optimizer, scope["loss"], run_eagerly=True)
        saving = tracin_beam.TracInCheckpoint(folder / f"ckpts-{run}", optimizer_state=True)
        fit = {"epochs": 2 - run, "batch_size": 7, "verbose": 0}
        model.fit(x[:14], y[:14], callbacks=[saving, Keep()], **fit)
    return folder, model, scope["loss"], x, y, kept


def flags(folder, **more):
    return {
        "task": f"{folder}/task.py:task",
        "checkpoints": [folder / "ckpts-0", folder / "ckpts-1"],
        "train": f"{folder}/train-*",
        "test": f"{folder}/test-*",
        "dim": 64,
        "recall_queries": 0,
        "top_k": 14,
        "gradient": "adam",
        **more,
    }


@pytest.fixture(scope="module")
def gradients(problem):
    """float64 [C, n, N]: of each example at each checkpoint, times what Adam divides it by."""
    _, model, loss, x, y, kept = problem
    found = []
    for weights, scales in kept:
        model.set_weights(weights)
        rows = []
        for i in range(len(x)):
            with tf.GradientTape() as tape:
                value = loss(y[i : i + 1], model(x[i : i + 1], training=False))
            parts = tape.gradient(value, [v.value for v in model.trainable_variables])
            dense = [np.asarray(tf.convert_to_tensor(g), np.float64) for g in parts]
            rows.append(
                np.concatenate([(g * s).ravel() for g, s in zip(dense, scales, strict=True)])
            )
        found.append(np.stack(rows))
    return np.stack(found)


def place(row, side):
    return 7 * int(row[f"{side}_shard"].split("-")[-3]) + row[f"{side}_position"]


def test_scores_sums_and_groups(problem, gradients, tmp_path, launch):
    folder, _, _, _, y, _ = problem
    given = flags(folder, output=tmp_path, total=True, group_by="label")
    assert launch("influence", **given) == 0
    terms = 0.01 * np.einsum("cip,cjp->ijc", gradients[:, 14:], gradients[:, :14])
    want = terms / [2, 2, 2]  # of two training runs, of which the first has two checkpoints
    close = {"rtol": 2e-3, "atol": 2e-3 * np.abs(want).max()}
    rows = t.table(tmp_path / "influence" / "test")
    assert len(rows) == 2 * want.shape[0] * want.shape[1]
    for row in rows:
        own = want[place(row, "test"), place(row, "train")]
        np.testing.assert_allclose(row["score_by_checkpoint"], own, **close)
    for row in t.table(tmp_path / "total_influence" / "test"):
        own = want[:, place(row, "train")].sum(axis=0)
        np.testing.assert_allclose(row["score_by_checkpoint"], own, **close)
    for row in t.table(tmp_path / "group_influence" / "test"):
        chosen = [y[14:] == int(row["test_group"]), y[:14] == int(row["train_group"])]
        own = want[np.ix_(*chosen)].sum(axis=(0, 1))
        np.testing.assert_allclose(row["score_by_checkpoint"], own, **close)


def test_preconditioned_embeddings_and_self_influence(problem, gradients, tmp_path, launch, capsys):
    folder = problem[0]
    small = flags(folder, projection="none", output=tmp_path)
    assert launch("influence", **small, preconditioner="projected") == 0
    want = np.zeros((6, 14))
    for rows in gradients:
        second = rows[:14].T @ rows[:14] / 14
        size = len(second)
        inverse = np.linalg.inv(second + np.trace(second) / size * np.eye(size))
        want += 0.01 / 2 * rows[14:] @ inverse @ rows[:14].T
    for row in t.table(tmp_path / "influence" / "test"):
        own = want[place(row, "test"), place(row, "train")]
        np.testing.assert_allclose(row["score"], own, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    del small["test"]
    assert launch("self_influence", **small, norms="estimated") == 0
    want = 0.01 / 2 * np.square(gradients[:, :14]).sum(axis=(0, 2))
    for row in t.table(tmp_path / "self_influence"):
        at = 7 * int(row["shard"].split("-")[-3]) + row["position"]
        np.testing.assert_allclose(row["self_influence"], want[at], rtol=2e-3)
    assert launch("self_influence", **small, preconditioner="kfac") == 2
    assert "kfac needs the factors of gradients" in capsys.readouterr().err
    small["gradient"] = "plain"
    assert launch("embed", **small) == 2
    assert "gradient (adam → plain)" in capsys.readouterr().err


def test_second_moments_that_are_missing_or_of_others(problem, tmp_path, launch, capsys):
    folder = problem[0]
    ckpts = tmp_path / "ckpts"
    shutil.copytree(folder / "ckpts-0", ckpts)
    given = flags(folder, checkpoints=ckpts, output=tmp_path / "out")
    first, last = sorted((ckpts / "optimizer").iterdir())
    shutil.copy(last, first)
    assert launch("influence", **given) == 2
    assert f"{first} has the second moments of other weights" in capsys.readouterr().err
    first.unlink()
    assert launch("influence", **given) == 2
    assert "train with TracInCheckpoint(…, optimizer_state=True)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
