import json
import math
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.legacy.saving import legacy_h5_format
from remote_files import PREFIX
from training import (
    RATE,
    STEPS,
    X,
    build,
    compiled,
    decay,
    fit,
    load_weights,
    schedule,
)

from tracin_beam.errors import InputError
from tracin_beam.inputs.callback import TracInCheckpoint
from tracin_beam.inputs.checkpoints import read_checkpoints

# read_checkpoints, a directory


def write_listing(tmp_path, *entries):
    (tmp_path / "checkpoints.json").write_text(json.dumps(list(entries)))
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            (tmp_path / entry["path"]).touch()


def entry(step, /, **changes):
    return {"path": f"{step}.weights.h5", "step": step, "epoch": 1, "learning_rate": 0.1} | changes


def without(item, key):
    return {k: v for k, v in item.items() if k != key}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "lists no checkpoint"),
        ([3], "Entry 0 .* must be an object"),
        ([entry(1), without(entry(2), "step")], "Entry 1 .*'step' is missing"),
        ([entry(1), entry(2, step="2")], "Entry 1 .*'step' is '2'"),
        ([without(entry(1), "path")], "Entry 0 .*'path' is missing"),
        ([entry(1, epoch="x")], "Entry 0 .*'epoch'"),
        ([without(entry(1), "learning_rate")], "entry 0 .*--learning_rate"),
        ([entry(1, learning_rate="fast")], "entry 0 .*'fast'"),
        ([entry(1, learning_rate=-0.1)], "entry 0 .*-0.1"),
        ([entry(1, learning_rate=math.nan)], "entry 0 .*nan"),
        ([entry(1, learning_rate=math.inf)], "entry 0 .*finite"),
        ([entry(1, learning_rate=1e308)], "entry 0 .*1e.308: no training"),
        ([entry(1, learning_rate=10**400)], "entry 0 .*no training"),
        ([entry(1, learning_rate=True)], "entry 0 .*must be a number"),
        ([entry(1, learning_rate=0), entry(2, learning_rate=0.0)], "every checkpoint is 0"),
        ([entry(1), entry(2, path="1.weights.h5")], "listed twice, at steps 1 and 2"),
        ([entry(1, step=-1)], "Entry 0 .*'step' must be from 0"),
        ([entry(1, step=10**30)], "Entry 0 .*'step' must be from 0"),
        ([entry(1, step=True)], "Entry 0 .*'step' is True"),
        ([entry(1, step=math.nan)], "Entry 0 .*'step' is nan"),
        ([entry(i) for i in range(10_001)], "lists 10001 checkpoints"),
        ([entry(1), entry(2, step=1)], "have the same step"),
        ([entry(2), entry(1)], "not in training order"),
    ],
)
def test_a_wrong_listing_names_entry_and_key(tmp_path, entries, message):
    write_listing(tmp_path, *entries)
    with pytest.raises(InputError, match=message):
        read_checkpoints(str(tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        "../1.weights.h5",
        "a/../../1.weights.h5",
        "/etc/1.weights.h5",
        "gs://bucket/1.weights.h5",
        "file:///1.weights.h5",
        "..\\1.weights.h5",
        "./1.weights.h5",
        "1\x00.weights.h5",
        "1\n.weights.h5",
        "",
        "a//1.weights.h5",
    ],
)
def test_a_listing_names_nothing_outside_its_folder(tmp_path, path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for where in (tmp_path / "a", tmp_path):
        (where / "1.weights.h5").touch()
    (folder / "checkpoints.json").write_text(json.dumps([entry(1, path=path)]))
    with pytest.raises(InputError, match=r"Entry 0 .*below the directory"):
        read_checkpoints(str(folder))
    with pytest.raises(InputError, match=r"Entry 0 .*below the directory"):
        fit(compiled(), TracInCheckpoint(folder))


def test_a_listing_names_weights_alone_and_may_name_folders(tmp_path):
    (tmp_path / "checkpoints.json").write_text(json.dumps([entry(1, path="checkpoints.json")]))
    with pytest.raises(InputError, match="must end in"):
        read_checkpoints(str(tmp_path))
    (tmp_path / "a").mkdir()
    write_listing(tmp_path, entry(1, path="a/1.weights.h5"))
    assert read_checkpoints(str(tmp_path))[0].path == str(tmp_path / "a" / "1.weights.h5")


def test_a_rate_of_zero_among_others_is_told(tmp_path, caplog):
    write_listing(tmp_path, entry(1, learning_rate=0), entry(2))
    assert [c.learning_rate for c in read_checkpoints(str(tmp_path))] == [0, 0.1]
    assert "1.weights.h5" in caplog.text


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "\x00", "[" * 100_000])
def test_a_listing_that_is_not_one(tmp_path, text):
    (tmp_path / "checkpoints.json").write_text(text)
    with pytest.raises(InputError, match=r"checkpoints\.json"):
        read_checkpoints(str(tmp_path))


