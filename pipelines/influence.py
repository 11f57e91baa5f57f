"""`python -m pipelines.influence`, which is `tracin-beam influence` in a checkout."""

import sys

from tracin_beam.jobs.registry import JOBS

if __name__ == "__main__":
    sys.exit(JOBS["influence"].main(prog="python -m pipelines.influence"))
