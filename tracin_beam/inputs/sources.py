"""What of a user's source code can touch a result, read from its syntax and never run.

From the statement that defines a task all top-level statements are followed whose names it
mentions, through every module of the user's that is imported on the way. Names are compared as
words, without scopes, so that a statement is rather taken in without need than left out. Comments,
docstrings, formatting, logging, printing, what stands under `if __name__ == "__main__"` and names
of classes for display change nothing, nor does the version of Python.
"""

import ast
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

_QUIET_MODULES = {"logging", "warnings"}
_LOGGERS = {"getLogger", "get_logger"}
# Whatever mentions one of these may reach any name.
_DYNAMIC = {"globals", "eval", "exec", "import_module", "__import__", "vars"}
# What gives another value in every process.
_UNSTABLE = {
    *("time", "datetime", "now", "today", "utcnow", "perf_counter", "monotonic", "date"),
    *("random", "secrets", "urandom", "default_rng", "RandomState", "Generator", "rand", "randn"),
    *("uuid", "uuid1", "uuid4", "getpid", "gethostname", "getuser", "getcwd", "cwd"),
    *("tempfile", "mkdtemp", "mkstemp", "shuffle", "randint", "hash"),
}
_CHANGES = {
    *("append", "extend", "insert", "add", "update", "setdefault"),
    *("pop", "popitem", "remove", "discard", "clear", "sort", "reverse", "assign"),
}


# Arguments of a task that training embeddings do not depend on; a target is compared by itself.
_APART = ("label_names", "files", "relabel", "show", "targets")


@dataclasses.dataclass(frozen=True)
class Part:
    """What is used of a module.

    Attributes:
      code: digest of its statements.
      names: global names whose values matter, in order.
      unstable: global names that are used, but whose value may differ from process to process, or
        is changed by functions; their source stands for them.
    """

    code: str
    names: tuple[str, ...]
    unstable: tuple[str, ...]


def used(modules: Mapping[str, str], main: str, attribute: str) -> dict[str, Part]:
    """The parts of modules that a global name of one of them depends on.

    Args:
      modules: source text by full name of the module, as in `sys.modules`.
      main: the module that defines the name.
      attribute: the name.

    Returns:
      By module; those of which nothing is used are left out.
    """
    statements = [s for name, text in modules.items() for s in _statements(name, text)]
    by_name: dict[str, list[_Statement]] = {}
    for statement in statements:
        for name in statement.defines:
            by_name.setdefault(name, []).append(statement)
    words: dict[str, list[str]] = {}
    for module in modules:
        words.setdefault(module.rpartition(".")[2], []).append(module)
    reached: set[_Statement] = set()
    entered: set[str] = set()
    waiting = [s for s in by_name.get(attribute, statements) if s.module == main] or statements
    while waiting:
        statement = waiting.pop()
        if statement in reached:
            continue
        reached.add(statement)
        if statement.dynamic:
            waiting += statements
        for name in statement.mentions:
            waiting += by_name.get(name, ())
        # A module that is used has run as a whole.
        mentioned = [m for word in statement.mentions & words.keys() for m in words[word]]
        for module in [statement.module, *mentioned]:
            if module not in entered:
                entered.add(module)
                waiting += [s for s in statements if s.module == module and s.acts]
    parts = {}
    for module in modules:
        mine = [s for s in statements if s.module == module and s in reached]
        if mine:
            unstable = _unstable([s for s in statements if s.module == module])
            held = dict.fromkeys(name for s in mine for name in s.assigns)
            parts[module] = Part(
                _digest([s.code for s in mine]),
                tuple(name for name in held if name not in unstable),
                tuple(name for name in held if name in unstable),
            )
    return parts


def of_function(text: str, quiet: set[str]) -> str:
    """Digest of a function's or a class's own source, indented or not.

    Args:
      text: the source.
      quiet: names of loggers and the like in it.

    Raises:
      SyntaxError: it is a piece of a statement, as the source of a lambda may be.
    """
    indented = text[:1] in (" ", "\t")
    tree = ast.parse("if True:\n" + text if indented else text)
    body = tree.body[0].body if indented else tree.body  # type: ignore[attr-defined]
    return _digest([_dump(_Quiet({"print", *quiet}).visit(node)) for node in body])


def imported(text: str, package: str) -> set[str]:
    """Full names that a module of this package may import, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                parents = parts[: len(parts) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:n]) for name in found for n in range(1, name.count(".") + 2)}


def files_named(text: str | bytes) -> list[str]:
    """The files that `Task(files=…)` names in a source, as far as they are written out.

    None of a source that does not parse.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    given = [
        keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Task"
        for keyword in node.keywords
        if keyword.arg == "files"
    ]
    written = [n for value in given if isinstance(value, ast.List | ast.Tuple) for n in value.elts]
    return [n.value for n in written if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def is_dynamic(text: str) -> bool:
    """Whether a module may reach others by names that are not in its source."""
    return bool(_words(ast.parse(text)) & {"import_module", "__import__", "exec", "eval"})


@dataclasses.dataclass(frozen=True, eq=False)
class _Statement:
    """A top-level statement.

    Attributes:
      module: its module.
      code: what it says, without place.
      defines: names that it may give a value, or whose value it may change.
      assigns: names that it assigns, other than by def, class or import.
      mentions: words in it.
      names: of variables in it.
      unstable: whether it may have another result in another process.
      acts: whether running it may do more than defining its names.
      dynamic: whether it may reach any name.
      changed: names that functions in it may change.
    """

    module: str
    code: str
    defines: frozenset[str]
    assigns: tuple[str, ...]
    mentions: frozenset[str]
    names: frozenset[str]
    unstable: bool
    acts: bool
    dynamic: bool
    changed: frozenset[str]


def _statements(module: str, text: str) -> Iterator[_Statement]:
    tree = ast.parse(text)
    tree = _Quiet(_loggers(tree)).visit(tree)
    for node in tree.body:
        words = _words(node)
        defines, assigns = _defined(node)
        yield _Statement(
            module,
            _dump(node),
            frozenset(defines),
            tuple(assigns),
            frozenset(words),
            frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name)),
            bool(_UNSTABLE & _spoken(node)),
            not isinstance(
                node,
                ast.FunctionDef
                | ast.AsyncFunctionDef
                | ast.ClassDef
                | ast.Import
                | ast.ImportFrom
                | ast.Assign
                | ast.AnnAssign
                | ast.Pass,
            ),
            bool(words & _DYNAMIC) or _gets_by_made_up_name(node),
            frozenset(_changed_by_functions(node)),
        )


