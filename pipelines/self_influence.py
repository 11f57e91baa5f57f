"""Self-influence tables: how much each training example lowers its own loss."""

import sys

from tracin_beam.jobs.launch import main

if __name__ == "__main__":
    sys.exit(main("self_influence", __doc__ or ""))
