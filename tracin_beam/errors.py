"""The errors that users are meant to read."""

import re


class InputError(ValueError):
    """An input that the user can mend. The message says what, where, and what to do."""


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
