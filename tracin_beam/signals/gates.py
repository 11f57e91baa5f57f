"""Gates: conditions on the metrics of a night, which warn or end the run with an error.

A gate is an expression such as `new_suspects.mislabelled >= 10 and suspects_rate > 2 * baseline`.
It is parsed with Python's own parser, and only what `_ALLOWED` names is taken from it; nothing of
it is ever run as Python.
"""

import ast
import dataclasses
import difflib
import math
import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracin_beam.errors import InputError

WARN, ERROR = "warn", "error"
RECENT = 7  # nights whose median the baseline is
# Standard errors that a difference from a baseline must have to count as one.
_SURE = 3.0
_LONGEST, _DEEPEST = 1000, 40
# A MAD of normal values times this is their standard deviation.
_MAD = 1.4826

_ALLOWED = (
    "names of metrics, numbers, + - * /, < <= > >= == !=, and, or, not, parentheses, `baseline` "
    "(the median of the same metric over recent nights), `last` (last night's), "
    '`baseline("2026-11-22")` (that night\'s), and max(by_shard.NAME), min(by_class.NAME) and so on'
)

DEFAULT_WARNINGS = (
    "new_suspicious_shards > 0",
    "suspects_rate > 1.5 * baseline and suspects >= 20",
    "accuracy < 0.95 * baseline",
    "mean_loss > 1.5 * baseline",
)
"""Gates of a run that states none. They hold their peace on data that does not change in kind."""


class _Unknown(Exception):
    """A value that this night does not have; the message says why."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """A parsed condition.

    Attributes:
      text: as it was written.
      level: "warn" or "error".
      tree: of the expression.
      default: whether it is one of ours, which is left out where a night lacks its metric.
    """

    text: str
    level: str
    tree: ast.expr
    default: bool = False


def parse(text: str, level: str, default: bool = False) -> Gate:
    """Reads a gate, without looking at any metric.

    Args:
      text: the condition.
      level: "warn" or "error".
      default: as of `Gate`.

    Raises:
      InputError: it is not an expression of the kind above. The message says which gate, what in
        it and at which character, and what is allowed.
    """
    where = f"--{level}_if={text!r:.200}"
    if len(text) > _LONGEST:
        raise InputError(f"{where} is longer than {_LONGEST} characters.")
    if "\x00" in text:
        raise InputError(f"{where} has a null character in it.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        at = getattr(error, "offset", None)
        place = f" at character {at}" if at else ""
        said = getattr(error, "msg", None) or error
        raise InputError(
            f"{where} is no condition{place} ({said}); allowed are {_ALLOWED}."
        ) from None
    _check(tree, where)
    return Gate(text.strip(), level, tree, default)


def parse_all(warn_if: Sequence[str] | None, error_if: Sequence[str]) -> list[Gate]:
    """The gates of a run.

    Args:
      warn_if: conditions that warn; None for `DEFAULT_WARNINGS`.
      error_if: conditions that end the run with an error.

    Raises:
      InputError: as of `parse`.
    """
    given = [parse(text, WARN) for text in warn_if or ()]
    if warn_if is None:
        given = [parse(text, WARN, default=True) for text in DEFAULT_WARNINGS]
    return [*given, *(parse(text, ERROR) for text in error_if)]


def evaluate(
    gates: Sequence[Gate], night: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Tells which gates fire.

    A comparison with a baseline holds only where the difference is beyond three standard errors:
    Poisson's for counts, the binomial for rates, and in all cases the spread of the recent nights
    (from their median absolute deviation), so that small counts and restless metrics raise no
    alarm. Where there is no earlier night such a comparison is unknown, and an unknown gate does
    not fire.

    Args:
      gates: as of `parse_all`.
      night: "metrics" ({name: number}), and where known "by_class", "by_shard" and
        "by_cohort" ({key: {name: number}}).
      history: the same of earlier nights, oldest first, with their "date".

    Returns:
      For each gate "gate", "level", "value" and "baseline" (of the first comparison, None where
      unknown), "fired" and "reason". Gates by default whose metrics this task does not have are
      left out.

    Raises:
      InputError: a gate names a metric that there is not.
    """
    results = []
    for gate in gates:
        at_work = _Evaluation(gate, night, history)
        try:
            found = at_work.truth(gate.tree)
        except InputError:
            if gate.default:
                continue
            raise
        fired = found is True
        results.append(
            {
                "gate": gate.text,
                "level": gate.level,
                "value": at_work.first[0] if at_work.first else None,
                "baseline": at_work.first[1] if at_work.first else None,
                "fired": fired,
                "reason": "; ".join(dict.fromkeys(at_work.said)),
            }
        )
    return results


def status(results: Sequence[Mapping[str, Any]]) -> int:
    """The exit status: 3 where an error gate has fired, otherwise 0."""
    return 3 if any(r["fired"] and r["level"] == ERROR for r in results) else 0


def lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to print of the gates, worst last, so that the reason is the last line of the output."""
    fired = [r for r in results if r["fired"]]
    said = [f"warning: {r['gate']}: {r['reason']}" for r in fired if r["level"] == WARN]
    said += [f"error: {r['gate']}: {r['reason']}" for r in fired if r["level"] == ERROR]
    return said or [f"no gate fired ({len(results)} looked at)"]


def name_of(metric: str) -> str:
    """A metric's name as an expression writes it: `suspects.conflicting_duplicate`."""
    return re.sub(r"[^\w.]", "_", metric)


_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[[float, float], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_ENDS: dict[str, Callable[[Sequence[float]], float]] = {"max": max, "min": min}
_GROUPS = ("by_shard", "by_class", "by_cohort")
_BASELINES = ("baseline", "last")


def _check(node: ast.expr, where: str, condition: bool = True, depth: int = 0) -> None:
    """Refuses what is not in the language: a condition, or a number in one."""
    conditions: list[ast.expr] = []
    numbers: list[ast.expr] = []
    said = "it is nested too deeply" if depth > _DEEPEST else ""
    is_not = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    if said:
        pass
    elif isinstance(node, ast.BoolOp | ast.Compare) or is_not:
        if not condition:
            said = "a condition stands where a number must"
        elif isinstance(node, ast.Compare):
            numbers, said = [node.left, *node.comparators], _comparison_problem(node)
        else:
            conditions = node.values if isinstance(node, ast.BoolOp) else [node.operand]  # type: ignore[attr-defined]
    elif condition:
        said = f"{ast.unparse(node):.60} compares nothing: write a condition such as examples < 100"
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Invert):
        numbers = [node.operand]
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        numbers = [node.left, node.right]
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            said = f"{node.value!r:.60} is not a number"
        elif not -1e300 < node.value < 1e300:
            said = "a number is too large"
    elif isinstance(node, ast.Call):
        said = _call_problem(node)
    elif _dotted(node) is None:
        said = f"{ast.unparse(node):.60} is not allowed"
    if said:
        at = node.col_offset + 1
        raise InputError(f"{where}, character {at}: {said}; allowed are {_ALLOWED}.")
    for part in conditions:
        _check(part, where, True, depth + 1)
    for part in numbers:
        _check(part, where, False, depth + 1)


def _comparison_problem(node: ast.Compare) -> str:
    if not all(type(op) in _COMPARISONS for op in node.ops):
        return "in and is are not allowed"
    metrics = {_dotted(metric) for metric in _metrics_of(node)}
    if any(map(_is_baseline, ast.walk(node))) and len(metrics) != 1:
        return (
            "a comparison with a baseline must have exactly one metric, whose baseline it is, and "
            f"this has {len(metrics)}"
        )
    return ""


