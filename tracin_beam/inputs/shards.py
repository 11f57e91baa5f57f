"""TFRecord shards from the data that people have, and the parser that reads them back."""

import contextlib
import gzip
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from tracin_beam.config import check_name
from tracin_beam.errors import InputError
from tracin_beam.storage import files
from tracin_beam.storage.records import RecordWriter

if TYPE_CHECKING:
    import tensorflow as tf

Spec = tuple[tuple[int, ...], str]
"""The shape and dtype of one example's array: `((28, 28, 1), 'float32')`."""

_INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "int64")
_FLOATS = ("float16", "float32", "float64")
_DTYPES = (*_INTEGERS, *_FLOATS, "string")
_FIELDS = ("features", "label", "id", "sample_weight", "group")
_TUPLE = ("features", "label", "sample_weight")
_SHARD_SIZE = 10_000


@dataclass(frozen=True)
class Parser:
    """Parses the records that `write_shards` wrote. Its repr can be pasted into a task file.

    Each field is a `(shape, dtype)` pair of one example, or a dict or a tuple of such pairs where
    the data had them; `None` where the data had no such field. Dtypes are NumPy's names, or
    'string'.

    Raises:
      InputError: a field is not made of such pairs.

    Example:

        >>> import tracin_beam
        >>> tracin_beam.Parser(features=((28, 28, 1), "float32"), label=((), "int64"))
        Parser(features=((28, 28, 1), 'float32'), label=((), 'int64'))
    """

    features: Any
    label: Any = None
    id: Any = None
    sample_weight: Any = None
    group: Any = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            spec = getattr(self, name)
            if spec is not None:
                object.__setattr__(self, name, _checked_spec(spec, name))
        if not self._leaves("features"):
            raise InputError("Parser needs the shape and dtype of at least one feature")

    def __repr__(self) -> str:
        given = (
            f"{name}={getattr(self, name)!r}" for name in _FIELDS if getattr(self, name) is not None
        )
        return f"Parser({', '.join(given)})"

    def __hash__(self) -> int:
        return hash(repr(self))  # the fields may be dicts

    def _leaves(self, name: str) -> dict[str, Spec]:
        return dict(_flatten(getattr(self, name), name))

    def __call__(self, serialized: "tf.Tensor") -> dict[str, Any]:
        """Parses a batch of records, also inside a `tf.function`.

        Args:
          serialized: `tf.string` [B] of serialized `tf.train.Example`s.

        Returns:
          The fields that the records have, with a leading dimension B, nested as they were
          written.

        Raises:
          tf.errors.InvalidArgumentError: a record lacks a field or has another shape.
        """
        import tensorflow as tf

        given = [name for name in _FIELDS if getattr(self, name) is not None]
        specs = {key: spec for name in given for key, spec in self._leaves(name).items()}
        columns = {key: tf.io.FixedLenFeature(*_stored(*spec)) for key, spec in specs.items()}
        parsed = tf.io.parse_example(serialized, columns)
        batch = tf.shape(serialized)[0]
        arrays = {key: _decoded(parsed[key], batch, *specs[key]) for key in specs}
        return {name: _nested(getattr(self, name), name, arrays) for name in given}


