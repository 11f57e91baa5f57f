"""The table of jobs: what each is called, what it needs, and what runs it.

This module imports no TensorFlow, and the jobs' code only when a job runs.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracin_beam.jobs.parts import Parts

_ALWAYS = ("task", "checkpoints", "train")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
      name: as a command and as a function of `tracin_beam`.
      about: what it makes, in a line.
      needs: the flags that must be given.
      code: the module that has `PARTS`, what the job is made of (see `parts.Parts`).
      uses_test: whether it takes the test set that is given.
      per_test_set: whether it may be at work for several test sets at once.
      command: the module whose `main`, with the signature of `launch.main`, runs it from a
        command line, if it is no job on Beam.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    code: str = ""
    uses_test: bool = True
    per_test_set: bool = False
    command: str = "tracin_beam.jobs.launch"

    @property
    def on_beam(self) -> bool:
        """Whether the job runs as a pipeline."""
        return bool(self.code)

    @property
    def parts(self) -> "Parts":
        """The functions that the job is made of, imported now."""
        found: Parts = importlib.import_module(self.code).PARTS
        return found

    def main(self, argv: Sequence[str] | None = None, prog: str = "") -> int:
        """Runs the job from the command line, by default the process's, and gives its status."""
        run: Callable[..., int] = importlib.import_module(self.command).main
        return run(self.name, prog, argv)


def installed_as(name: str) -> str:
    """What the command of a job is called where the package is installed."""
    return f"tracin-beam {name}"


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job(
            "influence",
            "Influence tables: every test example's top proponents and opponents, exactly scored.",
            (*_ALWAYS, "test", "output"),
            "tracin_beam.jobs.influence",
            per_test_set=True,
        ),
        Job(
            "self_influence",
            "Self-influence tables: how much each training example lowers its own loss.",
            (*_ALWAYS, "output"),
            "tracin_beam.jobs.self_influence",
            uses_test=False,
        ),
        Job(
            "embed",
            "Embeddings alone: projected loss gradients of every example at every checkpoint.",
            (*_ALWAYS, "output"),
            "tracin_beam.jobs.embed",
        ),
        Job(
            "quality",
            "A night's tables of what is wrong with the training data: signals, suspects, gates.",
            (*_ALWAYS, "output"),
            "tracin_beam.jobs.quality",
        ),
        Job(
            "cluster",
            "Clusters of training examples that influence alike, and their most typical examples.",
            (*_ALWAYS, "output"),
            "tracin_beam.jobs.cluster",
            uses_test=False,
        ),
        Job(
            "plan",
            "Before a run: how many examples, bytes, worker hours and how much memory; writes "
            "nothing.",
            _ALWAYS,
            command="tracin_beam.jobs.plan",
        ),
    )
}

# What else the one command does: no jobs on checkpoints, and named by two words.
COMMANDS: dict[str, Job] = {
    job.name: job
    for job in (
        Job(
            "quality verdicts",
            "The ledger of verdicts on suspects: adds files that reviewers exported to it.",
            ("output",),
            command="tracin_beam.jobs.quality_verdicts",
        ),
        Job(
            "quality apply",
            "Cleaned shards from the ledger of verdicts, into another folder.",
            ("task", "train", "output", "to"),
            command="tracin_beam.jobs.quality_apply",
        ),
    )
}
