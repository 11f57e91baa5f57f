import threading

import pytest

from tracin_beam.errors import InputError
from tracin_beam.stages.batching import ahead, without_failing


def attempt_of(items, bad=(), shapes=None):
    """Fails on bad items and where shapes differ."""

    def attempt(some):
        assert list(some) == sorted(some)
        for i in some:
            if i in bad:
                raise ValueError(f"bad {i}")
        if shapes and len({shapes[i] for i in some}) > 1:
            raise ValueError("shapes differ")
        return [items[i] for i in some]

    return attempt


@pytest.mark.parametrize("bad", [[], [0], [6], [2, 3, 5], range(7)])
def test_items_that_fail_are_left_out_with_their_own_reason(bad):
    items = list("abbbefg")  # equal ones are told apart
    result, kept, refused = without_failing(attempt_of(items, bad), 7)
    assert kept == [i for i in range(7) if i not in bad]
    assert result == ([items[i] for i in kept] if kept else None)
    assert sorted(refused) == [(i, f"ValueError: bad {i}") for i in bad]


def test_the_largest_group_that_goes_together_is_kept():
    shapes = [1, 2, 2, 2, 1, 2]
    result, kept, refused = without_failing(attempt_of("abcdef", shapes=shapes), 6)
    assert kept == [1, 2, 3, 5]
    assert result == list("bcdf")
    assert [i for i, _ in refused] == [0, 4]
    assert "does not go with the others" in refused[0][1]


def test_none_at_all():
    assert without_failing(attempt_of(""), 0) == (None, [], [])


def test_an_error_that_is_no_items():
    def attempt(some):
        raise InputError("the model is random")

    with pytest.raises(InputError, match="random"):
        without_failing(attempt, 3)


def test_items_are_made_ahead_in_another_thread():
    made = []

    def items():
        for i in range(10):
            made.append((i, threading.get_ident()))
            yield i

    found = []
    for i in ahead(items(), 2):
        found.append(i)
        assert len(made) <= i + 3
    assert found == list(range(10))
    assert {thread for _, thread in made} != {threading.get_ident()}
