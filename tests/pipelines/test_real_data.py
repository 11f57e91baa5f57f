"""From real data to both tables, against brute force."""

import brute_force as bf
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tasks import ag_news, california_housing, fashion_mnist

import tracin_beam

SEED = 3


def run_both(launch, tmp_path, task, train, test, **flags):
    shared = {
        "task": f"{task.__file__}:task",
        "checkpoints": tmp_path / "ckpts",
        "train": train,
        "output": tmp_path / "out",
        "norms": "exact",
        **flags,
    }
    assert launch("influence", test=test, recall_queries=1000, rescore=400, **shared) == 0
    assert launch("self_influence", **shared) == 0


def check_both(tmp_path, truth, predict):
    out = tmp_path / "out"
    rows = bf.read_table(out / "influence/test/*.parquet")
    bf.check_influence(rows, truth, predict)
    bf.check_self_influence(bf.read_table(out / "self_influence/*.parquet"), truth, predict)
    bf.check_retrieval(out, rows, truth)
    counts = bf.read_run(out)["counts"]
    for name, examples in (("train", truth.train), ("test", truth.test)):
        assert counts[name] == {
            "shards": len({path for path, _ in examples.places}),
            "read": len(examples),
            "embedded": len(examples),
            "rejected": 0,
        }


def argmax(output):
    return np.argmax(output, axis=1)


def test_images(tmp_path, launch, shared_data):
    keras.utils.set_random_seed(SEED)
    with np.load(shared_data("fashion_mnist.npz")) as data:
        images, labels = data["x_train"][:1200], data["y_train"][:1200]
        test_images, test_labels = data["x_test"][:30], data["y_test"][:30]
    ids = [f"train {i}" for i in range(1200)]
    test_ids = [f"test {i}" for i in range(30)]

    def write(pattern, part, **how):
        fields = {"features": images[part], "label": labels[part], "id": ids[part]}
        parser = tracin_beam.write_shards(fields, str(tmp_path / pattern), **how)
        assert parser == fashion_mnist.read

    write("a-*.tfrecord", slice(0, 350), shards=1, compression="gzip")
    write("b-*.tfrecord", slice(350, 1200), shards=3)
    tracin_beam.write_shards(
        {"features": test_images, "label": test_labels, "id": test_ids},
        str(tmp_path / "test-*.tfrecord.gz"),
        shards=2,
        compression="gzip",
    )
    model = fashion_mnist.build_model()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), fashion_mnist.loss)
    model.fit(
        fashion_mnist.prepare(images),
        labels,
        batch_size=16,
        epochs=3,
        verbose=0,
        callbacks=[tracin_beam.TracInCheckpoint(str(tmp_path / "ckpts"))],
    )
    patterns = [str(tmp_path / "a-*"), str(tmp_path / "b-*")]
    test = str(tmp_path / "test-*")
    run_both(launch, tmp_path, fashion_mnist, ",".join(patterns), test)

    def examples(x, y, ids, *patterns):
        features = fashion_mnist.prepare(x).numpy()
        return bf.Examples(features, y, bf.places(*patterns), ids=ids)

    checkpoints = bf.listed_checkpoints(tmp_path / "ckpts")
    assert [rate for _, rate in checkpoints] == pytest.approx([0.05] * 3)
    truth = bf.brute_force(
        fashion_mnist.build_model(),
        bf.keras_loss(fashion_mnist.loss),
        examples(images, labels, ids, *patterns),
        examples(test_images, test_labels, test_ids, test),
        checkpoints,
    )
    check_both(tmp_path, truth, argmax)