def test_a_listed_file_that_is_missing(tmp_path):
    write_listing(tmp_path, entry(1), entry(2))
    (tmp_path / "2.weights.h5").unlink()
    with pytest.raises(InputError, match=r"2\.weights\.h5 is missing"):
        read_checkpoints(str(tmp_path))


def test_a_learning_rate_beside_a_listing(tmp_path):
    write_listing(tmp_path, entry(1), entry(2))
    with pytest.raises(InputError, match="already has a learning rate"):
        read_checkpoints(str(tmp_path), 0.5)
    write_listing(tmp_path, *(without(entry(i), "learning_rate") for i in (1, 2)))
    assert [c.learning_rate for c in read_checkpoints(str(tmp_path), [0.5, 0.25])] == [0.5, 0.25]


def test_a_directory_without_a_listing(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoints\.json .*\*\.weights\.h5"):
        read_checkpoints(str(tmp_path))


# read_checkpoints, files


@pytest.fixture
def uncompiled(tmp_path):
    """Saves weights that know nothing but themselves."""
    model = build()

    def save(*names):
        for name in names:
            model.save_weights(tmp_path / name)

    return save


def test_names_are_sorted_by_their_numbers(tmp_path, uncompiled):
    uncompiled(
        *(f"resnet-{step}-{loss}.weights.h5" for step, loss in ((10, 0.1), (9, 0.3), (100, 0.2)))
    )
    checkpoints = read_checkpoints(str(tmp_path / "*.weights.h5"), 0.1)
    assert [checkpoint.step for checkpoint in checkpoints] == [9, 10, 100]
    assert "resnet-9-0.3" in checkpoints[0].path
    assert {checkpoint.learning_rate for checkpoint in checkpoints} == {0.1}


def test_names_whose_first_numbers_are_alike_are_counted(tmp_path, uncompiled):
    uncompiled(*(f"resnet20-{step}.weights.h5" for step in (10, 9)))
    checkpoints = read_checkpoints(str(tmp_path / "*.weights.h5"), [0.1, 0.2])
    assert [c.step for c in checkpoints] == [1, 2]
    assert [c.path.rsplit("-", 1)[1] for c in checkpoints] == ["9.weights.h5", "10.weights.h5"]
    assert [c.learning_rate for c in checkpoints] == [0.1, 0.2]


def test_a_list_of_files(tmp_path, uncompiled):
    uncompiled("b.weights.h5", "a.weights.h5")
    spec = f"{tmp_path}/b.weights.h5,{tmp_path}/a.weights.h5"
    assert [c.step for c in read_checkpoints(spec, 1)] == [1, 2]


@pytest.mark.parametrize(
    ("learning_rate", "message"),
    [
        (None, r"1\.weights\.h5: give it with --learning_rate"),
        ([0.1, 0.2, 0.3], "3 values for 2 checkpoints"),
        ([], "0 values for 2 checkpoints"),
        (-1.0, "at least 0"),
        ([0.1, math.nan], r"2\.weights\.h5 is nan"),
        ([0.1, math.inf], "finite"),
    ],
)
def test_wrong_learning_rates(tmp_path, uncompiled, learning_rate, message):
    uncompiled("1.weights.h5", "2.weights.h5")
    with pytest.raises(InputError, match=message):
        read_checkpoints(str(tmp_path / "*.weights.h5"), learning_rate)


def test_files_that_cannot_be_checkpoints(tmp_path, uncompiled):
    with pytest.raises(InputError, match="No file matches"):
        read_checkpoints(str(tmp_path / "*.weights.h5"), 0.1)
    (tmp_path / "model.h5").touch()
    with pytest.raises(InputError, match=r"model\.h5 is an HDF5 file of another kind"):
        read_checkpoints(str(tmp_path / "*"), 0.1)
    (tmp_path / "model.weights.h5").write_bytes(b"text")
    with pytest.raises(InputError, match=r"model\.weights\.h5 cannot be read"):
        read_checkpoints(str(tmp_path / "*.weights.h5"), 0.1)


def model_checkpoints(tmp_path, model, suffix=".keras"):
    weights_only = suffix == ".weights.h5"
    path = str(tmp_path / ("epoch{epoch}" + suffix))
    saver = keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only)
    fit(model, saver, initial_epoch=8, epochs=11)  # 9, 10 and 11 are not sorted as text
    return str(tmp_path / ("*" + suffix))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "scaled"])
