import ast
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.inputs.shards import Parser, write_shards
from tracin_beam.storage import patterns
from tracin_beam.storage.records import read_records

N = 25
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(N, 4, 3, 1)).astype(np.float32)
LABELS = RNG.integers(0, 10, N)


def read_all(parser, pattern):
    """Parses all shards in one batch, in a graph and as the repr of the parser would."""
    records = [
        record.data for info in patterns.match(pattern) for record in read_records(info.path)
    ]
    pasted = eval(repr(parser), {"Parser": Parser})
    assert pasted == parser == pickle.loads(pickle.dumps(parser))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def parse(serialized):
        return pasted(serialized)

    parsed = parse(tf.constant(records))
    static = parse.get_concrete_function().structured_outputs
    tf.nest.map_structure(lambda x, spec: x.shape[1:].assert_is_fully_defined(), static, parsed)
    return tf.nest.map_structure(lambda tensor: tensor.numpy(), parsed)


def assert_same(read, written):
    tf.nest.assert_same_structure(read, written)
    for ours, theirs in zip(tf.nest.flatten(read), tf.nest.flatten(written), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def pattern(tmp_path):
    return str(tmp_path / "train-*.tfrecord")


def test_a_tuple_of_arrays(pattern):
    weights = RNG.random(N).astype(np.float32)
    parser = write_shards((IMAGES, LABELS, weights), pattern, shards=4)
    assert repr(parser) == (
        "Parser(features=((4, 3, 1), 'float32'), label=((), 'int64'), "
        "sample_weight=((), 'float32'))"
    )
    read = read_all(parser, pattern)
    assert_same(read, {"features": IMAGES, "label": LABELS, "sample_weight": weights})


def test_shards_are_contiguous_and_near_equal(pattern):
    write_shards((IMAGES, LABELS), pattern, shards=4)
    infos = patterns.match(pattern)
    assert [info.path.rsplit("/", 1)[1] for info in infos] == [
        f"train-0000{i}-of-00004.tfrecord" for i in range(4)
    ]
    sizes = [sum(1 for _ in read_records(info.path)) for info in infos]
    assert sum(sizes) == N
    assert max(sizes) - min(sizes) <= 1


def test_ten_thousand_examples_to_a_shard_by_default(pattern):
    write_shards({"features": np.zeros((20_001, 1), np.int8)}, pattern)
    assert len(patterns.match(pattern)) == 3


def test_gzip_and_tensorflow_read_the_same(pattern):
    parser = write_shards((IMAGES, LABELS), pattern, compression="gzip")
    [info] = patterns.match(pattern)
    dataset = tf.data.TFRecordDataset(info.path, "GZIP").batch(10).map(parser)
    assert np.concatenate([batch["label"] for batch in dataset]).tolist() == LABELS.tolist()
    assert_same(read_all(parser, pattern), {"features": IMAGES, "label": LABELS})


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
        ">f4",
        ">i8",
    ],
)
def test_every_dtype_comes_back_as_scalar_and_as_array(pattern, dtype):
    extremes = {
        "b": [False, True, True],
        "f": [-np.pi, 1e-4, 6e4],
        "i": [np.iinfo(dtype).min, 0, np.iinfo(dtype).max] if np.dtype(dtype).kind in "iu" else [],
    }
    kind = np.dtype(dtype).kind
    values = np.array(extremes["i" if kind == "u" else kind], dtype)
    features = {"scalar": values, "vector": np.stack([values, values[::-1]], 1)}
    read = read_all(write_shards({"features": features}, pattern), pattern)
    native = {key: array.astype(array.dtype.newbyteorder("=")) for key, array in features.items()}
    assert_same(read["features"], native)


def test_nested_features_strings_and_ids(pattern):
    data = {
        "features": {
            "pair": (IMAGES, LABELS.astype(np.int32)),
            "text": [f"Übung {i}" for i in range(N)],
            "words": np.array([[b"a\0", b"bc"]] * N, object),
            "flag": np.arange(N) % 2 == 0,
        },
        "label": {"kind": LABELS, "box": RNG.random((N, 4))},
        "id": range(100, 100 + N),
    }
    parser = write_shards(data, pattern, shards=2)
    read = read_all(parser, pattern)
    expected = {
        **data,
        "features": {
            **data["features"],
            "text": np.array([text.encode() for text in data["features"]["text"]], object),
        },
        "id": np.array([str(i).encode() for i in range(100, 100 + N)], object),
    }
    assert_same(read, expected)
    ast.parse(repr(parser))


def test_arrays_without_elements_or_without_examples_in_the_batch(pattern):
    parser = write_shards({"features": {"a": np.zeros((3, 0)), "b": np.ones((3, 2))}}, pattern)
    read = read_all(parser, pattern)
    assert read["features"]["a"].shape == (3, 0)
    assert parser(tf.constant([], tf.string))["features"]["b"].shape == (0, 2)


def rows():
    yield from zip(IMAGES, LABELS, strict=True)


@pytest.mark.parametrize("known", [True, False])
def test_a_dataset(pattern, known):
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))
    if not known:
        signature = (tf.TensorSpec(None, tf.float32), tf.TensorSpec((), tf.int64))
        dataset = tf.data.Dataset.from_generator(rows, output_signature=signature)
        assert dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
    parser = write_shards(dataset, pattern, shards=3)
    assert parser == Parser(features=((4, 3, 1), "float32"), label=((), "int64"))
    assert_same(read_all(parser, pattern), {"features": IMAGES, "label": LABELS})


