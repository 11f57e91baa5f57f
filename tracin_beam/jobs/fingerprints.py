"""Digests of what determines a result, so that a change is noticed and nothing is done twice."""

import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tracin_beam.config import Config
from tracin_beam.gradients.engine import Engine
from tracin_beam.inputs import sources
from tracin_beam.inputs.task import Task, TaskSource
from tracin_beam.inputs.values import Values, is_library, is_users
from tracin_beam.storage import embeddings, runs

_log = logging.getLogger(__name__)

# Raised when the same inputs give other results than before.
_VERSION = 5
_PARTS = ("model", "loss", "parse", "predict")
_CODE = "code of "


def of_task(task: Task, engine: Engine, config: Config, source: TaskSource) -> dict[str, str]:
    """What embeddings depend on besides shards and checkpoints, by what a user calls it.

    That is what the task's objects hold, and the source and the global values of every module of
    the user's that the task needs.
    """
    flags = {**config.embedding_flags(), "dim": engine.dim}  # not "auto"
    main = _main_module(source)
    modules = _imported(main, source.root) if main else {}
    values = Values(source.root, lambda name: name in modules)
    parts = {name: runs.digest(values.plain(getattr(task, name))) for name in _PARTS}
    parts["model"] = runs.digest([parts["model"], values.model(engine.model)])
    code = _code(modules, main, source, values) if main else {}
    if values.unknown:
        _log.warning(
            "the task holds %s, which do not say what is in them: a change there is not noticed",
            ", ".join(values.unknown),
        )
    return {
        "version": f"{_VERSION} {embeddings.LAYOUT}",
        **parts,
        "files": runs.digest(source.read),
        "kind": runs.digest(engine.described_kind()),
        **code,
        **{name: str(value) for name, value in flags.items()},
    }


def of_target(task: Task, target: str, source: TaskSource) -> str:
    """A digest of a function of `Task.targets`, and of the values it uses; of others the name."""
    if target not in task.targets:
        return target
    values = Values(source.root, lambda _: False)
    return runs.digest([target, values.plain(task.targets[target])])


def changes(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, in words; a file of code is named only if no part of the task is."""
    words = runs.changes(earlier, now)
    if set(words) & {"version", "kind", "files", *_PARTS}:
        words = [word for word in words if not word.startswith(_CODE)]
    return words


def _main_module(source: TaskSource) -> ModuleType | None:
    """The module that defines a task, if it is a file."""
    path = os.path.join(source.root, *source.module.split("."))
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) in (path + ".py", os.path.join(path, "__init__.py")):
            return module
    return None


def _imported(main: ModuleType, root: str) -> dict[str, ModuleType]:
    """The user's modules that a module imports, with all that these import, and itself."""
    found = {main.__name__: main}
    waiting = [main]
    while waiting:
        module = waiting.pop()
        text = _text(module)
        names = sources.imported(text, module.__package__ or "")
        if sources.is_dynamic(text):
            names |= {name for name, other in list(sys.modules.items()) if _is_in(other, root)}
        for name in sorted(names):
            other = sys.modules.get(name)
            path = getattr(other, "__file__", None) or ""
            if other is None or name in found or not path.endswith(".py") or not is_users(name):
                continue
            found[name] = other
            waiting.append(other)
    return found


def _is_in(module: Any, root: str) -> bool:
    path = getattr(module, "__file__", None) or ""
    return path.startswith(root + os.sep) and not is_library(path)


def _text(module: ModuleType) -> str:
    import tokenize

    with tokenize.open(str(module.__file__)) as file:
        return file.read()


def _code(
    modules: Mapping[str, ModuleType], main: ModuleType, source: TaskSource, values: Values
) -> dict[str, str]:
    texts = {name: _text(module) for name, module in modules.items()}
    found, unstable = {}, []
    for name, part in sources.used(texts, main.__name__, source.attribute).items():
        module = modules[name]
        held = {
            n: values.plain(value)
            for n in part.names
            if not isinstance(value := getattr(module, n, None), Task | ModuleType | type)
        }
        path = str(module.__file__)
        inside = path.startswith(source.root + os.sep)
        path = os.path.relpath(path, source.root) if inside else os.path.basename(path)
        unstable += [
            f"{n} of {path}"
            for n in part.unstable
            if not isinstance(value := getattr(module, n, None), Task) and not callable(value)
        ]
        found[f"{_CODE}{'the task' if module is main else path}"] = runs.digest([part.code, held])
    if unstable:
        _log.info(
            "%s may have another value in every process: only what the source says of it is "
            "compared with earlier runs",
            ", ".join(sorted(unstable)),
        )
    return found
