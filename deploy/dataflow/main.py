"""What the Flex Template's launcher runs: the job that --stage names, with the other flags.

python main.py --stage=influence --train=gs://… …
"""

import argparse
import os
import sys
from collections.abc import Sequence

from tracin_beam import config
from tracin_beam.jobs.options import TracInOptions
from tracin_beam.jobs.registry import JOBS


def stages() -> list[str]:
    """The jobs that run on Beam."""
    return sorted(job.name for job in JOBS.values() if job.on_beam)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", required=True, choices=stages())
    known, rest = parser.parse_known_args(argv)
    flags = _several(_switches(rest))
    # The image that this runs in is the workers' too.
    image = os.environ.get("TRACIN_BEAM_IMAGE")
    if image and not any(flag.startswith("--sdk_container_image=") for flag in flags):
        flags.append(f"--sdk_container_image={image}")
    return JOBS[known.stage].main(flags)


def _several(flags: Sequence[str]) -> list[str]:
    """Flags that may be given several times: the launcher gives one, with ; between its values."""
    repeated = {f"--{name}" for name, flag in config.flags().items() if flag.repeated}
    given = []
    for flag in flags:
        name, _, value = flag.partition("=")
        values = value.split(";") if name in repeated else []
        given += [f"{name}={one.strip()}" for one in values if one.strip()] or [flag]
    return given


def _switches(flags: Sequence[str]) -> list[str]:
    """Flags that take no value, which the launcher can only give as --name=true or --name=false."""
    parser = argparse.ArgumentParser(add_help=False)
    TracInOptions._add_argparse_args(parser)
    switches = {f"--{action.dest}" for action in parser._actions if action.nargs == 0}
    given = []
    for flag in flags:
        name, _, value = flag.partition("=")
        if name not in switches:
            given.append(flag)
        elif value.lower() in ("", "true"):
            given.append(name)
        elif value.lower() != "false":
            sys.exit(f"{flag}: give true or false.")
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
