"""Which of a training's checkpoints to take, and what each of them then counts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.planning import sample
from tracin_beam.storage.runs import Shard

if TYPE_CHECKING:
    from tracin_beam.stages.workers import Loaded

# Training examples whose mean loss tells how far the training was.
_EXAMPLES = 512


def evenly(count: int, wanted: int) -> list[int]:
    """So many of the checkpoints 0 … count − 1, evenly spread, the last among them."""
    return sample.spread(count, wanted)


def by_fall(losses: Sequence[float], wanted: int) -> list[int]:
    """So many checkpoints, those before which the loss fell most since the checkpoint before.

    The first comes first, as most of what a training does is done before it. Of equal falls the
    earlier comes first.
    """
    falls = np.concatenate([[np.inf], -np.diff(np.asarray(losses, np.float64))])
    return sorted(np.argsort(-falls, kind="stable")[:wanted].tolist())


def mean_rates(rates: Sequence[float], chosen: Sequence[int]) -> list[float]:
    """The mean learning rate of each interval: after the chosen checkpoint before, up to its own.

    Those after the last chosen one are in no interval.
    """
    starts = [0, *(place + 1 for place in chosen)]
    return [
        float(np.mean(rates[start : place + 1]))
        for start, place in zip(starts, chosen, strict=False)
    ]


def mean_losses(loaded: "Loaded", paths: Sequence[str], train: Sequence[Shard]) -> list[float]:
    """The mean loss of a sample of the training set at each checkpoint.

    Raises:
      InputError: one is not a number.
    """
    from tracin_beam.stages import embed

    engine = loaded.engine
    batch, _, _ = embed.parse_records(loaded, sample.sample(train, _EXAMPLES))
    found = []
    for path in paths:
        values = engine.values(path)
        starts = range(0, batch.size, engine.batch_size)
        parts = [np.arange(i, min(i + engine.batch_size, batch.size)) for i in starts]
        losses = [engine.quantities("loss", values, batch.take(part)) for part in parts]
        finite = np.concatenate(losses)
        finite = finite[np.isfinite(finite)]
        if not len(finite):
            raise InputError(
                f"{path}: the loss of none of {batch.size} training examples is a number there. "
                "Leave that checkpoint out, or take --checkpoints_select_by=evenly."
            )
        found.append(float(finite.mean()))
    return found
