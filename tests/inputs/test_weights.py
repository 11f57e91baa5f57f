import keras
import numpy as np
import pytest

from tracin_beam.errors import InputError
from tracin_beam.inputs import weights
from tracin_beam.inputs.checkpoints import read_notes
from tracin_beam.inputs.weights import WeightsLoader

L = keras.layers
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def load(model, path):
    WeightsLoader(model).load(str(path))
    return model


def branches(order, names=("query", "key"), dense=L.Dense):
    """Two dense layers of one shape that differ in what they do, added up in some order."""
    x = keras.Input((4,))
    made = [
        dense(4, activation=activation, name=name)(x)
        for activation, name in zip(("relu", "tanh"), names, strict=True)
    ]
    return keras.Model(x, L.Dense(2, name="out")(L.Add()([made[i] for i in order])))


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_layers_added_in_another_order_get_their_own_weights(tmp_path, suffix):
    trained = branches([0, 1])
    path = tmp_path / f"m{suffix}"
    trained.save(path) if suffix == ".keras" else trained.save_weights(path)
    loaded = load(branches([1, 0]), path)
    assert [x.name for x in loaded.layers] != [x.name for x in trained.layers]
    np.testing.assert_array_equal(loaded(X), trained(X))


def test_nested_models_in_another_order(tmp_path):
    def make(order):
        x = keras.Input((4,))
        towers = [
            keras.Sequential([L.Input((4,)), L.Dense(3, name="in"), L.Dense(3)], name=name)
            for name in ("user", "item")
        ]
        return keras.Model(x, L.Concatenate()([towers[i](x) * (i + 1.0) for i in order]))

    trained = make([0, 1])
    trained.save_weights(tmp_path / "m.weights.h5")
    loaded = load(make([1, 0]), tmp_path / "m.weights.h5")
    want = np.asarray(trained(X))
    np.testing.assert_array_equal(loaded(X), np.concatenate([want[:, 3:], want[:, :3]], 1))


def test_attributes_that_hold_each_others_layers(tmp_path):
    class Net(keras.Model):
        def __init__(self, first, second):
            super().__init__()
            self.a, self.b = L.Dense(4, name=first), L.Dense(4, name=second)

        def call(self, x):
            layers = {layer.name: layer for layer in (self.a, self.b)}
            return layers["query"](x) - layers["key"](x)

    trained, other = Net("query", "key"), Net("key", "query")
    trained(X), other(X)
    trained.save_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(load(other, tmp_path / "m.weights.h5")(X), trained(X))


def test_made_up_names_in_another_order_are_refused(tmp_path):
    branches([0, 1], (None, None)).save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(InputError, match=r"stand in another order.* names of their own"):
        load(branches([1, 0], (None, None)), tmp_path / "m.weights.h5")


def test_made_up_names_of_another_process_are_places(tmp_path):
    for _ in range(3):
        L.Dense(1)  # counts on
    trained = branches([1, 0], (None, None))
    trained.save_weights(tmp_path / "m.weights.h5")
    keras.backend.clear_session()
    loaded = branches([1, 0], (None, None))
    assert {x.name for x in loaded.layers} != {x.name for x in trained.layers}
    np.testing.assert_array_equal(load(loaded, tmp_path / "m.weights.h5")(X), trained(X))


