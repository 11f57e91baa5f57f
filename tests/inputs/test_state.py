"""What a model computes with beside its variables: applied for each checkpoint, or refused."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close, engine_of, plain_gradients, task_of

from tracin_beam import save_checkpoint
from tracin_beam.errors import InputError
from tracin_beam.inputs.weights import WeightsLoader

L = keras.layers
N = 6
X = (np.random.default_rng(0).normal(size=(N, 3)) * [1, 10, 100] + 5).astype(np.float32)
Y = X.sum(1, keepdims=True)
WORDS = np.array([["a"], ["b"], ["a"], ["c"], ["b"], ["d"]])


def load(model, *paths):
    loader = WeightsLoader(model)
    for path in paths:
        loader.load(str(path))


def normalizing(**options):
    return keras.Sequential(
        [keras.Input((3,)), L.Normalization(**options), L.Dense(2, "tanh"), L.Dense(1)]
    )


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_each_checkpoint_has_its_own_statistics(tmp_path, suffix):
    trained, expected, paths = normalizing(), [], []

    def quantity(i):
        return tf.square(trained(X[i : i + 1]) - Y[i : i + 1])

    for count in (2, 4, N):
        trained.layers[0].adapt(X[:count])
        paths.append(f"{tmp_path}/{count}{suffix}")
        trained.save(paths[-1]) if suffix == ".keras" else trained.save_weights(paths[-1])
        expected.append(plain_gradients(trained, trained.trainable_variables, quantity, N))
    engine, batch = engine_of(task_of(normalizing, X, Y, "mean_squared_error"), N)
    engine.check_repeatable()
    for path, gradients in [*zip(paths, expected, strict=True)] * 2:
        values = engine.values(path)
        assert_close(engine.embed(values, batch).embedding, gradients)
        engine.verify(values, batch)


def looking_up(vocabulary=None, **options):
    lookup = L.StringLookup(vocabulary=vocabulary, **options)
    x = keras.Input((1,), dtype="string")
    return keras.Model(x, L.Dense(1)(L.Flatten()(L.Embedding(9, 2)(lookup(x)))))


def binning(bins=(0.0, 1.0), **options):
    x = keras.Input((1,))
    binned = L.Discretization(bin_boundaries=bins, **options)(x)
    return keras.Model(x, L.Dense(1)(L.Flatten()(L.Embedding(9, 2)(binned))))


def vectorizing(vocabulary=None):
    vectorize = L.TextVectorization(vocabulary=vocabulary, output_sequence_length=2)
    x = keras.Input((1,), dtype="string")
    return keras.Model(x, L.Dense(1)(L.Flatten()(L.Embedding(9, 2)(vectorize(x)))))


def adapted(make, data, **options):
    model = make(**options)
    model.layers[1].adapt(data)
    return model


@pytest.mark.parametrize("saved_by", ["keras", "us"])
@pytest.mark.parametrize(
    ("trained", "same", "other", "what"),
    [
        (
            lambda: adapted(looking_up, WORDS),
            lambda: looking_up(["b", "a", "d", "c"]),
            lambda: looking_up(["a", "b", "c", "d"]),
            "vocabulary of string_lookup",
        ),
        (
            lambda: looking_up(["b", "a"]),
            lambda: looking_up(["b", "a"]),
            lambda: looking_up(["b", "a", "c"]),
            "vocabulary of string_lookup",
        ),
        (
            lambda: adapted(vectorizing, WORDS),
            lambda: adapted(vectorizing, WORDS),
            lambda: adapted(vectorizing, WORDS[:2]),
            "vocabulary of",
        ),
        (
            lambda: adapted(binning, X[:, :1], bins=None, num_bins=3),
            lambda: adapted(binning, X[:, :1], bins=None, num_bins=3),
            binning,
            "bin_boundaries of discretization",
        ),
        (
            lambda: normalizing(mean=3.0, variance=2.0),
            lambda: normalizing(mean=3.0, variance=2.0),
            lambda: normalizing(mean=3.0, variance=1.0),
            "variance of normalization",
        ),
    ],
    ids=["adapted", "given", "text", "bins", "normalization"],
)
def test_what_adapt_finds_must_be_the_models(tmp_path, saved_by, trained, same, other, what):
    model = trained()
    if saved_by == "keras":
        path = tmp_path / "m.keras"
        model.save(path)
    else:
        path = save_checkpoint(tmp_path, model, 1, 0.1)
    load(same(), path)
    with pytest.raises(InputError, match=f"another {what}"):
        load(other(), path)


def test_inverse_frequencies_that_change_between_checkpoints(tmp_path):
    def make(weights):
        x = keras.Input((1,), dtype="string")
        lookup = L.StringLookup(
            vocabulary=["a", "b"], idf_weights=weights, output_mode="tf_idf", max_tokens=3
        )
        return keras.Model(x, L.Dense(1)(lookup(x)))

    for number, weights in enumerate(([1.0, 2.0], [1.0, 2.0], [1.0, 3.0])):
        make(weights).save_weights(tmp_path / f"{number}.weights.h5")
    first, same, other = (tmp_path / f"{number}.weights.h5" for number in range(3))
    load(make([5.0, 5.0]), first, same)
    with pytest.raises(InputError, match=r"2\.weights\.h5 sets string_lookup.*idf_weights"):
        load(make([1.0, 2.0]), first, other)


class Scaled(L.Layer):
    """Keeps what it loads in a tensor, or an array."""

    def __init__(self, scale, kind=tf.constant, **options):
        super().__init__(**options)
        self.kind = kind
        self.scale = kind(scale)

    def call(self, x):
        return x * self.scale

    def save_own_variables(self, store):
        store["scale"] = np.asarray(self.scale)

    def load_own_variables(self, store):
        self.scale = self.kind(store["scale"])


@pytest.mark.parametrize("kind", [tf.constant, np.asarray, float])
def test_state_of_a_layers_own(tmp_path, kind):
    def make(scale):
        return keras.Sequential([keras.Input((3,)), Scaled(scale, kind), L.Dense(1)])

    for number, scale in enumerate((2.0, 2.0, 3.0)):
        make(scale).save_weights(tmp_path / f"{number}.weights.h5")
    first, same, other = (tmp_path / f"{number}.weights.h5" for number in range(3))
    load(make(5.0), first, same)
    with pytest.raises(InputError, match=r"2\.weights\.h5 sets scaled\S*\.scale to another"):
        load(make(2.0), first, other)


@pytest.mark.parametrize("seed", [None, 3])
def test_constants_that_each_build_draws_anew(seed):
    class Features(L.Layer):
        def build(self, shape):
            self.directions = np.random.default_rng(seed).normal(size=(3, 4)).astype("float32")

        def call(self, x):
            return keras.ops.cos(x @ self.directions)

    def build():
        return keras.Sequential([Features(), L.Dense(1)])

    engine, _ = engine_of(task_of(build, X, Y, "mean_squared_error"), N)
    if seed is None:
        with pytest.raises(InputError, match=r"makes another: features\S*\.directions"):
            engine.check_repeatable()
    else:
        engine.check_repeatable()
