"""Training embeddings → self-influence tables.

Self-influence is TracInCP(z, z) = Σ_c η_c ‖∇ℓ(w_c, z)‖² (Pruthi et al. 2020, section 4.1): how much
an example lowers its own loss. Mislabelled and unusual examples have much of it, since nothing
else in the training set speaks for them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.storage import embeddings, runs, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import CheckpointFile, Output, ShardResult


def table_of(
    parts: Sequence[Embeddings], checkpoints: Sequence[CheckpointFile], shard: str
) -> pa.Table:
    """Rows of the self-influence table for the same examples at every checkpoint."""
    rates = np.array([c.learning_rate for c in checkpoints])
    by_checkpoint = np.stack([p.squared_norm.astype(np.float64) for p in parts], axis=1) * rates
    losses = np.stack([p.loss.astype(np.float64) for p in parts], axis=1)
    last = parts[-1]
    return pa.table(
        {
            "id": [tables.text(identity) for identity in last.ids],
            "label": tables.numbers(last.label),
            "prediction": tables.numbers(last.prediction),
            "self_influence": by_checkpoint.sum(axis=1),
            "self_influence_by_checkpoint": list(by_checkpoint),
            "loss_by_checkpoint": list(losses),
            "shard": [shard] * len(last),
            "position": last.position,
        },
        schema=tables.SELF_INFLUENCE,
    )


class WriteSelfInfluence(beam.DoFn):
    """ShardResult → the path of its Parquet file."""

    def __init__(
        self, output: Output, checkpoints: Sequence[CheckpointFile], shards: Sequence[str]
    ) -> None:
        self._output = output
        self._checkpoints = list(checkpoints)
        self._shards = list(shards)

    def process(self, result: ShardResult) -> Iterator[str]:
        paths = [
            self._output.embeddings(runs.TRAIN, c.step, result.shard) for c in self._checkpoints
        ]
        parts = [
            table_of(part, self._checkpoints, result.shard.path)
            for part in embeddings.read_checkpoints(paths, result.excluded)
        ]
        number = self._shards.index(result.shard.path)
        name = runs.numbered("self_influence", number, len(self._shards))
        path = self._output.self_influence(name)
        tables.write(path, pa.concat_tables(parts or [tables.SELF_INFLUENCE.empty_table()]))
        yield path


@dataclasses.dataclass
class SelfInfluence(beam.PTransform):
    """Training ShardResults → paths of the self-influence tables."""

    output: Output
    checkpoints: Sequence[CheckpointFile]
    shards: Sequence[str]

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        return (
            results
            | "SpreadResults" >> beam.Reshuffle()
            | "Write" >> beam.ParDo(WriteSelfInfluence(self.output, self.checkpoints, self.shards))
        )
