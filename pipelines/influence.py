"""Influence tables: every test example's top proponents and opponents, exactly scored."""

import sys

from tracin_beam.jobs.launch import main

if __name__ == "__main__":
    sys.exit(main("influence", __doc__ or ""))
