"""What of a night is kept for the next: its tables before any verdict, and how many of what.

A night with the same data is made from it without looking at an example. A mark vouches for it,
with a fingerprint of all that the tables are made from: not date, gates and verdicts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tracin_beam.errors import InputError
from tracin_beam.jobs import graphs
from tracin_beam.jobs.preflight import Run
from tracin_beam.storage import files, marks, tables
from tracin_beam.storage.files import Stamp
from tracin_beam.storage.runs import TRAIN, Output, ShardResult

_SHAPE = {
    "signals": str,
    "shards": {str: dict},
    "wrong": {str: int},
    "results": [(str, str, int, [(int, str)], [(int, str, str)])],
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a night was made from.

    Attributes:
      signals: path of `signals.parquet` in the night's folder.
      stamp: of that.
      shards: `nights.summary` of each training shard, by path.
      wrong: metrics of the number of wrong labels.
      results: of embedding.
    """

    signals: str
    stamp: Stamp
    shards: Mapping[str, Mapping[str, Any]]
    wrong: Mapping[str, int]
    results: tuple[ShardResult, ...]


def write(output: Output, fingerprint: str, night: Kept, suspects: pa.Table) -> None:
    """Keeps a night, and its suspects, of whatever verdict."""
    files.remove([_mark(output)])
    stamp = tables.write(_suspects(output), suspects)
    marks.write(
        _mark(output),
        output.root,
        fingerprint,
        {night.signals: night.stamp, _suspects(output): stamp},
        signals=night.signals.removeprefix(output.root.rstrip("/") + "/"),
        shards=night.shards,
        wrong=dict(night.wrong),
        results=[
            [
                *(result.set_name, result.shard.path, result.read),
                [list(pair) for pair in result.rejected],
                [list(dataclasses.astuple(stamp)) for stamp in result.stamps],
            ]
            for result in night.results
        ],
    )


def read(run: Run, fingerprint: str) -> Kept | None:
    """The night that was kept, if what it was made from is what this one would be.

    Embeddings that are no longer what they were are reason enough to look at all of them again.
    """
    output, mark = run.output, _mark(run.output)
    found = marks.read(mark, output.root, fingerprint, {_suspects(output)})
    if found is None:
        return None
    shards = {(TRAIN, shard.path): shard for shard in run.train}
    shards |= {(run.config.test_name, shard.path): shard for shard in run.test}
    if not files.fits(found, _SHAPE) or {(r[0], r[1]) for r in found["results"]} != shards.keys():
        marks.refuse(mark, "it has another form than one of this version")
        return None
    signals = output.path(found["signals"])
    results = []
    for name, path, records, rejected, stamps in found["results"]:
        pairs = tuple((position, reason) for position, reason in rejected)
        made = tuple(Stamp(*stamp) for stamp in stamps)
        results.append(ShardResult(name, shards[name, path], records, pairs, made))
    told = {output.rejected(r.set_name, r.shard) for r in results if r.rejected}
    change = "" if signals in found["files"] else f"it does not vouch for {signals}"
    change = change or next((f"{path} is missing" for path in told if not files.exists(path)), "")
    change = change or graphs.changed_embeddings(run, mark, dict(graphs.embeddings(run, results)))
    if change:
        marks.refuse(mark, change)
        return None
    return Kept(signals, found["files"][signals], found["shards"], found["wrong"], tuple(results))


def read_suspects(output: Output) -> pa.Table | None:
    """The suspects that were kept, of whatever verdict and whatever night."""
    path = _suspects(output)
    try:
        return tables.read(path) if files.exists(path) else None
    except (pa.ArrowException, InputError):
        return None


def _mark(output: Output) -> str:
    return output.path("_state", "quality", "night.json")


def _suspects(output: Output) -> str:
    return output.path("_state", "quality", "suspects.parquet")
