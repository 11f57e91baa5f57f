"""A script that runs a job and kills its own process in the middle."""

KILLED = """
import importlib, os, sys
module, name, calls, stage = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
module = importlib.import_module(module)
original = getattr(module, name)

def patched(*args, **kwargs):
    global calls
    calls -= 1
    if calls == 0:
        os._exit(9)
    return original(*args, **kwargs)

setattr(module, name, patched)
from tracin_beam.jobs.registry import JOBS
sys.exit(JOBS[stage].main(sys.argv[5:]))
"""
