"""The ledger of verdicts: what people decided on suspects, in `quality/verdicts.parquet`.

A verdict belongs to an example's id and to the content of its record, so that it holds as long as
the example is what was looked at. Nothing is ever taken out of the ledger; of several verdicts on
one example the latest counts.
"""

import csv
import datetime
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tracin_beam.errors import InputError
from tracin_beam.storage import files, leases, tables
from tracin_beam.storage.runs import Output

VERDICTS = ("keep", "relabel", "drop", "snooze")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("content_hash", pa.binary()),  # 16 bytes, see `records.content_hash`
        ("verdict", pa.string()),
        ("label", pa.float64()),  # that relabel gives
        ("until", pa.string()),  # of snooze: the first day on which it is asked again
        ("who", pa.string()),
        ("when", pa.string()),  # ISO 8601, UTC
        ("why", pa.string()),
        ("given_label", pa.float64()),  # that the reviewer saw, where it is known
    ]
)

_NEEDED = ("id", "content_hash", "verdict", "who", "when")
_LARGEST_FILE = 256 << 20  # bytes
_LONGEST = 10_000  # characters of a text
_HASH = 16


def read(output: Output) -> pa.Table:
    """The ledger of an output directory; without rows where there is none.

    Raises:
      InputError: the file is no ledger.
    """
    path = output.verdicts
    if not files.exists(path):
        return SCHEMA.empty_table()
    try:
        found = tables.read(path)
    except pa.ArrowException as error:
        raise InputError(
            f"{path} is no ledger of verdicts ({_line(error)}): restore it from a copy, or "
            "move it away."
        ) from None
    return _table(list(_checked(found.to_pylist(), path)))


def add(output: Output, paths: Sequence[str]) -> tuple[int, int]:
    """Merges files of verdicts into the ledger; several may do so at a time.

    A verdict that is in the ledger already is not added again.

    Args:
      output: whose ledger.
      paths: of files as `read_file` takes them. All are checked before anything is written.

    Returns:
      How many verdicts were added, and how many the ledger holds now.

    Raises:
      InputError: one of the files is not one of verdicts.
      leases.Taken: somebody else holds the ledger for minutes.
    """
    new = [row for path in paths for row in read_file(path).to_pylist()]
    with leases.waited_for(output.leases, "the ledger of verdicts", "verdicts"):
        old = read(output).to_pylist()
        whole = _table([*old, *new])
        if len(whole) > len(old):
            tables.write(output.verdicts, whole)
    return len(whole) - len(old), len(whole)


def read_file(path: str) -> pa.Table:
    """Reads verdicts that a reviewer exported: JSON lines, a JSON list, CSV or Parquet.

    In text a content hash is 32 hexadecimal digits. Columns that a ledger does not have are
    ignored.

    Raises:
      InputError: it says which file, which row and what is wrong with it.
    """
    try:
        if files.size(path) > _LARGEST_FILE:
            raise InputError(f"{path} is larger than {_LARGEST_FILE >> 20} MB: split it.")
        with files.open_read(path) as handle:
            content = handle.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_line(error)}") from None
    if content.startswith(b"PAR1"):
        try:
            rows = pq.read_table(pa.BufferReader(content)).to_pylist()
        except (pa.ArrowException, ValueError) as error:  # also text that is no UTF-8
            raise InputError(f"{path} is no sound Parquet file ({_line(error)}).") from None
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is neither Parquet nor text in UTF-8 ({error}).") from None
        rows = _rows_of_text(text, path)
    if not rows:
        raise InputError(f"{path} has no verdicts in it.")
    return _table(list(_checked(rows, path)))


def latest(ledger: pa.Table) -> dict[tuple[str, bytes], dict[str, Any]]:
    """The verdict that counts, by id and content hash."""
    return {(row["id"], row["content_hash"]): row for row in ledger.to_pylist()}


def without_reviewed(suspects: pa.Table, ledger: pa.Table, date: str) -> pa.Table:
    """The suspects that no verdict holds for, of any kind.

    A verdict holds while the content of the record is what was looked at, and the label too, as
    far as the ledger knows it; one to snooze until its date.

    Args:
      suspects: with the columns of `suspects.parquet`.
      ledger: as of `read`.
      date: tonight's.
    """
    held = latest(ledger)
    keep = []
    for row in suspects.select(["id", "content_hash", "label"]).to_pylist():
        verdict = held.get((row["id"], row["content_hash"]))
        keep.append(verdict is None or not _holds(verdict, row["label"], date))
    return suspects.filter(pa.array(keep, pa.bool_()))


