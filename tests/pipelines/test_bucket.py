"""Shards, checkpoints and output in a bucket, by Beam's own client for it."""

import keras
import numpy as np
import pytest
import tiny as t
from bucket import ANONYMOUS, NAME, ROOT, TinyInBucket, bucket  # noqa: F401
from tiny import rows

import tracin_beam
from tracin_beam.errors import InputError
from tracin_beam.storage import files, patterns

# Beam's client tries again for minutes where nothing answers.
pytestmark = pytest.mark.timeout(300)

FLAGS = {"index": "scann", "index_rows": 16}
STAGES = ("influence", "self_influence")
REJECTED = {("train-3.tfrecord", 9): "parse failed"}


def run_all(tiny, **changes):
    for stage in STAGES:
        assert tiny.run(stage, **{**FLAGS, **changes}) == 0


@pytest.fixture(scope="module")
def finished(bucket, tmp_path_factory, launch):  # noqa: F811
    """A run in the bucket, and what it made."""
    tiny = TinyInBucket(bucket, tmp_path_factory.mktemp("bucket"), launch)
    tiny.write_all(packed=True)
    tiny.write("train-3.tfrecord", [*rows("more", 9, 5), b"garbage"])
    run_all(tiny)
    tiny.expected = t.contents(tiny.out)
    tiny.made = {name: blob.download_as_bytes() for name, blob in tiny.objects().items()}
    return tiny


@pytest.fixture
def tiny(finished):
    """The same, where the output is as the run left it."""
    clear(finished)
    for name, content in finished.made.items():
        finished.bucket.blob(finished.key(finished.out / name)).upload_from_string(content)
    finished.pull()
    return finished


def clear(tiny):
    for blob in tiny.objects().values():
        blob.delete()


# The whole pipeline.


def test_tables_are_those_of_a_local_run(tiny, launch, tmp_path):
    tiny.check(REJECTED)
    assert "reports/test.html" in tiny.expected
    for stage in STAGES:
        flags = {**tiny.flags(stage), **FLAGS, "output": str(tmp_path)}
        local = {k: v.replace(ROOT, "") if isinstance(v, str) else v for k, v in flags.items()}
        assert launch(stage, **local) == 0
    here = t.contents(tmp_path)
    assert set(here) == set(tiny.expected)
    for path, content in here.items():
        if path.endswith(".tfrecord"):
            assert content == tiny.expected[path]
    for folder in ("influence/test", "self_influence"):
        for row, other in zip(t.table(tiny.out / folder), t.table(tmp_path / folder), strict=True):
            for key, value in row.items():
                if key.endswith("shard"):
                    assert value == ROOT + other[key]
                elif isinstance(value, float | list):
                    assert value == pytest.approx(other[key], rel=1e-5, abs=1e-6)
                else:
                    assert value == other[key]


def test_nothing_is_done_twice(tiny):
    before = tiny.generations()
    run_all(tiny)
    after = tiny.generations()
    written = {name for name in after if after[name] != before.get(name)}
    assert written == {"run.json"}
    tiny.check(REJECTED)


def test_a_new_shard_and_one_that_has_gone(tiny):
    before = tiny.generations()
    old = tiny.shards.pop("train-2.tfrecord.gz")
    content = (tiny.folder / "train-2.tfrecord.gz").read_bytes()
    (tiny.folder / "train-2.tfrecord.gz").unlink()
    tiny.write("train-4.tfrecord", rows("new", 5, 50))
    assert tiny.run("influence", **FLAGS) == 0
    tiny.check(REJECTED, tables=["influence"])
    after = tiny.generations()
    written = {name for name in after if after[name] != before.get(name)}
    embedded = {name for name in written if name.startswith("embeddings/")}
    assert {name.rpartition("/")[2].removesuffix(".json") for name in embedded} == {
        "train-4.tfrecord"
    }
    (tiny.folder / "train-4.tfrecord").unlink()
    del tiny.shards["train-4.tfrecord"]
    (tiny.folder / "train-2.tfrecord.gz").write_bytes(content)
    tiny.shards["train-2.tfrecord.gz"] = old


