"""What an example did to its own loss, and the loss itself, at every checkpoint."""

import numpy as np

from tracin_beam.scoring import methods
from tracin_beam.signals.registry import Rows, signal


@signal("self_influence", needs=("squared_norm",))
def self_influence(rows: Rows) -> np.ndarray:
    """TracInCP(z, z) = Σ_c η_c ‖∇ℓ(w_c, z)‖²: how much the example lowers its own loss.

    Pruthi et al. 2020, section 4.1. Mislabelled and unusual examples have much of it, since nothing
    else in the training set speaks for them.
    """
    return self_influence_by_checkpoint(rows).sum(axis=1)


@signal("self_influence_error", needs=("norm_error",))
def self_influence_error(rows: Rows) -> np.ndarray:
    """Standard error of `self_influence`, at most; 0 where `--norms` or the layers make it exact.

    The errors of the checkpoints are taken to go together, as all are projected alike.
    """
    score = methods.make(methods.DEFAULT, rows.learning_rates.tolist())
    return score.by_checkpoint(rows["norm_error"]).sum(axis=1)


@signal("self_influence_by_checkpoint", needs=("squared_norm",), by_checkpoint=True)
def self_influence_by_checkpoint(rows: Rows) -> np.ndarray:
    """Its terms, in checkpoint order."""
    score = methods.make(methods.DEFAULT, rows.learning_rates.tolist())
    return score.by_checkpoint(rows["squared_norm"])


@signal("loss_by_checkpoint", needs=("loss",), by_checkpoint=True)
def loss_by_checkpoint(rows: Rows) -> np.ndarray:
    """The loss of the example, in checkpoint order."""
    return rows["loss"]
