"""Shards × checkpoints → embeddings: projected loss gradients of every example."""

import sys

from tracin_beam.jobs.launch import main

if __name__ == "__main__":
    sys.exit(main("embed", __doc__ or ""))
