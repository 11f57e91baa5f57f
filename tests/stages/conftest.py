"""Embedding files with random rows."""

import numpy as np
import pytest

from tracin_beam.storage import embeddings, files
from tracin_beam.storage.runs import CheckpointFile, Output

DIM = 8


class WriteRows:
    """Writes shards' embedding files below a folder; gives embeddings by (shard's name, step)."""

    checkpoints = tuple(
        CheckpointFile(f"{step}.h5", step, None, rate, "x") for step, rate in ((5, 0.5), (9, 0.1))
    )

    def __init__(self, folder):
        self._output = Output(str(folder))
        self._rng = np.random.default_rng(0)

    def __call__(self, set_name, results):
        written = {}
        for result in results:
            for checkpoint in self.checkpoints:
                vector = self._rng.normal(size=(result.read, DIM)).astype(np.float32)
                zeros = np.zeros(result.read, np.float32)
                ids = np.array([b"%d" % i for i in range(result.read)], object)
                rows = embeddings.Embeddings(
                    ids, np.arange(result.read), *[zeros] * len(embeddings.FLOATS), vector
                )
                path = self._output.embeddings(set_name, checkpoint, result.shard)
                with files.atomic_write(path) as handle:
                    embeddings.EmbeddingWriter(handle).write(rows)
                written[result.shard.name, checkpoint.step] = vector
        return written


@pytest.fixture
def write_rows(tmp_path):
    return WriteRows(tmp_path)
