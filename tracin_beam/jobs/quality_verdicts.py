"""`tracin-beam quality verdicts`: merges files of verdicts into the ledger, or tells of it."""

import collections
from collections.abc import Sequence

from apache_beam.io.filesystems import FileSystems

from tracin_beam.jobs import launch, options
from tracin_beam.jobs.registry import COMMANDS, Job
from tracin_beam.storage import files, verdicts
from tracin_beam.storage.runs import Output, matched


def main(name: str, prog: str = "", argv: Sequence[str] | None = None) -> int:
    """Adds verdicts. Arguments and result are those of `launch.main`."""
    return launch.command(COMMANDS[name], prog, argv, _run)


def _run(job: Job, prog: str, argv: Sequence[str]) -> int:
    config, beam_options = options.parse(argv, job, prog)
    FileSystems.set_options(beam_options)
    output = Output(files.full(config.output))
    if config.add:
        added, _ = verdicts.add(output, [info.path for info in matched(config.add, "add")])
        print(f"{added} verdicts added")
    counted = collections.Counter(
        row["verdict"] for row in verdicts.latest(verdicts.read(output)).values()
    )
    words = ", ".join(f"{counted[name]} {name}" for name in verdicts.VERDICTS)
    print(f"{counted.total()} examples have a verdict ({words}): {output.verdicts}")
    return 0
