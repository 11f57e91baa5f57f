"""The table of jobs: what each is called, what it needs, and what runs it.

This module imports no TensorFlow, and the jobs' code only when a job runs.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence

_ALWAYS = ("task", "checkpoints", "train")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
      name: as a command and as a function of `tracin_beam`.
      about: what it makes, in a line.
      needs: the flags that must be given.
      command: "module:function" that runs it from a command line; it takes the job, the words of
        the command line and the name of the program, and gives the exit status.
      uses_test: whether it takes the test set that is given.
    """

    name: str
    about: str
    needs: tuple[str, ...]
    command: str
    uses_test: bool = True

    def main(self, argv: Sequence[str] | None = None, prog: str = "") -> int:
        """Runs the job from the command line, by default the process's, and gives its status."""
        module, _, name = self.command.partition(":")
        run: Callable[..., int] = getattr(importlib.import_module(module), name)
        return run(self, argv, prog or f"tracin-beam {self.name}")


_LAUNCH = "tracin_beam.jobs.launch:main"

JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job(
            "influence",
            "Influence tables: every test example's top proponents and opponents, exactly scored.",
            (*_ALWAYS, "test", "output"),
            _LAUNCH,
        ),
        Job(
            "self_influence",
            "Self-influence tables: how much each training example lowers its own loss.",
            (*_ALWAYS, "output"),
            _LAUNCH,
            uses_test=False,
        ),
        Job(
            "embed",
            "Embeddings alone: projected loss gradients of every example at every checkpoint.",
            (*_ALWAYS, "output"),
            _LAUNCH,
        ),
        Job(
            "plan",
            "Before a run: how many examples, bytes, worker hours and how much memory; writes "
            "nothing.",
            _ALWAYS,
            "tracin_beam.jobs.planning:main",
        ),
    )
}
