"""run.json: what is written there, by whatever job."""

import platform
from typing import TYPE_CHECKING, Any

import apache_beam as beam

from tracin_beam._version import __version__
from tracin_beam.scoring import methods
from tracin_beam.storage import files, leases, runs

if TYPE_CHECKING:
    from tracin_beam.jobs.preflight import Run


# Entries that are dictionaries, to which each job adds its own values.
_MERGED = ("sets", "counts", "timings", "folders")


def write_run(run: "Run", entries: dict[str, Any], *, anew: bool = False) -> dict[str, Any]:
    """Writes run.json: what is in it, unless it is to begin anew, what this run is, and entries.

    Returns:
      What is in it then.
    """
    with leases.waited_for(run.output.path("_state", "writing"), "writing run.json", "run.json"):
        return _merge_run(run, entries, {} if anew else runs.read_run(run.output))


def _merge_run(run: "Run", entries: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    described = {
        "method": methods.of_preconditioner(run.config.preconditioner),
        "config": run.config.recorded(),
        "versions": _versions(),
        "fingerprint": run.fingerprint,
        "kind": run.kind,
        "selection": run.selection,
        "checkpoints": [
            {
                "path": c.path,
                "step": c.step,
                "epoch": c.epoch,
                "learning_rate": c.learning_rate,
                "training": c.training + 1,
            }
            for c in run.checkpoints
        ],
    }
    merged = {key: {**earlier.get(key, {}), **entries[key]} for key in _MERGED if key in entries}
    state = {**earlier, **described, **entries, **merged}
    files.write_json(run.output.run, state)
    return state


def _versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    return {
        "tracin_beam": __version__,
        "apache_beam": beam.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
