"""Each layer type's rule against one `tf.GradientTape` per example."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracle import assert_close, plain_gradients, values_of

from tracin_beam.gradients import capture, forms, recording
from tracin_beam.gradients.rules import rule_for
from tracin_beam.gradients.selection import select_weights

L = keras.layers
BATCH = 3


@pytest.fixture(autouse=True)
def same_weights():
    """At half precision a relu's input near zero may have either sign, with other weights."""
    keras.utils.set_random_seed(0)


class Wrapped(keras.Model):
    """A layer as a model."""

    def __init__(self, layer, call=None):
        super().__init__()
        self.layer = layer
        self.how = call or (lambda layer, x: layer(x))

    def call(self, x):
        return self.how(self.layer, x)


def check_layer(layer, shape, call=None, general=(), tolerance=1e-5, inputs=None):
    """Compares the gradients of Σ c·output, c fixed, and tells which weights went which way."""
    rng = np.random.default_rng(0)
    if inputs is None:
        inputs = rng.normal(size=(BATCH, *shape)).astype("float32")
    model = Wrapped(layer, call)
    output = model(tf.constant(inputs[:1]))
    cotangent = tf.constant(rng.normal(size=(BATCH, *output.shape[1:])), tf.float32)
    values = values_of(model)
    weights = select_weights(model, "all")

    def forward(x, c, _):
        product = tf.cast(model(x, training=False), tf.float32) * c
        return tf.reduce_sum(product, axis=list(range(1, product.shape.rank))), None

    traced = recording.Model.of(model, weights)
    given = (tf.constant(inputs), cotangent, None)
    specs = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in given[:2]]
    survey = capture.survey(traced, forward, specs, given)
    taken = []

    @tf.function(autograph=False)
    def gradients(values, x, c):
        got = capture.per_example_gradients(traced, survey, forward, values, [x, c], given)
        taken.extend(weights[i].path for i in got.general)
        shapes = [w.shape for w in weights]
        found = got.gradients
        return (
            tf.concat([forms.materialise(found[i], s) for i, s in enumerate(shapes)], axis=1),
            tf.add_n([forms.squared_norm(found[i]) for i in range(len(shapes))]),
        )

    got, norms = gradients(values, tf.constant(inputs), cotangent)
    expected = plain_gradients(
        model,
        [w.variable for w in weights],
        lambda i: forward(tf.constant(inputs[i : i + 1]), cotangent[i : i + 1], None)[0],
        BATCH,
    )
    assert_close(got, expected, tolerance)
    np.testing.assert_allclose(norms, np.sum(expected**2, axis=1), 10 * tolerance)
    names = {path.removeprefix(f"{weights[0].path.split('/')[0]}/") for path in taken}
    assert names == set(general)


DENSE = [
    (lambda: L.Dense(4), (5,)),
    (lambda: L.Dense(4, activation="tanh", use_bias=False), (5,)),
    (lambda: L.Dense(4, activation="gelu"), (3, 5)),
    (lambda: L.Dense(1), (2, 3, 5)),
    (lambda: L.Dense(4, activation=keras.layers.LeakyReLU()), (5,)),
    (lambda: L.Dense(4, activation="softmax"), (5,)),
]


@pytest.mark.parametrize(("layer", "shape"), DENSE)
def test_dense(layer, shape):
    check_layer(layer(), shape)


def test_layer_as_activation_with_a_weight_of_its_own():
    check_layer(L.Dense(4, activation=L.PReLU()), (5,))
    check_layer(L.Dense(4, activation=L.LayerNormalization()), (5,))


