#!/usr/bin/env python3
"""Builds the Flex Template and launches jobs from it, with gcloud.

    flex_template.py build --project P --bucket B --image HOST/P/REPOSITORY/tracin-beam:1
    flex_template.py run influence --project P --bucket B --region R \\
        --task=gs://B/my_task.py:task --checkpoints=gs://B/ckpts --train='gs://B/data/train-*' \\
        --test='gs://B/data/test-*' --output=gs://B/out

PROJECT, BUCKET, REGION and IMAGE may stand in the environment instead. Any other flag of `run` is a
parameter of the template, which metadata.json lists. Needs Python and gcloud, nothing else.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METADATA = HERE / "metadata.json"
STAGE = "stage"

# Flags of `run` that are gcloud's, not the template's parameters.
_WORKERS = {
    "machine_type": ("--worker-machine-type", "machine of a worker (%(default)s)"),
    "launcher_machine_type": (
        "--launcher-machine-type",
        "machine that tries some records and makes the graph (%(default)s)",
    ),
    "num_workers": ("--num-workers", "workers to begin with"),
    "max_num_workers": ("--max-workers", "workers at most"),
    "worker_zone": ("--worker-zone", "zone of the workers, such as one that has the GPUs"),
    "service_account_email": ("--service-account-email", "account that the workers run as"),
    "network": ("--network", "network of the workers"),
    "subnetwork": ("--subnetwork", "subnetwork of the workers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the image and write the template")
    run = commands.add_parser("run", help="launch a job", allow_abbrev=False)
    for command in (build, run):
        _setting(command, "project")
        _setting(command, "bucket", "bucket of the template, and of staged and temporary files")
    _setting(build, "image", "name of the image to make, with its tag")
    build.add_argument("--gpu", action="store_true", help="with CUDA's libraries for TensorFlow")
    run.add_argument(STAGE, help="cluster, embed, influence, self_influence or quality")
    _setting(run, "region")
    run.add_argument("--job_name", help="by default tracin-<stage>-<time>")
    run.add_argument("--public_ips", action="store_true", help="give workers public addresses")
    for name, (_, about) in _WORKERS.items():
        run.add_argument(f"--{name}", help=about)
    run.set_defaults(machine_type="n1-standard-4", launcher_machine_type="n1-standard-2")
    given, rest = parser.parse_known_args(argv)
    if given.command == "build":
        if rest:
            build.error(f"unrecognized arguments: {' '.join(rest)}")
        return _build(given)
    return _run(given, _parameters({STAGE: given.stage}, rest, run.error))


def _setting(parser: argparse.ArgumentParser, name: str, about: str = "") -> None:
    default = os.environ.get(name.upper())
    parser.add_argument(
        f"--{name}", default=default, required=not default, help=f"{about} [${name.upper()}]"
    )


def _template(bucket: str) -> str:
    return f"gs://{bucket}/templates/tracin-beam.json"


def _build(given: argparse.Namespace) -> int:
    substitutions = {
        "_IMAGE": given.image,
        "_TEMPLATE": _template(given.bucket),
        "_TENSORFLOW": "tensorflow[and-cuda]" if given.gpu else "tensorflow",
    }
    return _gcloud(
        ["builds", "submit", str(HERE.parents[1])],
        {
            "--project": given.project,
            "--config": str(HERE / "cloudbuild.yaml"),
            "--substitutions": substitutions,
        },
    )


def _parameters(parameters: dict[str, str], flags: Sequence[str], fail: Any) -> dict[str, str]:
    """The template's parameters in --name=value, --name value and --name, checked as it does."""
    declared = {p["name"]: p for p in json.loads(METADATA.read_text())["parameters"]}
    words = list(flags)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in declared:
            fail(f"{word} is not a parameter of the template; write globs and lists in quotes.")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        between = declared[name].get("customMetadata", {}).get("repeated")
        before = [parameters[name]] if between and name in parameters else []
        parameters[name] = (between or "").join([*before, value])
    for name, value in parameters.items():
        regexes = declared[name].get("regexes", [])
        if not all(re.match(regex, value) for regex in regexes):
            fail(f"{name}={value} is not of the form {' '.join(regexes)}")
    missing = [
        f"--{name}"
        for name, parameter in declared.items()
        if name not in parameters
        and parameters[STAGE] in parameter.get("customMetadata", {}).get("needed_by", "").split(",")
    ]
    if missing and "config" not in parameters:
        fail(f"{', '.join(missing)} must be given, or a --config file that has them.")
    return parameters


def _run(given: argparse.Namespace, parameters: dict[str, str]) -> int:
    named = f"tracin-{given.stage}-{time.strftime('%Y%m%d-%H%M%S')}".replace("_", "-")
    flags: dict[str, Any] = {
        "--project": given.project,
        "--region": given.region,
        "--template-file-gcs-location": _template(given.bucket),
        "--temp-location": f"gs://{given.bucket}/tmp",
        "--staging-location": f"gs://{given.bucket}/staging",
        "--disable-public-ips": not given.public_ips,
        "--parameters": parameters,
    }
    chosen = {flag: getattr(given, name) for name, (flag, _) in _WORKERS.items()}
    flags.update({flag: value for flag, value in chosen.items() if value})
    return _gcloud(["dataflow", "flex-template", "run", given.job_name or named], flags)


def _gcloud(command: Sequence[str], flags: dict[str, Any]) -> int:
    """Runs gcloud, with its flags in a file, where commas and spaces in a value mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "flags.json"
        file.write_text(json.dumps(flags))  # which is YAML too
        try:
            return subprocess.run(
                ["gcloud", *command, f"--flags-file={file}"], check=False
            ).returncode
        except FileNotFoundError:
            print("flex_template.py: gcloud is not installed, or not on PATH.", file=sys.stderr)
            return 127


if __name__ == "__main__":
    sys.exit(main())