def test_layers_that_were_renamed_are_told(tmp_path, caplog):
    trained = branches([0, 1])
    trained.save_weights(tmp_path / "m.weights.h5")
    loaded = load(branches([0, 1], ("q", "k")), tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(loaded(X), trained(X))
    assert "query → q" in caplog.text


class Pair(L.Layer):
    """Two weights of one shape, made in some order."""

    def __init__(self, order, **options):
        super().__init__(**options)
        self.order = order

    def build(self, shape):
        for name in self.order:
            setattr(self, name, self.add_weight(name=name, shape=(4, 4)))

    def call(self, x):
        return keras.ops.relu(x @ self.up) @ self.down


def test_two_weights_of_one_shape_in_a_layer(tmp_path):
    def make(order):
        return keras.Sequential([keras.Input((4,)), Pair(order)])

    trained = make(("up", "down"))
    path = str(tmp_path / "m.weights.h5")
    weights.save(trained, path, {"a": 1})
    np.testing.assert_array_equal(load(make(("down", "up")), path)(X), trained(X))
    keras_loaded = make(("up", "down"))
    keras_loaded.load_weights(path)
    np.testing.assert_array_equal(keras_loaded(X), trained(X))
    assert read_notes(path) == {"a": 1}
    trained.save_weights(path)
    assert read_notes(path) == {}


def test_weights_that_were_frozen_in_training_are_told(tmp_path, caplog):
    model = branches([0, 1])
    model.get_layer("query").trainable = False
    path = str(tmp_path / "m.weights.h5")
    weights.save(model, path, {})
    load(model, path)
    assert not caplog.text
    loader = WeightsLoader(branches([1, 0]))
    loader.load(path)
    assert "frozen in the training" in caplog.text
    assert "query/kernel" in caplog.text
    assert "key/kernel" not in caplog.text
    caplog.clear()
    loader.load(path)
    assert not caplog.text


def test_a_model_that_saves_a_part_of_itself(tmp_path):
    class Wrapped(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = branches([0, 1])

        def call(self, x):
            return self.inner(x)

        def save_weights(self, path):
            self.inner.save_weights(path)

    model, path = Wrapped(), str(tmp_path / "m.weights.h5")
    model(X)
    weights.save(model, path, {"a": 1})
    assert read_notes(path) == {"a": 1}
    np.testing.assert_array_equal(load(branches([1, 0]), path)(X), model(X))


class Hidden(L.Layer):
    """Sublayers where Keras does not look for what it saves."""

    def __init__(self, **options):
        super().__init__(**options)
        self._layers = [L.Dense(4), L.Dense(4)]

    def build(self, shape):
        for layer in self._layers:
            layer.build(shape)

    def call(self, x):
        for layer in self._layers:
            x = layer(x)
        return x


def hidden():
    return keras.Sequential([keras.Input((4,)), Hidden(), L.Dense(2)])


def lora():
    model = keras.Sequential([keras.Input((4,)), L.Dense(4)])
    model.layers[0].enable_lora(2)
    return model


@pytest.mark.parametrize(("make", "count"), [(hidden, 4), (lora, 2)])
def test_variables_that_no_file_holds_are_named(tmp_path, make, count):
    make().save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(InputError, match=f"{count} of the model's variables are in no file"):
        load(make(), tmp_path / "m.weights.h5")
    assert len(weights.unsaved(make())) == count


class Copying(L.Dense):
    def save_own_variables(self, store):
        for i, variable in enumerate(self.variables):
            store[f"{i}"] = keras.ops.convert_to_numpy(variable)


def nested():
    shared = L.Dense(4, name="shared")
    inner = keras.Sequential([L.Input((4,)), shared, L.Dropout(0.5), L.BatchNormalization()])
    x = keras.Input((4,))
    return keras.Model(x, [L.Dense(1)(inner(shared(x))), Copying(2, name="copying")(inner(x))])


class Lists(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [{"a": L.Dense(4)}, [L.Dense(4, dtype="mixed_bfloat16")]]
        self.steps = self.add_weight(shape=(), dtype="int32", trainable=False, name="steps")
        self.flags = self.add_weight(shape=(3,), dtype="bool", trainable=False, name="flags")
        self.mean = keras.metrics.Mean()
        self.optimizers = {"one": keras.optimizers.Adam()}

    def call(self, x):
        return keras.ops.cast(self.blocks[1][0](self.blocks[0]["a"](x)), "float32")


def recurrent():
    return keras.Sequential(
        [
            keras.Input((4,)),
            L.Reshape((2, 2)),
            L.Bidirectional(L.LSTM(3)),
            L.Dense(1, dtype="float16"),
        ]
    )


@pytest.mark.parametrize("make", [nested, Lists, recurrent])
def test_every_variable_comes_from_the_file(tmp_path, make):
    trained, other = make(), make()
    trained(X), other(X)
    rng = np.random.default_rng(1)
    for variable in weights.variables(trained):
        variable.assign(rng.integers(0, 2, variable.shape) + (variable.dtype != "bool"))
    trained.save_weights(tmp_path / "m.weights.h5")
    assert weights.unsaved(trained) == []
    load(other, tmp_path / "m.weights.h5")
    for ours, theirs in zip(other.variables, trained.variables, strict=True):
        if "seed" not in ours.name:
            np.testing.assert_array_equal(ours, theirs)
    assert weights.digest(other) == weights.digest(trained)
    trained.layers[-1].variables[0].assign_add(trained.layers[-1].variables[0])
    assert weights.digest(other) != weights.digest(trained)


def test_optimizers_and_metrics_of_a_training_step_are_no_weights(tmp_path):
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = L.Dense(4), L.Dense(1)

        def call(self, x):
            return self.b(self.a(x))

        def compile(self, **options):
            super().compile(**options)
            self.optimizer_a, self.tracker = keras.optimizers.Adam(), keras.metrics.Mean()

    trained, other = Two(), Two()
    trained.compile(loss="mse")
    trained(X), other(X)
    trained.optimizer_a.build(trained.trainable_variables)
    trained.save_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(load(other, tmp_path / "m.weights.h5")(X), trained(X))
    other.save_weights(tmp_path / "m.weights.h5")
    load(trained, tmp_path / "m.weights.h5")


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (-np.inf, "-inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path, value, said):
    model = branches([0, 1])
    kernel = np.ones((4, 4), np.float32)
    kernel[2, 1] = value
    model.get_layer("query").kernel.assign(kernel)
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(InputError, match=rf"1 of the 16 .* query/kernel in .*m\.weights.*{said}"):
        load(branches([0, 1]), tmp_path / "m.weights.h5")