EINSUM = [
    ("abc,cd->abd", (None, 4), "d"),
    ("abc,cde->abde", (None, 3, 2), "de"),
    ("abc,cde->abde", (None, 3, 2), "e"),
    ("abc,cde->abed", (None, 2, 3), "d"),
    ("abc,dc->abd", (None, 4), None),
    ("abc,dec->abde", (None, 3, 2), "de"),
    ("abc,cd->adb", (4, 6), "d"),
    ("abc,bd->adc", (4, 5), "d"),
    ("abc,bcd->ad", (4,), "d"),
    ("abc,cbd->ad", (4,), "d"),
    ("abc,cd->ad", (4,), "d"),
    ("abc,bcd->abd", (6, 4), "bd"),
    ("abc,bcd->acd", (5, 4), "d"),
    ("ab...,bc->ac...", None, "c"),
    ("...x,xy->...y", 4, "y"),
    ("abc,c->abc", (6, 5), "c"),
    ("abc,bc->abc", (6, 5), None),
    ("abc,bc->ab", (6,), None),
    ("abc,dcb->abd", (6, 4), "bd"),
    ("abc,b->ac", (5,), None),
    ("abc,d->abcd", (6, 5, 3), None),
]


@pytest.mark.parametrize(("equation", "output", "bias"), EINSUM)
def test_einsum_dense(equation, output, bias):
    if output is None:
        output = (4, 5)
    elif output == 4:
        output = (6, 4)
    layer = L.EinsumDense(equation, output_shape=output, bias_axes=bias, activation="relu")
    check_layer(layer, (6, 5))


def test_layers_that_see_another_axis_first():
    def transposed(layer, x):
        return tf.transpose(layer(tf.transpose(x, [1, 0, 2])), [1, 0, 2])

    for steps in (BATCH, BATCH + 1):
        check_layer(L.Dense(4), (steps, 5), transposed)


def test_bias_that_keras_adds_along_another_axis():
    layer = L.Conv1D(4, 3, strides=2, data_format="channels_first")
    check_layer(layer, (2, 9), general=["kernel"])
    check_layer(L.Conv1D(1, 9, data_format="channels_first"), (2, 9))
    layer = L.EinsumDense("abc,cd->abd", output_shape=(4, 4), bias_axes="b")
    check_layer(layer, (4, 5))
    layer = L.EinsumDense("abc,cde->abde", output_shape=(4, 4, 3), bias_axes="d")
    check_layer(layer, (4, 5), general=["bias"])


CONV = [
    (lambda: L.Conv1D(4, 3, strides=2), (9, 2)),
    (lambda: L.Conv1D(4, 3, padding="same", strides=2, activation="relu"), (8, 2)),
    (lambda: L.Conv1D(4, 3, padding="causal", dilation_rate=2), (9, 2)),
    (lambda: L.Conv1D(4, 3, padding="causal", strides=2, use_bias=False), (9, 2)),
    (lambda: L.Conv1D(4, 2, groups=2), (7, 6)),
    (lambda: L.Conv2D(4, 3, strides=2, padding="same", activation="relu"), (6, 7, 2)),
    (lambda: L.Conv2D(4, (2, 3), dilation_rate=(2, 1)), (6, 7, 2)),
    (lambda: L.Conv2D(4, 3, dilation_rate=2, padding="same", use_bias=False), (6, 7, 2)),
    (lambda: L.Conv2D(6, 3, groups=3, strides=2, padding="same"), (6, 7, 3)),
    (lambda: L.Conv2D(4, 1, strides=3, padding="same"), (7, 8, 2)),
    (lambda: L.Conv2D(4, 2, strides=3), (7, 8, 2)),
    (lambda: L.Conv2D(4, 5, padding="same"), (3, 2, 2)),
    (lambda: L.Conv3D(3, (2, 3, 1), strides=(1, 2, 1), padding="same"), (3, 4, 2, 2)),
    (lambda: L.DepthwiseConv1D(3, depth_multiplier=2, strides=2, padding="same"), (8, 2)),
    (lambda: L.DepthwiseConv1D(3, dilation_rate=2, use_bias=False), (8, 2)),
    (lambda: L.DepthwiseConv2D((2, 3), depth_multiplier=2, activation="relu"), (5, 6, 2)),
    (lambda: L.DepthwiseConv2D(3, strides=2, padding="same"), (6, 6, 3)),
    (lambda: L.DepthwiseConv2D(3, dilation_rate=2, padding="same"), (6, 6, 3)),
    (lambda: L.SeparableConv1D(4, 3, strides=2, depth_multiplier=2, padding="same"), (8, 2)),
    (lambda: L.SeparableConv1D(4, 3, dilation_rate=2), (8, 2)),
    (lambda: L.SeparableConv2D(4, 3, strides=2, activation="relu", padding="same"), (6, 6, 2)),
    (lambda: L.SeparableConv2D(4, (2, 3), dilation_rate=2, use_bias=False), (6, 7, 2)),
    (lambda: L.Conv1DTranspose(4, 3, strides=2, padding="same", activation="relu"), (5, 2)),
    (lambda: L.Conv1DTranspose(4, 2, strides=3), (5, 2)),
    (lambda: L.Conv1DTranspose(4, 3, strides=3, output_padding=1), (5, 2)),
    (lambda: L.Conv1DTranspose(4, 3, dilation_rate=2, use_bias=False), (5, 2)),
    (lambda: L.Conv1DTranspose(4, 3, dilation_rate=2, padding="same"), (5, 2)),
    (lambda: L.Conv2DTranspose(4, 3, strides=2, padding="same"), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, (2, 3), strides=(2, 1)), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=0), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=1), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, 3, strides=2, output_padding=1), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, 2, strides=4, padding="same"), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, 4, strides=2, padding="same"), (3, 4, 2)),
    (lambda: L.Conv2DTranspose(4, 5, strides=1, padding="same"), (3, 4, 2)),
    (lambda: L.Conv3DTranspose(2, (2, 1, 3), strides=2, padding="same"), (2, 3, 2, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), CONV)
