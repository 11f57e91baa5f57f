"""Errors of workers: found in what a runner makes of them, and said in a sentence.

Workers are other processes, perhaps of another language's runner, so that of an error only the
text of its trace comes back, somewhere in the runner's own. An `InputError` is known in it by its
mark (`errors.MARK`). What any other error says stands in the last line of its trace.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from tracin_beam.errors import MARK, InputError, os_problem

TRACE_VARIABLE = "TRACIN_TRACE"
# Where Beam logs errors of workers that are threads of this process.
_LOGS = ("apache_beam.runners.common", "apache_beam.runners.worker.sdk_worker")
TRACEBACK = "Traceback (most recent call last)"
# What gRPC says of a connection to a job server that has ended.
_LOST = re.compile(r"StatusCode\.(UNAVAILABLE|CANCELLED)\s+details = \"(.*?)\"")
_LAST_LINE = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*)(?:: (.*))?$")


def shows_traces() -> bool:
    """Whether whoever looks for a mistake in the code wants to see all that there is."""
    return bool(os.environ.get(TRACE_VARIABLE))


class Failed(Exception):
    """A job that failed through no input that we know of; the message is for the user."""


def of(error: BaseException) -> InputError | Failed:
    """The error to show for one that came out of a pipeline: what, where, and what to do."""
    if isinstance(error, InputError | Failed):
        return error
    text = str(error)
    if text.startswith("Pipeline has validations errors"):  # of Beam's options
        return InputError(text.partition("\n")[2].strip())
    for line in reversed(text.splitlines()):
        _, mark, message = line.partition(MARK)
        if mark:
            with contextlib.suppress(ValueError):
                return InputError(json.JSONDecoder().raw_decode(message)[0])
    return unexpected(error)


def unexpected(error: BaseException) -> InputError | Failed:
    """A sentence for an error that nobody has foreseen."""
    kind, message, step = _parts(error)
    if isinstance(error, OSError) or kind.endswith("OSError"):
        for line in (message, str(error)):
            if problem := os_problem(line):
                return InputError(f"{message}: {problem}")
    if lost := _LOST.search(str(error)):
        return Failed(
            f"the runner cannot be reached any more ({lost[1]}: {lost[2]}). See whether it runs; "
            "the same command then goes on where the job stopped."
        )
    where = f" in the step {step}" if step else ""
    advice = (
        "The memory does not suffice: try a smaller --batch_size, --dim or --index_rows."
        if kind in ("MemoryError", "ResourceExhaustedError")
        else "The same command goes on where it stopped; if it fails again, "
        f"{TRACE_VARIABLE}=1 before it shows where in the code, for a bug report."
    )
    said = f"{kind}: {message}" if message else kind
    return Failed(f"the job failed{where}: {said[:1000]}. {advice}")


def _parts(error: BaseException) -> tuple[str, str, str]:
    """An error's type and message, of the worker's where there is one, and its step."""
    text = str(error)
    kind, message = type(error).__name__, text
    if TRACEBACK in text:
        for line in text.rpartition(TRACEBACK)[2].splitlines():
            if found := _LAST_LINE.match(line):
                kind, message = found[1], found[2] or ""
                break
    steps = re.findall(r"\[while running '(.+?)'\]", text)
    message = re.sub(r" ?\[while running '.+?'\]", "", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return kind, (lines[0] if lines else "").rstrip("."), steps[-1] if steps else ""


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """In this block Beam prints no traces of workers' errors, which are shown in one line later."""
    if shows_traces():
        yield
        return
    quiet: Any = _WithoutTraces(sys.stderr)
    without, earlier = WithoutTraces(), threading.excepthook

    def of_others(args: threading.ExceptHookArgs) -> None:
        frames = traceback.extract_tb(args.exc_traceback)
        if not any("apache_beam" in frame.filename for frame in frames):
            earlier(args)

    threading.excepthook = of_others
    for name in _LOGS:
        logging.getLogger(name).addFilter(without)
    try:
        with contextlib.redirect_stderr(quiet):
            yield
    finally:
        threading.excepthook = earlier
        for name in _LOGS:
            logging.getLogger(name).removeFilter(without)


class _WithoutTraces:
    """A stream that drops stack traces, each of which is written at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        end = self._dropped and text == "\n"
        self._dropped = text.startswith(TRACEBACK)
        return len(text) if self._dropped or end else self._stream.write(text)


class WithoutTraces(logging.Filter):
    """Drops what Beam logs of errors that are reported in a sentence at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        if shows_traces():
            return True
        message = record.getMessage()
        return not (record.exc_info or MARK in message or TRACEBACK in message)
