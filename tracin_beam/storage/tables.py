"""Arrow schemas of the tables, and Parquet files on any file system."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracin_beam.errors import InputError
from tracin_beam.storage import files

INFLUENCE = pa.schema(
    [
        ("test_id", pa.string()),
        ("train_id", pa.string()),
        ("role", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("score_by_checkpoint", pa.list_(pa.float64())),
        ("exact", pa.bool_()),
        ("test_label", pa.float64()),
        ("test_prediction", pa.float64()),
        ("train_label", pa.float64()),
        ("train_prediction", pa.float64()),
        ("train_shard", pa.string()),
        ("train_position", pa.int64()),
        ("test_shard", pa.string()),
        ("test_position", pa.int64()),
    ]
)

TOTAL_INFLUENCE = pa.schema(
    [
        ("train_id", pa.string()),
        ("score_sum", pa.float64()),
        ("score_mean", pa.float64()),
        ("score_by_checkpoint", pa.list_(pa.float64())),
        ("train_label", pa.float64()),
        ("train_prediction", pa.float64()),
        ("train_shard", pa.string()),
        ("train_position", pa.int64()),
    ]
)

GROUP_INFLUENCE = pa.schema(
    [
        ("train_group", pa.string()),
        ("test_group", pa.string()),
        ("score_sum", pa.float64()),
        ("score_mean", pa.float64()),
        ("standard_error", pa.float64()),
        ("score_by_checkpoint", pa.list_(pa.float64())),
        ("train_examples", pa.int64()),
        ("test_examples", pa.int64()),
    ]
)

SLICE_INFLUENCE = pa.schema(
    [
        ("slice", pa.string()),
        ("test_examples", pa.int64()),
        ("role", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float64()),
        ("score_by_checkpoint", pa.list_(pa.float64())),
        ("train_id", pa.string()),
        ("train_label", pa.float64()),
        ("train_prediction", pa.float64()),
        ("train_shard", pa.string()),
        ("train_position", pa.int64()),
    ]
)

INDEX_ROWS = pa.schema(
    [("shard", pa.dictionary(pa.int32(), pa.string())), ("position", pa.int64())]
)


def write(path: str, table: pa.Table) -> files.Stamp:
    """Writes a Parquet file, atomically."""
    with files.atomic_write(path) as handle:
        pq.write_table(table, pa.PythonFile(handle, mode="w"))
    return handle.stamp


def read(path: str, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """Reads a Parquet file: some columns, and the rows for which a compute expression holds."""
    with files.local_copy(path) as local:
        return pq.read_table(local, columns=columns, filters=filters, partitioning=None)


def pieces(path: str, rows: int = 65_536) -> Iterator[pa.Table]:
    """Reads a Parquet file, so many rows at a time: an empty table where it has none."""
    with files.local_copy(path) as local, pq.ParquetFile(local) as file:
        if not file.metadata.num_rows:
            yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(batch_size=rows):
            yield pa.Table.from_batches([batch])


def read_folder(folder: str, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """Reads the Parquet files in a folder of ours, one after the other, as `read` does.

    Raises:
      InputError: there is none.
    """
    return pa.concat_tables([read(path, columns, filters) for path in paths(folder)])


def paths(folder: str) -> list[str]:
    """The Parquet files in a folder of ours, in order.

    Raises:
      InputError: there is none.
    """
    found = [info.path for info in files.list_folder(folder) if info.path.endswith(".parquet")]
    if not found:
        raise InputError(f"There is no table in {folder}.")
    return found


def text(value: bytes | bytearray | memoryview) -> str:
    r"""An id as text, another one for every other id.

    Bytes that are no UTF-8 become \xff and the like. Backslashes before such bytes are doubled, and
    those before characters that look like such an escape.
    """
    found = bytes(value).decode("utf-8", errors="surrogateescape")
    if "\\" in found:
        found = _ESCAPE_LIKE.sub(lambda match: 2 * match.group(), found)
    if found.isascii():
        return found
    return _BYTES.sub(lambda match: f"\\x{ord(match.group()) - 0xDC00:02x}", found)


_ESCAPE_LIKE = re.compile("\\\\+(?=x[0-9a-f]{2}|[\udc80-\udcff])")
_BYTES = re.compile("[\udc80-\udcff]")


def number(value: float) -> float | None:
    """A label or prediction, None where it is not a number."""
    return None if math.isnan(value) else float(value)


def numbers(values: np.ndarray | Sequence[float]) -> pa.Array:
    """float64, null where not a number."""
    array = np.asarray(values, np.float64)
    return pa.array(array, mask=np.isnan(array))
