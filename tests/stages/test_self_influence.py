"""A shard's self-influence table is made and written some thousand rows at a time."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracin_beam.stages import self_influence
from tracin_beam.stages.self_influence import WriteSelfInfluence
from tracin_beam.storage import embeddings
from tracin_beam.storage.runs import Output, Shard, ShardResult

ROWS = 10_000


@pytest.fixture
def written(tmp_path, write_rows):
    """The stage, a shard of some thousand rows, and its embeddings in one piece."""
    shard = Shard("/data/train-0", "train-0", 1, "x")
    result = ShardResult("train", shard, ROWS, ((3, "bad"),))
    write_rows("train", [result])
    output = Output(str(tmp_path))
    write = WriteSelfInfluence(output, write_rows.checkpoints, {shard.path: "f"})
    paths = [output.embeddings("train", c, shard) for c in write_rows.checkpoints]
    (parts,) = embeddings.read_checkpoints(paths, result.excluded, ROWS)
    return write, result, self_influence.table_of(parts, write_rows.checkpoints, shard.path)


def test_pieces_are_the_whole_table(written, monkeypatch):
    write, result, expected = written
    monkeypatch.setattr(self_influence, "_PIECE_ROWS", 5000)
    ((path, _),) = write.process(result)
    assert pq.ParquetFile(path).num_row_groups == 2
    assert pq.read_table(path, partitioning=None).equals(expected)


def test_rows_are_read_when_the_earlier_ones_are_written(written, monkeypatch):
    write, result, _ = written
    monkeypatch.setattr(self_influence, "_PIECE_ROWS", 1)
    made = []

    def counted(*args):
        made.append(None)
        return table_of(*args)

    table_of = self_influence.table_of
    monkeypatch.setattr(self_influence, "table_of", counted)
    seen = []

    def sink(path, schema, pieces):
        for piece in pieces:
            assert len(made) == len(seen) + 1
            seen.append(len(piece))
        return write_parquet(path, schema, [])

    write_parquet = self_influence.sinks.write_parquet
    monkeypatch.setattr(self_influence.sinks, "write_parquet", sink)
    list(write.process(result))
    assert len(seen) > 1
    assert sum(seen) == ROWS - 1


def test_a_shard_of_rejected_records_has_an_empty_table(written):
    write, result, _ = written
    every = tuple((i, "bad") for i in range(ROWS))
    ((path, _),) = write.process(ShardResult("train", result.shard, ROWS, every))
    assert pq.read_table(path, partitioning=None).equals(
        pa.table({name: [] for name in self_influence.schema().names}, self_influence.schema())
    )
