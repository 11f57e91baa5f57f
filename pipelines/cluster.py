"""`python -m pipelines.cluster`, which is `tracin-beam cluster` in a checkout."""

import sys

from tracin_beam.jobs.registry import JOBS

if __name__ == "__main__":
    sys.exit(JOBS["cluster"].main(prog="python -m pipelines.cluster"))
