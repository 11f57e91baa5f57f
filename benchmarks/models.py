"""The models that benchmarks run on."""

from collections.abc import Callable

import keras

layers = keras.layers


def mlp(inputs: int = 784, classes: int = 10) -> keras.Model:
    """784-512-256-10."""
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(512, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(classes),
        ]
    )


def resnet20(classes: int = 10) -> keras.Model:
    """ResNet-20 for 32×32×3 images (He et al. 2016, section 4.2)."""
    inputs = keras.Input((32, 32, 3))

    def unit(x: keras.KerasTensor, filters: int, stride: int = 1) -> keras.KerasTensor:
        x = layers.Conv2D(filters, 3, strides=stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = layers.ReLU()(unit(inputs, 16))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(unit(x, filters, stride))
            y = unit(y, filters)
            if stride > 1:
                x = layers.Conv2D(filters, 1, strides=stride, use_bias=False)(x)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def transformer(
    depth: int = 4, width: int = 256, tokens: int = 128, vocabulary: int = 8192, classes: int = 4
) -> keras.Model:
    """A Transformer encoder (pre-normalisation), mean-pooled."""
    inputs = keras.Input((tokens,), dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(vocabulary, width)(inputs)
    x = x + layers.Embedding(tokens, width)(positions)
    for _ in range(depth):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4)(y, y)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="relu")(y)
        x = x + layers.Dense(width)(y)
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(classes)(layers.GlobalAveragePooling1D()(x)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "mlp": mlp,
    "resnet20": resnet20,
    "transformer": transformer,
}
