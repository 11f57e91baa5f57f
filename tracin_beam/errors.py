"""The errors that users are meant to read."""

import errno
import json
import os
import re
import threading

# What comes before the message, as JSON, in the trace of an `InputError` of a worker.
MARK = "tracin-beam error: "


class InputError(ValueError):
    """An input that the user can mend. The message says what, where, and what to do.

    Example:

      >>> import tracin_beam
      >>> try:
      ...     tracin_beam.open("nowhere")
      ... except tracin_beam.InputError as error:
      ...     print(error)
      There is no run.json in nowhere: no run has written there.
    """

    # Beam adds a worker's step to the message of errors that do not have this attribute.
    _tagged_with_step = True

    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        """The lines below the message in a trace: the mark, for errors in workers' threads."""
        if threading.current_thread() is threading.main_thread():
            return []
        return [MARK + json.dumps(str(self))]


_OS_PROBLEMS = {
    errno.ENOSPC: "the disk is full; free some space, or choose another place",
    errno.EDQUOT: "the quota of the disk is used up; free some space, or choose another place",
    errno.EFBIG: "the file would become larger than is allowed here; raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "the name is too long for the file system; take a shorter one",
    errno.EACCES: "this user may not do that; change the permissions, or choose another place",
    errno.EPERM: "this user may not do that; change the permissions, or choose another place",
    errno.ENOTDIR: "a part of the path is a file and not a folder; choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.EIO: "the disk fails; choose another place",
}


def os_problem(error: OSError | str) -> str:
    """What is wrong with a disk or file system, and what to do; empty where it is not known.

    Args:
      error: an error of the operating system, or its text.
    """
    if isinstance(error, OSError):
        return _OS_PROBLEMS.get(error.errno or 0, "")
    for number, problem in _OS_PROBLEMS.items():
        if f"[Errno {number}]" in error or os.strerror(number) in error:
            return problem
    return ""


# What TensorFlow and Keras say before they say what is wrong.
_PREAMBLE = re.compile(
    r"(Detected at node|File |Exception encountered|in user code|Graph execution error"
    r"|.*root error\(s\) found\.$)"
)


def reason(error: Exception) -> str:
    """What an error of the user's code or of TensorFlow says, in one line without its traces."""
    kind, message = type(error).__name__, getattr(error, "message", None) or str(error)
    if isinstance(error, UnicodeDecodeError):
        # TensorFlow quotes the record in its message, and cannot hand it over if that is no UTF-8.
        kind, message = "InvalidArgumentError", error.object.decode(errors="backslashreplace")
    message = re.sub(r"\x1b\[\d*m|\{\{function_node \S+\}\} ", "", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines and lines[0].startswith("in user code"):
        # AutoGraph's own trace, with the user's lines starred, and the message at its end.
        places = [line for line in lines if line.startswith("File ") and line.endswith("*")]
        place = f" ({places[-1].rstrip(' *')})" if places else ""
        return f"{lines[-1]}{place}"[:500]
    says = next((line for line in lines if not _PREAMBLE.match(line)), "")
    says = says.removeprefix("(0) ").split("[[{{node")[0].strip()
    return (f"{kind}: {says}" if says else kind)[:500]