def write_shards(
    data: Any,
    pattern: str,
    *,
    shards: int | None = None,
    compression: Literal["gzip"] | None = None,
    label_column: str | None = None,
) -> Parser:
    """Writes examples as TFRecord shards of `tf.train.Example`s, each shard atomically.

    The examples stay in order, cut into contiguous shards whose sizes differ by at most one.
    Scalars are stored as int64 or float lists and strings as bytes lists; other arrays and float64
    scalars as little-endian bytes. So every dtype comes back as it was, but `id`s always as
    strings.

    Args:
      data: one of
        - a dict with `features`, and where known `label`, `id` and `group` (strings or integers)
          and `sample_weight`. Each is an array of N examples, or a dict or a tuple of such arrays;
        - a tuple `(features, label, sample_weight)`, of which the last one or two may be left
          out;
        - a `tf.data.Dataset` of such dicts or tuples, one example each and all of one shape. It
          is streamed; one of unknown length is first read once to count;
        - a pandas DataFrame. Its columns `label`, `id` and `sample_weight` are these fields,
          the others a dict of features.
      pattern: the shards' path on any file system that Beam knows, with one `*` that becomes
        "00000-of-00004" and so on.
      shards: how many; by default as many as keep each to 10,000 examples.
      compression: None, or "gzip".
      label_column: the DataFrame's column of labels, if it is not `label`.

    Returns:
      The parser of these records. Paste its repr into the task file.

    Raises:
      InputError: there are no examples or no features, lengths or shapes differ, a dtype cannot
        be stored, `pattern` has not exactly one `*`, or it matches shards of another number
        that would mix with the new ones.

    Example:

        >>> import numpy as np, tracin_beam
        >>> data = {"features": np.zeros((6, 4), np.float32), "label": np.arange(6)}
        >>> tracin_beam.write_shards(data, "some-*.tfrecord", shards=2)
        Parser(features=((4,), 'float32'), label=((), 'int64'))
    """
    pattern = files.home(pattern)
    folder, _, name = pattern.rpartition("/")
    # In a remote folder's name, and in a file's, they would have a meaning when it is read.
    special = name.replace("*", "", 1) + ("" if files.is_local(pattern) else folder)
    if "*" not in name or any(character in special for character in ",*?[]{}"):
        raise InputError(
            f"The pattern {pattern!r} must have exactly one '*', in the name of the "
            "files, and none of , ? [ ] { }: write something like 'data/train-*.tfrecord'"
        )
    check_name("the pattern", pattern)
    if compression not in (None, "gzip"):
        raise InputError(f"The compression must be None or 'gzip', not {compression!r}")
    if label_column is not None and not _is_frame(data):
        raise InputError("label_column is only for a DataFrame: name the field 'label' instead")
    if _is_dataset(data):
        count, parser, examples = _dataset_examples(data)
    else:
        count, parser, examples = _array_examples(
            _frame_fields(data, label_column) if _is_frame(data) else _fields_of(data, "data")
        )
    shards = math.ceil(count / _SHARD_SIZE) if shards is None else shards
    if not 1 <= shards <= count:
        raise InputError(
            f"shards is {shards}: it must be between 1 and the number of examples, {count}"
        )
    paths = [pattern.replace("*", f"{i:05d}-of-{shards:05d}") for i in range(shards)]
    _refuse_other_shards(pattern, paths)
    encode = _encoder(parser)
    for i, path in enumerate(paths):
        size = count * (i + 1) // shards - count * i // shards
        with files.atomic_write(path) as handle, _packed(handle, compression) as target:
            writer = RecordWriter(target)
            for example in itertools.islice(examples, size):
                writer.write(encode(example))
                size -= 1
            if size or (i + 1 == shards and next(examples, None) is not None):
                raise InputError(
                    f"The dataset gave {'fewer' if size else 'more'} examples than the {count} "
                    "that it has or gave before: it must give the same ones each time it is read"
                )
    return parser


def _packed(
    handle: BinaryIO, compression: str | None
) -> contextlib.AbstractContextManager[BinaryIO | gzip.GzipFile]:
    if compression is None:
        return contextlib.nullcontext(handle)
    return gzip.GzipFile(fileobj=handle, mode="wb", filename="", mtime=0)


# The data, as the number of examples, their parser, and an iterator over them. An example is a flat
# dict of arrays, with keys as "label" and "features/width".
_Examples = tuple[int, Parser, Iterator[dict[str, np.ndarray]]]


def _is_dataset(data: Any) -> bool:
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(data, tf.data.Dataset)


