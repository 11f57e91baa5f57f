"""One command for all jobs: `tracin-beam influence …`, or `python -m tracin_beam influence …`."""

import sys
from collections.abc import Sequence

from tracin_beam._version import __version__
from tracin_beam.jobs import start
from tracin_beam.jobs.registry import COMMANDS, JOBS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job that the first word names.

    Args:
      argv: a job's name and its flags; those of the process by default.

    Returns:
      The exit status: that of the job, or 2 for an unknown name.
    """
    start.quietly()
    if argv is None:
        start.with_early_signals()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"tracin-beam {__version__}")
        return 0
    if words[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if (two := " ".join(words[:2])) in COMMANDS:
        return COMMANDS[two].main(words[2:])
    if not words or words[0] not in JOBS:
        said = f"there is no job {words[0]!r}" if words else "name a job"
        print(f"tracin-beam: {said}.\n{_usage()}", file=sys.stderr)
        return 2
    return JOBS[words[0]].main(words[1:])


def _usage() -> str:
    every = [*JOBS.values(), *COMMANDS.values()]
    lines = [f"  {job.name:<16} {job.about}" for job in every]
    return "\n".join(
        [
            "usage: tracin-beam JOB --flag=value …",
            "",
            *lines,
            "",
            "tracin-beam JOB --help shows the job's flags.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
