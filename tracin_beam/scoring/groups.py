"""Groups of examples and slices of a test set, and the influence of groups on groups.

A score is linear in the query's gradient, so that a training example's scores summed over a set of
test examples are its score for one query, the sum of their gradients. What follows is therefore
exact, and costs as much for a set as for one test example.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tracin_beam.errors import InputError

# What examples may be grouped by.
BY = ("group", "label", "prediction", "shard", "all")
_WORDS = ("wrong", "right")
_NAMED = ("label", "prediction", "group", "shard")


@dataclasses.dataclass(frozen=True)
class Known:
    """What groups and slices may be made of, of n examples of one shard.

    Attributes:
      label, prediction: float [n], NaN where unknown.
      group: text [n], or None where parse gives none.
      shard: its name.
    """

    label: np.ndarray
    prediction: np.ndarray
    group: np.ndarray | None
    shard: str

    def __len__(self) -> int:
        return len(self.label)


def by(text: str) -> tuple[str, str]:
    """What the training and the test set are grouped by, from the value of --group_by.

    Raises:
      InputError: it is none of `BY`.
    """
    parts = text.split(",")
    if len(parts) > 2 or not set(parts) <= set(BY):
        raise InputError(
            f"--group_by={text}: take one of {', '.join(BY)} for both sets, or one for the "
            "training and one for the test set, such as group,label."
        )
    return parts[0], parts[-1]


def names_of(what: str, known: Known) -> np.ndarray:
    """The group of each example: text [n], "" where it is not known."""
    if what == "shard":
        return np.full(len(known), known.shard)
    if what == "all":
        return np.full(len(known), "all")
    if what == "group":
        return np.full(len(known), "") if known.group is None else known.group
    return np.array([number(value) for value in getattr(known, what)], dtype=np.str_)


def number(value: float) -> str:
    """A label or prediction as the name of a group."""
    return "" if np.isnan(value) else f"{value:.9g}"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some test examples.

    Attributes:
      name: as it was given.
      conditions: ("wrong", ""), ("right", "") or (what, value), all of which hold.
    """

    name: str
    conditions: tuple[tuple[str, str], ...]

    def of(self, known: Known) -> np.ndarray:
        """Whether each example is in it: bool [n]."""
        found = np.ones(len(known), bool)
        for what, value in self.conditions:
            if what in _WORDS:
                both = ~np.isnan(known.label) & ~np.isnan(known.prediction)
                found &= both & ((known.label == known.prediction) == (what == "right"))
            else:
                found &= names_of(what, known) == value
        return found

    @property
    def uses(self) -> set[str]:
        """What it is told by."""
        return {what for what, _ in self.conditions}


def slice_of(text: str, label_names: Sequence[str] | None = None) -> Slice:
    """A slice from a value of --slice; a class may be given by its name.

    Raises:
      InputError: it cannot be read.
    """
    conditions = []
    for part in text.split("&"):
        what, equals, value = part.strip().partition("=")
        if not (what in _WORDS and not equals) and not (what in _NAMED and equals):
            raise InputError(
                f"--slice={text}: write wrong, right, label=…, prediction=…, group=… or shard=…, "
                "or several of these with & between them."
            )
        if what in ("label", "prediction"):
            value = _class(text, value, label_names)
        conditions.append((what, value))
    return Slice(text, tuple(conditions))


def _class(text: str, value: str, label_names: Sequence[str] | None) -> str:
    names = [str(name) for name in label_names or ()]
    if value in names:
        return number(float(names.index(value)))
    try:
        return number(float(value))
    except ValueError:
        shown = f", or one of {', '.join(names[:10])}" if names else ""
        raise InputError(f"--slice={text}: {value!r} is no number{shown}.") from None


def check(
    grouped: tuple[str, str] | None, slices: Sequence[Slice], gives_groups: bool, classes: bool
) -> None:
    """Checks that a task has what groups and slices are told by.

    Args:
      grouped: from `by`; None for no groups.
      slices: those that are asked for.
      gives_groups: whether parse gives a group.
      classes: whether the task is a classification, whose predictions are right or wrong.

    Raises:
      InputError: it has not.
    """
    flags = [(f"--group_by={','.join(grouped)}", set(grouped))] if grouped else []
    flags += [(f"--slice={one.name}", one.uses) for one in slices]
    for flag, uses in flags:
        if "group" in uses and not gives_groups:
            raise InputError(
                f'{flag} needs a group: let parse return "group", text or whole numbers [B].'
            )
        if uses & {"wrong", "right", "prediction"} and not classes:
            raise InputError(
                f"{flag} needs a classification, whose predictions are classes, right or wrong. "
                "If each example has one class, say so: Task(kind='classification')."
            )


@dataclasses.dataclass(frozen=True)
class Spread:
    """Moments of the scores of a group of training examples for each of S sets, mergeable.

    Attributes:
      count: training examples.
      mean: float64 [S, C], of the scores' terms.
      squares: float64 [S], sums of squared distances of the scores from their mean.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, terms: np.ndarray) -> "Spread":
        """Of terms float64 [n, S, C], n at least 1."""
        scores = terms.sum(axis=2)
        squares = np.square(scores - scores.mean(axis=0)).sum(axis=0)
        return cls(len(terms), terms.mean(axis=0), squares)

    def merged(self, other: "Spread") -> "Spread":
        """Of both groups together (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        squares = np.square(apart.sum(axis=1)) * self.count * other.count / count
        return Spread(
            count,
            self.mean + apart * other.count / count,
            self.squares + other.squares + squares,
        )

    @property
    def standard_error(self) -> np.ndarray:
        """Of the mean score over the training examples: float64 [S], NaN of a single one."""
        if self.count < 2:
            return np.full(len(self.squares), np.nan)
        return np.sqrt(self.squares / (self.count - 1) / self.count)


def spreads(names: np.ndarray, terms: np.ndarray) -> dict[str, Spread]:
    """By group of training examples: the moments of their terms, float64 [n, S, C]."""
    return {str(name): Spread.of(terms[names == name]) for name in np.unique(names)}


def merged(parts: Iterable[Mapping[str, Spread]]) -> dict[str, Spread]:
    """The moments by group of all parts."""
    found: dict[str, Spread] = {}
    for part in parts:
        for name, spread in part.items():
            found[name] = found[name].merged(spread) if name in found else spread
    return found