def _is_frame(data: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(data, pandas.DataFrame)


def _fields_of(data: Any, what: str) -> dict[str, Any]:
    """The fields of a dict or a tuple, checked for their names."""
    if isinstance(data, tuple) and 1 <= len(data) <= 3:
        data = dict(zip(_TUPLE, data, strict=False))
    if not isinstance(data, dict):
        raise InputError(
            f"The {what} must be a dict with 'features', a tuple (features, label, sample_weight), "
            f"a tf.data.Dataset of these or a pandas DataFrame, but is a {type(data).__name__}"
        )
    if unknown := [key for key in data if key not in _FIELDS]:
        raise InputError(
            f"The {what} has the key {unknown[0]!r}: only {', '.join(_FIELDS)} are fields. Put "
            "what the model takes under 'features'"
        )
    given = {name: data[name] for name in _FIELDS if data.get(name) is not None}
    if not list(_flatten(given.get("features", {}), "features")):
        raise InputError(f"The {what} has no features: put what the model takes under 'features'")
    return given


def _frame_fields(frame: Any, label_column: str | None) -> dict[str, Any]:
    if not frame.columns.is_unique:
        raise InputError("The DataFrame has two columns of one name: rename one")
    if label_column is not None and label_column not in frame.columns:
        raise InputError(
            f"The DataFrame has no column {label_column!r}: it has {list(frame.columns)}"
        )
    named = {"label": label_column or "label", "id": "id", "sample_weight": "sample_weight"}
    given = {name: frame[column].to_numpy() for name, column in named.items() if column in frame}
    features = {str(c): frame[c].to_numpy() for c in frame.columns if c not in named.values()}
    return _fields_of({"features": features, **given}, "DataFrame")


def _array_examples(given: dict[str, Any]) -> _Examples:
    columns = {
        key: _as_array(values, key) for name in given for key, values in _flatten(given[name], name)
    }
    lengths = {}
    for key, column in columns.items():
        if column.ndim == 0:
            raise InputError(
                f"{key} is a single value: it must be an array with one entry per example"
            )
        lengths[key] = len(column)
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise InputError(f"The fields have different numbers of examples: {listed}")
    count = next(iter(lengths.values()))
    if count == 0:
        raise InputError("There are no examples to write: the arrays are empty")
    specs = {key: (column.shape[1:], _dtype_name(column, key)) for key, column in columns.items()}
    parser = Parser(**{name: _nested(given[name], name, specs) for name in given})
    # asarray, because indexing gives scalars
    return count, parser, ({k: np.asarray(c[i]) for k, c in columns.items()} for i in range(count))


def _dataset_examples(dataset: "tf.data.Dataset") -> _Examples:
    import tensorflow as tf

    element = dataset.element_spec
    given = _fields_of(element, "dataset's element")
    leaves = {key: leaf for name in given for key, leaf in _flatten(given[name], name)}
    for key, leaf in leaves.items():
        if not isinstance(leaf, tf.TensorSpec):
            raise InputError(
                f"{key} of the dataset is a {type(leaf).__name__}: make it a dense tensor"
            )
    if all(leaf.shape.rank and leaf.shape[0] is None for leaf in leaves.values()):
        raise InputError("The dataset is batched: give dataset.unbatch()")
    count = int(dataset.cardinality())
    if count == tf.data.INFINITE_CARDINALITY:
        raise InputError("The dataset never ends: give dataset.take(n)")
    if count == tf.data.UNKNOWN_CARDINALITY:
        count = int(dataset.reduce(np.int64(0), lambda n, _: n + 1))
    if count == 0:
        raise InputError("There are no examples to write: the dataset is empty")

    def flat(element: Any) -> dict[str, np.ndarray]:
        fields_ = _fields_of(element, "dataset's element")
        return {k: _as_array(v, k) for name in fields_ for k, v in _flatten(fields_[name], name)}

    elements = map(flat, dataset.as_numpy_iterator())
    first = next(elements)
    specs = {key: (value.shape, _dtype_name(value, key)) for key, value in first.items()}

    def checked() -> Iterator[dict[str, np.ndarray]]:
        for i, example in enumerate(itertools.chain([first], elements)):
            for key, value in example.items():
                if value.shape != specs[key][0]:
                    raise InputError(
                        f"Example {i} of the dataset: {key} has the shape {value.shape}, in the "
                        f"first example it is {specs[key][0]}. Pad or resize them to one shape"
                    )
            yield example

    return count, Parser(**{name: _nested(given[name], name, specs) for name in given}), checked()


def _as_array(values: Any, key: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # a ragged list
        raise InputError(f"{key} is ragged: pad its examples to one shape ({error})") from error
    if key == "id" and array.dtype.kind in "iu":
        array = array.astype(np.str_)
    return array.astype(object) if array.dtype.kind == "T" else array


def _dtype_name(array: np.ndarray, key: str) -> str:
    name = array.dtype.name
    if array.dtype.kind in "US":
        name = "string"
    elif array.dtype.kind == "O":
        for place, value in np.ndenumerate(array):
            if not isinstance(value, str | bytes):
                at = f" at {', '.join(map(str, place))}" if place else ""
                raise InputError(
                    f"{key} holds a {type(value).__name__}{at} ({value!r:.50}): an array of "
                    "objects can hold only strings. Fill in what is missing, or pad to one shape"
                )
        name = "string"
    if name not in _DTYPES:
        raise InputError(f"{key} has the dtype {name}: convert it to one of {', '.join(_DTYPES)}")
    if key == "id" and name != "string":
        raise InputError(f"id has the dtype {name}: it must be of strings or integers")
    return name


def _refuse_other_shards(pattern: str, paths: Iterable[str]) -> None:
    folder, slash, name = pattern.rpartition("/")
    shard = re.compile(re.escape(name).replace(r"\*", r"\d{5}-of-\d{5}"))
    there = (info.path.rpartition("/")[2] for info in files.list_folder(folder + slash or "."))
    others = {folder + slash + name for name in there if shard.fullmatch(name)} - set(paths)
    if others:
        raise InputError(
            f"{min(others)} is there already, and the pattern {pattern!r} would match it together "
            "with the new shards: delete the old shards, or write under another name"
        )


def _encoder(parser: Parser) -> Callable[[dict[str, np.ndarray]], bytes]:
    """A function that serializes one example, given as a flat dict of arrays."""
    from tensorflow.train import BytesList, Example, Feature, Features, FloatList, Int64List

    def encode_value(array: np.ndarray, shape: tuple[int, ...], dtype: str) -> Feature:
        if dtype == "string":
            values = (s.encode() if isinstance(s, str) else s for s in array.ravel().tolist())
            return Feature(bytes_list=BytesList(value=values))
        if shape == () and dtype in _INTEGERS:
            return Feature(int64_list=Int64List(value=[int(array)]))
        if shape == () and dtype != "float64":
            return Feature(float_list=FloatList(value=[float(array)]))
        raw = array.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes()
        return Feature(bytes_list=BytesList(value=[raw]))

    specs = {
        key: spec for field in fields(parser) for key, spec in parser._leaves(field.name).items()
    }

    def encode(example: dict[str, np.ndarray]) -> bytes:
        feature = {key: encode_value(example[key], *spec) for key, spec in specs.items()}
        return Example(features=Features(feature=feature)).SerializeToString()

    return encode


def _stored(shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
    """How `_encoder` stores an array: the shape and dtype of the `tf.train.Feature`."""
    if dtype == "string":
        return shape, "string"
    if shape == () and dtype != "float64":
        return (), "int64" if dtype in _INTEGERS else "float32"
    return (), "string"


def _decoded(
    stored: "tf.Tensor", batch: "tf.Tensor", shape: tuple[int, ...], dtype: str
) -> "tf.Tensor":
    """The inverse of `_encoder` for a batch."""
    import tensorflow as tf

    if dtype == "string" or _stored(shape, dtype)[1] != "string":
        return tf.cast(stored, dtype) if dtype != "string" else stored
    raw = tf.io.decode_raw(stored, tf.uint8 if dtype == "bool" else dtype)
    return tf.ensure_shape(
        tf.reshape(tf.cast(raw, dtype), tf.stack([batch, *shape])), (None, *shape)
    )


def _is_leaf(tree: Any) -> bool:
    """Whether `tree` is an array or a `Spec`, rather than a dict or tuple of them."""
    spec = isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[1], str)
    return spec or not isinstance(tree, dict | tuple)


def _items(tree: Any) -> Iterable[tuple[Any, Any]]:
    return tree.items() if isinstance(tree, dict) else enumerate(tree)


def _flatten(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and tuples, with their paths as "features/width"."""
    if tree is None:
        return
    if _is_leaf(tree):
        yield name, tree
        return
    for key, branch in _items(tree):
        yield from _flatten(branch, f"{name}/{key}")


def _nested(tree: Any, name: str, leaves: dict[str, Any]) -> Any:
    """The inverse of `_flatten`: `leaves` nested as `tree`."""
    if _is_leaf(tree):
        return leaves[name]
    branches = {key: _nested(branch, f"{name}/{key}", leaves) for key, branch in _items(tree)}
    return branches if isinstance(tree, dict) else tuple(branches.values())


def _checked_spec(spec: Any, name: str) -> Any:
    """A field's nested specs, with lists of sizes made tuples."""
    if not _is_leaf(spec):
        branches = {key: _checked_spec(branch, f"{name}/{key}") for key, branch in _items(spec)}
        return branches if isinstance(spec, dict) else tuple(branches.values())
    try:
        shape, dtype = spec
        shape = tuple(int(size) for size in shape)
    except (TypeError, ValueError):
        shape, dtype = (), None
    if dtype not in _DTYPES:
        raise InputError(
            f"Parser: {name} must be a pair of a shape and one of the dtypes {', '.join(_DTYPES)}, "
            f"as ((28, 28, 1), 'float32'), but is {spec!r}"
        )
    return shape, dtype
