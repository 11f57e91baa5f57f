"""A subclassed model that is nothing but exceptions, from shards to both tables."""

import os

import brute_force as bf
import keras
import numpy as np
import pytest
from tasks import two_heads

import tracin_beam


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    words = rng.integers(0, two_heads.VOCABULARY, (310, two_heads.LENGTH)).astype(np.int32)
    numbers = rng.normal(size=(310, two_heads.WIDTH)).astype(np.float32)
    features = {"words": words, "numbers": numbers}
    value = (numbers[:, 0] * numbers[:, 1] + 0.1 * words.mean(axis=1)).astype(np.float32)
    return features, {"word": words[:, 2].astype(np.int64), "value": value}


def part(structure, which):
    return {key: array[which] for key, array in structure.items()}


def train(features, label, folder):
    keras.utils.set_random_seed(1)
    model = two_heads.TwoHeads()

    class Summed(keras.Model):
        """Trains on the loss of both outputs."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(two_heads.loss(y, y_pred))

        def call(self, x):
            return self.inner(x)

        def save_weights(self, path):
            self.inner.save_weights(path)

    summed = Summed()
    summed.compile(keras.optimizers.Adam(0.02))
    callback = tracin_beam.TracInCheckpoint(folder)
    summed.fit(features, label, batch_size=30, epochs=2, verbose=0, callbacks=[callback])


def test_shared_tied_raw_and_recurrent_weights(tmp_path, launch, data):
    features, label = data
    train(part(features, slice(0, 300)), part(label, slice(0, 300)), str(tmp_path / "ckpts"))
    # Two folders have shards of the same base names.
    for folder, which in (("a", slice(0, 120)), ("b", slice(120, 300)), ("test", slice(300, 310))):
        os.makedirs(tmp_path / folder)
        pattern = str(tmp_path / folder / "part-*.tfrecord")
        fields = {"features": part(features, which), "label": part(label, which)}
        assert tracin_beam.write_shards(fields, pattern, shards=2) == two_heads.parse
    flags = {
        "task": f"{two_heads.__file__}:task",
        "checkpoints": tmp_path / "ckpts",
        "train": f"{tmp_path}/a/*,{tmp_path}/b/*",
        "output": tmp_path / "out",
        "rescore": 300,
        "recall_queries": 4,
    }
    assert launch("influence", test=tmp_path / "test" / "*", **flags) == 0
    assert launch("self_influence", **flags) == 0

    places = bf.places(f"{tmp_path}/a/*", f"{tmp_path}/b/*")
    names = bf.read_run(tmp_path / "out")["sets"]["train"]["shards"]
    assert len(set(names.values())) == 4
    assert [names[p] for p in sorted(names)][:2] == [
        f"part-0000{i}-of-00002.tfrecord" for i in range(2)
    ]
    truth = bf.brute_force(
        two_heads.TwoHeads(),
        lambda y, output, _: two_heads.loss(y, output),
        bf.Examples(
            part(features, slice(0, 300)),
            part(label, slice(0, 300)),
            places,
            ids=[f"{names[path]}#{position}" for path, position in places],
        ),
        bf.Examples(
            part(features, slice(300, 310)),
            part(label, slice(300, 310)),
            bf.places(f"{tmp_path}/test/*"),
        ),
        bf.listed_checkpoints(tmp_path / "ckpts"),
    )
    columns = {
        "predict": lambda output: np.argmax(output["word"], axis=1),
        "label": lambda y: np.full(len(y["word"]), np.nan),
    }
    rows = bf.read_table(tmp_path / "out/influence/test/*.parquet")
    bf.check_influence(rows, truth, **columns)
    table = bf.read_table(tmp_path / "out/self_influence/*.parquet")
    bf.check_self_influence(table, truth, **columns)