def _defined(node: ast.stmt) -> tuple[set[str], list[str]]:
    """Names that a statement may define or change, and those that hold values."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        # A decorator may put it into a register.
        return {node.name, *(w for d in node.decorator_list for w in _words(d))}, []
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {a.asname or a.name.split(".")[0] for a in node.names}, []
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        return set(names), names
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    stored = [
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    ]
    inner = [n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {*names, *inner}, stored


def _words(node: ast.AST) -> set[str]:
    """Names, attributes, imported names and strings that could be names."""
    words = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Name):
            words.add(n.id)
        elif isinstance(n, ast.Attribute):
            words.add(n.attr)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isidentifier():
            words.add(n.value)
        elif isinstance(n, ast.Import | ast.ImportFrom):
            words |= {part for alias in n.names for part in alias.name.split(".")}
            words |= set((getattr(n, "module", None) or "").split("."))
    return words


def _gets_by_made_up_name(node: ast.AST) -> bool:
    return any(
        isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id == "getattr"
        and len(n.args) > 1
        and not isinstance(n.args[1], ast.Constant)
        for n in ast.walk(node)
    )


def _spoken(node: ast.AST) -> set[str]:
    """Names, attributes and imported names, without strings."""
    strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return names | (_words(node) - strings)


def _changed_by_functions(node: ast.stmt) -> Iterator[str]:
    """Names of what functions in a statement store into, such as caches."""
    for function in ast.walk(node):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        inside = list(ast.walk(function))
        own = {n.arg for n in inside if isinstance(n, ast.arg)}
        own |= {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for n in inside:
            roots: list[str] = []
            if isinstance(n, ast.Global):
                yield from n.names
            elif isinstance(n, ast.Subscript | ast.Attribute) and isinstance(n.ctx, ast.Store):
                roots = _root(n)
            elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute):
                roots = _root(n.func) if n.func.attr in _CHANGES else []
            yield from (name for name in roots if name not in own)


def _root(node: ast.expr) -> list[str]:
    """The name that a chain of attributes, items and calls begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return [node.id] if isinstance(node, ast.Name) else []


def _unstable(statements: list[_Statement]) -> set[str]:
    """Names of a module whose values depend on time, chance or what ran before."""
    held = {name for s in statements for name in s.assigns}
    found = {name for s in statements for name in s.changed}
    while True:
        more = {
            name
            for s in statements
            if s.unstable or s.names & found
            for name in s.defines
            # A call on a module, as tf.random.set_seed, leaves the module what it is.
            if not s.acts or name in held
        }
        if more <= found:
            return found
        found |= more


def _loggers(tree: ast.Module) -> set[str]:
    """Names under which a module knows logging, warnings and its loggers."""
    found = {"print"}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None)
            for alias in node.names:
                if alias.name in _QUIET_MODULES or base in _QUIET_MODULES:
                    found.add(alias.asname or alias.name)
        elif isinstance(node, ast.Assign) and _words(node.value) & _LOGGERS:
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return found


class _Quiet(ast.NodeTransformer):
    """Takes out docstrings, logging and what only a script does, none of which changes a result."""

    def __init__(self, loggers: set[str]) -> None:
        self._loggers = loggers

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call) and (
            set(_root(node.value)) & self._loggers or _words(node.value.func) & _LOGGERS
        ):
            return None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
        test = node.test
        if isinstance(test, ast.Compare) and _words(test) >= {"__name__", "__main__"}:
            return [self.visit(statement) for statement in node.orelse] or None
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "Task":
            node.keywords = [k for k in node.keywords if k.arg not in _APART]
            node.args = node.args[:4]
        return self.generic_visit(node)


def _dump(node: Any) -> str:
    """The syntax as text, the same in every version of Python."""
    if isinstance(node, ast.AST):
        given = [
            f"{name}={_dump(value)}"
            for name, value in ast.iter_fields(node)
            if value not in (None, []) and name not in ("ctx", "type_comment", "kind")
        ]
        if isinstance(node, ast.Constant):
            given = [f"{type(node.value).__name__} {node.value!r}"]
        elif isinstance(node, ast.Set):
            given = sorted(map(_dump, node.elts))
        elif isinstance(node, ast.Dict):
            given = sorted(
                f"{_dump(k)}: {_dump(v)}" for k, v in zip(node.keys, node.values, strict=True)
            )
        return f"{type(node).__name__}({', '.join(given)})"
    if isinstance(node, list):
        return f"[{', '.join(_dump(x) for x in node if not isinstance(x, ast.Pass))}]"
    return repr(node)


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