def test_convolutions(layer, shape):
    check_layer(layer(), shape)


CHANNELS_FIRST = [
    (lambda: L.Conv1D(4, 3, strides=2, data_format="channels_first"), (2, 11)),
    (lambda: L.Conv2D(4, 3, padding="same", data_format="channels_first"), (2, 6, 7)),
    (lambda: L.DepthwiseConv2D(3, depth_multiplier=2, data_format="channels_first"), (2, 6, 7)),
    (lambda: L.SeparableConv2D(4, 3, data_format="channels_first"), (2, 6, 7)),
    (lambda: L.Conv2DTranspose(4, 3, strides=2, data_format="channels_first"), (2, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CHANNELS_FIRST)
def test_channels_first(layer, shape):
    built = layer()
    try:
        built(np.zeros((1, *shape), "float32"))
    except Exception as error:
        pytest.skip(f"not on this device: {type(error).__name__}")
    check_layer(layer(), shape)


NORMALISATION = [
    (lambda: L.LayerNormalization(), (4, 5)),
    (lambda: L.LayerNormalization(axis=[3, 1]), (3, 4, 5)),
    (lambda: L.LayerNormalization(axis=[1, -1], center=False), (3, 4, 5)),
    (lambda: L.LayerNormalization(axis=1, scale=False), (3, 4)),
    (lambda: L.RMSNormalization(), (4, 5)),
    (lambda: L.RMSNormalization(axis=[2, 1]), (3, 4)),
    (lambda: L.RMSNormalization(axis=1), (4, 4)),
    (lambda: L.BatchNormalization(), (3, 4, 5)),
    (lambda: L.BatchNormalization(axis=1), (3, 4)),
    (lambda: L.BatchNormalization(scale=False), (5,)),
    (lambda: L.BatchNormalization(center=False), (5,)),
    (lambda: L.GroupNormalization(2), (3, 3, 4)),
    (lambda: L.GroupNormalization(-1, axis=1), (4, 3)),
    (lambda: L.GroupNormalization(1, center=False), (3, 4)),
    (lambda: L.GroupNormalization(2, scale=False), (3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMALISATION)
def test_normalisation(layer, shape):
    check_layer(layer(), shape)


@pytest.mark.parametrize("mask_zero", [False, True])
def test_embedding(mask_zero):
    ids = np.array([[0, 1, 1, 4], [2, 2, 2, 2], [3, 0, 0, 1]], "int32")
    check_layer(L.Embedding(5, 3, mask_zero=mask_zero), None, inputs=ids)
    check_layer(L.Embedding(5, 3), None, inputs=ids[:, 0])
    check_layer(L.Embedding(5, 3), None, inputs=ids.reshape(3, 2, 2).astype("int64"))


def test_embedding_of_ids_given_as_floats():
    ids = np.array([[0, 1], [2, 2], [3, 0]], "float32")
    check_layer(L.Embedding(5, 3), None, inputs=ids)


def mask_of(x):
    return tf.cast(tf.abs(x[:, :, 0]) > 0.3, tf.bool)


ATTENTION = [
    lambda attention, x: attention(x, x),
    lambda attention, x: attention(x[:, :2], x[:, 2:]),
    lambda attention, x: attention(x, x, use_causal_mask=True),
    lambda attention, x: attention(x, x[:, :3], x[:, :3] ** 2, key_mask=mask_of(x)[:, :3]),
    lambda attention, x: attention(x, x, attention_mask=mask_of(x)[:, None, :]),
]


@pytest.mark.parametrize("call", ATTENTION)
def test_attention(call):
    check_layer(L.MultiHeadAttention(2, 3, value_dim=4), (5, 6), call)
    check_layer(L.MultiHeadAttention(3, 2, output_shape=4, use_bias=False), (5, 6), call)
    check_layer(L.GroupQueryAttention(3, 4, 2), (5, 6), call)


def test_attention_over_several_axes():
    check_layer(
        L.MultiHeadAttention(2, 3, attention_axes=(2,)), (3, 4, 5), lambda layer, x: layer(x, x)
    )


class Scaled(L.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


class Named(L.Dense):
    def __init__(self, units):
        super().__init__(units, activation="tanh", name="named")


class WithExtraWeight(L.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.extra = self.add_weight(shape=(self.units,), name="extra")


class NormalisedKernel(L.Dense):
    @property
    def kernel(self):
        return self._kernel / tf.norm(self._kernel.value)


class AddsItsExtraWeight(WithExtraWeight):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training) * self.extra


def test_subclasses_that_only_configure_take_the_rule():
    check_layer(Named(4), (5,))


def test_subclasses_that_compute_something_else_go_by_the_uses_of_their_weights():
    for layer in (Scaled(4), NormalisedKernel(4), AddsItsExtraWeight(4)):
        assert rule_for(layer) is None
        check_layer(layer, (5,))


def test_lora():
    layer = L.Dense(4)
    layer.build((None, 5))
    layer.enable_lora(2)
    assert rule_for(layer) is None
    check_layer(layer, (5,))
    embedding = L.Embedding(5, 3)
    embedding.build()
    embedding.enable_lora(2)
    ids = np.array([[0, 1], [2, 2], [3, 0]], "int32")
    check_layer(embedding, None, inputs=ids)


def test_frozen_weights_are_left_out():
    check_layer(keras.Sequential([L.Dense(5, trainable=False), L.Dense(4)]), (5,))


OTHERS = [
    (lambda: L.SpectralNormalization(L.Dense(4)), (5,), None),
    (lambda: L.PReLU(), (5,), None),
    (lambda: L.TimeDistributed(L.Dense(4, activation="relu")), (3, 5), None),
    (lambda: L.TimeDistributed(L.Conv1D(4, 3)), (2, 5, 3), None),
    (lambda: L.AdditiveAttention(), (4, 5), lambda layer, x: layer([x, x])),
]


@pytest.mark.parametrize(("layer", "shape", "call"), OTHERS)
def test_layers_without_a_rule_of_their_own(layer, shape, call):
    check_layer(layer(), shape, call)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda p: L.Dense(4, dtype=p), (5,)),
        (lambda p: L.Conv2D(4, 3, dtype=p, activation="relu"), (5, 5, 2)),
        (lambda p: L.SeparableConv2D(4, 3, dtype=p), (5, 5, 2)),
        (lambda p: L.Conv2DTranspose(4, 3, strides=2, dtype=p), (3, 3, 2)),
        (lambda p: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e", dtype=p), (4, 5)),
        (lambda p: L.LayerNormalization(dtype=p), (4, 5)),
        (lambda p: L.BatchNormalization(dtype=p), (4, 5)),
    ],
)
def test_dtype_policies(layer, shape, policy):
    tolerance = {"mixed_bfloat16": 3e-2, "mixed_float16": 3e-3, "float64": 1e-5}[policy]
    check_layer(layer(policy), shape, tolerance=tolerance)
