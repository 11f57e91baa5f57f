"""`--dim auto`: a sample goes through the engine, to see which dim reaches the wanted recall."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from tracin_beam.config import Config
from tracin_beam.errors import InputError
from tracin_beam.planning import dims, plan, retrieval
from tracin_beam.planning.counts import Counts
from tracin_beam.planning.dims import Expected
from tracin_beam.planning.sample import (
    estimates,
    exact_scores,
    id_bytes,
    sample,
    self_scores,
    spread,
    usable,
)
from tracin_beam.scoring import methods
from tracin_beam.stages import workers
from tracin_beam.stages.workers import EngineSource, Loaded
from tracin_beam.storage.records import Record
from tracin_beam.storage.runs import CheckpointFile, Shard

# The sample: as many training examples as the time allows, and queries.
_MOST_ROWS, _FEWEST_ROWS, _SECONDS = 2048, 128, 20.0
_QUERIES, _MOST_BLOCKS = 32, 4
# Checkpoints at which it is computed, spread evenly, the last among them.
_CHECKPOINTS = 3


@dataclasses.dataclass(frozen=True)
class Choice:
    """The dim that was chosen, and why.

    Attributes:
      dim: the smallest that reaches the recall, or the largest tried.
      wanted: the recall that was wanted, at `top_k` with so many `candidates`.
      table: what was tried, in rising order.
      rows, queries, checkpoints: size of the pilot sample.
      training_rows: number of training examples that the recall is expected for.
    """

    dim: int
    wanted: float
    top_k: int
    candidates: int
    table: tuple[Expected, ...]
    rows: int
    queries: int
    checkpoints: int
    training_rows: int

    @property
    def reached(self) -> bool:
        return dims.smallest(self.table, self.wanted) is not None

    def lines(self) -> list[str]:
        """The choice as text."""
        what = f"recall@{self.top_k} of {self.candidates} candidates"
        said = [
            f"Pilot of {self.rows} training examples and {self.queries} queries at "
            f"{self.checkpoints} checkpoint(s); {what} to expect among {self.training_rows:,}:",
            f"{'dim':>6}  {'recall':>6}  {'embeddings':>12}  {'index':>12}",
        ]
        said += [
            f"{row.dim:>6}  {row.recall:>6.3f}  {plan.size(row.embedding_bytes):>12}  "
            f"{plan.size(row.index_bytes):>12}"
            for row in self.table
        ]
        if self.reached:
            said.append(f"{self.dim} is the smallest with {self.wanted:g} or more.")
        else:
            said.append(
                f"None of them is expected to reach {self.wanted:g}: {self.dim} comes closest. "
                "A larger --rescore helps more than a larger dim."
            )
        return said


def choose_dim(
    config: Config,
    source: EngineSource,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
    counts: Counts,
) -> Choice:
    """Finds the smallest dim of `dims.DIMS` with which the wanted recall is to be expected.

    Args:
      config: the flags.
      source: an engine of any dim.
      checkpoints, train, test: the run's; without a test set training examples are the queries.
      counts: of both sets.
    """
    loaded = source.get()
    pilot_checkpoints = [checkpoints[i] for i in spread(len(checkpoints), _CHECKPOINTS)]
    target = config.target if test else "loss"
    asked = min(_QUERIES, _MOST_BLOCKS * loaded.engine.batch_size)
    if test:
        rows, queries = sample(train, _MOST_ROWS), sample(test, asked)
    else:
        both = sample(train, _MOST_ROWS + asked)
        asked = min(asked, len(both) // 4)
        rows, queries = both[asked:], both[:asked]
    rows = rows[: _affordable(loaded, pilot_checkpoints, rows, len(queries))]
    rows, own = usable(loaded, pilot_checkpoints, "loss", rows)
    queries, asking = usable(loaded, pilot_checkpoints, target, queries)
    if not (rows and queries):
        raise InputError(
            "--dim=auto: too few of the sampled examples can be used; give --dim a number."
        )
    score = methods.make(methods.DEFAULT, [c.learning_rate for c in pilot_checkpoints])
    exact = exact_scores(loaded, score, pilot_checkpoints, rows, queries, target)
    sizes = np.sqrt(np.outer(self_scores(score, own), self_scores(score, asking)))
    candidates = config.rescore or config.top_k
    identities = [id_bytes(source, shards) for shards in (train, test)]
    parameters = sum(spec.size for spec in loaded.engine.specs)
    table: list[Expected] = []
    for dim in dims.DIMS:
        if table and (table[-1].recall >= config.recall or table[-1].dim >= parameters):
            break
        if dim != source.config.dim:
            changed = dataclasses.replace(source.config, dim=dim)
            loaded = workers.load(loaded.task, loaded.parser, changed, source.sample)
            _, own = usable(loaded, pilot_checkpoints, "loss", rows)
            _, asking = usable(loaded, pilot_checkpoints, target, queries)
        estimate = estimates(score, own, asking)
        recall = dims.expected_recall(
            exact, estimate, sizes, counts.train.total, config.top_k, candidates
        )
        numbers = dim * len(checkpoints)
        way = retrieval.of_counts(config, counts.train.total, counts.test.total, numbers).index
        table.append(
            Expected(
                dim,
                recall,
                len(checkpoints)
                * (
                    plan.embedding_bytes(
                        dim, train, counts.train, identities[0], config.embedding_dtype
                    )
                    + plan.embedding_bytes(
                        dim, test, counts.test, identities[1], config.embedding_dtype
                    )
                ),
                plan.index_bytes(way, counts.train.records, numbers, config.index_rows),
            )
        )
    best = dims.smallest(table, config.recall) or max(table, key=lambda row: row.recall)
    return Choice(
        best.dim,
        config.recall,
        config.top_k,
        candidates,
        tuple(table),
        len(rows),
        len(queries),
        len(pilot_checkpoints),
        counts.train.total,
    )


def _affordable(
    loaded: Loaded, checkpoints: Sequence[CheckpointFile], rows: Sequence[Record], queries: int
) -> int:
    """How many rows can be embedded and scored in the time that there is."""
    size = loaded.engine.batch_size
    some = rows[:size]
    taken = 0.0
    for _ in range(2):  # the first time, functions are traced
        started = time.monotonic()
        good, _ = usable(loaded, checkpoints[-1:], "loss", some)
        if not good:
            return len(rows)
        score = methods.make(methods.DEFAULT, [checkpoints[-1].learning_rate])
        exact_scores(loaded, score, checkpoints[-1:], good, good[:1], "loss")
        taken = time.monotonic() - started
    # What was timed is a pass to embed the rows, one for the query, and one to score them.
    passes = (1 + -(-queries // size)) * len(checkpoints)
    rate = len(some) / max(taken / 3, 1e-3)
    return max(_FEWEST_ROWS, int(rate * _SECONDS / passes))
