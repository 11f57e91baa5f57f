import os

import numpy as np
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.storage import embeddings, records
from tracin_beam.storage.embeddings import COMPUTED, Embeddings, MatrixReader


def rows_of(count, dim=5, start=0):
    rng = np.random.default_rng(count + start)
    floats = rng.normal(size=(len(embeddings.FLOATS), count)).astype(np.float32)
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


def test_bytes_of_a_record(write):
    for dim, length in ((1, 0), (16, 10), (1024, 300), (5000, 70_000)):
        rows = Embeddings(
            np.array([b"x" * length], object),
            np.array([10_000]),
            *np.zeros((len(embeddings.FLOATS), 1), np.float32),
            np.zeros((1, dim), np.float32),
        )
        assert embeddings.record_bytes(dim, length) == os.path.getsize(write("one", rows))


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("int8", 0.5 / 127)])
def test_smaller_numbers_are_within_their_rounding(tmp_path, no_parser, dtype, error):
    rows = rows_of(60, dim=33)
    vectors = rows.embedding
    vectors *= np.float32(10.0) ** np.linspace(-30, 30, 60, dtype=np.float32)[:, None]
    vectors[7] = 0
    path = tmp_path / "a"
    with path.open("wb") as handle:
        embeddings.EmbeddingWriter(handle, dtype).write(rows)
    found = embeddings.concatenate(list(embeddings.read(str(path), rows=7)))
    most = np.abs(vectors).max(axis=1, keepdims=True) * error * 1.001
    assert found.embedding.dtype == np.float32
    assert (np.abs(found.embedding - vectors) <= most).all()
    for name in ("position", *embeddings.FLOATS):
        np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))
    matrix = np.zeros((60, 66), np.float32)
    MatrixReader([str(path)] * 2, scales=[1.0, 0.25]).read(matrix)
    np.testing.assert_allclose(matrix[:, :33], found.embedding, rtol=1e-6)
    np.testing.assert_allclose(matrix[:, 33:], found.embedding * np.float32(0.25), rtol=1e-6)
    # By the record's own words alone, as another program reads it.
    for i, data in enumerate(embeddings.encode(rows, dtype)):
        feature = tf.train.Example.FromString(data).features.feature
        assert feature["dtype"].bytes_list.value[0] == dtype.encode()
        numbers = {"int8": "i1", "float16": "<f2"}[dtype]
        stored = np.frombuffer(feature["embedding"].bytes_list.value[0], numbers)
        scale = np.float32(feature["scale"].float_list.value[0])
        np.testing.assert_array_equal(stored * scale, found.embedding[i])
    one = rows.take(np.array([3]))
    one.position[:] = 10_000
    (data,) = embeddings.encode(one, dtype)
    size = embeddings.record_bytes(33, len(one.ids[0]), dtype=dtype)
    assert len(data) + records.FRAMING == size


@pytest.mark.parametrize("dtype", embeddings.DTYPES)
def test_the_parser_reads_every_dtype(tmp_path, dtype):
    rows = rows_of(20)
    path = tmp_path / "a"
    with path.open("wb") as handle:
        embeddings.EmbeddingWriter(handle, dtype).write(rows)
    same(
        embeddings.decode(list(embeddings.encode(rows, dtype))),
        embeddings.concatenate(list(embeddings.read(str(path)))),
    )


def test_an_unknown_dtype_is_named():
    (data,) = embeddings.encode(rows_of(1), "int8")
    with pytest.raises(InputError, match="int9"):
        embeddings.decode([data.replace(b"int8", b"int9")])


@pytest.fixture
def no_parser(monkeypatch):
    """TensorFlow's parser is the way for other programs' records: ours need none."""

    def refuse(serialised):
        raise AssertionError("parsed")

    monkeypatch.setattr(embeddings, "decode", refuse)


@pytest.mark.parametrize("dim", [0, 1, 31, 32, 5000])
def test_records_of_ours_are_read_without_a_parser(write, no_parser, dim):
    for start in (0, 2**40):  # ids, and at first positions, of several lengths
        rows = rows_of(400, dim, start)
        same(embeddings.concatenate(list(embeddings.read(write("a", rows)))), rows)


def test_negative_and_large_positions(write, no_parser):
    rows = rows_of(4)
    numbers = np.array([-(2**63), -1, 127, 2**63 - 1])
    rows = Embeddings(rows.ids, numbers, *(getattr(rows, n) for n in COMPUTED))
    same(next(embeddings.read(write("a", rows))), rows)


