"""What the user brings: a model, a loss and a way to read examples."""

import atexit
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

from tracin_beam.errors import InputError
from tracin_beam.inputs.sources import files_named
from tracin_beam.storage import files

T = TypeVar("T")

_log = logging.getLogger(__name__)
# The graph of a job, in which a task's files travel several times, may be 10 MB for Dataflow.
_MOST_BYTES = 2 << 20

# What `Task.kind` may be.
KINDS = ("classification", "multilabel", "regression", "other")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model whose training is to be explained.

    Attributes:
      model: a function without arguments that builds the `keras.Model`; weights come from each
        checkpoint. Layers that were frozen in training should be frozen here as well.
      loss: the loss of the training: a `keras.losses.Loss`, the name of one, or a function of
        (y_true, y_pred). For a model with several outputs y_pred has their structure.
      parse: a function that TensorFlow traces, from serialised records, `tf.string` [B], to a
        dict of batched tensors: "features" (a tensor, or a dict or tuple of them, as the model
        takes), "label", and if wanted "id", "sample_weight" and "group" (text or whole numbers: a
        data source, a day, an annotator; see `--group_by`). Examples without an id are called
        "<shard name>#<position>". A class below zero stands for no label; a test example may be
        without one where the target is not its loss.
      predict: a function from the model's output to a prediction for each example, [B] numbers.
        By default the class of highest score or, for one output, its value.
      label_names: names of the classes, for reports.
      kind: what labels and outputs are, where shapes and loss do not tell or mislead:
        "classification", one class of K (scores [B, K], or [B, 1] or [B] for two classes; labels
        are class numbers or one-hot); "multilabel", any of K (labels [B, K]); "regression",
        numbers; "other". Labels and predictions of a multilabel task are null in the tables.
      files: files that the task reads, such as a vocabulary, as paths from the folder of the file
        that defines it; they must lie in that folder, or in that of its package. They travel to
        workers with the task, and embeddings depend on their content. What Python opens there while
        the task is imported travels without being named; but of a task file in a bucket only what
        is named is fetched, which may be a module, and before it is imported only what stands in
        `Task(…)` itself.
      relabel: a function from a serialised record and a label to the record with that label, for
        `quality apply`. Without it a feature of a `tf.train.Example` is rewritten.
      show: what reports show of an example: a function of its features, in NumPy and without a
        batch dimension, and of its serialised record, `bytes`. It gives a picture (an array [H, W],
        [H, W, 1], [H, W, 3] or [H, W, 4], or a PIL image), a text, a table of features (a mapping
        from name to value), or a sound (samples and their number in a second). By default shapes
        and dtypes suggest it. Embeddings do not depend on it.
      targets: further quantities that `--target` may name, by name: each a function of the outputs
        of the model for a batch, or of (outputs, label), that gives float [B], a number for each
        example by itself, and that TensorFlow differentiates. It takes the place of the loss of a
        test example, so that proponents lower it: give the negative of what they should raise.

    Example:

      >>> import keras, tracin_beam
      >>> task = tracin_beam.Task(
      ...     model=lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]),
      ...     loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      ...     parse=tracin_beam.Parser(features=((4,), "float32"), label=((), "int64")),
      ...     label_names=["a", "b", "c"],
      ... )
      >>> task.model().count_params()
      15
    """

    model: Callable[[], Any]
    loss: Any
    parse: Callable[[Any], Mapping[str, Any]]
    predict: Callable[[Any], Any] | None = None
    label_names: Sequence[str] | None = None
    kind: str | None = None
    files: Sequence[str] = ()
    relabel: Callable[[bytes, float], bytes] | None = None
    show: Callable[[Any, bytes], Any] | None = None
    targets: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"Task(kind={self.kind!r}): take one of {', '.join(KINDS)}.")
        for name in self.label_names or ():
            if isinstance(name, str) and len(name.splitlines()) > 1:
                raise InputError(f"Task(label_names=…): {name!r:.100} is more than one line.")
        if not isinstance(self.targets, Mapping):
            raise InputError('Task(targets=…): give a dict, such as {"entropy": a_function}.')
        for name, function in self.targets.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
                raise InputError(
                    f"Task(targets=…): {name!r:.100} is no name; take letters, digits, _, - and ."
                )
            if not callable(function):
                raise InputError(f"Task(targets=…): {name} is a {type(function).__name__}.")


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """A task as it travels to workers: the modules and other files it needs.

    Attributes:
      name: as in `--task`, for messages.
      module: the module to import.
      attribute: the name of the task in it.
      root: folder the files were found in, used again where it still holds the same files.
      files: (path relative to root, content) of every module of the user's that the task imported,
        and of files that it reads.
      read: path relative to root and digest of each file of `Task.files`, whether it travels or is
        too large for that.
    """

    name: str
    module: str
    attribute: str
    root: str
    files: tuple[tuple[str, bytes], ...]
    read: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """Identity of what travels."""
        return hashlib.blake2b(repr(self.files).encode(), digest_size=8).hexdigest()

    def load(self) -> Task:
        """Imports the task, writing its sources to a temporary folder where they are missing."""
        return in_keras_thread(self._load)

    def _load(self) -> Task:
        key = f"{self.digest}:{self.module}:{self.attribute}"
        if key not in _loaded:
            root = self.root if self._intact() else self._unpack()
            _loaded[key] = _get(_import(root, self.module, self.name), self.attribute, self.name)
        return _loaded[key]

    def _intact(self) -> bool:
        for path, content in self.files:
            try:
                with open(os.path.join(self.root, path), "rb") as file:
                    if file.read() != content:
                        return False
            except OSError:
                return False
        return True

    def _unpack(self) -> str:
        root = _temporary_folder()
        for path, content in self.files:
            target = os.path.join(root, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                file.write(content)
        return root


def _temporary_folder() -> str:
    """A folder that nobody else may read, and that goes with the process."""
    folder = tempfile.mkdtemp(prefix="tracin_task_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# The module that tasks without a file are said to be of.
_GIVEN = "<this process>"
_given: dict[str, Task] = {}
_loaded: dict[str, Task] = {}
# Paths that a task opened while it was imported and its model built, by its module.
_opened: dict[str, dict[str, None]] = {}
_watching: list[dict[str, None]] = []
_roots: set[str] = set()
_keras_thread = ThreadPoolExecutor(1, thread_name_prefix="keras")
_keras_thread_id: list[int] = []


def in_keras_thread(function: Callable[[], T]) -> T:
    """Runs the function in the one thread of this process that imports tasks and builds models.

    Keras keeps global settings, such as the dtype policy that a task file may set, for each
    thread separately, while Beam's threads come and go.
    """
    if threading.get_ident() in _keras_thread_id:
        return function()

    def call() -> T:
        _keras_thread_id[:] = [threading.get_ident()]
        return function()

    return _keras_thread.submit(call).result()


def load_task(spec: str) -> tuple[Task, Callable[[], TaskSource]]:
    """Imports the task named by `file.py:name`, on any file system, or `package.module:name`.

    Returns:
      The task, and a function that gives its source for workers: to be called after the task has
      been used once, so that what it imports late is known too.

    Raises:
      InputError: nothing there, or not a task.
    """
    check_keras()
    if spec in _given:
        return _given[spec], lambda: _source_of_given(spec)
    location, _, attribute = spec.rpartition(":")
    if not location or not attribute.isidentifier():
        raise InputError(f"--task={spec}: write file.py:name or package.module:name.")
    if location.endswith(".py"):
        far = not files.is_local(location)
        path = _fetch(location, spec) if far else os.path.abspath(location)
        if not os.path.isfile(path):
            raise InputError(f"--task={spec}: there is no file {path}.")
        root, module = os.path.dirname(path), os.path.basename(path)[: -len(".py")]
        imported = in_keras_thread(lambda: _import(root, module, spec))
    else:
        module = location
        imported = in_keras_thread(lambda: _import(None, module, spec))
        file = imported.__file__ or os.path.join(next(iter(imported.__path__)), "__init__.py")
        depth = module.count(".") + (os.path.basename(file) == "__init__.py")
        root = os.path.abspath(file)
        for _ in range(depth + 1):
            root = os.path.dirname(root)
    task = _get(imported, attribute, spec)
    if location.endswith(".py") and far:
        _fetch_beside(location, root, task.files)

    def source() -> TaskSource:
        sources = _sources(root, imported)
        read, travelling = _read_files(root, imported, task)
        result = TaskSource(
            spec, module, attribute, root, tuple(sorted({**sources, **travelling}.items())), read
        )
        _loaded[f"{result.digest}:{module}:{attribute}"] = task
        return result

    return task, source


def _read_files(
    root: str, module: ModuleType, task: Task
) -> tuple[tuple[tuple[str, str], ...], dict[str, bytes]]:
    """Files that a task reads: (path, digest) of those it names, and content by path of those that
    travel.

    Raises:
      InputError: one that `Task(files=…)` names is not there, or not below root.
    """
    folder = os.path.dirname(os.path.abspath(str(module.__file__)))
    named = [os.path.normpath(os.path.join(folder, path)) for path in task.files]
    for path in named:
        if not os.path.isfile(path):
            raise InputError(f"Task(files=…): there is no file {path}.")
        if not path.startswith(root + os.sep):
            raise InputError(
                f"Task(files=…): {path} does not lie below {root}, the folder of the task or of "
                "its package, so that it cannot travel to workers. Put it there."
            )
    opened = _opened.get(str(module.__file__), {})
    seen = [os.path.abspath(path) for path in opened]
    seen = [path for path in seen if path.startswith(root + os.sep) and os.path.isfile(path)]
    relative = sorted(path for path in opened if not os.path.isabs(path) and os.path.isfile(path))
    if relative:
        _log.warning(
            "the task opens %s from the current folder, which workers on other machines do not "
            "have: open it from os.path.dirname(__file__)",
            ", ".join(relative),
        )
    read, travelling, left = [], {}, _MOST_BYTES
    for path in sorted({*named, *seen}):
        name = os.path.relpath(path, root)
        # What is not named is compared by the values that the task took from it.
        if path in named:
            read.append((name, files.checksum(path)))
        size = os.path.getsize(path)
        if size <= left:
            left -= size
            with open(path, "rb") as file:
                travelling[name] = file.read()
        else:
            _log.warning(
                "the task reads %s, which is too large to travel with the job (%d MiB in all): "
                "workers on other machines need it in their image, or from a bucket",
                path,
                _MOST_BYTES >> 20,
            )
    return tuple(read), travelling


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _watching:
        return
    path, _, flags = arguments
    reads = isinstance(flags, int) and flags & os.O_ACCMODE == os.O_RDONLY
    in_thread = threading.get_ident() in _keras_thread_id
    if reads and in_thread and isinstance(path, str) and not path.endswith((".py", ".pyc")):
        _watching[-1][path] = None


@contextlib.contextmanager
def watched(module_file: str) -> Iterator[None]:
    """Notes which files are opened for reading in Python, in the thread that imports tasks."""
    if not _watching_since:
        sys.addaudithook(_watch)
        _watching_since.append(True)
    _watching.append(_opened.setdefault(module_file, {}))
    try:
        yield
    finally:
        _watching.pop()


_watching_since: list[bool] = []


def check_keras() -> None:
    """Refuses a Keras that is not Keras 3 on TensorFlow, before anything imports it.

    Raises:
      InputError: it says which variable or file chose the other one.
    """
    chosen, where = os.environ.get("KERAS_BACKEND"), "the environment variable KERAS_BACKEND"
    if not chosen:
        home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
        where = os.path.join(home, "keras.json")
        try:
            with open(where, encoding="utf-8") as file:
                settings = json.load(file)
            chosen = settings.get("backend")
        except (OSError, ValueError, AttributeError):  # then Keras does not heed it either
            chosen = None
        where = f'"backend" in {where}'
    if chosen not in (None, "tensorflow"):
        raise InputError(
            f"{where} chooses {chosen!r} for Keras, and gradients are taken by TensorFlow: "
            "set KERAS_BACKEND=tensorflow."
        )
    if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
        raise InputError(
            "the environment variable TF_USE_LEGACY_KERAS chooses Keras 2, and tasks are models of "
            "Keras 3: unset it."
        )


def spec_of(task: Task) -> str:
    """What `load_task` takes for a task that this process has made already.

    Returns:
      `file.py:name` or `package.module:name` of a task that a module has under a name; for another,
      such as one of a notebook's cell, a name that holds in this process only: see `is_local`.
    """
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        # A script would be run once more, if it were imported under another name.
        if name == "__main__" or not isinstance(path, str) or not path.endswith(".py"):
            continue
        for attribute, value in list(vars(module).items()):
            if value is task and attribute.isidentifier():
                in_package = "." in name or os.path.basename(path) == "__init__.py"
                return f"{name if in_package else os.path.abspath(path)}:{attribute}"
    for spec, other in _given.items():
        if other is task:
            return spec
    spec = f"{_GIVEN}:task{len(_given) or ''}"
    _given[spec] = task
    return spec


def is_local(spec: str) -> bool:
    """Whether a task is in no file, so that no other process can have it."""
    return spec.startswith(f"{_GIVEN}:")


def _source_of_given(spec: str) -> TaskSource:
    """The source of a task without a file, which only this process can load."""
    attribute = spec.rpartition(":")[2]
    root = os.getcwd()
    read = []
    for name in _given[spec].files:
        if not os.path.isfile(os.path.join(root, name)):
            raise InputError(f"Task(files=…): there is no file {os.path.join(root, name)}.")
        read.append((name, files.checksum(os.path.join(root, name))))
    source = TaskSource(spec, _GIVEN, attribute, root, (), tuple(read))
    _loaded[f"{source.digest}:{_GIVEN}:{attribute}"] = _given[spec]
    return source


def _fetch(path: str, spec: str) -> str:
    """Copies a task file from another file system, and the files that its `Task(files=…)` names.

    What is named is found in the source before it runs, as the task may read it when it is
    imported; it may be a module too. What else lies beside it is left there.
    """
    local = os.path.join(_temporary_folder(), path.rpartition("/")[2])
    try:
        files.download(path, local)
    except OSError as error:
        raise InputError(f"--task={spec}: {error}") from error
    with open(local, "rb") as file:
        _fetch_beside(path, os.path.dirname(local), files_named(file.read()))
    return local


def _fetch_beside(path: str, folder: str, names: Sequence[str]) -> None:
    """Copies files that lie beside a task file on another file system, unless they are there."""
    for name in names:
        # Others are refused by `_read_files`, which says where files may lie.
        inside = not os.path.isabs(name) and not {"..", ""} & set(name.split("/"))
        local = os.path.join(folder, name)
        if inside and not os.path.exists(local):
            far = files.join(path.rpartition("/")[0], name)
            os.makedirs(os.path.dirname(local), exist_ok=True)
            try:
                files.download(far, local)
            except OSError as error:
                raise InputError(f"Task(files=…): {far} cannot be read: {error}") from error


def _get(module: ModuleType, attribute: str, spec: str) -> Task:
    if not hasattr(module, attribute):
        raise InputError(f"--task={spec}: {module.__file__} has no {attribute!r}.")
    task = getattr(module, attribute)
    if not isinstance(task, Task):
        raise InputError(
            f"--task={spec}: {attribute} is a {type(task).__name__}, not a tracin_beam.Task."
        )
    return task


def _import(root: str | None, module: str, spec: str) -> ModuleType:
    """Imports a file of the folder root, or, if it is None, whatever Python finds."""
    try:
        if root is None:
            if os.getcwd() not in sys.path:
                sys.path.insert(0, os.getcwd())
            found = importlib.util.find_spec(module)
            with watched(str(found.origin) if found else module):
                return importlib.import_module(module)
        _enter(root)
        path = os.path.join(root, *module.split("."))
        path = path + ".py" if os.path.isfile(path + ".py") else os.path.join(path, "__init__.py")
        known = sys.modules.get(module)
        if known is not None and getattr(known, "__file__", None) == path:
            return known
        if "." in module or os.path.basename(path) == "__init__.py":
            with watched(path):
                return importlib.import_module(module)
        # Two task files of the same name must not be taken for each other.
        unique = f"_tracin_task_{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"
        found = importlib.util.spec_from_file_location(unique, path)
        if found is None or found.loader is None:
            raise ImportError(f"cannot import {path}")
        loaded = importlib.util.module_from_spec(found)
        sys.modules[unique] = loaded
        with watched(path):
            found.loader.exec_module(loaded)
        return loaded
    except (Exception, SystemExit) as error:
        relative = "attempted relative import" in str(error)
        hint = ". Write the task as package.module:name, from the folder of the package" * relative
        raise InputError(
            f"--task={spec}: importing it failed with {type(error).__name__}: {error}{hint}"
        ) from error


def _enter(root: str) -> None:
    """Makes root the first folder to import from, as it would be for `python file.py`.

    It stays so, as imports may come late. What another task's folder gave under a name that is
    found here is forgotten.
    """
    if root in sys.path:
        sys.path.remove(root)
    sys.path.insert(0, root)
    # A folder that has just been written may not be seen otherwise.
    importlib.invalidate_caches()
    others = tuple(other + os.sep for other in _roots - {root})
    _roots.add(root)
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None) or ""
        top = os.path.join(root, name.split(".")[0])
        inside = file.startswith(root + os.sep)
        if not inside and file.startswith(others) and _is_module(top):
            del sys.modules[name]


def _is_module(path: str) -> bool:
    return os.path.isfile(path + ".py") or os.path.isdir(path)


def _sources(root: str, main: ModuleType) -> dict[str, bytes]:
    """Sources of the modules under root that are loaded, libraries and this package left out."""
    libraries = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    libraries.add(os.path.realpath(sysconfig.get_path("stdlib")))
    ours = {__name__.split(".")[0], "pipelines"}
    top = main.__name__.split(".")[0]
    found = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py"):
            continue
        path = os.path.abspath(path)
        if not path.startswith(root + os.sep) or name.split(".")[0] in ours:
            continue
        # Only the task's own package is sent of those that are installed.
        inside = any(os.path.realpath(path).startswith(lib + os.sep) for lib in libraries)
        if inside and name.split(".")[0] != top:
            continue
        if name == "__main__" and module is not main:
            continue
        with open(path, "rb") as file:
            found[os.path.relpath(path, root)] = file.read()
    return found
