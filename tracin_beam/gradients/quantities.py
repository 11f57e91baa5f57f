"""What is differentiated of an example: a target, for the kind of task at hand."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from tracin_beam.errors import InputError, reason
from tracin_beam.gradients import kinds, nests, targets
from tracin_beam.gradients.kinds import Kind
from tracin_beam.gradients.losses import PerExample, per_example_loss
from tracin_beam.gradients.targets import ClassScores, Losses

# A quantity without a label, which no flag can name: see `summed_outputs`.
OUTPUTS = "sum of outputs"


def summed_outputs(output: Any, kind: Kind) -> tf.Tensor:
    """The sum of an example's outputs, of a classifier's logits: float32 [B].

    Its gradient describes the example as the model sees it, without its label.
    """
    if kind.name in ("classification", "multilabel"):
        return tf.reduce_sum(_logits(output, kind), axis=1)
    parts = [tf.cast(x, tf.float32) for x in tf.nest.flatten(output)]
    return tf.add_n([tf.reduce_sum(x, axis=list(range(1, x.shape.rank))) for x in parts])


def log_probabilities(output: Any, kind: Kind) -> tf.Tensor:
    """Logs of a classifier's probabilities by class: float32 [B, K].

    Of one output for two classes, those of both; of a multi-label task, of each label by itself. Of
    other tasks the outputs themselves, in one row.
    """
    if kind.name == "multilabel":
        return tf.math.log_sigmoid(_logits(output, kind))
    if kind.name == "classification":
        logits = _logits(output, kind)
        if kind.single:
            return tf.concat([tf.math.log_sigmoid(-logits), tf.math.log_sigmoid(logits)], axis=1)
        return tf.nn.log_softmax(tf.math.log_sigmoid(logits) if kind.separate else logits)
    parts = [tf.cast(x, tf.float32) for x in tf.nest.flatten(output)]
    return tf.concat([tf.reshape(x, [tf.shape(x)[0], -1]) for x in parts], axis=1)


def check_target(target: str, given: Mapping[str, Callable[..., Any]]) -> None:
    """Checks that there is a target of this name.

    Args:
      target: the name.
      given: `Task.targets`.

    Raises:
      InputError: there is none, or `Task.targets` takes the name of a registered one.
    """
    for name in given:
        if name in targets.names():
            raise InputError(f"Task(targets=…): there is a target {name} already; rename it.")
    if target not in targets.names() and target not in given:
        known = ", ".join([*targets.names(), *given])
        more = "" if given else ", or add a function of that name to Task(targets=…)"
        raise InputError(f"--target={target} is not known; take one of {known}{more}.")


def target_quantity(
    target: str,
    loss: Any,
    kind: Kind | None = None,
    given: Mapping[str, Callable[..., Any]] | None = None,
) -> PerExample:
    """What is differentiated for a target, as a function like `per_example_loss`.

    Args:
      target: the name of a registered target, or of one that the task gives.
      loss: as in `Task.loss`.
      kind: of the task; None infers it from what the function is given.
      given: `Task.targets`.

    Raises:
      InputError: there is no such target; when called, the kind of task has none such, or the
        task's function does not give a float for each example.
    """
    if target == OUTPUTS:
        return lambda label, output, _: summed_outputs(
            output, kind or kinds.infer(loss, label, output)
        )
    check_target(target, given or {})
    if given and target in given:
        return _given_quantity(target, given[target])
    chosen = targets.get(target)
    compute = per_example_loss(loss)

    def quantity(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        of_task = kind or kinds.infer(loss, label, output)
        if chosen.of is ClassScores:
            _check_classes(target, of_task)
            return chosen.quantity(class_scores(label, output, of_task))

        def of_label() -> tf.Tensor:
            if label is None:
                raise InputError(
                    "parse gives no label: the loss needs one. For test examples without a label "
                    "take --target=predicted_loss, logit, probability or margin."
                )
            return compute(label, output, sample_weight)

        def of_prediction() -> tf.Tensor:
            return compute(_predicted_label(target, label, output, of_task), output, None)

        return chosen.quantity(Losses(of_label, of_prediction))

    return quantity


def _given_quantity(name: str, function: Callable[..., Any]) -> PerExample:
    """A function of `Task.targets` as a function like `per_example_loss`."""
    with_label = _takes_label(function)
    what = f"the target {name} of Task(targets=…)"

    def quantity(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        if with_label and label is None:
            raise InputError(f"parse gives no label, and {what} takes one.")
        try:
            value = tf.convert_to_tensor(
                function(output, label) if with_label else function(output)
            )
        except Exception as error:  # whatever a user's function raises
            raise InputError(f"{what} fails on what the model gives: {reason(error)}") from error
        size = nests.present(output)[0].shape[0]
        if not value.dtype.is_floating:
            raise InputError(
                f"{what} gives {value.dtype.name}, which has no gradient: let it give a float for "
                "each example, [B]."
            )
        if value.shape.rank != 1 or (size and value.shape[0] not in (None, size)):
            raise InputError(
                f"{what} gives shape {tuple(value.shape)} for {size} examples: let it give a "
                "number for each of them, [B]."
            )
        return tf.cast(value, tf.float32)

    return quantity


def _takes_label(function: Callable[..., Any]) -> bool:
    """Whether a function is of (outputs, label): it has two arguments that must be given."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a builtin
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in places if p.default is p.empty]
    return len(needed) > 1 or [p.name for p in places[1:2]] == ["label"]