def _holds(verdict: Mapping[str, Any], label: Any, date: str) -> bool:
    given = verdict["given_label"]
    if given is not None and isinstance(label, int | float) and label != given:
        return False
    return verdict["verdict"] != "snooze" or date < verdict["until"]


def _rows_of_text(text: str, path: str) -> list[dict[str, Any]]:
    start = text.lstrip()[:1]
    try:
        if start == "[":
            rows = json.loads(text)
        elif start == "{":
            lines = [line for line in text.split("\n") if line.strip()]
            rows = [json.loads(line) for line in lines]
        else:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(
                    f"{path} is neither JSON nor CSV of verdicts: it has no column "
                    f"{', '.join(missing)}."
                )
            rows = [{k: v for k, v in row.items() if v != ""} for row in reader]
    except (ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no sound JSON or CSV ({_line(error)}).") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number} is no verdict but {row!r:.60}.")
    return rows


def _checked(rows: Sequence[Mapping[str, Any]], path: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        try:
            yield _row(row)
        except ValueError as error:
            raise InputError(f"{path}, row {number}: {error}.") from None


def _row(given: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the ledger.

    Raises:
      ValueError: it says what is wrong.
    """
    row: dict[str, Any] = {name: given.get(name) for name in SCHEMA.names}
    for name in _NEEDED:
        if row[name] in (None, ""):
            raise ValueError(f"{name} is missing")
    for name in ("id", "verdict", "until", "who", "when", "why"):
        value = row[name]
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} is not a text but {value!r:.60}")
        if len(value) > _LONGEST:
            raise ValueError(f"{name} has {len(value)} characters, and {_LONGEST} are the most")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} {value!r:.60} is no Unicode text") from None
    if row["verdict"] not in VERDICTS:
        raise ValueError(f"the verdict {row['verdict']!r:.60} is none of {', '.join(VERDICTS)}")
    row["content_hash"] = _content_hash(row["content_hash"])
    row["label"] = _label("label", row["label"])
    row["given_label"] = _label("given_label", row["given_label"])
    if row["verdict"] == "relabel" and row["label"] is None:
        raise ValueError("relabel needs a label")
    if row["verdict"] != "relabel":
        row["label"] = None
    if row["verdict"] == "snooze":
        row["until"] = _date(row["until"])
    else:
        row["until"] = None
    row["when"] = _time(row["when"])
    row["why"] = row["why"] or ""
    return row


def _content_hash(value: Any) -> bytes:
    if isinstance(value, str):
        try:
            value = bytes.fromhex(value)
        except ValueError:
            raise ValueError(f"content_hash {value!r:.60} is not hexadecimal") from None
    if not isinstance(value, bytes) or len(value) != _HASH:
        raise ValueError(f"content_hash {value!r:.60} is not {_HASH} bytes")
    return value


def _label(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} {value!r:.60} is not a number")
    return number


def _date(value: str | None) -> str:
    try:
        return datetime.date.fromisoformat(value or "").isoformat()
    except ValueError:
        raise ValueError(f"until {value!r:.60} is not a date such as 2026-11-22") from None


def _time(value: str) -> str:
    try:
        found = datetime.datetime.fromisoformat(value)
        if found.tzinfo is None:
            found = found.replace(tzinfo=datetime.UTC)
        return found.astimezone(datetime.UTC).isoformat(timespec="microseconds")
    except (ValueError, OverflowError):
        raise ValueError(f"when {value!r:.60} is not a time such as 2026-11-22T07:30:00Z") from None


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Each verdict once, in an order that depends on the verdicts alone: the latest last."""
    distinct = {tuple(row[name] for name in SCHEMA.names): row for row in rows}
    ordered = sorted(distinct, key=lambda values: (values[6], *map(repr, values)))
    return pa.Table.from_pylist([dict(distinct[key]) for key in ordered], SCHEMA)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
