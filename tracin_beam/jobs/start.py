"""The start of a command, before Beam and TensorFlow are imported, which takes seconds.

This module imports neither.
"""

import logging
import os
import signal
from types import FrameType

# What Beam says at every start: of the [gcp] extra, also to runners that do not need it, and of
# transforms that take or give several PCollections.
_NOISE = ("apitools not found", "type hint will be ignored")


def quietly() -> None:
    """Keeps from the user what TensorFlow and Beam say at every start.

    What TensorFlow says of records that do not parse is no message to a user either. This sets up
    the whole process, so that only commands may call it.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger().addFilter(
        lambda record: not any(words in record.getMessage() for words in _NOISE)
    )


def with_early_signals() -> None:
    """Lets Ctrl-C and SIGTERM end the process in a line, where Python would show a trace."""
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped before anything was done\n")
    os._exit(128 + number)
