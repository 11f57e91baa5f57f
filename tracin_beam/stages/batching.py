"""Batches of what may fail: made ahead of their use, and freed of the items that fail."""

import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tracin_beam.errors import InputError, reason

T = TypeVar("T")


def ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The items, made in a thread of its own, a few at most before they are asked for."""
    iterator = iter(items)
    end: Any = object()
    with concurrent.futures.ThreadPoolExecutor(1) as maker:
        coming = collections.deque(maker.submit(next, iterator, end) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(maker.submit(next, iterator, end))
                yield item
        finally:
            maker.shutdown(cancel_futures=True)


def without_failing(
    attempt: Callable[[Sequence[int]], T], count: int
) -> tuple[T | None, list[int], list[tuple[int, str]]]:
    """Attempts all items at once, and if that fails, without those that fail on their own.

    Args:
      attempt: what to do with items, given by their indices in ascending order.
      count: how many items there are.

    Returns:
      The result (None if no item is left), the indices of its items, and those of the others with
      the reasons.

    Raises:
      InputError: `attempt` raises it, so that no item is at fault.
    """
    every = list(range(count))
    try:
        return (attempt(every) if every else None), every, []
    except InputError:
        raise
    except Exception as error:  # whatever TensorFlow raises: it is the items'
        refused = _failing(attempt, every, error)
    bad = {index for index, _ in refused}
    kept = [index for index in every if index not in bad]
    if not kept:
        return None, kept, refused
    try:
        return attempt(kept), kept, refused
    except Exception as error:  # each goes by itself, as those of different shapes do
        together = _largest_group(attempt, kept)
        why = f"it does not go with the others of its batch: {reason(error)}"
        refused += [(index, why) for index in kept if index not in set(together)]
        return (attempt(together) if together else None), together, refused


def _largest_group(attempt: Callable[[Sequence[int]], Any], indices: Sequence[int]) -> list[int]:
    """Those that go together with one of the first three, whichever has most of them."""
    largest: list[int] = []
    for first in indices[:3]:
        group = [first]
        for index in indices:
            if index != first:
                with contextlib.suppress(Exception):  # they do not go together
                    attempt(sorted([*group, index]))
                    group.append(index)
        if len(group) > max(1, len(largest)):
            largest = sorted(group)
    return largest


def _failing(
    attempt: Callable[[Sequence[int]], Any], indices: Sequence[int], error: Exception
) -> list[tuple[int, str]]:
    """Those behind an error, found by halving, each with its own."""
    if len(indices) == 1:
        return [(indices[0], reason(error))]
    found = []
    middle = len(indices) // 2
    for half in (indices[:middle], indices[middle:]):
        try:
            attempt(half)
        except Exception as own:  # as above
            found += _failing(attempt, half, own)
    return found