def _call_problem(node: ast.Call) -> str:
    called = node.func.id if isinstance(node.func, ast.Name) else ""
    plain = len(node.args) == 1 and not node.keywords
    if called in _ENDS and plain:
        group, _, name = (_dotted(node.args[0]) or "").partition(".")
        if group in _GROUPS and name:
            return ""
        return f"{called} takes by_shard.NAME, by_class.NAME or by_cohort.NAME"
    if called == "baseline" and plain and isinstance(node.args[0], ast.Constant):
        date = node.args[0].value
        if isinstance(date, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            return ""
    if called == "baseline":
        return 'baseline takes a date, as in baseline("2026-11-22")'
    return f"the call of {ast.unparse(node.func):.60} is not allowed"


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c`, None for what is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := _dotted(node.value)):
        return f"{left}.{node.attr}"
    return None


def _metrics_of(node: ast.expr) -> list[ast.expr]:
    """The metrics in an expression, each occurrence."""
    if (name := _dotted(node)) is not None:
        return [] if name in _BASELINES else [node]
    if isinstance(node, ast.Call):
        return []
    return [m for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)
            for m in _metrics_of(child)]  # fmt: skip


def _is_baseline(node: ast.AST) -> bool:
    named = node.func if isinstance(node, ast.Call) else node
    return isinstance(named, ast.Name) and named.id in _BASELINES


class _Evaluation:
    """One gate on one night."""

    def __init__(
        self, gate: Gate, night: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> None:
        self._where = f"--{gate.level}_if={gate.text!r:.200}"
        self._night, self._history = night, history
        self._metrics = {name_of(k): v for k, v in night.get("metrics", {}).items()}
        self.said: list[str] = []
        self.first: tuple[float, float | None] | None = None

    def truth(self, node: ast.expr) -> bool | None:
        """Kleene's logic: None is unknown."""
        if isinstance(node, ast.BoolOp):
            values = [self.truth(part) for part in node.values]
            decides = isinstance(node.op, ast.Or)
            if decides in values:
                return decides
            return None if None in values else not decides
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.truth(node.operand)
            return None if value is None else not value
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        raise TypeError(f"no condition: {ast.unparse(node)}")  # which `_check` refuses

    def _comparison(self, node: ast.Compare) -> bool | None:
        metrics = _metrics_of(node)
        about = _dotted(metrics[0]) if metrics else None
        try:
            values = [self._number(side, about) for side in (node.left, *node.comparators)]
        except _Unknown as unknown:
            self.said.append(str(unknown))
            return None
        except (ZeroDivisionError, OverflowError):
            self.said.append(f"{ast.unparse(node)} divides by zero, or overflows")
            return None
        base = None
        named = next(filter(_is_baseline, ast.walk(node)), None)  # a call before its function
        if isinstance(named, ast.expr) and about is not None:
            base = self._baseline(named, about)
        if self.first is None:
            own = self._metric(about) if about is not None else values[0]
            self.first = (own, base)
        holds = all(
            _COMPARISONS[type(op)][1](left, right)
            for op, left, right in zip(node.ops, values, values[1:], strict=False)
        )
        signs = [_COMPARISONS[type(op)][0] for op in node.ops]
        text = _shown(values[0]) + "".join(
            f" {sign} {_shown(value)}" for sign, value in zip(signs, values[1:], strict=True)
        )
        said = f"{ast.unparse(node)} is {text}"
        if base is not None and about is not None:
            said += f" (baseline {_shown(base)})"
        if not holds:
            self.said.append(f"not so: {said}")
            return False
        if base is not None and about is not None and len(values) == 2:
            error = self._standard_error(about, min(map(abs, values)))
            if abs(values[0] - values[1]) <= _SURE * error:
                self.said.append(f"within {_SURE:g} standard errors: {said}")
                return False
        self.said.append(said)
        return True

    def _number(self, node: ast.expr, about: str | None) -> float:
        if isinstance(node, ast.Constant):
            return float(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            value = self._number(node.operand, about)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp):
            left, right = self._number(node.left, about), self._number(node.right, about)
            return _ARITHMETIC[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in _ENDS:
                return self._end(node.func.id, _dotted(node.args[0]) or "")
            return self._baseline(node, about or "")
        name = _dotted(node)
        if name in _BASELINES:
            return self._baseline(node, about or "")
        if name is not None:
            return self._metric(name)
        raise TypeError(f"no number: {ast.unparse(node)}")  # which `_check` refuses

    def _metric(self, name: str) -> float:
        if name not in self._metrics:
            near = difflib.get_close_matches(name, self._metrics, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise InputError(
                f"{self._where}: there is no metric {name!r:.60}. {hint}There are "
                f"{', '.join(sorted(self._metrics))}."
            )
        value = self._metrics[name]
        if value is None or not math.isfinite(value):
            raise _Unknown(f"{name} has no value tonight")
        return float(value)

    def _end(self, end: str, dotted: str) -> float:
        group, _, name = dotted.partition(".")
        rows = self._night.get(group, {}).values()
        values = [v for row in rows for k, v in row.items() if name_of(k) == name]
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if not numbers:
            raise _Unknown(f"{dotted} has no value tonight")
        return _ENDS[end](numbers)

    def _earlier(self, name: str) -> dict[str, float]:
        """The metric on earlier nights that have it, by date."""
        found = {}
        for night in self._history:
            for key, value in night.get("metrics", {}).items():
                if name_of(key) == name and value is not None and math.isfinite(value):
                    found[str(night.get("date", ""))] = float(value)
        return found

    def _baseline(self, node: ast.expr, about: str) -> float:
        earlier = self._earlier(about)
        if isinstance(node, ast.Call):
            date = node.args[0].value  # type: ignore[attr-defined]
            if date not in earlier:
                raise _Unknown(f"{about} of {date} is not known")
            return earlier[date]
        if not earlier:
            raise _Unknown(f"no earlier night has {about}")
        values = list(earlier.values())
        if isinstance(node, ast.Name) and node.id == "last":
            return values[-1]
        return statistics.median(values[-RECENT:])

    def _standard_error(self, about: str, smaller: float) -> float:
        """Of the difference of a metric from a bound that a baseline gives."""
        recent = list(self._earlier(about).values())[-RECENT:]
        spread = 0.0
        if len(recent) > 2:
            middle = statistics.median(recent)
            spread = _MAD * statistics.median(abs(value - middle) for value in recent)
        if about.endswith("_rate") or about == "accuracy":
            of = "examples_new" if about.startswith("new_") else "examples"
            count = self._metrics.get(of) or 0
            share = min(max(smaller, 1 / max(count, 1)), 1.0)
            variance = share * (1 - share) / max(count, 1)
        elif isinstance(self._metrics[about], int):
            variance = max(smaller, 1.0)
        else:
            variance = 0.0
        return math.sqrt(variance + spread**2)


def _shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 or not float(value).is_integer() else f"{value:.0f}"
