"""From flags to a finished run.

Options, preflight, fingerprints, graphs, launch, and what Dataflow needs.
May import report and what lies below it.
"""
