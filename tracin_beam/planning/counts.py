"""How many records both sets of a run hold, before it."""

import dataclasses
from collections.abc import Sequence

from tracin_beam.config import Config
from tracin_beam.inputs import counting, formats
from tracin_beam.storage import files, patterns
from tracin_beam.storage.runs import Shard


@dataclasses.dataclass(frozen=True)
class Counts:
    """Records of the shards of both sets, in their order."""

    train: counting.Count
    test: counting.Count


def count(config: Config, train: Sequence[Shard], test: Sequence[Shard]) -> Counts:
    """Counts or estimates the records of both sets."""

    def of(pattern: str | None, shards: Sequence[Shard]) -> counting.Count:
        if not shards:
            return counting.Count((), True)
        matched = {files.full(info.path): info for info in patterns.match(pattern or "")}
        return formats.count([matched[shard.path] for shard in shards])

    return Counts(of(config.train, train), of(config.test, test))
