"""Writes metadata.json, the Flex Template's parameters, from the flags that the jobs take.

python deploy/dataflow/metadata.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam import config
from tracin_beam.jobs import options
from tracin_beam.jobs.registry import JOBS

FILE = Path(__file__).with_name("metadata.json")

STAGES = "|".join(sorted(job.name for job in JOBS.values() if job.on_beam))

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
    beam = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for beams in PipelineOptions.__subclasses__():
        beams._add_argparse_args(beam)
    by_name = {action.dest: action for action in beam._actions}
    return {
        "name": "tracin-beam",
        "description": "Which training examples made the model predict this, and which are wrong, "
        "rare or harmful: TracIn influence of training data on a Keras model's predictions.",
        "parameters": [
            _parameter("stage", f"The job: {STAGES.replace('|', ', ')}.", STAGES, optional=False),
            _parameter("config", "YAML file of flags; parameters given here win.", r"gs://.+"),
            *(
                _parameter(name, options.flag_help(name, flag), _regex(name, flag))
                for name, flag in config.flags().items()
                if flag.jobs is None
            ),
            *(
                _parameter(name, argparse.HelpFormatter("")._expand_help(by_name[name]))
                for name in _BEAM
            ),
        ],
    }


def _regex(name: str, flag: config.Flag) -> str:
    """What the values of one of our flags look like; empty where they can be anything."""
    default = config.default(name)
    if isinstance(default, bool):
        return "true|false"
    by_type = r"\d+" if isinstance(default, int) else r"[\d.eE+-]+"
    return flag.remote or (by_type if isinstance(default, int | float) else "")


def _parameter(name: str, about: str, regex: str = "", optional: bool = True) -> dict[str, Any]:
    """A parameter; all but the stage may stand in the --config file."""
    found: dict[str, Any] = {
        "name": name,
        "label": name.replace("_", " ").capitalize(),
        "helpText": about,
        "isOptional": optional,
    }
    if regex:
        found["regexes"] = [f"^({regex})$"]
    flag = config.flags().get(name)
    said: dict[str, str] = {}
    if flag and flag.repeated:
        said["repeated"] = ";"
        found["helpText"] = f"{about} Here several stand with ; between them."
    needed_by = [job.name for job in JOBS.values() if job.on_beam and name in job.needs]
    if needed_by:  # for flex_template.py, unless a --config file has it
        said["needed_by"] = ",".join(sorted(needed_by))
    if said:
        found["customMetadata"] = said
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(metadata(), indent=2) + "\n")
