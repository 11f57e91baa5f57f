"""From the command line to the result: what every launcher in `pipelines/` calls."""

import contextlib
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam import jobs, options, runs
from tracin_beam.errors import InputError
from tracin_beam.preflight import Run, prepare

_log = logging.getLogger(__name__)


def main(stage: str, about: str, argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line.

    Args:
      stage: "embed", "influence" or "self_influence".
      about: for `--help`.
      argv: flags; those of the process by default.

    Returns:
      The exit status: 0, or 2 for an input that has to be mended, which is said on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = f"python -m pipelines.{stage}"
    if options.wants_help(argv, prog, about):
        return 0
    try:
        config, beam_options = options.parse(argv, needs_test=stage == "influence", prog=prog)
        _set_up_logging()
        run = prepare(config, with_test=stage != "self_influence")
        if stage == "influence" and jobs.is_done(run):
            _log.info("nothing has changed since the tables were made")
        else:
            execute(stage, run, beam_options)
    except (InputError, OSError) as error:
        from tracin_beam.report.view import printable

        print(f"{prog}: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)
        return 2
    print(_summary(stage, run))
    return 0


def execute(stage: str, run: Run, beam_options: PipelineOptions) -> None:
    """Runs a job's graph.

    Raises:
      InputError: what a worker says of the input.
    """
    try:
        quiet: Any = _WithoutOurTraces(sys.stderr)
        with contextlib.redirect_stderr(quiet), beam.Pipeline(options=beam_options) as pipeline:
            jobs.GRAPHS[stage](pipeline, run)
    except InputError:
        raise
    except Exception as error:
        # Of a worker's error only the text comes back, in the middle of Beam's stack trace.
        end = r"(?: \[while running|\n\n|\nTraceback|\Z)"
        found = re.search(rf"InputError: (.*?){end}", str(error), re.S)
        if not found:
            raise
        raise InputError(found[1].strip()) from None


def _summary(stage: str, run: Run) -> str:
    from tracin_beam import tables
    from tracin_beam.report import text

    state = runs.read_run(run.output)
    if stage == "influence":
        name = run.config.test_name
        rows = tables.read(run.output.influence(name, "influence-*.parquet"))
        names = run.source.get().task.label_names
        summary = text.influence_summary(rows, state, label_names=names)
        return f"{summary}\nTables and report.html are in {run.output.influence(name)}"
    lines = []
    for name, counts in state["counts"].items():
        parts = ", ".join(f"{value} {key}" for key, value in counts.items())
        lines.append(f"{name}: {parts}")
    where = run.output.path("self_influence" if stage == "self_influence" else "embeddings")
    return "\n".join([*lines, f"Written to {where}"])


class _WithoutOurTraces:
    """A stream that drops the stack traces, which Beam prints, of errors that we report anyway."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        end = self._dropped and text == "\n"
        self._dropped = text.startswith("Traceback") and "InputError" in text
        return len(text) if self._dropped or end else self._stream.write(text)


class _OnlyOurErrors(logging.Filter):
    """Drops Beam's stack traces of errors that are reported in a sentence at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "InputError" not in record.getMessage() and not (
            record.exc_info and isinstance(record.exc_info[1], InputError)
        )


def _set_up_logging() -> None:
    """Our progress without the runners' chatter, and their errors without our own in them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("tracin_beam")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for other in logging.getLogger().handlers:
        other.addFilter(_OnlyOurErrors())
