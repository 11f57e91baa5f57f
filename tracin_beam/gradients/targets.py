"""What of a test example is explained: the quantity whose gradient its query is.

Every quantity falls when the model is trained on a proponent: a loss itself, and the negative of a
logit, probability or margin, so that a proponent always pushes towards the class in question. That
class is the label's, or the predicted one where there is no label.

To add a target, write a function of a few lines with `@target("name")`: its first docstring line is
shown to users. This module is read for `--help` too, so that it must not import TensorFlow: what a
target needs of it, it imports itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """A classifier's scores [B, K] of B examples, seen from one class of each.

    Attributes:
      own: float32 [B], the logit of the class.
      others: float32 [B, K], the logits of the other classes, and float32's least number in the
        place of the class itself.
      logits: float32 [B, K], the logits of all classes. For a model that gives probabilities they
        are the logs of these, or log-odds where `separate`; for one output z for two classes
        they are 0, z.
      separate: each score is by itself, as of sigmoids, and not beside the others, as of a softmax.
      relative: logits mean something beside each other only, as logs of probabilities do.
    """

    own: Any
    others: Any
    logits: Any
    separate: bool
    relative: bool

    @property
    def best_other(self) -> Any:
        """float32 [B], the greatest logit of the other classes."""
        import tensorflow as tf

        return tf.reduce_max(self.others, axis=1)

    @property
    def log_odds(self) -> Any:
        """float32 [B], log p / (1 − p) of the class."""
        import tensorflow as tf

        return self.own if self.separate else self.own - tf.reduce_logsumexp(self.others, axis=1)

    @property
    def probability(self) -> Any:
        """float32 [B], of the class."""
        import tensorflow as tf

        if self.separate or (self.logits.shape[1] == 2 and self.relative):
            return tf.sigmoid(self.log_odds)
        chosen = tf.equal(self.others, self.others.dtype.min)
        return tf.reduce_sum(tf.where(chosen, tf.nn.softmax(self.logits), 0.0), axis=1)


@dataclasses.dataclass(frozen=True)
class Losses:
    """The task's loss of some examples.

    Attributes:
      of_label: () -> float32 [B], with the labels and weights that parse gives.
      of_prediction: () -> float32 [B], with the predicted classes as labels.
    """

    of_label: Callable[[], Any]
    of_prediction: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """A registered target.

    Attributes:
      name: as in `--target`.
      about: what it is, in a line.
      quantity: from `Losses` or `ClassScores` to float32 [B].
      of: which of the two.
    """

    name: str
    about: str
    quantity: Callable[[Any], Any]
    of: type


_TARGETS: dict[str, Target] = {}


def target(name: str, of: type = ClassScores) -> Callable[[Callable[[Any], Any]], Any]:
    """Registers a function of `ClassScores` (or `Losses`) that gives float32 [B]."""

    def register(quantity: Callable[[Any], Any]) -> Callable[[Any], Any]:
        about = (quantity.__doc__ or "").strip().partition("\n")[0]
        _TARGETS[name] = Target(name, about, quantity, of)
        return quantity

    return register


def names() -> list[str]:
    """The names that `--target` takes, in the order in which they are shown."""
    return list(_TARGETS)


def get(name: str) -> Target:
    """The target of this name.

    Raises:
      KeyError: there is none.
    """
    return _TARGETS[name]


@target("loss", of=Losses)
def loss(losses: Losses) -> Any:
    """The loss of the example, with what layers add to it."""
    return losses.of_label()


@target("predicted_loss", of=Losses)
def predicted_loss(losses: Losses) -> Any:
    """The loss that the example would have if its label were the predicted one."""
    return losses.of_prediction()


@target("logit")
def logit(scores: ClassScores) -> Any:
    """The logit of the class; its log-odds where the model gives probabilities or one output."""
    return -(scores.log_odds if scores.relative else scores.own)


@target("probability")
def probability(scores: ClassScores) -> Any:
    """The probability of the class."""
    return -scores.probability


@target("margin")
def margin(scores: ClassScores) -> Any:
    """The logit of the class less the greatest of the others."""
    return scores.best_other - scores.own
