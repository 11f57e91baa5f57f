import contextlib
import json
import math
import subprocess
import sys
import warnings
import zipfile

import keras
import numpy as np
import pytest
from remote_files import PREFIX

from tracin_beam.errors import InputError
from tracin_beam.inputs.callback import TracInCheckpoint
from tracin_beam.inputs.checkpoints import Checkpoint, read_checkpoints
from tracin_beam.inputs.weights import WeightsLoader
from tracin_beam.storage import files

STEPS = 4  # to an epoch
X = np.random.default_rng(0).normal(size=(STEPS * 2, 3)).astype(np.float32)
Y = X.sum(1, keepdims=True)
RATE = 0.0625  # a binary fraction, exact in float32


def decay(step):
    """The oracle of `schedule`."""
    return RATE * 0.5 ** (step / 10)


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(RATE, 10, 0.5)


def build(units=2):
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(units, name="hidden"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )


def compiled(rate=RATE, optimizer=keras.optimizers.SGD, model=None, **options):
    model = model or build()
    model.compile(optimizer(rate), "mse", **options)
    return model


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": 2, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def load_weights(model, path):
    WeightsLoader(model).load(path)


def listing(directory):
    return json.loads((directory / "checkpoints.json").read_text())


def saved_steps(directory):
    return [entry["step"] for entry in listing(directory)]


# TracInCheckpoint


def test_each_epoch_is_saved_with_the_weights_and_rate_of_that_time(tmp_path):
    weights = []
    snapshot = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(model.get_weights())
    )
    model = compiled(schedule())
    fit(model, snapshot, TracInCheckpoint(tmp_path / "ckpts"), epochs=3)
    entries = listing(tmp_path / "ckpts")
    assert [(e["path"], e["step"], e["epoch"]) for e in entries] == [
        ("00000004.weights.h5", 4, 1),
        ("00000008.weights.h5", 8, 2),
        ("00000012.weights.h5", 12, 3),
    ]
    rates = [entry["learning_rate"] for entry in entries]
    assert rates == pytest.approx([decay(3), decay(7), decay(11)], rel=1e-6)

    checkpoints = read_checkpoints(str(tmp_path / "ckpts"))
    assert checkpoints[1] == Checkpoint(
        str(tmp_path / "ckpts" / "00000008.weights.h5"), 8, 2, rates[1]
    )
    fresh = build()
    for checkpoint, expected in zip(checkpoints, weights, strict=True):
        load_weights(fresh, checkpoint.path)
        for ours, theirs in zip(fresh.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_directory_on_another_file_system(tmp_path):
    model = compiled()
    fit(model, TracInCheckpoint(f"{PREFIX}{tmp_path}/ckpts"))
    checkpoints = read_checkpoints(f"{PREFIX}{tmp_path}/ckpts")
    assert [checkpoint.step for checkpoint in checkpoints] == [4, 8]
    fresh = build()
    load_weights(fresh, checkpoints[-1].path)
    np.testing.assert_array_equal(fresh.get_weights()[0], model.get_weights()[0])
    globbed = read_checkpoints(f"{PREFIX}{tmp_path}/ckpts/*.weights.h5", 0.5)
    assert [checkpoint.step for checkpoint in globbed] == [4, 8]


@pytest.mark.parametrize("first", [True, False])
def test_the_rate_is_the_one_used_not_the_one_set_for_the_next_epoch(tmp_path, first):
    halve = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    ours = TracInCheckpoint(tmp_path)
    fit(compiled(), *([halve, ours] if first else [ours, halve]), epochs=4)
    # The first epoch sets the best, the second waits and halves, as do all after it.
    expected = [RATE, RATE, RATE / 2, RATE / 4]
    assert [entry["learning_rate"] for entry in listing(tmp_path)] == expected


def test_a_learning_rate_scheduler(tmp_path):
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: RATE / (epoch + 1))
    fit(compiled(), TracInCheckpoint(tmp_path), scheduler, epochs=3)
    rates = [entry["learning_rate"] for entry in listing(tmp_path)]
    assert rates == pytest.approx([RATE, RATE / 2, RATE / 3], rel=1e-6)


def test_a_loss_scale_optimizer(tmp_path):
    def scaled(rate):
        return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate))

    fit(compiled(schedule(), scaled), TracInCheckpoint(tmp_path))
    rates = [entry["learning_rate"] for entry in listing(tmp_path)]
    assert rates == pytest.approx([decay(3), decay(7)], rel=1e-6)
    assert saved_steps(tmp_path) == [4, 8]


