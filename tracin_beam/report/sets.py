"""What the influence page shows of groups and slices."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tracin_beam.report import words
from tracin_beam.report.explanations import Influence, Place, Reading, influences

# Groups that the page shows of the training and of the test set, those with most examples.
_TRAIN_GROUPS, _TEST_GROUPS = 40, 12
_SLICES = 20


@dataclass(frozen=True)
class _Cell:
    """The mean score of a training group for a test group; `error` is None where it is unknown."""

    mean: float
    error: float | None

    @property
    def clear(self) -> bool:
        """Whether it lies more than two standard errors from zero."""
        return self.error is not None and abs(self.mean) > 2 * self.error


@dataclass(frozen=True)
class _Groups:
    """A table of training groups by test groups.

    Attributes:
      columns: names of test groups, with how many examples they have.
      rows: name of a training group, how many examples, and a cell for each column.
      more: how many training and test groups are left out.
    """

    columns: tuple[tuple[str, int], ...]
    rows: tuple[tuple[str, int, tuple[_Cell, ...]], ...]
    more: tuple[int, int]


@dataclass(frozen=True)
class _Slice:
    """A slice of the test set with what it rests on, strongest first."""

    name: str
    examples: int
    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]


def groups_of(table: pa.Table | None) -> _Groups | None:
    """The table of groups, in words; None where there is none."""
    if table is None or not table.num_rows:
        return None
    rows = table.to_pylist()
    sides = []
    for side, most in (("train", _TRAIN_GROUPS), ("test", _TEST_GROUPS)):
        sizes = {row[f"{side}_group"]: row[f"{side}_examples"] for row in rows}
        largest = sorted(sizes.items(), key=lambda one: (-one[1], one[0]))
        sides.append((sorted(largest[:most]), max(0, len(largest) - most)))
    (of_train, more_train), (of_test, more_test) = sides
    cells = {
        (row["train_group"], row["test_group"]): _Cell(row["score_mean"], row["standard_error"])
        for row in rows
    }
    return _Groups(
        tuple((_name(name), size) for name, size in of_test),
        tuple(
            (_name(name), size, tuple(cells[name, other] for other, _ in of_test))
            for name, size in of_train
        ),
        (more_train, more_test),
    )


def slices_of(table: pa.Table | None, read: Reading) -> list[_Slice]:
    """The slices of a table, in its order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist() if table is not None else ():
        found.setdefault(row["slice"], []).append(row)

    slices = []
    for name, rows in list(found.items())[:_SLICES]:
        rows.sort(key=lambda row: row["rank"])
        of_roles = (influences(rows, role, read) for role in ("proponent", "opponent"))
        slices.append(_Slice(words.shown(name), rows[0]["test_examples"], *of_roles))
    return slices


def places_shown(table: pa.Table | None) -> set[Place]:
    """The training examples that the slices on the page name: (shard, position)."""
    if table is None:
        return set()
    names = list(dict.fromkeys(table["slice"].to_pylist()))[:_SLICES]
    places = zip(
        *(table[c].to_pylist() for c in ("slice", "train_shard", "train_position")), strict=True
    )
    return {(shard, position) for name, shard, position in places if name in names}


def _name(group: str) -> str:
    return words.shown(group) if group else "not known"
