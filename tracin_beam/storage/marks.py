"""Marks: what says that results are whole, and what they were made from.

A mark is a JSON file with a fingerprint of all that its results depend on, with size and checksum
of each of their files, and with a checksum of itself. It is written after them, and removed before
they change. Results are used again only where their mark has the wanted fingerprint and every file
is what it was; whatever is not, for whatever reason, is made again, and the log says so.

Size and CRC-32C tell a file that was cut short, zeroed, overwritten or exchanged for another, not
one that somebody made to have the same. They are compared where the file's number and the times of
its last changes are not those of its writing; where they are, it is certainly what was written.
"""

import json
import logging
from collections.abc import Callable, Mapping, Set
from typing import Any

from tracin_beam.errors import InputError
from tracin_beam.storage import files
from tracin_beam.storage.files import Stamp

_log = logging.getLogger(__name__)

_SHAPE = {"fingerprint": str, "checksum": str, "files": {str: (int, str, str)}}


def write(
    path: str, root: str, fingerprint: str, made: Mapping[str, Stamp], **content: Any
) -> None:
    """Marks results as whole.

    Args:
      path: of the mark.
      root: the folder that the results' paths are told from.
      fingerprint: of all that they depend on.
      made: their files, by path.
      **content: what else is to be known of them.
    """
    mark = {"fingerprint": fingerprint, **content, "files": as_json(made, root)}
    files.write_json(path, {**mark, "checksum": _checksum(mark)})


def read(
    path: str, root: str, fingerprint: str, wanted: Set[str] = frozenset()
) -> dict[str, Any] | None:
    """What a mark says, if its results can be used again.

    Args:
      path: of the mark.
      root: the folder that the results' paths are told from.
      fingerprint: that they must have.
      wanted: paths of files that it must vouch for; none in particular by default.

    Returns:
      Its content, "files" as a Stamp by path; None if there is none, or the results are others or
      not what they were, which is logged.

    Raises:
      OSError: a file system does not say.
    """
    if not files.exists(path):
        return None
    try:
        stored = files.read_json(path)
        if not files.fits(stored, _SHAPE):
            raise InputError("it has another form than a mark of this version")
        if stored.pop("checksum") != _checksum(stored):
            raise InputError("it is not as it was written")
        if stored["fingerprint"] != fingerprint:
            return None
        made = from_json(stored["files"], root)
        if missing := wanted - set(made):
            raise InputError(f"it does not vouch for {min(missing)}")
        if change := first_change(made):
            raise InputError(change)
    except InputError as error:
        refuse(path, str(error))
        return None
    return {**stored, "files": made}


def is_of(path: str, fingerprint: str) -> bool:
    """Whether a mark has a fingerprint, whatever has become of what it vouches for."""
    try:
        stored = files.read_json(path) if files.exists(path) else {}
    except InputError:
        return False
    return files.fits(stored, _SHAPE) and bool(stored["fingerprint"] == fingerprint)


def beside(path: str) -> str:
    """The mark of a single file."""
    return path + ".json"


def kept_or_made(path: str, root: str, fingerprint: str, make: Callable[[], Stamp]) -> bool:
    """Makes a file, unless it is there and the mark beside it says that it can be used again.

    Args:
      path: of the file.
      root: as of `write`.
      fingerprint: of all that it depends on.
      make: writes it.

    Returns:
      Whether it was there.
    """
    mark = beside(path)
    if read(mark, root, fingerprint, {path}) is not None:
        return True
    files.remove([mark])
    write(mark, root, fingerprint, {path: make()})
    return False


def named(path: str, root: str) -> set[str]:
    """The files that a mark vouches for, whatever has become of them; none without a mark."""
    try:
        stored = files.read_json(path) if files.exists(path) else {}
        return set(from_json(stored["files"], root)) if files.fits(stored, _SHAPE) else set()
    except InputError:
        return set()


def refuse(path: str, why: str) -> None:
    """Says that what a mark vouches for cannot be used."""
    _log.warning("what %s vouches for is made again: %s", path, why)


def first_change(made: Mapping[str, Stamp]) -> str:
    """What is the matter with the first file that is not what it was; "" if none is."""

    def change(path: str) -> str:
        how = files.difference(path, made[path])
        return f"{path}: {how}" if how else ""

    return next(filter(None, files.in_parallel(change, list(made))), "")


def as_json(made: Mapping[str, Stamp], root: str) -> dict[str, Any]:
    """Stamps by path, told from a folder, for a JSON file."""
    return {
        _relative(path, root): [stamp.size, stamp.checksum, stamp.version]
        for path, stamp in sorted(made.items())
    }


def from_json(stored: Mapping[str, Any], root: str) -> dict[str, Stamp]:
    """The inverse of `as_json`.

    Raises:
      InputError: a path leads out of the folder.
    """
    if bad := [name for name in stored if not is_inside(name)]:
        raise InputError(f"it names {bad[0]!r}, which is not inside {root}")
    return {files.join(root, *name.split("/")): Stamp(*parts) for name, parts in stored.items()}


def is_inside(name: str) -> bool:
    """Whether a relative path stays in the folder that it is told from."""
    return not ({"", ".", ".."} & set(name.split("/"))) and "\0" not in name


def _checksum(mark: Mapping[str, Any]) -> str:
    crc = files.Crc()
    crc.update(json.dumps(mark, sort_keys=True).encode())
    return crc.hexdigest()


def _relative(path: str, root: str) -> str:
    base = root.rstrip("/") + "/"
    if not path.startswith(base) or not is_inside(path.removeprefix(base)):
        raise ValueError(f"{path} is not in {root}")
    return path.removeprefix(base)
