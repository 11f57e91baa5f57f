"""Where tables go: Parquet files, written piece by piece.

What makes rows knows nothing of files, and what writes them nothing of the rows.
"""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from tracin_beam.storage import files


def write_parquet(path: str, schema: pa.Schema, pieces: Iterable[pa.Table]) -> files.Stamp:
    """Writes a table whose pieces are made as they are asked for, atomically.

    Args:
      path: on any file system.
      schema: of the file; its metadata is kept in it.
      pieces: with the schema's columns. Each is at least one row group.

    Returns:
      What the file holds.
    """
    with (
        files.atomic_write(path) as handle,
        pq.ParquetWriter(pa.PythonFile(handle, mode="w"), schema) as writer,
    ):
        for piece in pieces:
            writer.write_table(piece.select(schema.names).cast(schema))
    return handle.stamp
