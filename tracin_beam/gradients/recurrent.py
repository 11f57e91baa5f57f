"""Recurrent layers: the gradient of a cell's weights from all steps at a time.

The loop over the steps runs once, forward and backward, with a zero added to what the cell gives
out at each step, the output and the new states. The gradient with respect to those zeros is that of
all that came of the step later. Given the inputs, the states before each step and those
gradients, the steps no longer depend on one another: the cell is run on all of them as one batch of
B·T rows, and the uses of its weights there (see `uses`) give Σ_t x_t ⊗ g_t, Σ_t h_{t−1} ⊗ g_t and
Σ_t g_t, g_t the gradient of the cell's pre-activations, whatever cell it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tracin_beam.errors import InputError

_ANY_LENGTH = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Steps:
    """All steps of a recurrent layer in one call.

    Attributes:
      layer: the layer.
      inputs: [B, T, ...], in the order in which they were taken.
      states: [B, T, ...] each, before each step, flat.
      structure: how the cell takes the states.
      arguments: other arguments of the cell.
      zeros: [B, T, ...] each; their gradients are those of `sums`.
      sums: where each zero went: to the output (−1), to the states of these indices.
    """

    layer: keras.layers.RNN
    inputs: tf.Tensor
    states: Sequence[tf.Tensor]
    structure: Any
    arguments: dict[str, Any]
    zeros: Sequence[tf.Tensor]
    sums: Sequence[Sequence[int]]

    def replay(self) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Runs the cell on all steps at a time.

        Returns:
          What the cell was given, [B·T, ...], and for each zero what it was added to, [B·T, ...].
        """
        rows = [_rows(x) for x in (self.inputs, *self.states)]
        states = tf.nest.pack_sequence_as(self.structure, rows[1:])
        output, new = _called(self.layer, rows[0], states, self.arguments)
        given = [output, *tf.nest.flatten(new)]
        return rows, [given[where[0] + 1] for where in self.sums]


def takes(layer: Any) -> bool:
    """Whether a layer loops over a cell as Keras's own recurrent layers do."""
    return isinstance(layer, keras.layers.RNN) and all(
        getattr(type(layer), name).__module__.startswith("keras.")
        for name in ("inner_loop", "call")
    )


def refuse_stateful(model: keras.Model) -> None:
    """An example's gradient must not depend on what came before it.

    Raises:
      InputError: a recurrent layer that keeps its state.
    """
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise InputError(
                f"layer {layer.name} is stateful: what it makes of an example depends on those "
                "before it. Build the model with stateful=False."
            )


def inner_loop(
    layer: keras.layers.RNN, record: Callable[[Steps], None]
) -> Callable[..., tuple[tf.Tensor, tf.Tensor, Any]]:
    """What to put in the place of `layer.inner_loop`, to get its steps recorded."""

    def loop(sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        cell: Any = layer.cell
        arguments = {"training": training} if getattr(cell, "_call_has_training_arg", False) else {}
        if not tf.nest.is_nested(initial_state):
            initial_state = [initial_state]
        initial_state = list(initial_state)
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        if layer.go_backwards:
            sequences = tf.reverse(sequences, [1])
            mask = None if mask is None else tf.reverse(mask, [1])
        flat = tf.nest.flatten(initial_state)
        # Once outside of the loop, to see what the cell gives out; nothing depends on it.
        output, new = _called(layer, sequences[:, 0], initial_state, arguments)
        given = [output, *tf.nest.flatten(new)]
        sums: list[list[int]] = []
        for i, x in enumerate(given):
            same = next((s for s in sums if given[s[0] + 1] is x), None)
            if same is None:
                sums.append([i - 1])
            else:
                same.append(i - 1)
        steps = tf.shape(sequences)[1] if sequences.shape[1] is None else sequences.shape[1]
        batch = sequences.shape[0]
        zeros = []
        for where in sums:
            like = given[where[0] + 1]
            zero = tf.zeros([batch, steps, *like.shape[1:]], like.dtype)
            zeros.append(tf.ensure_shape(zero, [batch, sequences.shape[1], *like.shape[1:]]))

        def step(inputs: Any, states: Any) -> Any:
            x, *added = inputs
            states = list(states)
            output, new = _called(layer, x, states, arguments)
            given = [output, *tf.nest.flatten(new)]
            for where, zero in zip(sums, added, strict=True):
                for i in where:
                    given[i + 1] = given[i + 1] + zero
            return (given[0], *tf.nest.flatten(states)), tf.nest.pack_sequence_as(new, given[1:])

        last, outputs, final = keras.src.backend.rnn(
            step,
            (sequences, *zeros),
            initial_state,
            mask=mask,
            input_length=sequences.shape[1] or _ANY_LENGTH,
            zero_output_for_mask=layer.zero_output_for_mask,
            return_all_outputs=True,
        )
        before = [
            tf.ensure_shape(x, [batch, sequences.shape[1], *first.shape[1:]])
            for x, first in zip(outputs[1:], flat, strict=True)
        ]
        record(Steps(layer, sequences, before, initial_state, arguments, zeros, sums))
        return last[0], outputs[0], final

    return loop


def _called(layer: Any, x: tf.Tensor, states: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    output, new = layer.cell(x, states, **arguments)
    return output, new if tf.nest.is_nested(new) else [new]


def _rows(x: tf.Tensor) -> tf.Tensor:
    """[B, T, ...] to [B·T, ...]."""
    known = x.shape[1] is not None
    lengths = [n if n is not None else tf.shape(x)[2 + a] for a, n in enumerate(x.shape[2:])]
    return tf.reshape(x, [x.shape[0] * x.shape[1] if known else -1, *lengths])
