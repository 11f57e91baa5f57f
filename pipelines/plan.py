"""Before a run: how many examples, bytes, worker hours and how much memory; writes nothing."""

import sys

from tracin_beam.jobs.planning import main

if __name__ == "__main__":
    sys.exit(main(__doc__ or ""))
