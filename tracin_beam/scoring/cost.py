"""How are the candidates to be found? By what it costs, from rows, numbers and queries.

The exact product of all queries with all rows needs no index, and gives both roles at once. A
ScaNN tree over rows that are sketched once more costs its building, and little for each query. The
constants are for two cores, and elsewhere of that order; `benchmarks/index.py --crossover` prints
what they expect beside what both ways take.
"""

import dataclasses
from typing import Literal

from tracin_beam.scoring import sketch

Index = Literal["exact", "scann"]

# Seconds of the exact product, for a pair of a query and a row: by number, and for its two ends.
_PRODUCT, _ENDS = 2.5e-11, 3e-9
# Seconds to read a number of an embedding.
_READ = 4e-9
# Seconds of a tree, by number of its sketched rows: to build it, to search it for a query and role.
BUILD, SEARCH = 3.5e-7, 7e-12
# Seconds to rank a candidate again by its whole embedding, by number of that.
_AGAIN = 2e-9
# Candidates of the sketched search for each that is wanted.
MORE = 2


@dataclasses.dataclass(frozen=True)
class Choice:
    """How candidates are found, and why.

    Attributes:
      index: "exact" or "scann".
      rows, numbers: of the training set, and of a row over all checkpoints.
      queries: of this run and those to come.
      exact_seconds, scann_seconds: what each would take for them.
      why: in words.
    """

    index: Index
    rows: int
    numbers: int
    queries: int
    exact_seconds: float
    scann_seconds: float
    why: str


def exact_seconds(rows: int, numbers: int, queries: int) -> float:
    """Seconds of exact retrieval for both roles, from the files to the candidates."""
    return rows * (numbers * _READ + queries * (numbers * _PRODUCT + _ENDS))


def scann_seconds(rows: int, numbers: int, queries: int, candidates: int) -> float:
    """Seconds of the same retrieval with an index that has still to be built."""
    width = min(numbers, sketch.DIM)
    build = rows * (numbers * _READ + width * BUILD)
    search = 2 * queries * rows * width * SEARCH
    again = 2 * queries * min(rows, MORE * candidates) * numbers * _AGAIN
    return build + search + again + rows * numbers * _READ


def choose(
    asked: str, rows: int, numbers: int, queries: int, expected: int, candidates: int
) -> Choice:
    """The cheaper way.

    Args:
      asked: "auto", or a way that is wanted whatever it costs.
      rows: training examples.
      numbers: in an embedding, over all checkpoints.
      queries: test examples of this run.
      expected: those of this run and the ones to come, if that is more.
      candidates: wanted for each query and role.
    """
    queries = max(queries, expected)
    exact = exact_seconds(rows, numbers, queries)
    scann = scann_seconds(rows, numbers, queries, candidates)
    index: Index = "exact" if exact <= scann else "scann"
    why = (
        f"for {queries:,} queries of {rows:,} rows of {numbers:,} numbers the exact product takes "
        f"about {exact:,.1f} s, a ScaNN index with its building {scann:,.1f} s"
    )
    if asked != "auto":
        index = "exact" if asked == "exact" else "scann"
        why = f"--index={asked}; {why}"
    return Choice(index, rows, numbers, queries, round(exact, 2), round(scann, 2), why)
