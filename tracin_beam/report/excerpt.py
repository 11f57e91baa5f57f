"""What a page or the terminal shows of an influence table, read without the rest of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracin_beam.report import explanations
from tracin_beam.storage import files, tables

_COLUMNS = ["role", "rank", "test_position", "test_label", "test_prediction"]


@dataclass(frozen=True)
class Excerpt:
    """Some rows of an influence table.

    Attributes:
      rows: all of the test examples that are shown, in the order of the table.
      tests: how many test examples the whole table explains.
    """

    rows: pa.Table
    tests: int


def read(
    folder: str, run: Mapping[str, Any], label_names: Sequence[str] | None, max_tests: int
) -> Excerpt:
    """Reads the rows of the first test examples, those with wrong predictions first.

    A row group at a time is read of five columns, and then the rows that are shown.

    Args:
      folder: of the table.
      run: what run.json holds; it says how predictions are read.
      label_names: names of the classes, or None.
      max_tests: how many test examples are shown.

    Raises:
      InputError: there is no table.
    """
    paths = tables.paths(folder)
    with files.local_copy(paths[0]) as local:
        empty = pq.read_schema(local).empty_table()
    reading = explanations.reading(empty, run, label_names)
    wrong: list[tuple[str, int]] = []
    right: list[tuple[str, int]] = []
    tests = 0
    for path in paths:
        for positions, labels, predictions in _tests(path):
            tests += len(positions)
            for position, label, prediction in zip(positions, labels, predictions, strict=True):
                if len(wrong) >= max_tests:
                    break
                fails = explanations.is_wrong(reading, prediction, label)
                if fails or len(right) < max_tests:
                    (wrong if fails else right).append((path, position))
    chosen = [*wrong, *right][:max_tests]
    parts = [empty]
    for path in paths:
        if mine := [position for other, position in chosen if other == path]:
            parts.append(tables.read(path, filters=[("test_position", "in", mine)]))
    return Excerpt(pa.concat_tables(parts), tests)


def _tests(path: str) -> Iterator[tuple[list[int], list[Any], list[Any]]]:
    """Positions, labels and predictions of a file's test examples, of a row group at a time."""
    with files.local_copy(path) as local, pq.ParquetFile(local) as file:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=_COLUMNS)
            first = pc.and_(pc.equal(rows["rank"], 1), pc.equal(rows["role"], "proponent"))
            rows = rows.filter(first)
            yield (
                rows["test_position"].to_pylist(),
                rows["test_label"].to_pylist(),
                rows["test_prediction"].to_pylist(),
            )
