"""The influence table as one static HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tracin_beam.report import explanations, pages, sets, words
from tracin_beam.report.explanations import Influence, count_tests
from tracin_beam.report.show import Shown


@dataclass(frozen=True)
class _Bar:
    """One checkpoint's share of a score, in units of a drawing whose y runs from 0 down to 20."""

    x: int
    y: float
    height: float
    zero: float
    positive: bool


def influence_page(
    rows: pa.Table,
    shown: Mapping[tuple[str, int], Shown],
    run: Mapping[str, Any],
    *,
    label_names: Sequence[str] | None = None,
    max_tests: int = 30,
    tests_in_table: int | None = None,
    groups: pa.Table | None = None,
    slices: pa.Table | None = None,
) -> str:
    """Makes the page: every test example with the training examples that influenced it most.

    Args:
      rows: the influence table, or what is shown of it.
      shown: what to show of an example, by (shard, position); `explanations.places_shown` says
        which ones the page has room for. For any other example the page shows the id alone.
      run: what run.json holds. Whatever is missing or null is left out of the page.
      label_names: names of the classes 0, 1, …; without them labels are shown as numbers.
      max_tests: how many test examples to show; wrong predictions come first.
      tests_in_table: how many the whole table explains, if `rows` are not all.
      groups: the table of group_influence, if there is one.
      slices: that of slice_influence.

    Returns:
      A whole HTML document that refers to nothing outside itself.
    """
    context = influence_context(
        rows,
        shown,
        run,
        label_names=label_names,
        max_tests=max_tests,
        tests_in_table=tests_in_table,
        groups=groups,
        slices=slices,
    )
    return pages.render(
        "influence.html",
        context,
        run,
        styles=("page.css", "lists.css", "influence.css"),
        scripts=("influence.js",),
    )


def influence_context(
    rows: pa.Table,
    shown: Mapping[tuple[str, int], Shown],
    run: Mapping[str, Any],
    *,
    label_names: Sequence[str] | None,
    max_tests: int,
    tests_in_table: int | None,
    groups: pa.Table | None = None,
    slices: pa.Table | None = None,
) -> dict[str, Any]:
    """What `influence.html` needs besides what all pages do; the arguments of `influence_page`."""
    read = explanations.reading(rows, run, label_names)
    tests = explanations.arrange(rows, read, max_tests=max_tests)
    of_slices = sets.slices_of(slices, read)
    lists = [test.proponents + test.opponents for test in tests]
    lists += [one.proponents + one.opponents for one in of_slices]
    influences = [one for some in lists for one in some]
    target = (run.get("config") or {}).get("target")
    return {
        "tests": tests,
        "groups": sets.groups_of(groups),
        "slices": of_slices,
        "tests_in_table": count_tests(rows) if tests_in_table is None else tests_in_table,
        "any_wrong": any(test.wrong for test in tests),
        "any_bars": any(len(one.by_checkpoint) > 1 for one in influences),
        "any_differs": any(one.label_differs for one in influences),
        "exact": explanations.is_exact(rows),
        "target": words.printable(target or "loss"),
        "shown": shown,
        "bars": _bars,
        "by_checkpoint": lambda influence: _by_checkpoint(influence, run.get("checkpoints") or []),
        "is_pictures": lambda influences: any(
            (it := shown.get(influence.place)) is not None and it.kind == "image"
            for influence in influences
        ),
    }


def _bars(influence: Influence, influences: Sequence[Influence]) -> list[_Bar]:
    """Bars for one score, to one scale for all `influences`; none for a single checkpoint."""
    if len(influence.by_checkpoint) < 2:
        return []
    shares = [share for one in influences for share in one.by_checkpoint]
    highest, lowest = max(0.0, *shares), min(0.0, *shares)
    unit = 20 / (highest - lowest or 1.0)
    return [
        _Bar(
            x=5 * checkpoint,
            y=round(unit * (highest - max(share, 0.0)), 2),
            height=round(unit * abs(share), 2),
            zero=round(unit * highest, 2),
            positive=share >= 0,
        )
        for checkpoint, share in enumerate(influence.by_checkpoint)
    ]


def _by_checkpoint(influence: Influence, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    """The bars in words: "step 100: +1.25, step 200: +0.3102"."""
    steps = [checkpoint.get("step") for checkpoint in checkpoints]
    if len(steps) != len(influence.by_checkpoint) or None in steps:
        steps = []
    return ", ".join(
        (f"step {steps[index]:,}" if steps else f"checkpoint {index + 1}")
        + f": {words.number(share, sign=True)}"
        for index, share in enumerate(influence.by_checkpoint)
    )