def test_overwrite_clears_the_bucket(tiny):
    half = tiny.bucket.blob(tiny.key(tiny.out / "embeddings/train/10/.x.tfrecord.0123.tmp"))
    half.upload_from_string(b"half")
    before = tiny.generations()
    assert tiny.run("self_influence", seed=3, **FLAGS) == 2
    assert tiny.generations() == before
    assert tiny.run("self_influence", seed=3, overwrite=True, **FLAGS) == 0
    tiny.check(REJECTED, tables=["self_influence"])
    left = set(tiny.objects())
    assert not [name for name in left if name.startswith(("influence/", "index/", "evaluation/"))]
    assert not half.exists()


# Killed.


# The number of files that have got their names: in the midst of embedding, and in the index.
# The first five are the lease and run.json.
@pytest.mark.parametrize(("calls", "where"), [(10, "embeddings/"), (44, "index/part-")])
def test_killed_before_a_file_has_its_name(tiny, start, calls, where):
    clear(tiny)
    argv = tiny.argv("influence", **FLAGS)
    exits = ("tracin_beam.storage.files", "_replace", calls)
    job = start("influence", argv, exits, prelude=ANONYMOUS)
    assert job.wait() == 9, job.said()
    left = tiny.generations()
    hidden = {name for name in left if name.rpartition("/")[2].startswith(".")}
    assert any(name.startswith(where) for name in hidden), hidden
    tiny.pull()
    pulled = t.whole(tiny.out)
    for name in set(left) - hidden - {"run.json"}:
        if not name.startswith(("index/", "_state/")):
            assert pulled[name] == tiny.expected[name], name
    assert tiny.run("influence", **FLAGS) == 0
    made = t.contents(tiny.out)
    made.pop("run.json")
    expected = {
        name: content
        for name, content in tiny.expected.items()
        if name != "run.json" and not name.startswith(("self_influence/", "_state/self_influence"))
    }
    assert set(made) == set(expected)
    assert not {name for name in made if made[name] != expected[name]}
    after = tiny.generations()
    units = {name for name in left if name.endswith(".tfrecord") and f"{name}.json" in left}
    assert units
    assert {after[name] == left[name] for name in units} == {True}


# What goes to the bucket from a training script, and comes from it in other ways.


