"""Jobs in processes of their own, for tests that kill or watch whole ones.

They are forked from a process that has imported everything and computed nothing, as only such a one
can be forked: each starts at once, where a new interpreter takes seconds to import TensorFlow.
"""

import atexit
import importlib
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["apache_beam", "tensorflow", "tracin_beam.jobs.graphs", "tracin_beam.jobs.launch"]
)


class Job:
    """A job in a process of its own.

    Attributes:
      process: the process, of multiprocessing.
    """

    def __init__(self, stage, argv, exits=None, prelude="", **env):
        """Starts it.

        Args:
          stage: the job's name.
          argv: its flags.
          exits: a module, the name of a function in it, and at which of its calls the process ends
            with status 9, as a machine does that is switched off.
          prelude: code to run before.
          **env: more variables of the environment.
        """
        self._folder = tempfile.mkdtemp()
        env = {**os.environ, "TMPDIR": self._folder, **env}
        given = stage, argv, exits, prelude, env, self._said
        self.process = _FORKS.Process(target=_run, args=given)
        self.process.start()

    @property
    def _said(self):
        return os.path.join(self._folder, "said")

    def running(self):
        """Whether it has not ended yet."""
        return self.process.exitcode is None

    def wait(self):
        """Its exit status, once it has ended; of a signal, the negative of its number."""
        self.process.join()
        return self.process.exitcode

    def said(self):
        """What it has written to stderr."""
        return Path(self._said).read_text()

    def end(self):
        """Kills it, if it has not ended, and removes what it leaves in its temporary folder."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self._folder)


def result_of(code, **given):
    """What code, which sees the names that are given, leaves under the name `result`."""
    ours, theirs = _FORKS.Pipe()
    process = _FORKS.Process(target=_evaluate, args=(code, given, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _evaluate(code, names, answer):
    exec(code, names)
    answer.send(names["result"])
    atexit._run_exitfuncs()  # which a fork does not by itself


def _run(stage, argv, exits, prelude, env, said):
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    for number, path in ((1, os.devnull), (2, said)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    exec(prelude, {})
    if exits:
        _exit_at(*exits)
    import beam_memo

    from tracin_beam.jobs.registry import JOBS

    beam_memo.install()
    status = JOBS[stage].main(argv)
    atexit._run_exitfuncs()  # which a fork does not by itself
    raise SystemExit(status)


def _exit_at(module, name, calls):
    module = importlib.import_module(module)
    original = getattr(module, name)

    def counted(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os._exit(9)
        return original(*args, **kwargs)

    setattr(module, name, counted)
