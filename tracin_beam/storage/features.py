"""Feature files: what a checkpoint makes of each training example, whatever its label.

A Parquet file for each shard and checkpoint, with a row for each example that was embedded, in the
order of positions.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracin_beam.storage import files

_ROWS = 4096
# Logs of probabilities below this have no more to say, and are no float16.
LEAST_LOG = -60000.0


@dataclasses.dataclass(frozen=True)
class Features:
    """Rows of a feature file.

    Attributes:
      position: int64 [n], place of the record in its shard.
      content_hash: object [n] of bytes, see `records.content_hash`.
      log_probabilities: float32 [n, K], kept as float16 for classes; outputs of other tasks.
      features: float32 [n, D], the projected gradient of the sum of the outputs; D is 0 where they
        were not wanted at this checkpoint.
      labels: float32 [n, L], of a multi-label task; L is 0 for others.
    """

    position: np.ndarray
    content_hash: np.ndarray
    log_probabilities: np.ndarray
    features: np.ndarray
    labels: np.ndarray

    def table(self, schema: pa.Schema) -> pa.Table:
        """As rows of a file of this schema."""
        columns = [
            pa.array(self.position),
            pa.array(list(self.content_hash), pa.binary(16)),
            *(
                pa.FixedSizeListArray.from_arrays(
                    pa.array(x.ravel().astype(field.type.value_type.to_pandas_dtype())),
                    type=field.type,
                )
                for field in list(schema)[2:]
                for x in [getattr(self, field.name)]
            ),
        ]
        return pa.table(columns, schema=schema)


def schema(classes: int, dim: int, labels: int, half: bool) -> pa.Schema:
    """The columns of a file.

    Args:
      classes, dim, labels: numbers in a row of each list, which is left out if it has none.
      half: whether the outputs are logs of probabilities, for which float16 is enough.
    """
    lists = {"log_probabilities": classes, "features": dim, "labels": labels}
    kinds = {"log_probabilities": pa.float16() if half else pa.float32()}
    return pa.schema(
        [
            ("position", pa.int64()),
            ("content_hash", pa.binary(16)),
            *(
                (name, pa.list_(kinds.get(name, pa.float32()), width))
                for name, width in lists.items()
                if width
            ),
        ]
    )


def read(path: str, rows: int = _ROWS) -> Iterator[Features]:
    """The rows of a file, so many at a time."""
    with files.local_copy(path) as local, pq.ParquetFile(local) as file:
        for batch in file.iter_batches(batch_size=rows):
            vectors = [_matrix(batch, name) for name in ("log_probabilities", "features", "labels")]
            hashes = np.empty(len(batch), object)
            hashes[:] = batch["content_hash"].to_pylist()
            yield Features(batch["position"].to_numpy(), hashes, *vectors)


def _matrix(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of lists, which a file has only where they are not empty: float32 [n, width]."""
    if name not in batch.schema.names:
        return np.zeros((len(batch), 0), np.float32)
    flat = batch[name].flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(batch), batch.schema.field(name).type.list_size)
