"""Per-example weight gradients by layer type.

A rule takes a layer, its input x and g = ∂Σℓ/∂z, the gradient of the summed per-example losses
with respect to the layer's output z before any fused activation. As example b's loss depends on
the b-th slice of z only, g[b] is that example's own gradient, and the rule says what it makes of
each weight:

    Dense, EinsumDense         ∂ℓ_b/∂W = Σ_p x[b, p] ⊗ g[b, p]
    convolution                the same, with x[b, p] the patch under output position p
    convolution, transposed    the same, with the roles of x and g exchanged
    Embedding                  ∂ℓ_b/∂W = Σ_p e(x[b, p]) ⊗ g[b, p]
    normalisation              ∂ℓ_b/∂γ = Σ_p x̂[b, p] g[b, p]
    biases, β                  ∂ℓ_b/∂β = Σ_p g[b, p]

To add a layer type, write a function and put `@rule(TheLayer)` on it. A layer without a rule is
none the worse for it in exactness, only in speed: see `engine`.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tracin_beam.gradients import forms
from tracin_beam.gradients.forms import Form, Full, Outer, Rows, Window, Windowed, full

Contributions = list[tuple[keras.Variable, Form]]
Rule = Callable[[Any, tf.Tensor, tf.Tensor], Contributions]

_RULES: dict[type, Rule] = {}

# What a subclass may define and still compute what its parent does.
_HARMLESS = {"__init__", "build", "get_config", "from_config", "compute_output_shape"}


def rule(*layer_types: type) -> Callable[[Rule], Rule]:
    """Registers a rule for these layer types.

    The rule is called as `rule(layer, x, g)` with x and g of static batch size, inside a scope in
    which the layer's variables have the values of the checkpoint. It returns (variable, gradient)
    for every weight that the layer uses.
    """

    def register(function: Rule) -> Rule:
        for layer_type in layer_types:
            _RULES[layer_type] = function
        return function

    return register


def rule_for(layer: keras.layers.Layer) -> Rule | None:
    """The rule of a layer's type, or None when it needs the general fallback.

    A subclass is given its parent's rule only if it changes nothing that computes; LoRA and
    quantised layers use other weights than the rules know of.
    """
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return None
    for cls in type(layer).__mro__:
        if cls in _RULES:
            return _RULES[cls]
        changed = {
            name
            for name, member in vars(cls).items()
            if (callable(member) or isinstance(member, property | classmethod | staticmethod))
            and not (name.startswith("__") and name != "__call__")
        }
        if changed - _HARMLESS:
            return None
    return None


def kernel_and_bias(layer: keras.layers.Layer) -> tuple[keras.Variable | None, ...]:
    """The weights of a layer whose output is x · kernel + bias at every position; else None, None.

    The bias is then the kernel's row for an input of one.
    """
    known = rule_for(layer)
    if known not in (dense, einsum_dense, conv) or getattr(layer, "bias", None) is None:
        return None, None
    if known is einsum_dense:
        inputs, kernel = layer.equation.partition("->")[0].split(",")
        if kernel[0] not in inputs:  # outputs first
            return None, None
    return layer._kernel, layer.bias


@rule(keras.layers.Dense)
def dense(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """Inputs [B, ..., m], outputs [B, ..., n]."""
    contributions: Contributions = [(layer._kernel, Outer(_positions(x), _positions(g)))]
    if layer.bias is not None:
        contributions.append((layer.bias, Full(tf.reduce_sum(_positions(g), axis=1))))
    return contributions


@rule(keras.layers.EinsumDense)
def einsum_dense(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """The equation read backwards: labels of the kernel that x has and those that g has."""
    inputs, kernel, outputs = _einsum_labels(layer.equation, x.shape.rank, g.shape.rank)
    if inputs[0] != outputs[0] or inputs[0] in kernel:
        raise NotImplementedError(f"the first axis of {layer.equation} is not the batch")
    contributions: Contributions = []
    # Axes of the bias are those of its shape (bias_axes) against the output's, from the right.
    if layer.bias is not None:
        aligned = [1] * (g.shape.rank - len(layer.bias.shape)) + list(layer.bias.shape)
        long = [i for i, n in enumerate(aligned) if n > 1]
        if len(long) == 1:
            _check_bias_axis(aligned[long[0]], long[0], g.shape)
        contributions.append((layer.bias, full(_sum_to(g, layer.bias.shape))))

    rows = "".join(label for label in kernel if label not in outputs)
    columns = "".join(label for label in kernel if label not in inputs)
    left_source, right_source = (inputs, x), (outputs, g)
    if kernel == columns + rows:
        rows, columns = columns, rows
        left_source, right_source = right_source, left_source
    positions = "".join(label for label in inputs[1:] if label in outputs and label not in kernel)
    rest = set(inputs + outputs) - set(inputs[0] + positions + rows + columns)
    if kernel == rows + columns and not rest:
        left = _grouped(*left_source, positions, rows)
        right = _grouped(*right_source, positions, columns)
        contributions.append((layer._kernel, Outer(left, right)))
    else:
        # A label that x alone has is summed in the product, so g is the same along it.
        gradient = tf.einsum(f"{inputs},{outputs}->{inputs[0]}{kernel}", x, g)
        contributions.append((layer._kernel, full(gradient)))
    return contributions


@rule(keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
def conv(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """Kernel [*window, channels / groups, filters]."""
    bias = _channel_bias(layer, g)
    x = tf.cast(_channels_last(layer, x), tf.float32)
    right = _positions(_channels_last(layer, g))
    window = _window(layer)
    if layer.groups == 1:
        return [(layer._kernel, Windowed(x, right, window)), *bias]
    gradient = forms.grouped(x, right, window, layer.groups)
    return [(layer._kernel, full(gradient)), *bias]


@rule(keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
def depthwise_conv(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """Kernel [*window, channels, multiplier]; outputs in the order (channel, multiplier)."""
    bias = _channel_bias(layer, g)
    x, g = _channels_last(layer, x), _channels_last(layer, g)
    return [(layer.kernel, full(_depthwise(layer, x, g))), *bias]


@rule(keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
def separable_conv(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """A depthwise convolution, y, and a dense layer over its channels."""
    bias = _channel_bias(layer, g)
    x = tf.cast(_channels_last(layer, x), tf.float32)
    g = tf.cast(_channels_last(layer, g), tf.float32)
    y = keras.ops.depthwise_conv(
        x,
        tf.cast(layer.depthwise_kernel.value, tf.float32),
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format="channels_last",
    )
    pointwise = tf.reshape(
        tf.cast(layer.pointwise_kernel.value, tf.float32), [y.shape[-1], layer.filters]
    )
    through = tf.tensordot(g, pointwise, axes=[[-1], [1]])
    return [
        (layer.depthwise_kernel, full(_depthwise(layer, x, through))),
        (layer.pointwise_kernel, Outer(_positions(y), _positions(g))),
        *bias,
    ]


@rule(keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
def conv_transpose(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """Kernel [*window, filters, channels]: a convolution of g with outputs at x's positions."""
    bias = _channel_bias(layer, g)
    x, g = _channels_last(layer, x), _channels_last(layer, g)
    form = Windowed(tf.cast(g, tf.float32), _positions(x), _window(layer))
    return [(layer.kernel, form), *bias]


