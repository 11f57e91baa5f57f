"""The engine: batches of any size, several checkpoints and threads, one trace."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close, at, engine_of, plain_gradients, task_of, values_of

from tracin_beam.errors import InputError
from tracin_beam.gradients import recording

L = keras.layers
N = 9
rng = np.random.default_rng(0)
FEATURES = rng.normal(size=(N, 5)).astype("float32")
CLASSES = rng.integers(0, 3, N)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build():
    return keras.Sequential([L.Dense(6, "tanh"), L.PReLU(), L.Dense(3)])


def make(**config):
    engine, batch = engine_of(task_of(build, FEATURES, CLASSES, LOSS), N, **config)
    return engine, batch, values_of(engine.model)


def gradients(engine, values, loss=LOSS):
    """float64 [N, weights] at these values, by the tape."""
    for variable, value in zip(engine.model.variables, values, strict=True):
        variable.assign(value)

    def quantity(i):
        return loss(at(CLASSES, i), engine.model(at(FEATURES, i), training=False))

    return plain_gradients(engine.model, engine.model.trainable_variables, quantity, N)


def other(values):
    return [v + 0.3 for v in values]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batches_of_any_size(batch_size):
    engine, batch, values = make(batch_size=batch_size)
    expected = gradients(engine, values)
    for indices in ([0], [3, 1], [5, 5, 5, 5], range(N)):
        part = batch.take(indices)
        got = engine.embed(values, part)
        assert_close(got.embedding, expected[list(indices)])
        np.testing.assert_array_equal(got.label, CLASSES[list(indices)])
        assert got.embedding.dtype == got.squared_norm.dtype == np.float32
    for count in (1, min(3, batch_size)):
        queries = engine.queries(values, batch.take(range(count)))
        for indices in ([8], range(N)):
            got = engine.scores(values, batch.take(indices), queries)
            assert_close(got, expected[list(indices)] @ expected[:count].T)
    assert engine.trace_counts() == {
        ("embed", "loss"): 1,
        ("queries", "loss"): 1,
        ("scores", "loss"): 1,
    }


def test_too_many_queries_are_refused():
    engine, batch, values = make(batch_size=4)
    with pytest.raises(ValueError, match="9 queries; at most 4"):
        engine.queries(values, batch)


@pytest.mark.parametrize("name", ["countsketch", "kronecker", "gaussian"])
def test_projected_embeddings_estimate_the_inner_products(name):
    engine, batch, values = make(projection=name, dim=1024, seed=3)
    exact = gradients(engine, values)
    got = engine.embed(values, batch)
    assert got.embedding.shape == (N, engine.dim) == (N, 1024)
    norms = np.sum(exact**2, axis=1)
    np.testing.assert_allclose(got.squared_norm, norms, 1e-4)
    deviation = ((1 + 2 / 32) ** 2 - 1 if name == "kronecker" else 2 / 1024) ** 0.5
    error = np.abs(got.embedding @ got.embedding.T - exact @ exact.T)
    assert np.all(error <= 4 * deviation * np.sqrt(np.outer(norms, norms)))
    again, batch, _ = make(projection=name, dim=1024, seed=3, batch_size=5)
    np.testing.assert_allclose(again.embed(values, batch).embedding, got.embedding, 1e-4, 1e-5)
    other_seed, batch, _ = make(projection=name, dim=1024, seed=4)
    assert not np.allclose(other_seed.embed(values, batch).embedding, got.embedding, 0.1)


def test_queries_by_target_and_training_side_by_loss():
    engine, batch, values = make(batch_size=4)
    losses = gradients(engine, values)
    for target, quantity in {
        "logit": lambda y, p: -p[0, int(y[0])],
        "predicted_loss": lambda y, p: LOSS(tf.argmax(p, axis=1), p),
    }.items():
        expected = losses @ gradients(engine, values, quantity)[:3].T
        queries = engine.queries(values, batch.take(range(3)), target)
        assert_close(engine.scores(values, batch, queries, target), expected)
    assert set(engine.trace_counts().values()) == {1}


def test_few_queries_have_a_function_of_their_own():
    engine, batch, values = make(batch_size=32)
    expected = gradients(engine, values)
    queries = engine.queries(values, batch.take(range(3)))
    assert {x.shape[0] for x in queries.gradients} == {16}
    assert_close(engine.scores(values, batch, queries), expected @ expected[:3].T)
    assert ("few scores", "loss") in engine.trace_counts()


@pytest.mark.parametrize("target", ["loss", "logit"])
def test_sums_of_gradients_and_products_with_them(target):
    engine, batch, values = make(batch_size=4)
    losses = gradients(engine, values)
    quantity = {"logit": lambda y, p: -p[0, int(y[0])]}.get(target)
    total = (gradients(engine, values, quantity) if quantity else losses)[:7].sum(axis=0)
    found = engine.summed(values, batch.take(range(7)), target)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-5)
    expected = losses @ total
    got = engine.products(values, batch, found)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert set(engine.trace_counts().values()) == {1}


def test_test_examples_without_a_label():
    task = task_of(build, FEATURES, None, LOSS)
    engine, batch = engine_of(task, N)
    got = engine.embed(values_of(engine.model), batch, "predicted_loss")
    assert np.all(np.isnan(got.loss))
    assert np.all(np.isnan(got.label))
    assert np.all(got.squared_norm > 0)
    with pytest.raises(InputError, match="parse gives no label"):
        engine.embed(values_of(engine.model), batch)


def test_two_threads_with_a_checkpoint_each():
    engine, batch, values = make(batch_size=4)
    checkpoints = [values, other(values)]
    expected = [gradients(engine, v) for v in checkpoints]
    failures = []
    start = threading.Barrier(2)

    def work(which):
        try:
            start.wait()
            for _ in range(5):
                v, exact = checkpoints[which], expected[which]
                assert_close(engine.embed(v, batch).embedding, exact)
                queries = engine.queries(v, batch.take([2, 3]))
                assert_close(engine.scores(v, batch, queries), exact @ exact[2:4].T)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(engine.trace_counts().values()) == {1}


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_values_are_the_checkpoints(tmp_path, suffix):
    engine, batch, values = make()
    trained = build()
    trained.build((None, 5))
    trained.set_weights([v.numpy() for v in other(values)])
    path = str(tmp_path / f"model{suffix}")
    (trained.save_weights if suffix == ".weights.h5" else trained.save)(path)
    loaded = engine.values(path)
    assert engine.values(path) is loaded
    for got, expected in zip(loaded, other(values), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert_close(engine.embed(loaded, batch).embedding, gradients(engine, loaded))
    with pytest.raises(InputError):
        engine.values(str(tmp_path / f"missing{suffix}"))


def test_infinite_and_missing_numbers_stay_with_their_example():
    features = FEATURES.copy()
    features[2, 0] = np.nan
    features[5, 1] = np.inf
    task = task_of(build, features, CLASSES, LOSS)
    engine, batch = engine_of(task, N)
    values = values_of(engine.model)
    got = engine.embed(values, batch)
    bad = ~np.isfinite(got.loss) | ~np.isfinite(got.squared_norm)
    assert bad[2]
    sound = [i for i in range(N) if i not in (2, 5)]
    expected = engine.embed(values, batch.take(sound))
    np.testing.assert_allclose(got.embedding[sound], expected.embedding, 1e-5, 1e-6)


def test_batch_size_chosen_by_the_size_of_the_model():
    engine, batch, values = make(batch_size=0)
    assert engine.batch_size == 512
    assert engine.embed(values, batch).embedding.shape == (N, engine.dim)


def test_what_a_model_may_not_be():
    with pytest.raises(InputError, match="returned a str, not a model"):
        engine_of(task_of(lambda: "model", FEATURES, CLASSES, LOSS), N)

    def misfit():
        return keras.Sequential([keras.Input((7,)), L.Dense(3)])

    with pytest.raises(InputError, match="does not take what parse gives"):
        engine_of(task_of(misfit, FEATURES, CLASSES, LOSS), N)


def test_threads_share_large_sums():
    # TensorFlow's memory optimiser rewrites sums of large tensors, as residual connections have
    # them in their backward pass, in a way that does not stand two runs at a time.
    def residual():
        inputs = keras.Input((64, 64, 3))
        x = L.Conv2D(16, 3, padding="same")(inputs)
        for _ in range(4):
            y = L.Conv2D(16, 3, padding="same", activation="relu")(x)
            x = L.Add()([x, y, L.Conv2D(16, 1)(x)])
        return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling2D()(x)))

    features = rng.normal(size=(64, 64, 64, 3)).astype("float32")
    task = task_of(residual, features, np.arange(64) % 3, LOSS)
    engine, batch = engine_of(task, 64, batch_size=64)
    values = values_of(engine.model)
    expected = engine.embed(values, batch).embedding
    failures = []

    def work():
        try:
            for _ in range(2):
                assert_close(engine.embed(values, batch).embedding, expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("initializer", ["ones", "glorot_uniform"])
def test_variables_outside_the_model_must_be_the_same_in_each_process(initializer):
    def build():
        outside = L.Dense(4, "tanh", kernel_initializer=initializer)
        outside.build((None, 5))
        return keras.Sequential([L.Lambda(lambda x: outside(x)), L.Dense(3)])

    engine, batch = engine_of(task_of(build, FEATURES, CLASSES, LOSS), N)
    values = values_of(engine.model)
    if initializer == "ones":
        engine.check_repeatable()
        assert_close(engine.embed(values, batch).embedding, gradients(engine, values))
    else:
        with pytest.raises(InputError, match=r"not among its own.*kernel:0 \(5, 4\)"):
            engine.check_repeatable()


def test_checkpoints_in_memory_are_bounded(tmp_path, monkeypatch):
    engine, _, values = make()
    size = sum(int(tf.size(v)) * v.dtype.size for v in values)
    monkeypatch.setattr("tracin_beam.gradients.engine._VALUES_BYTES", 3 * size)
    paths = [str(tmp_path / f"{number}.weights.h5") for number in range(5)]
    for number, path in enumerate(paths):
        engine.model.set_weights([np.full(v.shape, number, np.float32) for v in values])
        engine.model.save_weights(path)
    kept = [engine.values(path) for path in paths]
    assert len(engine._cache) == 3
    assert all(engine.values(path) is one for path, one in zip(paths[2:], kept[2:], strict=True))
    again = engine.values(paths[0])
    assert again is not kept[0]
    for ours, theirs in zip(again, kept[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pooled_inputs_are_those_of_the_last_layers():
    layers = keras.layers
    given = keras.Input((6, 4))
    hidden = layers.Conv1D(5, 3, activation="relu")(given)
    pooled = layers.Flatten()(hidden)
    output = layers.Dense(2)(layers.Dense(3, activation="tanh")(pooled))
    model = keras.Model(given, output)
    x = np.random.default_rng(0).normal(size=(7, 6, 4)).astype(np.float32)

    @tf.function(autograph=False)
    def found(x):
        return recording.pooled_inputs(model._flatten_layers(), lambda: model(x), 7, 3)

    parts = found(tf.constant(x))
    between = keras.Model(given, [pooled, model.layers[-1].input])(x)
    expected = [x.mean(axis=1) / 2, between[0] / np.sqrt(20), between[1] / np.sqrt(3)]
    for part, value in zip(parts, expected, strict=True):
        np.testing.assert_allclose(part, value, rtol=1e-5, atol=1e-6)
