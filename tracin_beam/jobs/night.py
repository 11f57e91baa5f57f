"""The end of a night: metrics, gates and what other software reads, from its tables.

What a caller does, on tables that are there:

    ledger = verdicts.read(output)
    suspects = verdicts.without_reviewed(suspects, ledger, date)
    earlier = history(output, date)
    night = finish(output, date, summaries, suspects, gates, earlier, pieces)
    lines, status = gates.lines(night["gates"]), gates.status(night["gates"])
"""

import datetime
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from tracin_beam.errors import InputError
from tracin_beam.report import exports
from tracin_beam.signals import gates, nights
from tracin_beam.signals.gates import Gate
from tracin_beam.storage import files, sinks
from tracin_beam.storage.runs import Output

_log = logging.getLogger(__name__)

_NIGHTS = 60  # whose metrics are read
_SHAPE = {
    "date": str,
    "metrics": {str: int | float | None},
    "by_class": {str: dict},
    "by_shard": {str: dict},
    "arrivals": {str: {"cohort": str, "scores": [int]}},
    "gates": [dict],
}


def check_date(date: str) -> str:
    """A date as it names a folder.

    Raises:
      InputError: it is none.
    """
    try:
        return datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        raise InputError(f"--date={date}: give a date such as 2026-11-22.") from None


def history(output: Output, date: str) -> list[dict[str, Any]]:
    """What `metrics.json` of the nights before a date holds, oldest first.

    One that cannot be read is left out, which is logged.
    """
    found = []
    for path in sorted(files.under(output.path("quality"))):
        match = re.search(r"/(\d{4}-\d\d-\d\d)/metrics\.json$", path.replace("\\", "/"))
        if match and match[1] < date:
            found.append((match[1], path))

    def read(dated: tuple[str, str]) -> dict[str, Any] | None:
        try:
            night = files.read_json(dated[1])
        except (InputError, OSError) as error:
            _log.warning("an earlier night is left out: %s", error)
            return None
        if not files.fits(night, _SHAPE) or night["date"] != dated[0]:
            _log.warning("an earlier night is left out: %s is not what it was", dated[1])
            return None
        return dict(night)

    return [night for night in files.in_parallel(read, found[-_NIGHTS:]) if night]


def finish(
    output: Output,
    date: str,
    shards: Mapping[str, Mapping[str, Any]],
    suspects: pa.Table,
    conditions: Sequence[Gate],
    earlier: Sequence[Mapping[str, Any]],
    signals: Iterable[pa.Table] = (),
    extra: Mapping[str, float | None] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `metrics.json`, `metrics.prom`, `openlineage.json` and `datalab.parquet` of a night.

    A second time, with the same input, it writes the same.

    Args:
      output: the output directory.
      date: of the night.
      shards: `nights.summary` of each training shard, by path.
      suspects: rows of `suspects.parquet`, without those that a verdict holds for.
      conditions: the gates.
      earlier: as `history` gives them.
      signals: pieces of `signals.parquet`.
      extra: other metrics, by name.
      changes: what changed since the last night, as the page shows it.

    Returns:
      What `metrics.json` holds.

    Raises:
      InputError: a gate names a metric that there is not. The metrics are written before.
    """
    night = nights.metrics_of(date, shards, suspects, earlier, extra)
    night |= {"gates": [], "changes": dict(changes or {})}
    folder = output.path("quality", date)
    try:
        night["gates"] = gates.evaluate(conditions, night, earlier)
    finally:
        with files.atomic_write(files.join(folder, "metrics.prom")) as handle:
            handle.write(exports.prometheus(night).encode())
        files.write_json(files.join(folder, "openlineage.json"), exports.open_lineage(night))
        sinks.write_parquet(
            files.join(folder, "datalab.parquet"),
            exports.DATALAB,
            exports.datalab(iter(signals), suspects),
        )
        files.write_json(files.join(folder, "metrics.json"), night)
    return night
