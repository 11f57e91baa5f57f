"""Long lists, which travel to workers as the path of a file.

Beam pickles and compresses what a step holds, several times for each step, and sends it with the
graph, which may have some megabytes only. Thousands of shards in each of twenty steps would take
minutes.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tracin_beam.storage import files, runs
from tracin_beam.storage.runs import CheckpointFile, Output, Shard, Unit

# So many travel as they are.
_FEW = 200

T = TypeVar("T", Shard, Unit)


class Listing(tuple[T, ...]):
    """A tuple of shards or units that lies in a file.

    Attributes:
      path: of the file.
    """

    path: str

    def __reduce__(self) -> Any:
        return _read_list, (self.path,)


class Lookup(dict[str, str]):
    """A dict of texts that lies in a file.

    Attributes:
      path: of the file.
    """

    path: str

    def __reduce__(self) -> Any:
        return _read_lookup, (self.path,)


def of_list(output: Output, items: Sequence[T]) -> tuple[T, ...]:
    """The items; where they are many they lie in a file of the output directory."""
    if len(items) <= _FEW:
        return tuple(items)
    listing: Listing[T] = Listing(items)
    listing.path = _written(output, [_row(item) for item in items])
    return listing


def of_dict(output: Output, items: Mapping[str, str]) -> dict[str, str]:
    """The same for texts by key."""
    if len(items) <= _FEW:
        return dict(items)
    lookup = Lookup(items)
    lookup.path = _written(output, dict(items))
    return lookup


def _written(output: Output, value: Any) -> str:
    """Writes a value under a name that follows from it, so that it never changes."""
    path = output.listing(runs.digest(value))
    if not files.exists(path):
        with files.atomic_write(path) as handle:
            handle.write(json.dumps(value).encode())
    return path


# What is unpickled in every step is read once.
@functools.lru_cache(8)
def _read_list(path: str) -> Listing[Any]:
    rows = files.read_json(path)
    listing: Listing[Any] = Listing(_item(row) for row in rows)
    listing.path = path
    return listing


@functools.lru_cache(8)
def _read_lookup(path: str) -> Lookup:
    lookup = Lookup(files.read_json(path))
    lookup.path = path
    return lookup


def _row(item: Any) -> list[Any]:
    """The fields of a dataclass, in their order."""
    return [_row(v) if dataclasses.is_dataclass(v) else v for v in vars(item).values()]


def _item(row: list[Any]) -> Shard | Unit:
    if isinstance(row[1], str):
        return Shard(*row)
    set_name, shard, checkpoint, *others = row
    return Unit(set_name, Shard(*shard), CheckpointFile(*checkpoint), *others)
