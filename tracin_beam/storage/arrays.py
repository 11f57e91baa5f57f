"""Files of named arrays, in NumPy's own format."""

import io
from collections.abc import Mapping

import numpy as np

from tracin_beam.storage import files
from tracin_beam.storage.files import Stamp


def write(path: str, named: Mapping[str, np.ndarray]) -> Stamp:
    """Writes arrays to a file that appears whole or not at all."""
    # A zip file is not written from its beginning to its end, as remote files are.
    whole = io.BytesIO()
    np.savez(whole, allow_pickle=False, **named)
    with files.atomic_write(path) as handle:
        handle.write(whole.getbuffer())
    stamp: Stamp = handle.stamp
    return stamp


def read(path: str) -> dict[str, np.ndarray]:
    """The arrays of a file that `write` wrote, by name."""
    with files.local_copy(path) as local, np.load(local, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
