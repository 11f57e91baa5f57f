import pyarrow as pa
import pytest

from tracin_beam.errors import InputError
from tracin_beam.report import excerpt, explanations
from tracin_beam.storage import tables

CLASSES = {"kind": {"name": "classification"}}


def rows_of(shard, start, wrong):
    """Rows of four test examples, two of each role, whose predictions are wrong where said."""
    rows = []
    for position in range(start, start + 4):
        label = float(position % 3)
        for role in ("proponent", "opponent"):
            rows += [
                {
                    "test_id": f"{shard}#{position}",
                    "train_id": f"t{rank}",
                    "role": role,
                    "rank": rank,
                    "score": 1.0,
                    "score_by_checkpoint": [1.0],
                    "exact": True,
                    "test_label": label,
                    "test_prediction": label + (position in wrong),
                    "train_label": 0.0,
                    "train_prediction": 0.0,
                    "train_shard": "train",
                    "train_position": rank,
                    "test_shard": shard,
                    "test_position": position,
                }
                for rank in (1, 2)
            ]
    return pa.Table.from_pylist(rows, schema=tables.INFLUENCE)


@pytest.fixture
def folder(tmp_path):
    for i, part in enumerate([rows_of("a", 0, {2}), rows_of("a", 4, {5}), rows_of("b", 0, {1, 3})]):
        tables.write(f"{tmp_path}/influence-0000{i}-of-00003.parquet", part)
    return str(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 3, 6, 100])
def test_what_is_shown_is_what_the_whole_table_would_show(folder, count):
    found = excerpt.read(folder, CLASSES, None, count)
    whole = tables.read_folder(folder)
    read = explanations.reading(whole, CLASSES, None)
    assert found.tests == explanations.count_tests(whole) == 12
    assert explanations.arrange(found.rows, read, max_tests=count) == explanations.arrange(
        whole, read, max_tests=count
    )
    assert explanations.count_tests(found.rows) == min(count, 12)


def test_a_folder_without_a_table(tmp_path):
    with pytest.raises(InputError, match="There is no table"):
        excerpt.read(str(tmp_path), CLASSES, None, 3)
