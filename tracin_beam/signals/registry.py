"""Signals: one column for each training example, from what is known of it at every checkpoint.

To add a column to the self-influence table, write in a module of this package

    @signal("mean_loss", needs=("loss",))
    def mean_loss(rows):
      \"\"\"Mean loss over the checkpoints.\"\"\"
      return rows["loss"].mean(axis=1)

The docstring's first line is the column's documentation. A signal that compares an example with all
others names statistics of the whole training set, and takes their values as its second argument:

    @statistic("loss_sum", needs=("loss",))
    def loss_sum(rows):
      return np.array([rows["loss"].sum(), rows["loss"].size])

    @signal("loss_above_mean", needs=("loss",), statistics=("loss_sum",))
    def loss_above_mean(rows, statistics):
      \"\"\"Loss over the checkpoints, less that of all examples.\"\"\"
      total, count = statistics["loss_sum"]
      return rows["loss"].mean(axis=1) - total / count
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tracin_beam import signals
from tracin_beam.storage.embeddings import COMPUTED, Embeddings


@dataclasses.dataclass(frozen=True)
class Rows:
    """n training examples at all C checkpoints; `rows["loss"]` is one of their columns.

    Columns are those of the embedding record, float64 [n, C], and "embedding" float32 [n, C, D]. A
    function finds only those that it says it needs.

    Attributes:
      learning_rates: float64 [C].
      columns: by name.
    """

    learning_rates: np.ndarray
    columns: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def only(self, names: Iterable[str]) -> "Rows":
        return Rows(self.learning_rates, {name: self.columns[name] for name in names})


def rows_of(
    parts: Sequence[Embeddings], learning_rates: Sequence[float], needs: Iterable[str]
) -> Rows:
    """The rows that embeddings of the same examples at every checkpoint give."""
    columns = {}
    for name in needs:
        values = np.stack([getattr(part, name) for part in parts], axis=1)
        columns[name] = values if name == "embedding" else values.astype(np.float64)
    return Rows(np.asarray(learning_rates, np.float64), columns)


@dataclasses.dataclass(frozen=True)
class Signal:
    """A registered signal.

    Attributes:
      name: of its column.
      about: what it is, in a line.
      function: from `Rows`, and the values of its statistics if it names some, to float [n], or
        [n, C] where `by_checkpoint`.
      needs: columns of the rows.
      statistics: names.
      by_checkpoint: whether it has a value for each checkpoint.
    """

    name: str
    about: str
    function: Callable[..., np.ndarray]
    needs: tuple[str, ...]
    statistics: tuple[str, ...]
    by_checkpoint: bool

    def of(self, rows: Rows, statistics: Mapping[str, Any]) -> np.ndarray:
        """The column: float64 [n] or [n, C].

        Raises:
          ValueError: the function gives another shape.
        """
        given = [{name: statistics[name] for name in self.statistics}] if self.statistics else []
        values = np.asarray(self.function(rows.only(self.needs), *given), np.float64)
        n, c = len(next(iter(rows.columns.values()))), len(rows.learning_rates)
        expected = (n, c) if self.by_checkpoint else (n,)
        if values.shape != expected:
            raise ValueError(f"the signal {self.name} gives {values.shape}, not {expected}")
        return values


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A registered statistic of the whole training set.

    Attributes:
      name: for the signals.
      function: from the `Rows` of some examples to a value that pickles.
      merge: puts two such values together, whatever the order.
      needs: columns of the rows.
    """

    name: str
    function: Callable[[Rows], Any]
    merge: Callable[[Any, Any], Any]
    needs: tuple[str, ...]


_signals: dict[str, Signal] = {}
_statistics: dict[str, Statistic] = {}


def signal(
    name: str,
    *,
    needs: Sequence[str],
    statistics: Sequence[str] = (),
    by_checkpoint: bool = False,
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Registers a signal; see the top of this module.

    Raises:
      ValueError: the name is taken, a need is no column, or there is no docstring.
    """

    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        about = (function.__doc__ or "").strip().partition("\n")[0]
        _check(name, needs, _signals)
        if not about:
            raise ValueError(f"the signal {name} needs a docstring, which documents its column")
        _signals[name] = Signal(
            name, about, function, tuple(needs), tuple(statistics), by_checkpoint
        )
        return function

    return register


def statistic(
    name: str, *, needs: Sequence[str], merge: Callable[[Any, Any], Any] = np.add
) -> Callable[[Callable[[Rows], Any]], Callable[[Rows], Any]]:
    """Registers a statistic; see the top of this module.

    Raises:
      ValueError: the name is taken, or a need is no column.
    """

    def register(function: Callable[[Rows], Any]) -> Callable[[Rows], Any]:
        _check(name, needs, _statistics)
        _statistics[name] = Statistic(name, function, merge, tuple(needs))
        return function

    return register


def _check(name: str, needs: Sequence[str], known: Mapping[str, Any]) -> None:
    if name in known:
        raise ValueError(f"there are two of the name {name}")
    if unknown := set(needs) - set(COMPUTED):
        raise ValueError(f"{name} needs {sorted(unknown)[0]}, which embeddings do not have")


@functools.cache
def _load() -> None:
    for module in pkgutil.iter_modules(signals.__path__, f"{signals.__name__}."):
        importlib.import_module(module.name)


def every() -> list[Signal]:
    """All signals, in the order of their columns: modules by name, and as they stand in them."""
    _load()
    return list(_signals.values())


def documented_rows() -> str:
    """The signals' rows of the table of columns in docs/tables.md."""
    types = {False: "float64", True: "list of float64"}
    rows = [f"| `{one.name}` | {types[one.by_checkpoint]} | {one.about} |" for one in every()]
    return "\n".join(rows) + "\n"


def statistics_of(some: Iterable[Signal]) -> list[Statistic]:
    """The statistics that signals name, each once.

    Raises:
      ValueError: one is not registered.
    """
    _load()
    names = sorted({name for one in some for name in one.statistics})
    if unknown := [name for name in names if name not in _statistics]:
        raise ValueError(f"there is no statistic {unknown[0]}")
    return [_statistics[name] for name in names]
