"""The influence table arranged by test example: what its page and the terminal share."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracin_beam.report import words

Place = tuple[str, int]  # (shard, position): where an example stands in the data


@dataclass(frozen=True)
class Reading:
    """How labels and predictions are to be read.

    Attributes:
      classes: they are classes, so that being equal means being right.
      threshold: above which a prediction, which is then a score, stands for the class 1.
      probabilities: such scores are probabilities, and not logits.
      names: of the classes 0, 1, …, or None.
    """

    classes: bool
    threshold: float | None
    probabilities: bool
    names: Sequence[str] | None

    def predicted(self, value: float | None) -> float | None:
        """The class that a prediction stands for."""
        if self.threshold is None or value is None or not math.isfinite(value):
            return value
        return float(value > self.threshold)

    def label(self, value: float | None) -> str:
        """A label in words."""
        return _named(value, self.names)

    def prediction(self, value: float | None) -> str:
        """A prediction in words: "pos", "pos (0.52)" where it comes from a score."""
        name = _named(self.predicted(value), self.names)
        if self.threshold is None or value is None or not math.isfinite(value):
            return name
        return f"{name} ({'' if self.probabilities else 'logit '}{value:.2f})"


def reading(
    rows: pa.Table | None, run: Mapping[str, Any], label_names: Sequence[str] | None
) -> Reading:
    """How to read labels and predictions: by run.json, or else by their values in the table."""
    known = run.get("kind")
    kind = known if isinstance(known, Mapping) else {}
    if kind.get("name") in ("classification", "multilabel", "regression"):
        classes = kind["name"] == "classification"
        threshold = kind.get("threshold") if classes else None
        return Reading(classes, threshold, bool(kind.get("probabilities")), label_names)
    classes = rows is not None and _is_classification(rows, label_names)
    return Reading(classes, None, False, label_names)


@dataclass(frozen=True)
class Influence:
    """One row of the influence table: a proponent or opponent of a test example."""

    id: str
    place: Place
    label: str
    label_differs: bool  # from the test example's label, in a classification
    prediction: str
    score: float
    by_checkpoint: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """One test example with the training examples that influenced it most, strongest first."""

    id: str
    place: Place
    label: str
    prediction: str
    wrong: bool  # the prediction is not the label; always False outside a classification
    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]


def influences(
    rows: Sequence[Mapping[str, Any]],
    role: str,
    read: Reading,
    differs: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> tuple[Influence, ...]:
    """Those rows of a table that have a role, in words.

    Args:
      rows: strongest first.
      role: "proponent" or "opponent".
      read: how to read labels and predictions.
      differs: whether a row's training example has another label than what it influenced.
    """
    return tuple(
        Influence(
            id=words.shown(row["train_id"]),
            place=(row["train_shard"], row["train_position"]),
            label=read.label(row["train_label"]),
            label_differs=differs(row),
            prediction=read.prediction(row["train_prediction"]),
            score=row["score"],
            by_checkpoint=tuple(row["score_by_checkpoint"] or ()),
        )
        for row in rows
        if row["role"] == role
    )


def arrange(rows: pa.Table, read: Reading, *, max_tests: int) -> list[Explanation]:
    """Arranges the table by test example: wrong predictions first, else in the table's order."""

    def one(place: Place) -> Explanation:
        mine = rows.filter(_at(rows, place)).sort_by("rank").to_pylist()
        first = mine[0]

        def differs(row: Mapping[str, Any]) -> bool:
            return read.classes and _differ(row["train_label"], row["test_label"])

        return Explanation(
            id=words.shown(first["test_id"]),
            place=place,
            label=read.label(first["test_label"]),
            prediction=read.prediction(first["test_prediction"]),
            wrong=is_wrong(read, first["test_prediction"], first["test_label"]),
            proponents=influences(mine, "proponent", read, differs),
            opponents=influences(mine, "opponent", read, differs),
        )

    return [one(place) for place in _chosen(rows, read, max_tests)]


def places_shown(rows: pa.Table, read: Reading, *, max_tests: int) -> set[Place]:
    """The test and training examples that a report of at most `max_tests` test examples shows."""
    places = set()
    for place in _chosen(rows, read, max_tests):
        mine = rows.filter(_at(rows, place))
        places.add(place)
        places.update(
            zip(mine["train_shard"].to_pylist(), mine["train_position"].to_pylist(), strict=True)
        )
    return places


def count_tests(rows: pa.Table) -> int:
    """How many test examples the table explains."""
    return rows.group_by(["test_shard", "test_position"]).aggregate([]).num_rows


def is_exact(rows: pa.Table) -> bool:
    """Whether every score in the table is an exact TracInCP value, and none an estimate."""
    return pc.all(rows["exact"], min_count=0).as_py()


def _chosen(rows: pa.Table, read: Reading, max_tests: int) -> list[Place]:
    """The test examples to show, wrong predictions first."""
    if not rows.num_rows:
        return []
    tests = (
        rows.group_by(["test_shard", "test_position"], use_threads=False)
        .aggregate([("test_label", "first"), ("test_prediction", "first")])
        .to_pylist()
    )
    # The sort is stable.
    tests.sort(key=lambda t: not is_wrong(read, t["test_prediction_first"], t["test_label_first"]))
    return [(test["test_shard"], test["test_position"]) for test in tests[:max_tests]]


def _at(rows: pa.Table, place: Place) -> pa.ChunkedArray:
    shard, position = place
    return pc.and_(pc.equal(rows["test_shard"], shard), pc.equal(rows["test_position"], position))


def _is_classification(rows: pa.Table, label_names: Sequence[str] | None) -> bool:
    """Labels and predictions are whole numbers, so that being equal means being right."""
    if label_names is not None:
        return True
    known = [
        column
        for name in ("test_label", "test_prediction", "train_label", "train_prediction")
        if len(column := rows[name].filter(pc.is_finite(rows[name])))
    ]
    return bool(known) and all(
        pc.all(pc.equal(column, pc.floor(column)), min_count=0).as_py() for column in known
    )


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _differ(one: float | None, other: float | None) -> bool:
    return _is_known(one) and _is_known(other) and one != other


def is_wrong(read: Reading, prediction: float | None, label: float | None) -> bool:
    """Whether a class is predicted that is not the label; False if either is unknown."""
    return read.classes and _differ(read.predicted(prediction), label)


def _named(value: float | None, label_names: Sequence[str] | None) -> str:
    """A label or prediction: its name, else its number, else "unknown"."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if float(value).is_integer():
        if label_names is not None and 0 <= value < len(label_names):
            return words.shown(label_names[int(value)])
        return str(int(value))
    return words.number(value)
