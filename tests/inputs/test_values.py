"""Values of a task as data that can be compared."""

import keras

from tracin_beam.inputs.values import Values


def masked(activation="softmax"):
    """Masks are operations of the graph, and attention has a layer called softmax inside."""
    layers = keras.layers
    tokens = keras.Input((5,), dtype="int64")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 3)(x, x)])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(4, activation=activation)(x))


def test_a_model_is_the_same_however_often_it_is_built():
    values = Values("/nowhere", lambda name: False)
    first = values.model(masked())
    assert values.model(masked()) == first
    assert values.model(masked("softplus")) != first
