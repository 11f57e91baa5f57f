"""How many different training examples do the tables show? Few mean: the same for every query."""

from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import numpy as np

from tracin_beam.scoring import topk
from tracin_beam.scoring.topk import ROLES
from tracin_beam.stages.search import BothScored

_TOP = 10

# By role: how many slots there are, and int64 [n], what stands in them, each once.
_Found = tuple[tuple[int, np.ndarray], ...]


class Distinct(beam.CombineFn):
    """(block, both roles' best) → of the top ten by role: "slots", "examples" and their "share"."""

    def create_accumulator(self) -> _Found:
        return tuple((0, np.empty(0, np.int64)) for _ in ROLES)

    def add_input(self, accumulator: _Found, element: tuple[int, BothScored]) -> _Found:
        found = []
        for rows in element[1]:
            top = topk.ranks_within(rows.query) < _TOP
            places = rows.shard[top].astype(np.int64) << 40 | rows.position[top]
            found.append((int(top.sum()), places))
        return self.merge_accumulators([accumulator, tuple(found)])

    def merge_accumulators(self, accumulators: Iterable[_Found]) -> _Found:
        by_role = zip(*accumulators, strict=True)
        return tuple(
            (sum(slots for slots, _ in parts), np.unique(np.concatenate([p for _, p in parts])))
            for parts in by_role
        )

    def extract_output(self, accumulator: _Found) -> dict[str, Any]:
        return {
            role + "s": {
                "slots": slots,
                "examples": len(places),
                "share": len(places) / slots if slots else None,
            }
            for role, (slots, places) in zip(ROLES, accumulator, strict=True)
        }
