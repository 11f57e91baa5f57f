"""What the user brings.

The task, its checkpoints and the callback that writes them, and shards.
May import storage and what lies below it.
"""