@rule(keras.layers.Embedding)
def embedding(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """Ids [B, ...], outputs [B, ..., n]."""
    ids = x if x.dtype in (tf.int32, tf.int64) else tf.cast(x, tf.int32)
    return [(layer._embeddings, Rows(tf.reshape(ids, [x.shape[0], -1]), _positions(g)))]


@rule(keras.layers.LayerNormalization)
def layer_normalization(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """γ and β have the shape of the normalised axes."""
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    return _scale_and_offset(layer, x, g, axes, layer.gamma, layer.beta)


@rule(keras.layers.RMSNormalization)
def rms_normalization(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """γ only, called scale, which Keras multiplies with the last axes whatever layer.axis is."""
    axes = range(-len(layer.scale.shape), 0)
    return _scale_and_offset(layer, x, g, axes, layer.scale, None)


@rule(keras.layers.GroupNormalization)
def group_normalization(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """γ and β by channel."""
    gamma = layer.gamma if layer.scale else None
    beta = layer.beta if layer.center else None
    return _scale_and_offset(layer, x, g, [layer.axis], gamma, beta)


@rule(keras.layers.BatchNormalization)
def batch_normalization(layer: Any, x: tf.Tensor, g: tf.Tensor) -> Contributions:
    """With the moving statistics μ and σ², as at inference: Σ x̂ g = (Σ x g − μ Σ g) / σ."""
    summed = [i for i in range(1, x.shape.rank) if i != layer.axis % x.shape.rank]
    x, g = tf.cast(x, tf.float32), tf.cast(g, tf.float32)
    total = tf.reduce_sum(g, axis=summed)
    contributions: Contributions = []
    if layer.scale:
        mean = tf.cast(layer.moving_mean.value, tf.float32)
        variance = tf.cast(layer.moving_variance.value, tf.float32)
        scaled = tf.reduce_sum(x * g, axis=summed) - mean * total
        contributions.append((layer.gamma, Full(scaled * tf.math.rsqrt(variance + layer.epsilon))))
    if layer.center:
        contributions.append((layer.beta, Full(total)))
    return contributions


def _scale_and_offset(
    layer: Any,
    x: tf.Tensor,
    g: tf.Tensor,
    axes: Sequence[int],
    gamma: keras.Variable | None,
    beta: keras.Variable | None,
) -> Contributions:
    kept = {axis % x.shape.rank for axis in axes}
    summed = [axis for axis in range(1, x.shape.rank) if axis not in kept]
    g = tf.cast(g, tf.float32)
    contributions: Contributions = []
    if gamma is not None:
        # x̂ is what the layer itself gives with γ = 1 and β = 0.
        neutral = [(v, v.value) for v in layer.variables if v is not gamma and v is not beta]
        neutral.append((gamma, tf.ones(gamma.shape)))
        if beta is not None:
            neutral.append((beta, tf.zeros(beta.shape)))
        with keras.StatelessScope(neutral):
            normalised = tf.cast(layer.call(x), tf.float32)
        contributions.append((gamma, full(tf.reduce_sum(normalised * g, axis=summed))))
    if beta is not None:
        contributions.append((beta, full(tf.reduce_sum(g, axis=summed))))
    return contributions


def _channel_bias(layer: Any, g: tf.Tensor) -> Contributions:
    """The bias of a convolution, g in the layer's own data format."""
    if not layer.use_bias:
        return []
    channels = layer.bias.shape[0]
    _check_bias_axis(channels, -1 if layer.data_format == "channels_last" else 1, g.shape)
    gradient = tf.reduce_sum(_positions(_channels_last(layer, g)), axis=1)
    return [(layer.bias, Full(gradient))]


def _check_bias_axis(length: int, axis: int, shape: tf.TensorShape) -> None:
    # keras.ops.add takes a vector for one along the last axis, or the second, if only it fits.
    if length > 1:
        fitting = [i for i in (shape.rank - 1, 1) if shape[i] == length]
        if fitting and fitting[0] != axis % shape.rank:
            raise NotImplementedError(f"a bias of {length} that Keras adds along another axis")


def _positions(x: tf.Tensor) -> tf.Tensor:
    """[B, ..., m] to float32 [B, P, m]."""
    if x.shape.rank == 2:
        return tf.cast(x, tf.float32)[:, None, :]
    known = x.shape[1:-1]
    positions = math.prod(known) if known.is_fully_defined() else -1
    return tf.reshape(tf.cast(x, tf.float32), [x.shape[0], positions, x.shape[-1]])


def _channels_last(layer: Any, x: tf.Tensor) -> tf.Tensor:
    if layer.data_format == "channels_last":
        return x
    return tf.transpose(x, [0, *range(2, x.shape.rank), 1])


def _window(layer: Any) -> Window:
    return Window(layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding)


def _depthwise(layer: Any, x: tf.Tensor, g: tf.Tensor) -> tf.Tensor:
    """∂ℓ_b/∂K [B, *window, C, M] of a depthwise convolution."""
    x = tf.cast(x, tf.float32)
    found = forms.depthwise(x, _positions(g), _window(layer), layer.depth_multiplier)
    return tf.reshape(found, [x.shape[0], *layer.kernel_size, x.shape[-1], layer.depth_multiplier])


def _sum_to(g: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Sums [B, ...] over what broadcasting such a weight along it repeated: [B, *shape]."""
    g = tf.cast(g, tf.float32)
    axes = range(1, g.shape.rank)
    aligned = [1] * (g.shape.rank - len(shape)) + list(shape)
    if aligned[0] != 1:
        raise NotImplementedError("a bias along the batch axis")
    summed = tf.reduce_sum(g, axis=[i for i in axes if aligned[i] == 1], keepdims=True)
    return tf.reshape(summed, [g.shape[0], *shape])


def _einsum_labels(equation: str, input_rank: int, output_rank: int) -> tuple[str, str, str]:
    """The three terms of an EinsumDense equation, with a label for each axis of an ellipsis."""
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    unused = [label for label in string.ascii_letters if label not in equation]

    def spelled_out(term: str, rank: int) -> str:
        if "..." not in term:
            return term
        return term.replace("...", "".join(unused[: rank - len(term) + 3]))

    return spelled_out(inputs, input_rank), kernel, spelled_out(outputs, output_rank)


def _grouped(labels: str, x: tf.Tensor, positions: str, kept: str) -> tf.Tensor:
    """Brings [batch, ...] with these axis labels to float32 [B, P, K]."""
    order = [0, *(labels.index(label) for label in positions + kept)]
    x = tf.transpose(tf.cast(x, tf.float32), order)
    size = math.prod(x.shape[1 + len(positions) :])
    known = x.shape[1 : 1 + len(positions)]
    count = math.prod(known) if known.is_fully_defined() else -1
    return tf.reshape(x, [x.shape[0], count, size])
