"""`python -m pipelines.embed`, which is `tracin-beam embed` in a checkout."""

import sys

from tracin_beam.jobs.registry import JOBS

if __name__ == "__main__":
    sys.exit(JOBS["embed"].main(prog="python -m pipelines.embed"))