@pytest.mark.parametrize("scheduled", [True, False])
def test_keras_files_know_their_steps_and_rates(tmp_path, optimizer, scheduled):
    kinds = {
        "sgd": keras.optimizers.SGD,
        "adam": keras.optimizers.Adam,
        "scaled": lambda rate: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate)),
    }
    model = compiled(schedule() if scheduled else RATE, kinds[optimizer])
    checkpoints = read_checkpoints(model_checkpoints(tmp_path, model))
    steps = [4, 8, 12]
    assert [c.step for c in checkpoints] == steps
    expected = [decay(step - 1) if scheduled else RATE for step in steps]
    assert [c.learning_rate for c in checkpoints] == pytest.approx(expected, rel=1e-6)
    given = read_checkpoints(str(tmp_path / "*.keras"), 0.5)
    assert {c.learning_rate for c in given} == {0.5}


@pytest.mark.parametrize(
    "make",
    [
        lambda s: s.CosineDecay(RATE, 100, warmup_target=1.0, warmup_steps=2),
        lambda s: s.CosineDecayRestarts(RATE, 5),
        lambda s: s.InverseTimeDecay(RATE, 2, 0.5),
        lambda s: s.PiecewiseConstantDecay((2, 3), (0.5, 0.25, 0.125)),
        lambda s: s.PolynomialDecay(RATE, 10),
    ],
)
def test_all_of_keras_schedules(tmp_path, make):
    fixed = make(keras.optimizers.schedules)
    model = compiled(fixed)
    fit(model, epochs=1)
    model.save(tmp_path / "m.keras")
    [checkpoint] = read_checkpoints(str(tmp_path / "m.keras"))
    assert checkpoint.learning_rate == float(fixed(STEPS - 1))


def test_an_optimizer_by_its_name(tmp_path):
    model = build()
    model.compile("adam", "mse")
    fit(model, epochs=1)
    model.save(tmp_path / "m.keras")
    assert read_checkpoints(str(tmp_path / "m.keras"))[0].learning_rate == np.float32(0.001)


def test_weights_files_of_keras_know_their_steps(tmp_path):
    spec = model_checkpoints(tmp_path, compiled(), ".weights.h5")
    assert [c.step for c in read_checkpoints(spec, 0.1)] == [4, 8, 12]


def test_weights_files_whose_optimizer_did_not_train(tmp_path):
    model = compiled()
    for number in (3, 20, 100):
        model.save_weights(tmp_path / f"w-{number}.weights.h5")
    found = read_checkpoints(str(tmp_path / "*.weights.h5"), 0.1)
    assert [c.step for c in found] == [3, 20, 100]


