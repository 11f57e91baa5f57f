"""One number per training example each.

What the self-influence and data-quality tables are made of: pure functions over arrays.
May import scoring and what lies below it; no Beam.
"""
