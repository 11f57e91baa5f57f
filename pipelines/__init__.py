"""One launcher for each job: flags in, the graph that tracin_beam builds, the result out."""

import logging
import os

# What TensorFlow says of its start, and of records that do not parse, is no message to a user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# What Beam says at every start: of the [gcp] extra, also to runners that do not need it, and of
# transforms that take or give several PCollections.
_NOISE = ("apitools not found", "type hint will be ignored")
logging.getLogger().addFilter(
    lambda record: not any(words in record.getMessage() for words in _NOISE)
)
