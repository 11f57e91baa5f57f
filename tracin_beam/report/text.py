"""The influence table in brief, for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from tracin_beam.report import explanations, words
from tracin_beam.report.facts import run_facts

_PER_ROLE = 3  # training examples shown of each role


def influence_summary(
    rows: pa.Table,
    run: Mapping[str, Any],
    *,
    label_names: Sequence[str] | None = None,
    max_tests: int = 5,
    tests_in_table: int | None = None,
) -> str:
    """Writes some test examples, each with its strongest influences, and then the run's facts.

    Args:
      rows: the influence table, or what is shown of it.
      run: what run.json holds. Whatever is missing or null is left out.
      label_names: names of the classes 0, 1, …; without them labels are shown as numbers.
      max_tests: how many test examples to show; wrong predictions come first.
      tests_in_table: how many the whole table explains, if `rows` are not all.

    Returns:
      Lines of plain text without control characters, whatever ids and labels hold.
    """
    read = explanations.reading(rows, run, label_names)
    tests = explanations.arrange(rows, read, max_tests=max_tests)
    blocks = ["\n".join(_explanation(test)) for test in tests] or ["The influence table is empty."]
    every = explanations.count_tests(rows) if tests_in_table is None else tests_in_table
    more = every - len(tests)
    if more > 0:
        blocks.append(f"… and {more:,} more test examples in the table.")
    if not explanations.is_exact(rows):
        blocks.append(
            "These scores are estimates from projected gradients: exact rescoring was turned off."
        )
    facts = run_facts(run)
    if facts:
        blocks.append("\n".join(_columns(facts)))
    return "\n\n".join(blocks) + "\n"


def _explanation(test: explanations.Explanation) -> Iterator[str]:
    wrong = "  (wrong)" if test.wrong else ""
    yield f"{test.id}: predicted {test.prediction}, label {test.label}{wrong}"
    influences = [
        (role, influence)
        for role, all_of_role in (("proponent", test.proponents), ("opponent", test.opponents))
        for influence in all_of_role[:_PER_ROLE]
    ]
    cells = [
        (
            role,
            words.number(influence.score, sign=True),
            f"label {influence.label}" + (" ≠" if influence.label_differs else ""),
            f"predicted {influence.prediction}",
            influence.id,
        )
        for role, influence in influences
    ]
    for line in _columns(cells, right_aligned=(1,)):
        yield "  " + line


def _columns(lines: Sequence[Sequence[str]], *, right_aligned: Sequence[int] = ()) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield "  ".join(
            cell.rjust(width) if column in right_aligned else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