def test_regression(tmp_path, launch, shared_data):
    keras.utils.set_random_seed(SEED)
    frame = pd.read_csv(shared_data("california_housing.csv.gz"))
    assert frame.total_bedrooms.isna().any()
    frame = frame.fillna({"total_bedrooms": frame.total_bedrooms.median()})
    frame = frame.sample(1100, random_state=SEED)
    label = (frame.pop("median_house_value") / 1e5).to_numpy(np.float32)
    weight = (0.5 + frame.households.rank(pct=True)).to_numpy(np.float32)
    places = ["<1H OCEAN", "INLAND", "ISLAND", "NEAR BAY", "NEAR OCEAN"]
    frame["ocean_proximity"] = pd.Categorical(frame.ocean_proximity, places)
    frame = pd.get_dummies(frame, dtype=float)
    features = ((frame - frame.mean()) / (frame.std() + 1e-6)).to_numpy()
    train, test = slice(0, 1000), slice(1000, 1100, 4)
    for name, part, shards in (("train", train, 3), ("test", test, 1)):
        parser = tracin_beam.write_shards(
            (features[part], label[part], weight[part]),
            str(tmp_path / f"{name}-*.tfrecord"),
            shards=shards,
        )
        assert parser == california_housing.parse
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 200)
    model = california_housing.build_model()
    model.compile(keras.optimizers.Adam(schedule), california_housing.task.loss)
    model.fit(
        features[train],
        label[train],
        sample_weight=weight[train],
        batch_size=16,
        epochs=2,
        verbose=0,
        callbacks=[tracin_beam.TracInCheckpoint(str(tmp_path / "ckpts"), save_freq=50)],
    )
    patterns = [str(tmp_path / f"{name}-*") for name in ("train", "test")]
    run_both(launch, tmp_path, california_housing, *patterns)

    checkpoints = bf.listed_checkpoints(tmp_path / "ckpts")
    expected = [0.01 * (1 + np.cos(np.pi * (step - 1) / 200)) for step in (50, 100, 126)]
    assert [rate for _, rate in checkpoints] == pytest.approx(expected, rel=1e-5)
    sides = [
        bf.Examples(features[part], label[part], bf.places(pattern), weight[part])
        for part, pattern in zip((train, test), patterns, strict=True)
    ]
    truth = bf.brute_force(
        california_housing.build_model(),
        bf.keras_loss(keras.losses.MeanSquaredError()),
        *sides,
        checkpoints,
    )
    check_both(tmp_path, truth, lambda output: output[:, 0])


def test_text(tmp_path, launch, shared_data):
    keras.utils.set_random_seed(SEED)
    frame = pd.read_parquet(shared_data("ag_news_partial.parquet"))
    frame = frame.sample(770, random_state=SEED)
    label = frame.label.to_numpy(np.int64)
    label -= label.min()
    text = frame.text.tolist()

    def write(name, part):
        with tf.io.TFRecordWriter(str(tmp_path / name)) as writer:
            for x, y in zip(text[part], label[part], strict=True):
                feature = {
                    "text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[x.encode()])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[y])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())

    write("train.0", slice(0, 400))
    write("train.1", slice(400, 410))
    write("train.2", slice(410, 750))
    write("test", slice(750, 770))
    tokens = ag_news.tokenize(tf.constant(text)).numpy()
    model = ag_news.build_model()
    model.compile(keras.optimizers.Adam(5e-3), ag_news.task.loss)
    model.fit(
        tokens[:750],
        label[:750],
        batch_size=16,
        epochs=2,
        verbose=0,
        callbacks=[tracin_beam.TracInCheckpoint(str(tmp_path / "ckpts"))],
    )
    train, test = str(tmp_path / "train.*"), str(tmp_path / "test")
    run_both(launch, tmp_path, ag_news, train, test)
    truth = bf.brute_force(
        ag_news.build_model(),
        bf.keras_loss(keras.losses.SparseCategoricalCrossentropy()),
        bf.Examples(tokens[:750], label[:750], bf.places(train)),
        bf.Examples(tokens[750:], label[750:], bf.places(test)),
        bf.listed_checkpoints(tmp_path / "ckpts"),
    )
    check_both(tmp_path, truth, argmax)
