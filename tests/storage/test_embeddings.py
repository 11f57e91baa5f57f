import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.storage import embeddings, records
from tracin_beam.storage.embeddings import Embeddings


def rows_of(count, dim=5, start=0):
    rng = np.random.default_rng(count + start)
    floats = rng.normal(size=(4, count)).astype(np.float32)
    floats[0, ::3] = np.nan
    ids = [b"", b"\xff\xfe raw", "Größe".encode(), b"x" * 300]
    return Embeddings(
        np.array([ids[i % 4] + b"%d" % (i % 97) for i in range(count)], object),
        np.array([start, *range(start + 127, start + 126 + count)][:count], np.int64),
        *floats,
        rng.normal(size=(count, dim)).astype(np.float32),
    )


def message(rows, i):
    """Row i as TensorFlow's own message."""

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    values = {
        "id": rows.ids[i],
        "position": int(rows.position[i]),
        "embedding": rows.embedding[i].astype("<f4").tobytes(),
        **{name: float(getattr(rows, name)[i]) for name in embeddings.FLOATS},
    }
    features = {name: feature(value) for name, value in values.items()}
    return tf.train.Example(features=tf.train.Features(feature=features))


def same(a, b):
    assert a.ids.tolist() == b.ids.tolist()
    for name in ("position", *embeddings.FLOATS, "embedding"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("dim", [1, 5, 31, 32, 5000])
def test_encoding_is_that_of_an_example_message(dim):
    rows = rows_of(9, dim, start=2**40)
    for i, data in enumerate(embeddings.encode(rows)):
        parsed = tf.train.Example.FromString(data)
        expected = message(rows, i)
        if np.isnan(rows.label[i]):  # is not equal to itself
            assert np.isnan(parsed.features.feature["label"].float_list.value[0])
            for one in (parsed, expected):
                one.features.feature["label"].float_list.value[0] = 0.0
        assert parsed == expected


def test_decoding_is_the_inverse():
    rows = rows_of(20)
    same(embeddings.decode(list(embeddings.encode(rows))), rows)
    plain = [message(rows, i).SerializeToString() for i in range(20)]
    same(embeddings.decode(plain), rows)


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        with path.open("wb") as handle:
            embeddings.EmbeddingWriter(handle).write(rows)
        return str(path)

    return write


def test_files_are_read_in_parts_and_at_positions(write):
    rows = rows_of(50)
    path = write("a", rows)
    parts = list(embeddings.read(path, rows=8))
    assert [len(part) for part in parts] == [8] * 6 + [2]
    same(embeddings.concatenate(parts), rows)
    some = rows.position[[3, 17, 40]]
    same(embeddings.read_at(path, some), rows.take(np.array([3, 17, 40])))
    for missing in ([10**6], [int(some[0]), 10**6]):
        with pytest.raises(InputError, match="lacks some examples"):
            embeddings.read_at(path, np.array(missing))


def test_checkpoints_are_read_side_by_side(write):
    # One file lacks what another has; what is left out fills up from the next part.
    rows = rows_of(10_000, dim=1)
    gone = rows.position[[5, 4096, 9000]]
    paths = [write("a", rows), write("b", rows.take(np.arange(10_000) != 5))]
    parts = list(embeddings.read_checkpoints(paths, gone.tolist()))
    kept = rows.take(~np.isin(rows.position, gone))
    for c in range(2):
        same(embeddings.concatenate([part[c] for part in parts]), kept)
    assert max(len(part[0]) for part in parts) <= 4096


def test_files_that_do_not_fit_together_are_an_error(write):
    rows = rows_of(10)
    other = rows.take(np.arange(10) != 5)
    with pytest.raises(InputError, match="do not hold the same examples"):
        list(embeddings.read_checkpoints([write("a", rows), write("b", other)], []))


def test_a_damaged_file_is_named(write):
    path = write("a", rows_of(3))
    with open(path, "r+b") as file:
        file.seek(60)
        file.write(b"!!!!")
    assert any(isinstance(r, records.BadRecord) for r in records.read_records(path))
    with pytest.raises(InputError, match=r"at record 0\. Delete the file and run again"):
        list(embeddings.read(path))