def loss_if_labelled(loss: Any, kind: Kind) -> PerExample:
    """Like `per_example_loss`, but NaN for examples of a classification that have no label."""
    compute = per_example_loss(loss)

    def known(label: Any, output: Any, sample_weight: Any) -> tf.Tensor:
        if label is None:
            return tf.fill([tf.shape(tf.nest.flatten(output)[0])[0]], float("nan"))
        if kind.name != "classification":
            return compute(label, output, sample_weight)
        missing = tf.math.is_nan(kinds.labels(label, output, kind))
        # Some losses fail on a class that there is not.
        none = missing if label.shape.rank == 1 else missing[:, None]
        value = compute(tf.where(none, tf.zeros_like(label), label), output, sample_weight)
        return tf.where(missing, float("nan"), value)

    return known


def class_scores(label: Any, output: tf.Tensor, kind: Kind) -> ClassScores:
    """A classifier's scores, from the class of the label, or from the predicted one."""
    logits = _logits(output, kind)
    if kind.single:
        logits = tf.concat([tf.zeros_like(logits), logits], axis=1)
    known = kinds.labels(label, output, kind)
    predicted = tf.argmax(logits, axis=1)
    index = tf.where(tf.math.is_nan(known), predicted, tf.cast(known, tf.int64))
    chosen = tf.one_hot(index, logits.shape[1], on_value=True, off_value=False)
    return ClassScores(
        own=tf.reduce_sum(tf.where(chosen, logits, 0.0), axis=1),
        others=tf.where(chosen, logits.dtype.min, logits),
        logits=logits,
        separate=kind.separate,
        relative=kind.single or (kind.probabilities and not kind.separate),
    )


def _check_classes(target: str, kind: Kind) -> None:
    if kind.name == "classification":
        return
    why = {
        "multilabel": "its examples have any number of labels, so that there is no one class",
        "regression": "its outputs are numbers",
        "other": "its outputs are not known to be scores of classes",
    }[kind.name]
    raise InputError(
        f"--target={target} needs a classifier: one output of scores [B, K]. This task is taken "
        f"for kind={kind.name!r}: {why}. If each example has one class, say so: "
        "Task(kind='classification')."
    )


def _predicted_label(target: str, label: Any, output: tf.Tensor, kind: Kind) -> tf.Tensor:
    """What the label would be if the model were right, of the label's shape where there is one."""
    if kind.name == "multilabel":
        return tf.cast(output > (0.5 if kind.probabilities else 0.0), tf.float32)
    _check_classes(target, kind)
    logits = _logits(output, kind)
    if kind.single:
        return tf.cast(logits > 0, tf.int64)
    predicted = tf.argmax(logits, axis=1)
    if not kind.sparse:
        return tf.one_hot(predicted, logits.shape[1])
    flat = label is None or label.shape.rank == 1
    return predicted if flat else predicted[:, None]


def _logits(output: tf.Tensor, kind: Kind) -> tf.Tensor:
    """float32 [B, K]: logits; of probabilities the log-odds if separate or single, else the logs.

    A probability near one has lost the digits that tell how near it is: where Keras knows the
    logits that it was made from, they are taken (their softmax is the same, which is enough).
    """
    logits = getattr(output, "_keras_logits", None if kind.probabilities else output)
    if logits is not None:
        logits = tf.cast(logits, tf.float32)
    else:
        given = tf.cast(output, tf.float32)
        if kind.separate or kind.single:
            clipped = tf.clip_by_value(given, 1e-7, 1 - 1e-7)
            logits = tf.math.log(clipped) - tf.math.log1p(-clipped)
        else:
            logits = tf.math.log(tf.maximum(given, 1e-30))
    return logits if logits.shape.rank == 2 else logits[:, None]
