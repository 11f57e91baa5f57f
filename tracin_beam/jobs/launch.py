"""From the command line to the result: what every launcher in `pipelines/` calls."""

import contextlib
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from tracin_beam.errors import InputError
from tracin_beam.jobs import dataflow, graphs, local, options
from tracin_beam.jobs.preflight import Run, prepare
from tracin_beam.storage import runs

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
        FileSystems.set_options(PipelineOptions(argv))  # whose account reads a --config file
        config, beam_options = options.parse(argv, needs_test=stage == "influence", prog=prog)
        if dataflow.is_chosen(beam_options):
            dataflow.check(config, beam_options)
            dataflow.set_defaults(beam_options)
        set_up_logging()
        FileSystems.set_options(beam_options)
        run = prepare(config, with_test=stage != "self_influence")
        only_written = dataflow.only_written(beam_options)
        if stage == "influence" and not only_written and graphs.is_done(run):
            _log.info("nothing has changed since the tables were made")
        else:
            result = execute(stage, run, beam_options)
            if said := only_written or _unfinished(result, beam_options):
                print(said)
                return 0
    except (InputError, OSError) as error:
        say(prog, error)
        return 2
    print(_summary(stage, run))
    return 0


def say(prog: str, error: Exception) -> None:
    """Says on stderr what has to be mended."""
    from tracin_beam.report.view import printable

    print(f"{prog}: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)


def execute(stage: str, run: Run, beam_options: PipelineOptions) -> PipelineResult:
    """Runs a job's graph, and waits for it unless the options say otherwise.

    Raises:
      InputError: what Beam says of its options, or a worker of the input.
    """
    local.prepare(beam_options)
    try:
        quiet: Any = _WithoutOurTraces(sys.stderr)
        with contextlib.redirect_stderr(quiet), beam.Pipeline(options=beam_options) as pipeline:
            graphs.GRAPHS[stage](pipeline, run)
        return pipeline.result
    except InputError:
        raise
    except Exception as error:
        if str(error).startswith("Pipeline has validations errors"):
            raise InputError(str(error).partition("\n")[2].strip()) from None
        # Of a worker's error only the text comes back, in the middle of Beam's stack trace.
        end = r"(?: \[while running|\n\n|\nTraceback|\Z)"
        found = re.search(rf"InputError: (.*?){end}", str(error), re.S)
        if not found:
            raise
        raise InputError(found[1].strip()) from None


def _unfinished(result: PipelineResult, beam_options: PipelineOptions) -> str | None:
    """What to say of a job that was not waited for."""
    waited = not beam_options.view_as(StandardOptions).no_wait_until_finish
    if waited or result.state == PipelineState.DONE:
        return None
    # Dataflow's results have a method, those of job servers an attribute.
    job_id = result.job_id() if hasattr(result, "job_id") else getattr(result, "_job_id", "")
    return f"Submitted the job {job_id}. Once it has finished, this command shows its results."


def _summary(stage: str, run: Run) -> str:
    from tracin_beam.report import text
    from tracin_beam.storage import tables

    state = runs.read_run(run.output)
    if stage == "influence":
        name = run.config.test_name
        rows = tables.read_folder(run.output.influence(name))
        names = run.source.get().task.label_names
        summary = text.influence_summary(rows, state, label_names=names)
        return (
            f"{summary}\nTables are in {run.output.influence(name)}\n"
            f"Report: {run.output.report(name)}"
        )
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


def set_up_logging() -> None:
    """Our progress without the runners' chatter, and their errors without our own in them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("tracin_beam")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for other in logging.getLogger().handlers:
        other.addFilter(_OnlyOurErrors())
