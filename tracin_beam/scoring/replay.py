"""Influence as the paper defines it, by training once more: what checkpoints only estimate.

Pruthi, Liu, Kale and Sundararajan: Estimating Training Data Influence by Tracing Gradient Descent,
NeurIPS 2020, sections 3.1 and 3.2. While a training is taken step by step from the weights that it
began with, each visit of a training example z is given the change that it made to the loss of each
test example z':

    TracInIdeal(z, z') = Σ over the steps t that used z of ℓ(w_t, z') − ℓ(w_{t+1}, z')
    TracIn(z, z')      = Σ over the steps t that used z of (η_t / b) ∇ℓ(w_t, z) · ∇ℓ(w_t, z')

The first takes steps of one example, and its sum over z is the change of the loss of z' over the
training, whatever the optimizer. The second is its first order for minibatches of b examples and
gradient descent. Both cost a pass over the test set for every visit, so they are for small models
and short trainings, to see how near TracInCP comes with the checkpoints at hand.

    parser = BatchParser(task)
    train, test = parser(train_records), parser(test_records)
    training, steps = recorded(task, "ckpts", keras.optimizers.SGD(0.1), train)
    replayed = first_order(training, steps, test)
    replayed.scores[3, 0]      # of the fourth training example for the first test example
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import nests
from tracin_beam.gradients.batches import Batch
from tracin_beam.gradients.losses import per_example_loss
from tracin_beam.inputs import batches
from tracin_beam.inputs.task import Task, in_keras_thread
from tracin_beam.inputs.weights import WeightsLoader, array

# The optimizer's rate and the recorded one are the same up to float32.
_SAME_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a training.

    Attributes:
      examples: places in the training set, of the examples of its batch.
      learning_rate: if it is recorded, to be held against the optimizer's.
    """

    examples: tuple[int, ...]
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    """A training that can be taken once more. A replay changes the model and the optimizer.

    Attributes:
      model: a built model, with the weights that the training began with.
      loss: as `Task.loss`. What layers add to the loss is trained with, and is not counted to the
        loss of an example.
      optimizer: a new one, as it was compiled.
      train: the training set.
    """

    model: keras.Model
    loss: Any
    optimizer: keras.optimizers.Optimizer
    train: Batch


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a replay found, for n training and m test examples.

    Attributes:
      scores: float64 [n, m], of every training example for every test example.
      before, after: float64 [m], the test examples' losses at both ends of the training.
    """

    scores: np.ndarray
    before: np.ndarray
    after: np.ndarray


def recorded(
    task: Task, directory: str, optimizer: keras.optimizers.Optimizer, train: Batch
) -> tuple[Training, list[Step]]:
    """A training that `TracInCheckpoint(record_batches=True)` recorded, and its steps.

    Args:
      task: of the training.
      directory: of its checkpoints.
      optimizer: a new one, as the training had it.
      train: the training set, or what of it the training used.

    Raises:
      InputError: not every step is recorded, or one used an example that is not in `train`.
    """
    found = batches.read(directory)
    places = batches.places(found, train.features, train.label)
    model = in_keras_thread(task.model)
    WeightsLoader(model).load(batches.start_of(directory))
    steps = [Step(p, s.learning_rate) for p, s in zip(places, found, strict=True)]
    return Training(model, task.loss, optimizer, train), steps


def ideal(training: Training, steps: Sequence[Step], test: Batch) -> Replayed:
    """TracInIdeal: what each step of one example did to the losses of the test examples.

    The scores' sum over the training set is `before - after`.

    Raises:
      InputError: a step has more than one example, or another learning rate than the optimizer.
    """
    if any(len(step.examples) != 1 for step in steps):
        raise InputError(
            "TracInIdeal is of trainings that take one example a step: for batches take first_order"
        )
    losses = _Losses(training)
    scores = np.zeros((training.train.size, test.size))
    before = now = losses.of(test)
    for number, step in enumerate(steps):
        losses.take(step, number)
        after = losses.of(test)
        scores[step.examples[0]] += now - after
        now = after
    return Replayed(scores, before, now)


def first_order(training: Training, steps: Sequence[Step], test: Batch) -> Replayed:
    """TracIn for minibatches: (η_t / b) ∇ℓ(w_t, z) · ∇ℓ(w_t, z'), over the steps that used z.

    Gradients are those of inference mode, over all trainable weights. Of a batch in which an
    example stands twice, both are visits.

    Raises:
      InputError: a step has another learning rate than the optimizer.
    """
    losses = _Losses(training)
    scores = np.zeros((training.train.size, test.size))
    before = losses.of(test)
    for number, step in enumerate(steps):
        visited = [(place, losses.products(place, test)) for place in step.examples]
        rate = losses.take(step, number)
        for place, products in visited:
            scores[place] += rate * losses.share(len(step.examples)) * products
    return Replayed(scores, before, losses.of(test))


class _Losses:
    """The losses of examples at a model's present weights, and the steps that change these."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._model, self._optimizer = training.model, training.optimizer
        self._compute = per_example_loss(training.loss)
        self._summed = getattr(keras.losses.get(training.loss), "reduction", "") == "sum"
        self._weights = [v.value for v in self._model.trainable_variables]
        self._functions: dict[str, Any] = {}
        in_keras_thread(lambda: self._optimizer.build(self._model.trainable_variables))

    def share(self, size: int) -> float:
        """What the loss of an example counts in the loss of a batch of this size."""
        return 1.0 if self._summed else 1.0 / size

    def of(self, batch: Batch) -> np.ndarray:
        """ℓ(w, ·) of each example: float64 [n]."""
        losses = self._run("losses", lambda flat: self._losses(flat, batch), batch)
        return np.asarray(losses, np.float64)

    def products(self, place: int, test: Batch) -> np.ndarray:
        """∇ℓ(w, z) · ∇ℓ(w, z'), of a training example for all test examples: float64 [m]."""
        one = self._training.train.take([place])
        gradient = self._run("gradient", lambda flat: self._gradient(flat, one), one)
        found = self._run("products", lambda flat: self._products(flat, test), test, gradient)
        return np.asarray(found, np.float64)

    def take(self, step: Step, number: int) -> float:
        """Takes a step, and gives its learning rate."""
        rate = float(array(self._optimizer.learning_rate))
        if step.learning_rate is not None and not np.isclose(
            rate, step.learning_rate, rtol=_SAME_RATE, atol=0
        ):
            raise InputError(
                f"Step {number + 1} was taken with the learning rate {step.learning_rate:g}, and "
                f"the optimizer given has {rate:g} there: give one like that of the training"
            )
        batch = self._training.train.take(step.examples)
        name = f"train {batch.size}"
        gradients = self._run(name, lambda flat: self._trained(flat, batch), batch)
        self._optimizer.apply(gradients, self._model.trainable_variables)
        return rate

    def _run(self, name: str, body: Callable[..., Any], batch: Batch, *more: Any) -> Any:
        """Calls a function of a batch's tensors, traced once."""
        flat = nests.present((batch.features, batch.label, batch.sample_weight))
        if name not in self._functions:
            # Later batches of this name have the structure that the first one has.
            self._functions[name] = tf.function(
                lambda given, *others: body((given, *others)), reduce_retracing=True
            )
        return in_keras_thread(lambda: self._functions[name](flat, *more))

    def _losses(self, given: Any, batch: Batch, training: bool = False) -> tf.Tensor:
        structure = (batch.features, batch.label, batch.sample_weight)
        features, label, weight = nests.repack(structure, given[0])
        return self._compute(label, self._model(features, training=training), weight)

    def _gradient(self, given: Any, batch: Batch) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(self._losses(given, batch))
        return self._dense(tape, loss)

    def _products(self, given: Any, batch: Batch) -> tf.Tensor:
        _, gradient = given
        with tf.autodiff.ForwardAccumulator(self._weights, gradient) as forward:
            losses = self._losses(given, batch)
        products = forward.jvp(losses, unconnected_gradients="zero")
        assert products is not None
        return products

    def _trained(self, given: Any, batch: Batch) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            losses = self._losses(given, batch, training=True)
            loss = tf.reduce_sum(losses) * self.share(batch.size)
            loss += sum(tf.cast(tf.reduce_sum(x), loss.dtype) for x in self._model.losses)
        return self._dense(tape, loss)

    def _dense(self, tape: tf.GradientTape, loss: tf.Tensor) -> list[tf.Tensor]:
        gradients = tape.gradient(loss, self._weights, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in gradients]
