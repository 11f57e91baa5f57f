"""--gradient adam: gradients divided by √v + ε on both sides, against a tape for each example."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny as t

import tracin_beam
from tracin_beam.errors import InputError

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
    model = scope["build_model"]()
    optimizer = keras.optimizers.Adam(0.01, epsilon=1e-3)
    model.compile(optimizer, scope["loss"])
    kept = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            v = [np.asarray(v, np.float64) for v in optimizer._velocities]
            kept.append(([np.array(w) for w in model.get_weights()], v))

    saving = tracin_beam.TracInCheckpoint(folder / "ckpts", optimizer_state=True)
    model.fit(x[:14], y[:14], epochs=2, batch_size=7, verbose=0, callbacks=[saving, Keep()])
    return folder, model, scope["loss"], x, y, kept


def flags(folder, **more):
    return {
        "task": f"{folder}/task.py:task",
        "checkpoints": folder / "ckpts",
        "train": f"{folder}/train-*",
        "test": f"{folder}/test-*",
        "dim": 64,
        "recall_queries": 0,
        "top_k": 14,
        "gradient": "adam",
        **more,
    }


def truth(problem):
    """float64 [tests, trains, C]: 0.01 Σ (g / (√v + ε)) (g' / (√v + ε))."""
    _, model, loss, x, y, kept = problem
    parts = []
    for weights, moments in kept:
        model.set_weights(weights)
        rows = []
        for i in range(len(x)):
            with tf.GradientTape() as tape:
                value = loss(y[i : i + 1], model(x[i : i + 1], training=False))
            found = tape.gradient(value, [v.value for v in model.trainable_variables])
            dense = [np.asarray(tf.convert_to_tensor(g), np.float64) for g in found]
            scaled = [g / (np.sqrt(v) + 1e-3) for g, v in zip(dense, moments, strict=True)]
            rows.append(np.concatenate([g.ravel() for g in scaled]))
        rows = np.stack(rows)
        parts.append(0.01 * rows[14:] @ rows[:14].T)
    return np.stack(parts, axis=2)


def test_exact_scores_and_their_sums(problem, tmp_path, launch):
    folder = problem[0]
    assert launch("influence", output=tmp_path, total=True, **flags(folder)) == 0
    want = truth(problem)
    close = {"rtol": 2e-3, "atol": 2e-3 * np.abs(want).max()}
    rows = t.table(tmp_path / "influence" / "test")
    assert len(rows) == 2 * want.shape[0] * want.shape[1]
    at = {s: i for i, s in enumerate(sorted({r["train_shard"] for r in rows}))}
    for row in rows:
        own = want[row["test_position"], 7 * at[row["train_shard"]] + row["train_position"]]
        np.testing.assert_allclose(row["score_by_checkpoint"], own, **close)
    for row in t.table(tmp_path / "total_influence" / "test"):
        place = 7 * at[row["train_shard"]] + row["train_position"]
        np.testing.assert_allclose(row["score_by_checkpoint"], want[:, place].sum(axis=0), **close)


def test_plain_gradients_are_another_output(problem, tmp_path, launch, capsys):
    folder = problem[0]
    small = {"projection": "none", "output": tmp_path}
    assert launch("embed", **flags(folder, **small)) == 0
    assert launch("embed", **flags(folder, **small, gradient="plain")) == 2
    assert "gradient (adam → plain)" in capsys.readouterr().err


def test_misuse(problem, tmp_path, launch, capsys):
    folder, model, loss, x, y, _ = problem
    model.compile(keras.optimizers.SGD(0.1), loss)
    saving = tracin_beam.TracInCheckpoint(tmp_path / "sgd", optimizer_state=True)
    with pytest.raises(InputError, match="SGD keeps no second moments"):
        model.fit(x, y, verbose=0, callbacks=[saving])
    model.fit(x, y, verbose=0, callbacks=[tracin_beam.TracInCheckpoint(tmp_path / "plain")])
    given = flags(folder, checkpoints=tmp_path / "plain", output=tmp_path / "out")
    assert launch("influence", **given) == 2
    assert "train with TracInCheckpoint(…, optimizer_state=True)" in capsys.readouterr().err
