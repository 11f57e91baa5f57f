"""The files that a user's pattern names: globs, braces, lists with commas, on any file system.

What we write ourselves is never a pattern: `files.list_folder` lists it.
"""

import itertools
import os
import re
import stat
import warnings
from collections.abc import Iterator

from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from tracin_beam.config import check_name
from tracin_beam.errors import InputError
from tracin_beam.storage import files
from tracin_beam.storage.files import FileInfo

_WILD = re.compile(r"[*?\[]")
_OPENING, _CLOSING = "{[", "}]"


def match(pattern: str) -> list[FileInfo]:
    """Finds the files that a pattern, or a comma separated list of patterns and paths, names.

    `*`, `?` and `[...]` stay within a folder, `**` does not; `{a,b}` is one or the other, and `~`
    at the beginning the home directory. A local file or folder whose name is written as it is,
    with all its brackets and commas, is taken as it is; elsewhere `[,]`, `[[]` and `[{]` stand for
    a comma and for brackets. Directories never match, and hidden files (unfinished ones are) only
    when the pattern's own base name starts with a dot.

    Returns:
      The files, each once, sorted by path.

    Raises:
      InputError: a pattern matches nothing, something that is no file, or a name that is not
        printable, or its file system is unknown.
    """
    patterns = split(pattern)
    if not patterns:
        raise InputError(f"No file is named by the pattern {pattern!r}: give a path or a glob")
    found: dict[str, FileInfo] = {}
    for info in itertools.chain.from_iterable(map(_match_one, patterns)):
        found.setdefault(files.absolute(info.path), info)
    return sorted(found.values(), key=lambda info: info.path)


def split(pattern: str) -> list[str]:
    """The patterns in a list of them, without the spaces around them.

    A comma in braces or brackets does not separate, nor one in the name of a local file or folder
    that is there.
    """
    parts, start, depth = [], 0, 0
    for at, character in enumerate(pattern):
        if character in _OPENING and any(c in pattern[at:] for c in _CLOSING):
            depth += 1
        elif character in _CLOSING and depth:
            depth -= 1
        elif character == "," and not depth and not _is_of_a_name(pattern[start:], at - start):
            parts.append(pattern[start:at])
            start = at + 1
    parts.append(pattern[start:])
    return [part.strip() for part in parts if part.strip()]


def _is_of_a_name(pattern: str, comma: int) -> bool:
    """Whether a comma in a local pattern stands in the name of a file or folder that is there."""
    text = pattern.lstrip()
    comma -= len(pattern) - len(text)
    if not files.is_local(text):
        return False
    ends = [i for i in range(comma + 1, len(text)) if text[i] in "/,"] + [len(text)]
    return any(os.path.lexists(files.home(text[:end].rstrip())) for end in ends)


def expand_braces(pattern: str) -> list[str]:
    """`a{b,c}d` as `abd` and `acd`; braces without a comma stay as they are."""
    for opening in re.finditer(r"\{", pattern):
        depth, cuts = 0, [opening.start()]
        for at in range(opening.start(), len(pattern)):
            depth += (pattern[at] == "{") - (pattern[at] == "}")
            if pattern[at] == "," and depth == 1:
                cuts.append(at)
            if not depth:
                cuts.append(at)
                break
        if depth or len(cuts) < 3 or pattern[: opening.start()].endswith("["):
            continue
        head, tail = pattern[: cuts[0]], pattern[cuts[-1] + 1 :]
        middles = [pattern[a + 1 : b] for a, b in itertools.pairwise(cuts)]
        return [text for middle in middles for text in expand_braces(head + middle + tail)]
    return [pattern]


def _match_one(pattern: str) -> list[FileInfo]:
    check_name("the pattern", pattern)
    given = pattern
    if files.is_local(pattern):
        pattern = files.home(pattern)
        if os.path.lexists(pattern) and not os.path.isdir(pattern):
            return [_info(pattern)]
        if found := _visible(pattern):  # also where braces are in a name that is there
            return found
    infos: list[FileInfo] = []
    for one in expand_braces(pattern):
        found = _visible(one)
        if not found:
            folder = files.is_local(one) and os.path.isdir(one)
            hint = f"it is a folder, write '{os.path.join(given, '*')}'" if folder else _hint(given)
            which = f" (of {given!r})" if one not in (given, pattern) else ""
            raise InputError(f"No file matches {one if which else given!r}{which}: {hint}")
        infos += found
    return infos


def _visible(pattern: str) -> list[FileInfo]:
    """What matches a pattern without braces, hidden files only if it asks for them."""
    hidden = _base_name(pattern).startswith(".")
    found = _local(pattern) if files.is_local(pattern) else _remote(pattern)
    return [info for info in found if hidden or not _base_name(info.path).startswith(".")]


def _hint(pattern: str) -> str:
    if "," in pattern:
        return "check the path; a comma in a name is written [,]"
    return "check the path"


def _remote(pattern: str) -> list[FileInfo]:
    try:
        metadata = FileSystems.match([pattern])[0].metadata_list
    except (BeamIOError, ValueError) as error:
        raise InputError(f"Cannot look for files matching {pattern!r}: {error}") from error
    infos = [FileInfo(m.path, m.size_in_bytes) for m in metadata if not m.path.endswith("/")]
    for info in infos:
        check_name("the file", info.path)
    return infos


def _local(pattern: str) -> list[FileInfo]:
    found = (path for path in _paths("", pattern) if not os.path.isdir(path))
    return [_info(path) for path in found]


def _paths(folder: str, pattern: str) -> Iterator[str]:
    """What is there locally and matches; a name that is written as it is goes before a glob."""
    name, slash, rest = pattern.partition("/")
    if slash and (not name or not _WILD.search(name) or os.path.isdir(folder + name)):
        if not name or os.path.isdir(folder + name):
            yield from _paths(folder + name + "/", rest)
    elif "**" in name:
        regex = _regex(pattern)
        for parent, _, names in os.walk(folder or "."):
            inside = os.path.relpath(parent, folder or ".")
            for each in names:
                path = each if inside == "." else f"{inside}/{each}"
                if regex.fullmatch(path):
                    yield folder + path
    elif not _WILD.search(name) or os.path.lexists(folder + name):
        if name and os.path.lexists(folder + name):
            yield folder + name
    else:
        regex = _regex(name)
        try:
            entries = sorted(os.listdir(folder or "."))
        except OSError:
            return
        for entry in filter(regex.fullmatch, entries):
            if not slash:
                yield folder + entry
            elif os.path.isdir(folder + entry):
                yield from _paths(folder + entry + "/", rest)


def _regex(pattern: str) -> re.Pattern[str]:
    """A glob's regular expression, as Beam has it, so that all file systems agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a bracket in brackets
        return re.compile(FileSystems.get_filesystem(".").translate_pattern(pattern))


def _info(path: str) -> FileInfo:
    check_name("the file", path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is no regular file but a pipe, a socket or a device: copy it.")
    return FileInfo(path, found.st_size)


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]
