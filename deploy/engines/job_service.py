"""Beam's own job service in Python, on loopback only and with whole elements in its streams."""

import signal
import sys

from apache_beam.runners.portability import local_job_service_main

from tracin_beam.jobs import local

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    local.secure()
    local_job_service_main.run(sys.argv[1:])
