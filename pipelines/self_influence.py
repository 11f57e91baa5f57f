"""`python -m pipelines.self_influence`, which is `tracin-beam self_influence` in a checkout."""

import sys

from tracin_beam.jobs.registry import JOBS

if __name__ == "__main__":
    sys.exit(JOBS["self_influence"].main(prog="python -m pipelines.self_influence"))
