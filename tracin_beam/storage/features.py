"""Feature files: what a checkpoint makes of each training example, whatever its label.

A Parquet file for each shard and checkpoint, with a row for each example that was embedded, in the
order of positions.
"""

import dataclasses
from collections.abc import Iterator, Sequence

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
      labels: float32 [n, L], NaN where there is none; L is 1 but for multi-label tasks.
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


def read(path: str, rows: int = _ROWS, columns: Sequence[str] | None = None) -> Iterator[Features]:
    """The rows of a file, so many at a time.

    Args:
      path: of the file.
      rows: how many.
      columns: those that are read besides the position; others are as if the file had none. By
        default all.
    """
    with files.local_copy(path) as local, pq.ParquetFile(local) as file:
        wanted = None if columns is None else ["position", *columns]
        for batch in file.iter_batches(batch_size=rows, columns=wanted):
            vectors = [_matrix(batch, name) for name in ("log_probabilities", "features", "labels")]
            hashes = np.empty(len(batch), object)
            if "content_hash" in batch.schema.names:
                hashes[:] = batch["content_hash"].to_pylist()
            yield Features(batch["position"].to_numpy(), hashes, *vectors)


def width(path: str) -> int:
    """How many features a row of a file has."""
    with files.local_copy(path) as local:
        found = pq.read_schema(local)
    return found.field("features").type.list_size if "features" in found.names else 0


def short_hashes(content_hash: np.ndarray) -> np.ndarray:
    """The first eight bytes of content hashes as numbers: uint64 [n]."""
    return np.frombuffer(b"".join(value[:8] for value in content_hash), ">u8").astype(np.uint64)


def _matrix(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of lists, which a file has only where they are not empty: float32 [n, width]."""
    if name not in batch.schema.names:
        return np.zeros((len(batch), 0), np.float32)
    flat = batch[name].flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(batch), batch.schema.field(name).type.list_size)
