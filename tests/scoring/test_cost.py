import dataclasses

import pytest

from tracin_beam.scoring import cost


def index(queries, *, asked="auto", expected=0, rows=60_000, numbers=3072):
    return cost.choose(asked, rows, numbers, queries, expected, 100).index


def test_few_queries_do_not_repay_an_index_and_many_do():
    assert index(100) == "exact"
    assert index(1_000) == "exact"
    assert index(1_000_000) == "scann"
    assert index(100, expected=1_000_000) == "scann"
    assert index(1_000_000, expected=100) == "scann"


def test_what_is_asked_for_is_taken_and_the_reason_kept():
    assert index(10, asked="scann") == "scann"
    assert index(10**6, asked="exact") == "exact"
    choice = cost.choose("scann", 1000, 256, 10, 0, 100)
    assert choice.why.startswith("--index=scann; for 10 queries of 1,000 rows of 256 numbers")
    assert choice.exact_seconds < choice.scann_seconds
    assert dataclasses.asdict(choice)["queries"] == 10


@pytest.mark.parametrize("rows", [1000, 60_000, 10**7])
def test_there_is_one_crossover(rows):
    chosen = [index(10**power, rows=rows) for power in range(9)]
    assert chosen == sorted(chosen)  # "exact" before "scann"
