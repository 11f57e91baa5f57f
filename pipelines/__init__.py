"""One launcher for each job, for a checkout; where the package is installed it is `tracin-beam`."""

import sys

from tracin_beam.jobs import start

start.quietly()
if sys.argv[:1] == ["-m"]:
    start.with_early_signals()
