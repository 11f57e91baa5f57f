"""Writes metadata.json, the Flex Template's parameters, from the flags that the jobs take.

python deploy/dataflow/metadata.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam.jobs import graphs
from tracin_beam.jobs.options import TracInOptions

FILE = Path(__file__).with_name("metadata.json")

# Parameters that no template can do without; the other needed flags may stand in the --config file.
_REQUIRED = ("stage",)
_REGEXES = {
    "stage": "|".join(sorted(graphs.GRAPHS)),
    "config": r"gs://.+",
    "task": r"(gs://.+\.py|[\w.]+):\w+",
    "checkpoints": r"gs://.+",
    "train": r"gs://.+",
    "test": r"gs://.+",
    "output": r"gs://[^*?\[\]]+",
    "dim": r"\d+|auto",
}
_BY_TYPE = {int: r"\d+", float: r"[\d.eE+-]+"}

# Of Beam's flags those that neither the launch request nor the image gives.
_BEAM = (
    "sdk_container_image",
    "number_of_worker_harness_threads",
    "resource_hints",
    "dataflow_service_options",
    "disk_size_gb",
)


def metadata() -> dict[str, Any]:
    """The template's metadata, as Dataflow's TemplateMetadata."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--stage", help=f"The job: {', '.join(sorted(graphs.GRAPHS))}.")
    own.add_argument("--config", help="YAML file of flags; parameters given here win.")
    TracInOptions._add_argparse_args(own)
    beam = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(beam)
    by_name = {action.dest: action for action in beam._actions}
    return {
        "name": "tracin-beam",
        "description": "Which training examples made the model predict this, and which are wrong, "
        "rare or harmful: TracIn influence of training data on a Keras model's predictions.",
        "parameters": [_parameter(action) for action in own._actions]
        + [_parameter(by_name[name]) for name in _BEAM],
    }


def _parameter(action: argparse.Action) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": action.dest,
        "label": action.dest.replace("_", " ").capitalize(),
        "helpText": argparse.HelpFormatter("")._expand_help(action),
        "isOptional": action.dest not in _REQUIRED,
    }
    regex = _REGEXES.get(action.dest) or _BY_TYPE.get(action.type)
    if action.nargs == 0:
        regex = "true|false"
    if regex:
        found["regexes"] = [f"^({regex})$"]
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(metadata(), indent=2) + "\n")