def stages(tmp_path):
    """Weights of two stages of training, in training order: steps 4, 8 and 2, 4 of their own."""
    model, paths = build(), []
    for stage, batch_size in ((1, 2), (2, 4)):
        name = f"{tmp_path}/s{stage}-e{{epoch}}.weights.h5"
        saver = keras.callbacks.ModelCheckpoint(name, save_weights_only=True)
        fit(compiled(model=model), saver, batch_size=batch_size)
        paths += [name.format(epoch=epoch) for epoch in (1, 2)]
    return paths


def test_stages_of_training_are_taken_in_the_order_of_a_list(tmp_path):
    paths = stages(tmp_path)
    shutil.copy(paths[1], tmp_path / "copy.weights.h5")
    with pytest.raises(InputError, match=r"copy\.weights\.h5 hold the same weights"):
        read_checkpoints(f"{paths[0]},{paths[1]},{tmp_path}/copy.weights.h5", 0.1)
    with pytest.raises(InputError, match=r"contradict the files' names: s2-e1.* list in training"):
        read_checkpoints(str(tmp_path / "s*.weights.h5"), [0.5, 0.5, 0.25, 0.25])
    found = read_checkpoints(",".join(paths), [0.5, 0.5, 0.25, 0.25])
    assert [(c.path, c.step, c.learning_rate) for c in found] == [
        *zip(paths, (4, 8, 10, 12), (0.5, 0.5, 0.25, 0.25), strict=True)
    ]


def test_names_that_begin_with_a_loss_may_fall(tmp_path):
    model = compiled()
    for loss, epoch in ((0.9, 1), (0.5, 2), (0.7, 3)):
        fit(model, epochs=1)
        model.save_weights(tmp_path / f"{loss}-{epoch}.weights.h5")
    found = read_checkpoints(str(tmp_path / "*.weights.h5"), 0.1)
    assert [c.step for c in found] == [4, 8, 12]


def test_rates_of_keras_files_that_fall_are_doubted(tmp_path, caplog):
    model = compiled()
    fit(model, epochs=1)
    model.save(tmp_path / "1.keras")
    assert len(read_checkpoints(str(tmp_path / "*.keras"))) == 1
    assert not caplog.text
    model.optimizer.learning_rate = RATE / 2
    fit(model, epochs=1)
    model.save(tmp_path / "2.keras")
    read_checkpoints(str(tmp_path / "*.keras"), 0.1)
    assert not caplog.text
    read_checkpoints(str(tmp_path / "*.keras"))
    assert "those at the time of saving" in caplog.text


def old_kinds(model, folder):
    """Saves a model in all older ways; yields what a user would give for --checkpoints."""
    model.save(folder / "whole.h5")
    yield f"{folder}/whole.h5"
    with h5py.File(folder / "weights.hdf5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    yield f"{folder}/weights.hdf5"
    model.save_weights(folder / "shards.weights.json", max_shard_size=1e-6)
    yield f"{folder}/shards.weights.json"
    prefix = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "tf" / "c")
    yield from (prefix, f"{prefix}.index", f"{folder}/tf/c-*")
    yield tf.train.Checkpoint(net=model, optimizer=model.optimizer).write(f"{folder}/tf/other")
    yield tf.train.Checkpoint(model).write(f"{folder}/tf/itself")
    model.export(folder / "exported", verbose=False)
    yield from (f"{folder}/exported", f"{folder}/exported/saved_model.pb")
    tf.saved_model.save(model, f"{folder}/plain")
    yield f"{folder}/plain"


def lines_of(error):
    """The code that a message gives."""
    return [line[4:] for line in str(error).splitlines() if line.startswith("    ")]


