"""`python -m pipelines.plan`, which is `tracin-beam plan` in a checkout."""

import sys

from tracin_beam.jobs.registry import JOBS

if __name__ == "__main__":
    sys.exit(JOBS["plan"].main(prog="python -m pipelines.plan"))
