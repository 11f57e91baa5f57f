"""A sample of a run's records, embedded and scored before the run."""

from collections.abc import Sequence

import numpy as np

from tracin_beam.inputs import formats
from tracin_beam.scoring.methods import Score
from tracin_beam.stages import embed
from tracin_beam.stages.workers import EngineSource, Loaded
from tracin_beam.storage import embeddings
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.records import Record
from tracin_beam.storage.runs import CheckpointFile, Shard

# Shards that it comes from, and how much of the beginning of each is read for it.
_SHARDS, _READ_BYTES = 16, 16 << 20
# Records that an id's length is taken from.
_FOR_IDS = 128


def sample(shards: Sequence[Shard], wanted: int) -> list[Record]:
    """Records from all over the shards, in random order, numbered anew.

    They come from the first megabytes of each of up to 16 shards, spread evenly.
    """
    chosen = [shards[i] for i in spread(len(shards), _SHARDS)]
    found: list[bytes] = []
    for i, shard in enumerate(chosen):
        read, size = [], 0
        for record in formats.read(shard.path):
            if isinstance(record, Record):
                read.append(record.data)
                size += len(record.data)
            if size >= _READ_BYTES:
                break
        # What a shard is too small for, those after it make up.
        share = -(-(wanted - len(found)) // (len(chosen) - i))
        found += [read[j] for j in spread(len(read), share)]
    order = np.random.default_rng(0).permutation(len(found))
    return [Record(i, found[j]) for i, j in enumerate(order)]


def spread(count: int, wanted: int) -> list[int]:
    """So many indices below count (all, if there are fewer), evenly spread, the last among them."""
    wanted = min(wanted, count)
    return [(i + 1) * count // wanted - 1 for i in range(wanted)]


def usable(
    loaded: Loaded,
    checkpoints: Sequence[CheckpointFile],
    target: str,
    some: Sequence[Record],
) -> tuple[list[Record], list[Embeddings]]:
    """The records that can be used at all checkpoints, and their embeddings at each."""
    parts = []
    for checkpoint in checkpoints:
        found = [
            rows
            for rows, _ in embed.embed_records(loaded, checkpoint, target, "", some)
            if rows is not None
        ]
        if not found:
            return [], []
        parts.append(embeddings.concatenate(found))
    positions = parts[0].position
    for part in parts[1:]:
        positions = np.intersect1d(positions, part.position)
    kept = [part.take(np.isin(part.position, positions)) for part in parts]
    wanted = set(positions.tolist())
    return [record for record in some if record.position in wanted], kept


def exact_scores(
    loaded: Loaded,
    score: Score,
    checkpoints: Sequence[CheckpointFile],
    rows: Sequence[Record],
    queries: Sequence[Record],
    target: str,
) -> np.ndarray:
    """Exact scores: float64 [rows, queries]."""
    engine = loaded.engine
    products = np.zeros((len(rows), len(queries), len(checkpoints)), np.float32)
    for c, checkpoint in enumerate(checkpoints):
        values = engine.values(checkpoint.path)
        for j in range(0, len(queries), engine.batch_size):
            block = loaded.parse([q.data for q in queries[j : j + engine.batch_size]])
            gradients = score.of_gradients(c, engine.queries(values, block, target))
            for i in range(0, len(rows), engine.batch_size):
                batch = loaded.parse([r.data for r in rows[i : i + engine.batch_size]])
                found = engine.scores(values, batch, gradients, target)
                products[i : i + batch.size, j : j + block.size, c] = found
    return score.by_checkpoint(products).sum(axis=2)


def estimates(
    score: Score, rows: Sequence[Embeddings], queries: Sequence[Embeddings]
) -> np.ndarray:
    """Scores by embeddings, of examples at every checkpoint: float64 [rows, queries]."""
    return score.estimates(score.queries(_side_by_side(queries)), _side_by_side(rows)).T


def _side_by_side(parts: Sequence[Embeddings]) -> np.ndarray:
    return np.concatenate([part.embedding.astype(np.float64) for part in parts], axis=1)


def self_scores(score: Score, parts: Sequence[Embeddings]) -> np.ndarray:
    """Each example's score for itself: float64 [n]."""
    norms = np.stack([part.squared_norm for part in parts], axis=1)
    return score.by_checkpoint(norms).sum(axis=1)


def id_bytes(source: EngineSource, shards: Sequence[Shard]) -> float | None:
    """Mean length of the ids in a sample; None where the task gives none."""
    loaded = source.get()
    if not (shards and loaded.parser.gives_ids):
        return None
    batch, _, _ = embed.parse_records(loaded, sample(shards, _FOR_IDS))
    return None if batch is None else float(np.mean([len(identity) for identity in batch.ids]))
