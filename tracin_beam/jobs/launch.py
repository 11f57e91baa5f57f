"""From the command line to the result: what every job but `plan` does."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from tracin_beam.config import Config
from tracin_beam.errors import InputError
from tracin_beam.jobs import dataflow, graphs, interrupts, local, options, worker_errors
from tracin_beam.jobs.preflight import Run, prepared
from tracin_beam.jobs.registry import JOBS, Job, installed_as
from tracin_beam.stages import metrics, progress
from tracin_beam.storage import files, runs, unfinished

_log = logging.getLogger(__name__)


def main(name: str, prog: str = "", argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line.

    Args:
      name: of the job.
      prog: what the command is called, by default as it is installed.
      argv: flags, by default those of the process.

    Returns:
      The exit status, as `ends` gives it.
    """
    return command(JOBS[name], prog, argv, _run)


def command(
    job: Job,
    prog: str,
    argv: Sequence[str] | None,
    body: Callable[[Job, str, Sequence[str]], int],
) -> int:
    """Runs a body of one's own for a job's command line; the rest is as of `main`.

    Args:
      job: which one.
      prog: as of `main`.
      argv: as of `main`.
      body: from the job, what it is called and its flags to the exit status.
    """
    prog = prog or installed_as(job.name)
    argv = list(sys.argv[1:] if argv is None else argv)
    if options.wants_help(argv, prog, job):
        return 0
    return ends(prog, lambda: body(job, prog, argv))


def _run(job: Job, prog: str, argv: Sequence[str]) -> int:
    FileSystems.set_options(PipelineOptions(argv))  # whose account reads a --config file
    config, beam_options = options.parse(argv, job, prog)
    set_up_logging()
    with progress.reported(progress.as_lines):
        run, said = carry_out(job, config, beam_options)
    print(said or job.parts.summary(run, runs.read_run(run.output)))
    return 0 if said else job.parts.status(run)


def ends(prog: str, body: Callable[[], int]) -> int:
    """Runs a command, which may end in one sentence on stderr; its temporary files go with it.

    Returns:
      The exit status: that of `body`, 2 for an input that has to be mended, 1 for a failure. By
      Ctrl-C and SIGTERM the process ends, with 130 and 143.
    """
    try:
        with interrupts.handled(prog), unfinished.temporary_folder():
            return body()
    except (InputError, OSError) as error:
        say(prog, error)
        return 2
    except Exception as error:
        if worker_errors.shows_traces():
            raise
        failed = worker_errors.of(error)
        say(prog, failed)
        return 2 if isinstance(failed, InputError) else 1


def carry_out(job: Job, config: Config, beam_options: PipelineOptions) -> tuple[Run, str | None]:
    """Runs a job as far as it is not done already.

    Returns:
      The run, and what to say of a job that was not waited for, or not even submitted.

    Raises:
      InputError: an input has to be mended.
    """
    unfinished.begin()
    if dataflow.is_chosen(beam_options):
        dataflow.check(config, beam_options)
        dataflow.set_defaults(beam_options)
    FileSystems.set_options(beam_options)
    _log.info("looking at the task, the checkpoints and the data")
    with prepared(config, job, functools.partial(graphs.is_known, job)) as run:
        only_written = dataflow.only_written(beam_options)
        if only_written:
            run = dataclasses.replace(run, lease=None)
        elif graphs.is_done(job, run):
            _log.info("nothing has changed since the results were made")
            return run, None
        elif run.lease and beam_options.view_as(StandardOptions).no_wait_until_finish:
            run.lease.detached = True
        run = run.tried_out()
        if local.is_chosen(beam_options):
            progress.expect("embedding", sum(unit.shard.size for unit in run.units))
        result = execute(job, run, beam_options)
        said = only_written or _unfinished(result, beam_options)
        if not said:
            graphs.write_counters(run, job, metrics.of_job(result))
        return run, said


def say(prog: str, error: Exception) -> None:
    """Says on stderr what has to be mended."""
    from tracin_beam.report.words import printable

    print(f"{prog}: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)


def execute(job: Job, run: Run, beam_options: PipelineOptions) -> PipelineResult:
    """Runs a job's graph as `execute_graph` does."""
    run = run.travelling()
    return execute_graph(lambda pipeline: job.parts.graph(pipeline, run), beam_options)


def execute_graph(
    graph: Callable[[beam.Pipeline], None], beam_options: PipelineOptions
) -> PipelineResult:
    """Runs a graph, and waits for it unless the options say otherwise.

    Raises:
      InputError: what Beam says of its options, or a worker of the input.
      worker_errors.Failed: the job has failed otherwise.
    """
    local.prepare(beam_options)
    try:
        pipeline = beam.Pipeline(options=beam_options)
        cancelled = interrupts.telling(lambda: local.cancel(pipeline))
        with (
            worker_errors.without_traces(),
            unfinished.tidied(files.remove),
            local.without_interactive_beam(),
            cancelled,
            pipeline,
        ):
            graph(pipeline)
        return pipeline.result
    except Exception as error:
        if worker_errors.shows_traces():
            raise
        raise worker_errors.of(error) from None


def _unfinished(result: PipelineResult, beam_options: PipelineOptions) -> str | None:
    """What to say of a job that was not waited for."""
    waited = not beam_options.view_as(StandardOptions).no_wait_until_finish
    if waited or result.state == PipelineState.DONE:
        return None
    # Dataflow's results have a method, those of job servers an attribute.
    job_id = result.job_id() if hasattr(result, "job_id") else getattr(result, "_job_id", "")
    return f"Submitted the job {job_id}. Once it has finished, this command shows its results."


def set_up_logging() -> None:
    """Our progress without the runners' chatter, and their errors without our own in them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("tracin_beam")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for other in logging.getLogger().handlers:
        other.addFilter(worker_errors.WithoutTraces())