def test_a_dataset_of_dicts(pattern):
    ids = [f"row {i}" for i in range(N)]
    dataset = tf.data.Dataset.from_tensor_slices(
        {"features": {"a": IMAGES, "b": (LABELS, ids)}, "id": ids}
    )
    read = read_all(write_shards(dataset, pattern), pattern)
    texts = np.array([i.encode() for i in ids], object)
    assert_same(read, {"features": {"a": IMAGES, "b": (LABELS, texts)}, "id": texts})


def test_a_data_frame(pattern):
    frame = pd.DataFrame(
        {
            "age": RNG.integers(0, 90, N),
            "city": ["Köln", "Oslo", "Rome", "Bonn", "Ulm"] * 5,
            "income": RNG.random(N),
            "label": LABELS % 2,
            "id": [f"p{i}" for i in range(N)],
        }
    )
    read = read_all(write_shards(frame, pattern, shards=2), pattern)
    assert list(read) == ["features", "label", "id"]
    assert sorted(read["features"]) == ["age", "city", "income"]
    np.testing.assert_array_equal(read["features"]["income"], frame["income"])
    assert [city.decode() for city in read["features"]["city"]] == frame["city"].tolist()
    np.testing.assert_array_equal(read["label"], frame["label"])

    renamed = frame.rename(columns={"label": "bought"}).astype({"city": "category"})
    other = pattern.replace("train", "other")
    assert_same(read_all(write_shards(renamed, other, label_column="bought"), other), read)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((IMAGES, LABELS[:-1]), "features has 25, label has 24"),
        ((IMAGES, 3), "label is a single value"),
        ((np.zeros((0, 2)), np.zeros(0)), "empty"),
        ({"label": LABELS}, "no features"),
        ({"features": {}}, "no features"),
        ({"image": IMAGES}, "'image'"),
        (IMAGES, "ndarray"),
        (([[1, 2], [3]],), "features is ragged"),
        ({"features": {"a": np.array([[1], None], object)}}, r"features/a holds a list at 0"),
        ({"features": np.zeros(3, "datetime64[s]")}, "datetime64"),
        ({"features": np.zeros((3, 2), complex)}, "complex128"),
        ({"features": np.zeros(3, np.uint64)}, "uint64"),
        ({"features": IMAGES, "id": np.zeros(N)}, "id has the dtype float64"),
        (pd.DataFrame({"a": ["x", None], "label": [0, 1]}), "features/a holds a"),
        (pd.DataFrame({"label": [0, 1]}), "no features"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "two columns"),
        (tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(10), "unbatch"),
        (tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).repeat(), "take"),
        (tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).take(0), "empty"),
        (tf.data.Dataset.from_tensor_slices({"image": IMAGES}), "'image'"),
        (
            tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3]])).map(
                lambda row: (row, 1)
            ),
            "RaggedTensorSpec|Example 1",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path, pattern, data, message):
    with pytest.raises(InputError, match=message):
        write_shards(data, pattern)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "train.tfrecord"}, "exactly one"),
        ({"pattern": "*-*.tfrecord"}, "exactly one"),
        ({"shards": 0}, "between 1 and"),
        ({"shards": N + 1}, "between 1 and"),
        ({"compression": "zip"}, "zip"),
        ({"label_column": "y"}, "label_column"),
    ],
)
def test_wrong_options(pattern, options, message):
    with pytest.raises(InputError, match=message):
        write_shards((IMAGES, LABELS), **{"pattern": pattern, **options})


def test_a_label_column_that_is_not_there(pattern):
    with pytest.raises(InputError, match="no column 'y'"):
        write_shards(pd.DataFrame({"x": [1]}), pattern, label_column="y")


def test_examples_of_another_shape_are_named(pattern):
    def ragged():
        yield from ([1.0], [2.0], [3.0, 4.0])

    spec = tf.TensorSpec([None], tf.float32)
    dataset = tf.data.Dataset.from_generator(ragged, output_signature=spec)
    dataset = dataset.map(lambda x: (x, 1))
    with pytest.raises(InputError, match=r"Example 2 .* features has the shape \(2,\)"):
        write_shards(dataset, pattern, shards=1)
    with pytest.raises(InputError, match="No file matches"):
        patterns.match(pattern)


def test_a_dataset_that_changes_between_readings(pattern):
    readings = []

    def shrinking():
        readings.append(None)
        yield from range(6 - len(readings))

    dataset = tf.data.Dataset.from_generator(
        shrinking, output_signature=tf.TensorSpec((), tf.int64)
    )
    with pytest.raises(InputError, match="fewer examples"):
        write_shards(dataset.map(lambda x: (x,)), pattern, shards=1)


def test_old_shards_of_another_number_are_not_mixed_in(pattern):
    write_shards((IMAGES, LABELS), pattern, shards=4)
    write_shards((IMAGES, LABELS), pattern, shards=4)
    with pytest.raises(InputError, match="00000-of-00004"):
        write_shards((IMAGES, LABELS), pattern, shards=3)
    assert len(patterns.match(pattern)) == 4


def test_a_record_that_does_not_fit_fails_to_parse(pattern):
    write_shards({"features": np.zeros((2, 3))}, pattern)
    [info] = patterns.match(pattern)
    records = [record.data for record in read_records(info.path)]
    for parser in (
        Parser(features=((4,), "float64")),
        Parser(features=((3,), "float64"), label=((), "int64")),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            parser(tf.constant(records))


@pytest.mark.parametrize(
    "spec", [None, {}, ((3,), "float128"), (3, "float32"), ((3,),), "float32", {"a": ((3,), "x")}]
)
def test_a_parser_of_what_is_not_a_spec(spec):
    with pytest.raises(InputError, match="Parser"):
        Parser(features=spec)


def test_needs_no_tensorflow_to_be_imported():
    code = "import sys, tracin_beam.inputs.shards; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