class WithAList(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [keras.layers.Dense(3), keras.layers.Dense(2)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_the_lines_fail_where_a_file_lacks_weights(tmp_path):
    model = WithAList()
    model(X)
    tf.saved_model.save(model, f"{tmp_path}/old")
    with pytest.raises(InputError) as raised:
        read_checkpoints(f"{tmp_path}/old", 0.1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="kernel"):
        exec("\n".join(lines_of(raised.value)), {"tf": tf, "model": model})
    assert not list(tmp_path.glob("*.weights.h5"))


def test_older_kinds_are_named_with_the_lines_that_convert_them(tmp_path):
    trained = compiled(model=build())
    fit(trained, epochs=1)
    for number, spec in enumerate(old_kinds(trained, tmp_path)):
        with pytest.raises(
            InputError, match=r"of another kind|tf\.train\.Checkpoint|SavedModel"
        ) as raised:
            read_checkpoints(spec, 0.1)
        lines = lines_of(raised.value)
        exec("\n".join(lines), {"tf": tf, "model": build()})
        written = Path(lines[-1].split("'")[1])
        model = build()
        load_weights(model, str(read_checkpoints(str(written), 0.1)[0].path))
        np.testing.assert_array_equal(model(X), trained(X), err_msg=str(number))
        written.unlink()
    with pytest.raises(InputError, match=r"give the path of one of them"):
        read_checkpoints(str(tmp_path / "tf"), 0.1)


@pytest.mark.parametrize("spec", ["{}", "{}/*"])
def test_older_kinds_are_named_by_their_folder_too(spec, tmp_path):
    (tmp_path / "h5").mkdir()
    model = build()
    model.save(tmp_path / "h5" / "m.h5")
    model.export(tmp_path / "exported" / "1", verbose=False)
    for folder, kind in (
        ("h5", "m.h5 is an HDF5 file"),
        ("exported", "1 is a SavedModel|.pb is a"),
    ):
        with pytest.raises(InputError, match=kind):
            read_checkpoints(spec.format(tmp_path / folder), 0.1)
    (tmp_path / "w.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"w.npz is not a checkpoint that can be read"):
        read_checkpoints(str(tmp_path / "w.npz"), 0.1)


@pytest.mark.parametrize("name", ["old.weights.h5", "old.keras"])
@pytest.mark.parametrize("whole", [True, False])
def test_older_files_under_newer_names(whole, name, tmp_path):
    trained = compiled(model=build())
    fit(trained, epochs=1)
    if whole:
        trained.save(tmp_path / "old.h5")
    else:
        with h5py.File(tmp_path / "old.h5", "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, trained)
    (tmp_path / "old.h5").rename(tmp_path / name)
    with pytest.raises(InputError, match="of an older kind, whatever its name") as raised:
        read_checkpoints(str(tmp_path / name), 0.1)
    exec("\n".join(lines_of(raised.value)), {"os": os, "model": build()})
    model = build()
    load_weights(model, read_checkpoints(str(tmp_path / "old.weights.h5"), 0.1)[0].path)
    np.testing.assert_array_equal(model(X), trained(X))


def test_two_files_of_the_same_step(tmp_path):
    model = compiled()
    fit(model, epochs=1)
    model.save(tmp_path / "a.keras")
    model.save(tmp_path / "b.keras")
    with pytest.raises(InputError, match=r"a\.keras \(step 4\) and .*b\.keras .*same step"):
        read_checkpoints(str(tmp_path / "*.keras"))


def test_an_uncompiled_keras_file(tmp_path):
    build().save(tmp_path / "m.keras")
    with pytest.raises(InputError, match=r"m\.keras: give it with --learning_rate"):
        read_checkpoints(str(tmp_path / "m.keras"))
    assert read_checkpoints(str(tmp_path / "m.keras"), 0.1)[0].step == 1


def edit_config(path, change):
    """Rewrites the learning rate in a .keras file's configuration."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    settings = config["compile_config"]["optimizer"]["config"]
    settings["learning_rate"] = change(settings["learning_rate"])
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda rate: rate | {"module": "my_schedules", "class_name": "Warmup"},
        lambda rate: rate | {"module": "os", "class_name": "system"},
        lambda rate: rate | {"class_name": "deserialize"},
        lambda rate: rate | {"class_name": "__doc__"},
        lambda rate: rate | {"config": {"initial_learning_rate": {"class_name": "__lambda__"}}},
    ],
)
def test_no_other_schedule_is_built(tmp_path, change):
    path = tmp_path / "m.keras"
    model = compiled(schedule())
    fit(model, epochs=1)
    model.save(path)
    edit_config(path, change)
    with pytest.raises(InputError, match=r"schedule .* not one of Keras's own.*--learning_rate"):
        read_checkpoints(str(path))
    assert read_checkpoints(str(path), 0.5)[0].learning_rate == 0.5


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "m.keras"
    model = compiled(schedule())
    fit(model, epochs=1)
    model.save(path)
    content = path.read_bytes()
    for size in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"m\.keras"):
            read_checkpoints(str(path))
        with pytest.raises(InputError, match=r"m\.keras"):
            load_weights(build(), str(path))

    path = tmp_path / "m.weights.h5"
    model.save_weights(path)
    content = path.read_bytes()
    for size in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"m\.weights\.h5"):
            load_weights(build(), str(path))


# load_weights


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_loads_into_a_model_with_or_without_an_optimizer(tmp_path, suffix, prefix):
    trained = compiled(optimizer=keras.optimizers.Adam)
    fit(trained)
    path = f"{tmp_path}/m{suffix}"
    trained.save(path) if suffix == ".keras" else trained.save_weights(path)
    other = compiled()
    fit(other, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for model in (build(), compiled(), other):
            load_weights(model, prefix + path)
            for ours, theirs in zip(model.get_weights(), trained.get_weights(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert int(other.optimizer.iterations) == STEPS


def test_another_shape_is_named_with_both(tmp_path):
    path = str(tmp_path / "m.weights.h5")
    build(units=5).save_weights(path)
    model = build()
    before = model.get_weights()
    with pytest.raises(InputError) as raised:
        load_weights(model, path)
    message = str(raised.value)
    assert path in message
    assert "layers/dense/vars/0: the model has (3, 2), the file (3, 5)" in message
    assert "layers/dense_1/vars/0: the model has (2, 1), the file (5, 1)" in message
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_missing_and_extra_layers_are_listed(tmp_path):
    small = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    large = keras.Sequential([keras.Input((3,)), *(keras.layers.Dense(2) for _ in range(9))])
    # Dense layers beyond the first take (2, 2), the first (3, 2).
    small.save_weights(tmp_path / "small.weights.h5")
    large.save_weights(tmp_path / "large.weights.h5")
    with pytest.raises(
        InputError, match="16 missing from the file: layers/dense_1/vars/0"
    ) as raised:
        load_weights(large, str(tmp_path / "small.weights.h5"))
    assert str(raised.value).count("vars/") == 10
    with pytest.raises(InputError, match="16 not in the model: layers/dense_1/vars/0"):
        load_weights(small, str(tmp_path / "large.weights.h5"))


def test_a_subclassed_model_and_one_that_is_not_built(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(2)

        def call(self, x):
            return self.inner(x)

    trained, fresh = Net(), Net()
    trained(X)
    path = str(tmp_path / "m.weights.h5")
    trained.save_weights(path)
    with pytest.raises(InputError, match="not built"):
        load_weights(fresh, path)
    fresh(X)
    load_weights(fresh, path)
    np.testing.assert_array_equal(fresh(X), trained(X))


def test_unreadable_paths(tmp_path):
    with pytest.raises(InputError, match="absent"):
        load_weights(build(), str(tmp_path / "absent.weights.h5"))
    with pytest.raises(InputError, match="must end in"):
        load_weights(build(), str(tmp_path / "model.npz"))


def test_needs_no_tensorflow_to_be_imported():
    code = (
        "import sys, tracin_beam.inputs.checkpoints\n"
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
