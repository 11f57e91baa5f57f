"""How candidates will be found: the choice by cost, from what can be counted before a run."""

from collections.abc import Sequence

from tracin_beam.config import Config
from tracin_beam.planning import counts
from tracin_beam.scoring import cost
from tracin_beam.storage.runs import Shard


def choose(
    config: Config, train: Sequence[Shard], test: Sequence[Shard], numbers: int
) -> cost.Choice:
    """The cheaper way to the candidates.

    Args:
      config: the flags.
      train, test: shards, whose records are counted, or estimated from their size.
      numbers: in an embedding, over all checkpoints.
    """
    counted = counts.count(config, train, test)
    return of_counts(config, counted.train.total, counted.test.total, numbers)


def of_counts(config: Config, rows: int, queries: int, numbers: int) -> cost.Choice:
    """The same for numbers of examples that are known."""
    return cost.choose(
        config.index,
        rows,
        numbers,
        queries,
        config.queries_expected,
        config.rescore or config.top_k,
    )
