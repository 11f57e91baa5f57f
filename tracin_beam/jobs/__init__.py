"""From flags to a finished run.

Options, the table of jobs and each job, preflight and tryout, fingerprints, launch, and what
Dataflow needs.
May import report and what lies below it.
"""
