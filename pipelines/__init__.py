"""One launcher for each job: flags in, the graph that tracin_beam builds, the result out."""

import logging
import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"stopped before anything was done\n")
    os._exit(128 + number)


# Importing Beam takes seconds in which Python would show where it was interrupted.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)

# What TensorFlow says of its start, and of records that do not parse, is no message to a user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# What Beam says at every start: of the [gcp] extra, also to runners that do not need it, and of
# transforms that take or give several PCollections.
_NOISE = ("apitools not found", "type hint will be ignored")
logging.getLogger().addFilter(
    lambda record: not any(words in record.getMessage() for words in _NOISE)
)