def test_from_training_to_tables(bucket, tmp_path, launch):  # noqa: F811
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)).astype(np.float32), rng.integers(3, size=40)
    parser = tracin_beam.write_shards(
        {"features": x[:32], "label": y[:32]}, f"{ROOT}/made/data/train-*.tfrecord", shards=2
    )
    tracin_beam.write_shards(
        {"features": x[32:], "label": y[32:]}, f"{ROOT}/made/test.tfrecord.gz*", shards=1,
        compression="gzip",
    )  # fmt: skip
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    callback = tracin_beam.TracInCheckpoint(f"{ROOT}/made/ckpts")
    model.fit(x[:32], y[:32], epochs=2, verbose=0, callbacks=[callback])
    names = {blob.name for blob in bucket.list_blobs(prefix="made/")}
    assert not [name for name in names if "/." in name]
    assert {name for name in names if "ckpts" in name} == {
        "made/ckpts/checkpoints.json",
        "made/ckpts/00000001.weights.h5",
        "made/ckpts/00000002.weights.h5",
    }
    # The task is in the bucket too.
    text = t.TASK[: t.TASK.index("def parse")].replace(', name="scores"', "")
    text += f"from tracin_beam import Parser\nparse = {parser!r}\n"
    text += t.TASK[t.TASK.index("loss =") :]
    bucket.blob("made/task.py").upload_from_string(text)
    flags = {
        "task": f"{ROOT}/made/task.py:task",
        "checkpoints": f"{ROOT}/made/ckpts",
        "train": f"{ROOT}/made/data/*",
        "test": f"{ROOT}/made/test*",
        "output": f"{ROOT}/made/out",
        "dim": 8,
        "top_k": 32,
    }
    assert launch("influence", **flags) == 0
    path = tmp_path / "influence-00000-of-00001.parquet"
    name = "made/out/influence/test/influence-00000-of-00001.parquet"
    bucket.blob(name).download_to_filename(path)
    found = t.table(tmp_path)
    scores = np.zeros((8, 32))
    for step in (1, 2):
        weights = tmp_path / f"{step}.weights.h5"
        bucket.blob(f"made/ckpts/{step:08d}.weights.h5").download_to_filename(weights)
        model.load_weights(weights)
        residual = keras.ops.softmax(model(x)).numpy() - np.eye(3)[y]
        inputs = np.concatenate([x, np.ones((40, 1))], axis=1)
        products = (residual[32:] @ residual[:32].T) * (inputs[32:] @ inputs[:32].T)
        scores += 0.1 * products
    assert len(found) == 2 * 8 * 32
    for row in found:
        shard = int(row["train_shard"][-len("0-of-00002.tfrecord")])
        expected = scores[row["test_position"], 16 * shard + row["train_position"]]
        assert row["score"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # The copy of the task has another name in each run, which changes nothing.
    before = {b.name: b.generation for b in bucket.list_blobs(prefix="made/out/")}
    assert launch("influence", **flags) == 0
    after = {b.name: b.generation for b in bucket.list_blobs(prefix="made/out/")}
    assert {name for name in after if after[name] != before[name]} == {"made/out/run.json"}


def test_a_glob_of_weight_files_and_a_config_file(tiny):
    text = f"checkpoints: {tiny.path('ckpts')}/*.weights.h5\nlearning_rate: [0.5, 0.25]\n"
    (tiny.folder / "run.yaml").write_text(text)
    config = tiny.path("run.yaml")
    assert tiny.run("self_influence", checkpoints=None, config=config, overwrite=True, **FLAGS) == 0
    (tiny.folder / "run.yaml").unlink()
    tiny.check(REJECTED, tables=["self_influence"])


# What is wrong.


def test_what_is_not_there(tiny, capfd):
    for changed, said in [
        ({"train": f"{ROOT}/nowhere/*"}, "No file matches 'gs://tracin-test/nowhere/*'"),
        ({"checkpoints": f"{ROOT}/nowhere"}, "There is no checkpoints.json in"),
        ({"config": f"{ROOT}/nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"task": f"{ROOT}/nowhere.py:task"}, "nowhere.py: NotFound"),
    ]:
        assert tiny.run("embed", **changed) == 2
        told = capfd.readouterr().err
        assert said in told
        assert "Traceback" not in told


def test_a_bucket_that_may_not_be_read_or_written(bucket, monkeypatch):  # noqa: F811
    from apache_beam.io.gcp import gcsio
    from google.api_core.exceptions import Forbidden

    def forbidden(*_, **__):
        raise Forbidden("no access to the bucket")

    for name in ("exists", "open", "checksum"):
        monkeypatch.setattr(gcsio.GcsIO, name, forbidden)
    for call in (files.exists, files.read_json, files.checksum):
        with pytest.raises(OSError, match=r"(?s)gs://b/x.*no access to the bucket"):
            call("gs://b/x")
    with pytest.raises(OSError, match="no access to the bucket"):
        files.write_json("gs://b/x", {})


def test_atomic_write(bucket):  # noqa: F811
    def names():
        return [blob.name for blob in bucket.list_blobs(prefix="atomic/")]

    path = f"{ROOT}/atomic/data.tfrecord"
    for content in (b"one", b"two" * (9 << 20)):  # the second in several requests
        with files.atomic_write(path) as handle:
            handle.write(content)
            assert names() in ([], ["atomic/data.tfrecord"])
        assert names() == ["atomic/data.tfrecord"]
        with files.open_read(path) as handle:
            assert handle.read() == content

    def fail():
        with files.atomic_write(path) as handle:
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names() == ["atomic/data.tfrecord"]
    assert bucket.blob("atomic/data.tfrecord").download_as_bytes() == content


def test_names_in_a_bucket(bucket):  # noqa: F811
    for name in ("a/1.x", "a/2.x", "a/.hidden.x", "a/sub/3.x", "a/folder/", "ab/4.x"):
        bucket.blob(f"names/{name}").upload_from_string(name)

    def found(pattern):
        return [info.path.removeprefix(f"{ROOT}/names/") for info in patterns.match(pattern)]

    assert found(f"{ROOT}/names/a/*") == ["a/1.x", "a/2.x"]
    assert found(f"{ROOT}/names/a/**") == ["a/1.x", "a/2.x", "a/sub/3.x"]
    assert found(f"{ROOT}/names/*/*.x,{ROOT}/names/a/1.x") == ["a/1.x", "a/2.x", "ab/4.x"]
    with pytest.raises(InputError, match="No file matches 'gs://tracin-test/names/a'"):
        patterns.match(f"{ROOT}/names/a")
    assert patterns.match(f"gs://{NAME}/names/ab/4.x")[0].size == 6