def test_accumulated_gradients(tmp_path):
    def accumulating(rate):
        return keras.optimizers.SGD(rate, gradient_accumulation_steps=3)

    model = compiled(schedule(), accumulating)
    saver = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, TracInCheckpoint(tmp_path / "ckpts"), saver)
    assert saved_steps(tmp_path / "ckpts") == [1, 2]  # updates, after batches 3 and 6
    rates = [entry["learning_rate"] for entry in listing(tmp_path / "ckpts")]
    assert rates == pytest.approx([decay(2), decay(5)], rel=1e-6)
    read = [c.learning_rate for c in read_checkpoints(str(tmp_path / "*.keras"))]
    assert read == pytest.approx(rates, rel=1e-6)


@pytest.mark.parametrize(
    ("save_freq", "execution", "expected"),
    [(3, 1, [3, 6, 8]), (4, 1, [4, 8]), (5, 1, [5, 8]), (3, 2, [4, 8]), (100, 1, [8])],
)
def test_every_so_many_batches_and_the_last(tmp_path, save_freq, execution, expected):
    fit(compiled(steps_per_execution=execution), TracInCheckpoint(tmp_path, save_freq))
    assert saved_steps(tmp_path) == expected


@pytest.mark.parametrize("save_freq", [0, -1, True, 2.0, "batch"])
def test_a_wrong_save_freq(save_freq):
    with pytest.raises(InputError, match="save_freq"):
        TracInCheckpoint("ckpts", save_freq)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("victim", "left"), [(".weights.h5", [4, 8]), ("checkpoints.json", [4])])
def test_killed_in_the_middle_of_saving(tmp_path, monkeypatch, victim, left):
    atomic_write = files.atomic_write

    @contextlib.contextmanager
    def dying(path):
        with atomic_write(path) as handle:
            yield handle
            if path.endswith(victim) and (tmp_path / "00000008.weights.h5").exists():
                raise Killed

    monkeypatch.setattr(files, "atomic_write", dying)
    with pytest.raises(Killed):
        fit(compiled(), TracInCheckpoint(tmp_path), epochs=9)
    assert [c.step for c in read_checkpoints(str(tmp_path))] == left
    for checkpoint in read_checkpoints(str(tmp_path)):
        load_weights(build(), checkpoint.path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_resumed_from_a_checkpoint(tmp_path):
    straight = tmp_path / "straight"
    keras.utils.set_random_seed(1)
    fit(compiled(schedule()), TracInCheckpoint(straight), epochs=4)

    resumed = tmp_path / "resumed"
    keras.utils.set_random_seed(1)
    fit(compiled(schedule()), TracInCheckpoint(resumed), epochs=3)
    model = compiled(schedule())
    model.optimizer.build(model.trainable_variables)
    model.load_weights(resumed / "00000008.weights.h5")  # the third epoch is lost
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, TracInCheckpoint(resumed), epochs=4, initial_epoch=2)
    assert listing(resumed) == listing(straight)


def test_resumed_by_a_callback_that_comes_later(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise Killed

    def callbacks():
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return TracInCheckpoint(tmp_path / "ckpts"), backup

    with pytest.raises(Killed):
        fit(compiled(), *callbacks(), Stop(), epochs=4)
    fit(compiled(), *callbacks(), epochs=4)
    assert saved_steps(tmp_path / "ckpts") == [4, 8, 12, 16]
    assert [entry["epoch"] for entry in listing(tmp_path / "ckpts")] == [1, 2, 3, 4]


def test_fitted_twice(tmp_path):
    model, callback = compiled(), TracInCheckpoint(tmp_path)
    fit(model, callback)
    fit(model, callback)
    assert saved_steps(tmp_path) == [4, 8, 12, 16]


def test_a_new_run_begins_the_list_anew_with_a_warning(tmp_path):
    fit(compiled(), TracInCheckpoint(tmp_path), epochs=3)
    with pytest.warns(UserWarning, match="3 checkpoints of another"):
        fit(compiled(), TracInCheckpoint(tmp_path), epochs=1)
    assert saved_steps(tmp_path) == [4]


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
        ([entry(1), entry(2, step=1)], "have the same step"),
        ([entry(2), entry(1)], "not in training order"),
    ],
)
def test_a_wrong_listing_names_entry_and_key(tmp_path, entries, message):
    write_listing(tmp_path, *entries)
    with pytest.raises(InputError, match=message):
        read_checkpoints(str(tmp_path))


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "\x00"])
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
    with pytest.raises(InputError, match=r"model\.h5 .* must end in"):
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
        load_weights(build(), str(tmp_path / "model.h5"))


def test_needs_no_tensorflow_to_be_imported():
    code = (
        "import sys, tracin_beam.inputs.checkpoints\n"
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
