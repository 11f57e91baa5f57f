"""The influence table and run.json arranged for a reader: what page and terminal share."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracin_beam.storage import tables

Place = tuple[str, int]  # (shard, position): where an example stands in the data

LONGEST_NAME = 200  # characters of an id or a label on a page
_BIDI_CONTROLS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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


def reading(rows: pa.Table, run: Mapping[str, Any], label_names: Sequence[str] | None) -> Reading:
    """How to read a table's labels and predictions: by run.json, or else by their values."""
    kind = _dict(run, "kind")
    if kind.get("name") in ("classification", "multilabel", "regression"):
        classes = kind["name"] == "classification"
        threshold = kind.get("threshold") if classes else None
        return Reading(classes, threshold, bool(kind.get("probabilities")), label_names)
    return Reading(_is_classification(rows, label_names), None, False, label_names)


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


def explanations(rows: pa.Table, read: Reading, *, max_tests: int) -> list[Explanation]:
    """Arranges the table by test example: wrong predictions first, else in the table's order."""

    def one(place: Place) -> Explanation:
        mine = rows.filter(_at(rows, place)).sort_by("rank").to_pylist()
        first = mine[0]

        def of(role: str) -> tuple[Influence, ...]:
            return tuple(
                Influence(
                    id=shown(row["train_id"]),
                    place=(row["train_shard"], row["train_position"]),
                    label=read.label(row["train_label"]),
                    label_differs=read.classes and _differ(row["train_label"], row["test_label"]),
                    prediction=read.prediction(row["train_prediction"]),
                    score=row["score"],
                    by_checkpoint=tuple(row["score_by_checkpoint"] or ()),
                )
                for row in mine
                if row["role"] == role
            )

        return Explanation(
            id=shown(first["test_id"]),
            place=place,
            label=read.label(first["test_label"]),
            prediction=read.prediction(first["test_prediction"]),
            wrong=is_wrong(read, first["test_prediction"], first["test_label"]),
            proponents=of("proponent"),
            opponents=of("opponent"),
        )

    return [one(place) for place in _chosen(rows, read, max_tests)]


def places_shown(rows: pa.Table, read: Reading, *, max_tests: int) -> set[Place]:
    """The examples, of both sides, that a report of at most `max_tests` test examples shows."""
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


def run_facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What run.json says of a run, as (name, value); what it does not say is left out."""
    facts = []
    if method := run.get("method"):
        facts.append(("Method", printable(method)))
    test_name = str(_dict(run, "config").get("test_name") or "test")
    for side, name in (("train", "Training data"), (test_name, "Test data")):
        if counts := _counts(_dict(_dict(run, "counts"), side)):
            facts.append((name, counts))
    if checkpoints := _checkpoints(run.get("checkpoints")):
        facts.append(("Checkpoints", checkpoints))
    if projection := _projection(_dict(run, "config")):
        facts.append(("Projection", projection))
    return facts + _retrieval(_dict(run, "retrieval"))


def number(value: float, *, sign: bool = False) -> str:
    """Writes a number with four significant digits, without an exponent where that reads well."""
    plus = "+" if sign else ""
    if not math.isfinite(value):
        return f"{value:{plus}}"
    size = abs(value)
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e7:
        return f"{value:{plus}.3e}"
    decimals = max(0, 3 - math.floor(math.log10(size)))
    return f"{value:{plus},.{decimals}f}"


def shown(value: Any) -> str:
    """An id or a label on one line, cut in its middle where it is very long."""
    text = tables.text(value) if isinstance(value, bytes) else str(value)
    if len(text) > LONGEST_NAME:
        head, tail = text[: LONGEST_NAME // 2], text[-LONGEST_NAME // 4 :]
        text = f"{head} … {tail} ({len(text):,} characters)"
    return printable(text)


def printable(value: Any) -> str:
    r"""Anything as text, its control and bidirectional characters as \x1b, \u202e …"""
    text = tables.text(value) if isinstance(value, bytes) else str(value)
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or character in _BIDI_CONTROLS
        else character
        for character in text
    )


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
    return read.classes and _differ(read.predicted(prediction), label)


def _named(value: float | None, label_names: Sequence[str] | None) -> str:
    """A label or prediction: its name, else its number, else "unknown"."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if float(value).is_integer():
        if label_names is not None and 0 <= value < len(label_names):
            return shown(label_names[int(value)])
        return str(int(value))
    return number(value)


def _dict(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    child = parent.get(key)
    return child if isinstance(child, Mapping) else {}


def _counts(counts: Mapping[str, Any]) -> str:
    read, embedded, rejected, shards = (
        counts.get(key) for key in ("read", "embedded", "rejected", "shards")
    )
    parts = []
    if embedded is not None:
        parts.append(f"{embedded:,} examples" + (f" of {read:,} read" if read is not None else ""))
    elif read is not None:
        parts.append(f"{read:,} examples read")
    if rejected is not None:
        parts.append(f"{rejected:,} rejected")
    if shards is not None:
        parts.append(f"{shards:,} shard" + ("" if shards == 1 else "s"))
    return ", ".join(parts)


def _checkpoints(checkpoints: Any) -> str:
    if not isinstance(checkpoints, Sequence) or not checkpoints:
        return ""
    steps = [c["step"] for c in checkpoints if c.get("step") is not None]
    rates = [c["learning_rate"] for c in checkpoints if c.get("learning_rate") is not None]
    parts = [f"{len(checkpoints):,}"]
    if steps:
        parts.append(f"step {_span(steps, '{:,}'.format)}")
    if rates:
        parts.append(f"learning rate {_span(rates, '{:.4g}'.format)}")
    return ", ".join(parts)


def _span(values: Sequence[Any], write: Any) -> str:
    first, last = write(values[0]), write(values[-1])
    return first if first == last else f"{first} to {last}"


def _projection(config: Mapping[str, Any]) -> str:
    projection, dim, layers = (config.get(key) for key in ("projection", "dim", "layers"))
    if projection is None:
        return ""
    parts = [printable(projection)]
    if dim is not None and projection != "none":
        parts[0] += f" to {dim:,}"
    if layers is not None:
        parts.append(f"layers: {printable(layers)}")
    return ", ".join(parts)


def _retrieval(retrieval: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    k, queries = retrieval.get("k"), retrieval.get("queries")
    at = f"Recall@{k}" if k is not None else "Recall"
    over = f", over {queries:,} sampled test examples" if queries is not None else ""
    for role in ("proponents", "opponents"):
        recall, alone = (_dict(retrieval, role).get(key) for key in ("recall", "recall_projection"))
        parts = []
        if recall is not None:
            parts.append(f"{recall:.3f}")
        if alone is not None:
            parts.append(f"{alone:.3f} by projection alone")
        if parts:
            facts.append((f"{at}, {role}", ", ".join(parts) + over))
    correlation = _dict(retrieval, "correlation")
    parts = [
        f"{name.capitalize()} {correlation[name]:.3f}"
        for name in ("pearson", "spearman")
        if correlation.get(name) is not None
    ]
    if parts:
        facts.append(("Projected against exact", ", ".join(parts)))
    return facts
