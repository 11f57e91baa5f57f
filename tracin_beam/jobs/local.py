"""What Beam's Python servers need before a job runs on this machine.

Beam's local runner, its job service and the workers that it starts in this process for an engine
(LOOPBACK) talk over gRPC. Two of their defaults do not suit this software, and no option of Beam's
changes them, so they are set in Beam's modules.
"""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

import apache_beam as beam
import apache_beam.pipeline as pipeline_module
import grpc
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    PipelineOptions,
    StandardOptions,
)
from apache_beam.runners.portability import (
    abstract_job_service,
    local_job_service,
    portable_runner,
)
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.worker import worker_pool_main

from tracin_beam.errors import MARK, InputError
from tracin_beam.jobs import worker_errors

# Beam's modules that open a port on every interface.
_SERVERS = (worker_handlers, local_job_service, abstract_job_service, worker_pool_main)


def is_chosen(options: PipelineOptions) -> bool:
    """Whether all workers are threads of this process."""
    local = "FnApiRunner" in (options.view_as(StandardOptions).runner or "")
    mode = options.view_as(DirectOptions).direct_running_mode
    return local and mode != "multi_processing"


def prepare(options: PipelineOptions) -> None:
    """Makes this process's Beam servers listen on loopback only, and send whole elements only.

    Servers and streams that are open already stay as they are. Runners whose servers are not in
    this process are not touched.

    Raises:
      InputError: the options ask every worker for the flush that loses data.
    """
    for experiment in options.view_as(DebugOptions).experiments or []:
        if re.fullmatch(r"data_buffer_time_limit_ms=0*[1-9]\d*", experiment):
            raise InputError(
                f"--experiments={experiment} would lose data: with it Beam's workers send their "
                "output while an element is half written. Leave it out."
            )
    secure()
    local_job_service.subprocess = _QUIET


def secure() -> None:
    """Secures all servers that this process will start; a second call changes nothing."""
    # The local runner's streams have a thread that takes what is in the buffer every 1,000 ms,
    # also while another thread writes an element into it (`data_plane.py`: only flushes lock each
    # other out). The receiver then decodes halves of elements, and what is written between taking
    # and clearing is lost. Batch jobs do not need that flush: a stream is sent at its end, and
    # between elements whenever it holds 10 MB. Workers of other runners have no such thread.
    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0
    for module in _SERVERS:
        setattr(module, "grpc", _LOOPBACK)  # noqa: B010, as mypy knows these modules


@contextlib.contextmanager
def without_interactive_beam() -> Iterator[None]:
    """In this block a notebook is nothing special to Beam, for this thread and all others.

    In one Beam renames every step after the cell, so that a rerun has other names, leaves its
    temporary folder, and imports its data frames, which do not go with every pandas.
    """
    module: Any = pipeline_module
    earlier = module.alter_label_if_ipython, module.is_in_ipython
    module.alter_label_if_ipython = lambda transform, pvalueish: None
    module.is_in_ipython = lambda: False
    try:
        yield
    finally:
        module.alter_label_if_ipython, module.is_in_ipython = earlier


class _LoopbackGrpc:
    """gRPC, but servers that were to listen on every interface listen on loopback.

    There is no authentication: whoever reaches a worker's ports can run code in it. "localhost"
    is both 127.0.0.1 and ::1, where the machine has them.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(grpc, name)

    def server(self, *args: Any, **kwargs: Any) -> grpc.Server:
        server = grpc.server(*args, **kwargs)
        listen = server.add_insecure_port
        server.add_insecure_port = lambda address: listen(
            re.sub(r"^(\[::\]|0\.0\.0\.0):", "localhost:", address)
        )
        return server


_LOOPBACK = _LoopbackGrpc()


class _QuietSubprocess:
    """The module subprocess, but what it starts shows no traces: the job's end is one sentence."""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: str, **kwargs: Any) -> "subprocess.Popen[bytes]":
        if worker_errors.shows_traces():
            return subprocess.Popen(command, **kwargs)
        process: subprocess.Popen[bytes]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, **kwargs)
        passing = threading.Thread(target=_pass_on, args=[process.stderr], daemon=True)
        passing.start()
        return process


_QUIET = _QuietSubprocess()

# How a trace goes on after an empty line: another error's, or a message of several lines.
_GOES_ON = (" ", "The above exception", "During handling of", worker_errors.TRACEBACK, MARK)


def _pass_on(stream: IO[bytes]) -> None:
    """Writes what comes on a stream to stderr, but for traces and empty lines."""
    in_trace = after_empty_line = False
    for line in stream:
        text = line.decode(errors="replace")
        if not text.strip():
            after_empty_line = True
            continue
        if text.startswith(worker_errors.TRACEBACK):
            in_trace = True
        elif after_empty_line and not text.startswith(_GOES_ON):
            in_trace = False
        after_empty_line = False
        if not in_trace:
            sys.stderr.write(text)


def cancel(pipeline: beam.Pipeline, seconds: float = 0.5) -> None:
    """Cancels the job of a job server, whose workers may end with this process.

    A job on Dataflow goes on; `gcloud dataflow jobs cancel` ends it.
    """
    result = getattr(pipeline, "result", None)
    if isinstance(result, portable_runner.PipelineResult):
        asking = threading.Thread(target=result.cancel, daemon=True)
        asking.start()
        asking.join(seconds)
