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
# Up to so many classes the log-probabilities of all are kept; of more, the label's and these
# largest of the others.
ALL_CLASSES, LARGEST = 64, 8
_COUNT = b"classes"
_DENSE = _ROWS * ALL_CLASSES  # log-probabilities that are held at a time
# Logs of probabilities below this have no more to say, and are no float16.
LEAST_LOG = -60000.0


@dataclasses.dataclass(frozen=True)
class Features:
    """Rows of a feature file.

    Attributes:
      position: int64 [n], place of the record in its shard.
      content_hash: object [n] of bytes, see `records.content_hash`.
      log_probabilities: float32 [n, K], kept as float16 for classes; outputs of other tasks. Of
        more than `ALL_CLASSES` classes the file has the label's, the `LARGEST` of the others, and
        the mean of the rest, which each of these has when it is read.
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
        lists = {name: getattr(self, name) for name in ("log_probabilities", "features", "labels")}
        if "classes" in schema.names:
            lists |= _few(self.log_probabilities, self.labels[:, 0])
        columns = [
            pa.array(self.position),
            pa.array(list(self.content_hash), pa.binary(16)),
            *(
                pa.FixedSizeListArray.from_arrays(
                    pa.array(
                        lists[field.name].ravel().astype(field.type.value_type.to_pandas_dtype())
                    ),
                    type=field.type,
                )
                for field in list(schema)[2:]
            ),
        ]
        return pa.table(columns, schema=schema)


def _few(logs: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of the log-probabilities of many classes.

    Args:
      logs: float32 [n, K].
      label: float [n]; where it is none of the classes, another of the largest takes its place.

    Returns:
      "log_probabilities" [n, 2 + `LARGEST`] and "classes", whose each is; −1 is for the mean
      probability of those that are not among the others.
    """
    n, count = logs.shape
    known = np.isfinite(label) & (label >= 0) & (label < count)
    rows = np.arange(n)
    order = logs.copy()
    own = np.where(known, np.nan_to_num(label), logs.argmax(axis=1)).astype(int)
    order[rows, own] = np.inf
    kept = np.argpartition(-order, LARGEST, axis=1)[:, : LARGEST + 1]
    probabilities = np.exp(logs.astype(np.float64))
    probabilities[rows[:, None], kept] = 0
    rest = probabilities.sum(axis=1, keepdims=True) / (count - LARGEST - 1)
    with np.errstate(divide="ignore"):
        mean = np.maximum(np.log(rest), LEAST_LOG)
    return {
        "log_probabilities": np.hstack([np.take_along_axis(logs, kept, axis=1), mean]),
        "classes": np.hstack([kept, np.full((n, 1), -1)]),
    }


def _all(few: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
    """Log-probabilities of all classes, from what `_few` keeps: float32 [n, K]."""
    found = np.repeat(few[:, -1:], count, axis=1)
    np.put_along_axis(found, classes[:, :-1], few[:, :-1], axis=1)
    return found


def schema(classes: int, dim: int, labels: int, half: bool, single: bool = False) -> pa.Schema:
    """The columns of a file.

    Args:
      classes, dim, labels: numbers in a row of each list, which is left out if it has none.
      half: whether the outputs are logs of probabilities, for which float16 is enough.
      single: whether just one of the classes is an example's, so that of many only a few are kept.
    """
    few = single and classes > ALL_CLASSES
    kept = LARGEST + 2 if few else classes
    lists = {
        "log_probabilities": kept,
        "classes": kept if few else 0,
        "features": dim,
        "labels": labels,
    }
    kinds = {"log_probabilities": pa.float16() if half else pa.float32(), "classes": pa.int32()}
    return pa.schema(
        [
            ("position", pa.int64()),
            ("content_hash", pa.binary(16)),
            *(
                (name, pa.list_(kinds.get(name, pa.float32()), width))
                for name, width in lists.items()
                if width
            ),
        ],
        metadata={_COUNT: str(classes)} if few else None,
    )


def read(path: str, rows: int = _ROWS, columns: Sequence[str] | None = None) -> Iterator[Features]:
    """The rows of a file, so many at a time.

    Args:
      path: of the file.
      rows: how many; fewer where there are very many classes.
      columns: those that are read besides the position; others are as if the file had none. By
        default all.
    """
    with files.local_copy(path) as local, pq.ParquetFile(local) as file:
        wanted = None if columns is None else ["position", *columns]
        count = int((file.schema_arrow.metadata or {}).get(_COUNT, 0))
        if count and columns is None:
            rows = min(rows, max(1, _DENSE // count))
        for batch in file.iter_batches(batch_size=rows, columns=wanted):
            vectors = [_matrix(batch, name) for name in ("log_probabilities", "features", "labels")]
            if "classes" in batch.schema.names:
                whose = batch["classes"].flatten().to_numpy().reshape(vectors[0].shape)
                vectors[0] = _all(vectors[0], whose.astype(np.int64), count)
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