def test_a_record_is_found_whatever_its_id_says(write, no_parser):
    rows = rows_of(5)
    nasty = [next(embeddings.encode(rows)), b"\n\tembedding\x12", bytes(200), b"\xff" * 11, b""]
    rows.ids[:] = nasty
    same(next(embeddings.read(write("a", rows))), rows)


def test_records_of_another_program_go_through_the_parser(tmp_path):
    rows = rows_of(30)
    path = tmp_path / "a"
    ours = list(embeddings.encode(rows))
    with path.open("wb") as handle:
        writer = records.RecordWriter(handle)
        writer.write_all(ours[:10])
        for i in range(10, 20):
            rebuilt = message(rows, i)
            # Unknown fields and another order of the entries are still an Example.
            rebuilt.features.feature["more"].int64_list.value.append(7)
            writer.write(rebuilt.SerializeToString())
        writer.write_all(ours[20:])
    same(embeddings.concatenate(list(embeddings.read(str(path)))), rows)
    out = np.zeros((30, 5), np.float32)
    assert MatrixReader([str(path)]).read(out).tolist() == rows.position.tolist()
    np.testing.assert_array_equal(out, rows.embedding)


def test_a_matrix_is_read_into_an_array_in_blocks(write, no_parser, monkeypatch):
    monkeypatch.setattr(records, "_PIECE", 700)  # some records each
    first, second = rows_of(100, dim=3), rows_of(100, dim=3, start=50_000)
    second = Embeddings(second.ids, first.position, *(getattr(second, n) for n in COMPUTED))
    paths = [write("a", first), write("b", second)]
    scales = [1.0, 0.25]
    gone = first.position[[0, 40, 41, 99]]
    kept = ~np.isin(first.position, gone)
    expected = np.concatenate([first.embedding, second.embedding * np.float32(0.25)], axis=1)
    reader = MatrixReader(paths, gone, scales=scales)
    assert reader.width == 6
    out = np.full((40, 6), 7, np.float32)
    found, positions = [], []
    while len(position := reader.read(out)):
        positions += position.tolist()
        found.append(out[: len(position)].copy())
    assert [len(part) for part in found] == [40, 40, 16]
    np.testing.assert_array_equal(np.concatenate(found), expected[kept])
    assert positions == first.position[kept].tolist()
    assert (out[16:] == found[1][16:]).all()

    only = first.position[[3, 70, 41]]
    position = MatrixReader(paths, gone, only=only, scales=scales).read(out)
    assert position.tolist() == first.position[[3, 70]].tolist()
    np.testing.assert_array_equal(out[:2], expected[[3, 70]])


def test_no_rows_are_no_rows(write):
    empty = write("a", rows_of(3).take(np.zeros(3, bool)))
    reader = MatrixReader([empty, empty])
    assert reader.width == 0
    assert len(reader.read(np.empty((5, 2), np.float32))) == 0
    assert list(embeddings.read(empty)) == []


def test_a_matrix_of_files_that_do_not_fit_together_is_an_error(write):
    rows = rows_of(10)
    shorter = rows.take(np.arange(10) < 9)
    for paths in ([write("a", rows), write("b", shorter)], [write("b", shorter), write("a", rows)]):
        with pytest.raises(InputError, match="do not hold the same examples"):
            MatrixReader(paths).read(np.empty((20, 10), np.float32))
        with pytest.raises(InputError, match="do not hold the same examples"):
            list(embeddings.read_checkpoints(paths, []))


@pytest.mark.parametrize("where", [8, 100, -2, -6])
def test_any_flipped_byte_is_found(write, where):
    path = write("a", rows_of(50))
    with open(path, "r+b") as file:
        file.seek(where, os.SEEK_END if where < 0 else os.SEEK_SET)
        octet = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([octet ^ 1]))
    for read in (
        lambda: list(embeddings.read(path)),
        lambda: MatrixReader([path]).read(np.empty((50, 5), np.float32)),
    ):
        with pytest.raises(InputError, match="Delete the file and run again"):
            read()


def test_a_file_cut_short_is_found(write):
    path = write("a", rows_of(50))
    os.truncate(path, os.path.getsize(path) - 5)
    with pytest.raises(InputError, match=r"cut short.*at record 49"):
        list(embeddings.read(path))


def test_a_damaged_file_is_named(write):
    path = write("a", rows_of(3))
    with open(path, "r+b") as file:
        file.seek(60)
        file.write(b"!!!!")
    assert any(isinstance(r, records.BadRecord) for r in records.read_records(path))
    with pytest.raises(InputError, match=r"at record 0\. Delete the file and run again"):
        list(embeddings.read(path))
