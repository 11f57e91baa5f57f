"""What the user brings: a model, a loss and a way to read examples."""

import dataclasses
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

from tracin_beam.errors import InputError
from tracin_beam.storage import files

T = TypeVar("T")

# What `Task.kind` may be.
KINDS = ("classification", "multilabel", "regression", "other")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model whose training is to be explained.

    Attributes:
      model: a function without arguments that builds the `keras.Model`; weights come from each
        checkpoint. Layers that were frozen in training should be frozen here as well.
      loss: the loss of the training: a `keras.losses.Loss`, the name of one, or a function of
        (y_true, y_pred). Of a model with several outputs y_pred has their structure.
      parse: a function that TensorFlow traces, from serialised records, `tf.string` [B], to a
        dict of batched tensors: "features" (a tensor, or a dict or tuple of them, as the model
        takes), "label", and if wanted "id" and "sample_weight". Examples without an id are
        called "<shard name>#<position>". A class below zero stands for no label; a test example
        may be without one where the target is not its loss.
      predict: a function from the model's output to a prediction for each example, [B] numbers.
        By default the class of highest score or, for one output, its value.
      label_names: names of the classes, for reports.
      kind: what labels and outputs are, where shapes and loss do not tell or mislead:
        "classification", one class of K (scores [B, K], or [B, 1] or [B] for two classes; labels
        are class numbers or one-hot); "multilabel", any of K (labels [B, K]); "regression",
        numbers; "other". Labels and predictions of a multilabel task are null in the tables.
    """

    model: Callable[[], Any]
    loss: Any
    parse: Callable[[Any], Mapping[str, Any]]
    predict: Callable[[Any], Any] | None = None
    label_names: Sequence[str] | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"Task(kind={self.kind!r}): take one of {', '.join(KINDS)}.")


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """A task as it travels to workers: the Python source of the modules it needs.

    Attributes:
      name: as in `--task`, for messages.
      module: the module to import.
      attribute: the name of the task in it.
      root: folder the files were found in, used again where it still holds the same files.
      files: (path relative to root, source) of every module of the user's that the task imported.
    """

    name: str
    module: str
    attribute: str
    root: str
    files: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """Identity of the sources."""
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
        for path, source in self.files:
            try:
                with open(os.path.join(self.root, path), encoding="utf-8") as file:
                    if file.read() != source:
                        return False
            except OSError:
                return False
        return True

    def _unpack(self) -> str:
        root = tempfile.mkdtemp(prefix="tracin_task_")
        for path, source in self.files:
            target = os.path.join(root, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w", encoding="utf-8") as file:
                file.write(source)
        return root


_loaded: dict[str, Task] = {}
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
    location, _, attribute = spec.rpartition(":")
    if not location or not attribute.isidentifier():
        raise InputError(f"--task={spec}: write file.py:name or package.module:name.")
    if location.endswith(".py"):
        path = os.path.abspath(location) if files.is_local(location) else _fetch(location, spec)
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

    def source() -> TaskSource:
        files = _sources(root, imported)
        result = TaskSource(spec, module, attribute, root, files)
        _loaded[f"{result.digest}:{module}:{attribute}"] = task
        return result

    return task, source


def _fetch(path: str, spec: str) -> str:
    """Copies a task file from another file system; what lies beside it is left there."""
    local = os.path.join(tempfile.mkdtemp(prefix="tracin_task_"), path.rpartition("/")[2])
    try:
        files.download(path, local)
    except OSError as error:
        raise InputError(f"--task={spec}: {error}") from error
    return local


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
            return importlib.import_module(module)
        _enter(root)
        path = os.path.join(root, *module.split("."))
        path = path + ".py" if os.path.isfile(path + ".py") else os.path.join(path, "__init__.py")
        known = sys.modules.get(module)
        if known is not None and getattr(known, "__file__", None) == path:
            return known
        if "." in module or os.path.basename(path) == "__init__.py":
            return importlib.import_module(module)
        # Two task files of the same name must not be taken for each other.
        unique = f"_tracin_task_{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"
        found = importlib.util.spec_from_file_location(unique, path)
        if found is None or found.loader is None:
            raise ImportError(f"cannot import {path}")
        loaded = importlib.util.module_from_spec(found)
        sys.modules[unique] = loaded
        found.loader.exec_module(loaded)
        return loaded
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--task={spec}: importing it failed with {type(error).__name__}: {error}"
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


def _sources(root: str, main: ModuleType) -> tuple[tuple[str, str], ...]:
    """Sources of the modules under root that are loaded, libraries and this package left out."""
    libraries = {os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    libraries.add(os.path.realpath(sysconfig.get_path("stdlib")))
    ours = {__name__.split(".")[0], "pipelines"}
    top = main.__name__.split(".")[0]
    files = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py"):
            continue
        path = os.path.abspath(path)
        if not path.startswith(root + os.sep) or name.split(".")[0] in ours:
            continue
        # Of installed packages only the task's own is sent.
        inside = any(os.path.realpath(path).startswith(lib + os.sep) for lib in libraries)
        if inside and name.split(".")[0] != top:
            continue
        if name == "__main__" and module is not main:
            continue
        with open(path, encoding="utf-8") as file:
            files[os.path.relpath(path, root)] = file.read()
    return tuple(sorted(files.items()))
