"""`python -m pipelines.quality`, which is `tracin-beam quality` in a checkout."""

import sys

from tracin_beam.jobs.registry import JOBS

if __name__ == "__main__":
    sys.exit(JOBS["quality"].main(prog="python -m pipelines.quality"))
