"""Which shards a training has seen, as checkpoints.json tells.

An entry of the list may have "train": the shards of the training from this checkpoint on, each with
"path" and "identity" (size and checksum), or null where nothing is known of it. An entry without it
is of the same training as the one before; the first one without it is of an unknown one.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracin_beam.errors import InputError
from tracin_beam.inputs.checkpoints import LISTING, read_entries
from tracin_beam.storage import files, runs
from tracin_beam.storage.runs import Shard

Shards = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A glob, or a list of globs and paths."""

TRAINED, NEW, UNKNOWN = "trained", "new", "unknown"
"""Cohorts of examples: the training has seen them, has not, or nobody knows."""

_KEY = "train"
_SHAPE = [{"path": str, "identity": str}]


@dataclass(frozen=True)
class Trained:
    """What is known of the shards that a training has seen.

    Attributes:
      identities: size and checksum of those that are known, by path.
      all_known: whether there are no others.
    """

    identities: Mapping[str, str]
    all_known: bool


def described(train: Shards | None) -> list[dict[str, str]] | None:
    """What an entry of the list says of the shards that a pattern, or a list of them, names.

    Raises:
      InputError: nothing matches.
    """
    if train is None:
        return None
    paths = [train] if isinstance(train, str | os.PathLike) else train
    pattern = ",".join(os.fspath(path) for path in paths)
    shards = runs.find_shards(pattern, "train", {})
    return [{"path": shard.path, "identity": shard.identity} for shard in shards]


def note(
    entry: dict[str, Any], before: Sequence[Mapping[str, Any]], train: list[dict[str, str]] | None
) -> None:
    """Puts into an entry what it was trained on, unless those before say the same."""
    said = next((one[_KEY] for one in reversed(before) if _KEY in one), None)
    if train != said:
        entry[_KEY] = train


def read(checkpoints: str) -> Trained:
    """What the listing of a directory tells of the shards of its training, over all its stages.

    Args:
      checkpoints: the directory; of anything else nothing is known.

    Raises:
      InputError: the listing is not as it must be.
    """
    listing = files.join(checkpoints, LISTING)
    entries = read_entries(checkpoints) if files.exists(listing) else []
    identities: dict[str, str] = {}
    all_known = bool(entries) and entries[0].get(_KEY) is not None
    for number, entry in enumerate(entries):
        shards = entry.get(_KEY, [])
        if shards is None:
            all_known = False
        elif not files.fits(shards, _SHAPE):
            raise InputError(
                f"Entry {number} of {listing}: {_KEY!r} must be a list of shards, each with 'path' "
                "and 'identity', or null"
            )
        else:
            identities.update((shard["path"], shard["identity"]) for shard in shards)
    return Trained(identities, all_known)


def cohorts(shards: Sequence[Shard], checkpoints: str, pattern: str = "") -> dict[str, str]:
    """The cohort of each shard's examples, by the shard's path.

    A shard with the size and checksum of one that was trained on is "trained", wherever it lies.
    One that has changed since is "unknown", as some of its examples may be as they were.

    Args:
      shards: of the training set.
      checkpoints: of the training, as `read` takes it.
      pattern: the shards that the training has seen, if the user says so: the others are new.

    Raises:
      InputError: as of `read`, or the pattern matches nothing.
    """
    if pattern:
        seen = {info.path for info in runs.matched(pattern, "trained")}
        return {shard.path: TRAINED if shard.path in seen else NEW for shard in shards}
    known = read(checkpoints)
    identities = set(known.identities.values())
    # Of a copy on another file system, which keeps another checksum, only the size tells.
    kinds = {_size_and_kind(identity) for identity in identities}
    found = {}
    for shard in shards:
        size, is_local = _size_and_kind(shard.identity)
        if shard.identity in identities:
            found[shard.path] = TRAINED
        elif shard.path in known.identities or (size, not is_local) in kinds:
            found[shard.path] = UNKNOWN
        else:
            found[shard.path] = NEW if known.all_known else UNKNOWN
    return found


def _size_and_kind(identity: str) -> tuple[str, bool]:
    """The size, and whether the checksum is one of ours, as of a local file."""
    size, _, checksum = identity.partition(":")
    return size, re.fullmatch("[0-9a-f]{8}", checksum) is not None
