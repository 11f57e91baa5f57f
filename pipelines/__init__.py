"""One launcher for each job: flags in, the graph that tracin_beam builds, the result out."""

import logging

# Beam says this at every start without the [gcp] extra, on runners that do not need it too.
logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
