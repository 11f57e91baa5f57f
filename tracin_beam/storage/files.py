"""Files on any file system that Beam knows: local, gs://, s3://, hdfs:// and others."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from tracin_beam.errors import InputError, os_problem
from tracin_beam.storage import unfinished

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileInfo:
    """A file and its size in bytes."""

    path: str
    size: int


def is_local(path: str) -> bool:
    """Whether `path` has no scheme, so that it lies on this machine."""
    return FileSystems.get_scheme(path) is None


def absolute(path: str) -> str:
    """The same for all spellings of a local path: relative, absolute, by a link."""
    return os.path.realpath(path) if is_local(path) else path


def home(path: str) -> str:
    """A local path with the home directory for a `~` at its beginning."""
    return os.path.expanduser(path) if is_local(path) else path


def full(path: str) -> str:
    """A local path from the root on, as workers have other current directories and homes."""
    return os.path.abspath(home(path)) if is_local(path) else path


def join(base: str, *parts: str) -> str:
    """Joins path components as the file system of `base` does.

    Raises:
        InputError: that file system is unknown.
    """
    try:
        return FileSystems.join(base, *parts)
    except ValueError as error:
        raise InputError(str(error)) from error


@contextlib.contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Makes an OSError of what a remote file system's client raises: not found, forbidden."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def exists(path: str) -> bool:
    """Whether there is a file, or where the file system has such a directory, at `path`.

    Raises:
        OSError: the file system does not say.
    """
    with _os_errors(path):
        return FileSystems.exists(path)


def list_folder(folder: str, *, deep: bool = False) -> list[FileInfo]:
    """The files in a folder of ours, whatever its name, hidden ones too; none if there is none.

    Args:
        folder: its path, which is no pattern.
        deep: whether the files in folders within are listed too.

    Returns:
        The files, sorted by path.
    """
    if is_local(folder):
        found = [
            FileInfo(entry.path, entry.stat().st_size)
            for entry in _scan(folder, deep)
            if entry.is_file()
        ]
    else:
        # The characters of globs are refused in the names of remote folders of ours.
        with _os_errors(folder):
            try:
                matched = FileSystems.match([join(folder, "**" if deep else "*")])
            except BeamIOError:
                if exists(folder):
                    raise
                return []
        found = [FileInfo(m.path, m.size_in_bytes) for m in matched[0].metadata_list]
        found = [info for info in found if not info.path.endswith("/")]
    return sorted(found, key=lambda info: info.path)


def _scan(folder: str, deep: bool) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if deep and entry.is_dir(follow_symlinks=False):
                    yield from _scan(entry.path, deep)
                else:
                    yield entry
    except FileNotFoundError:
        return


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def checksum(path: str) -> str:
    """Identifies a file's content.

    Returns:
        The 128-bit BLAKE2b hex digest of a local file; elsewhere the checksum the file system
        keeps.
    """
    if not is_local(path):
        with _os_errors(path):
            return FileSystems.checksum(path)
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def open_read(path: str) -> BinaryIO:
    """Opens a file for reading its raw bytes, never decompressed whatever its suffix.

    Raises:
        OSError: it cannot be opened.
    """
    with _os_errors(path):
        return FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yields a local path of the file: its own, or that of a copy which is removed at exit.

    The copy keeps the base name, since Keras looks at suffixes.
    """
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, _base_name(path))
        download(path, local)
        yield local


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """Yields a binary handle whose bytes appear under `path` all at once, at a normal exit.

    Until then they lie in a hidden file beside it, which an exception removes. A file that was at
    `path` is replaced; missing folders are made.

    Raises:
        InputError: the disk is full, the name too long, or the place forbidden.
        OSError: it cannot be written for another reason.
    """
    folder, name = FileSystems.split(path)
    temporary = join(folder, f".{_cut(name)}.{uuid.uuid4().hex}.tmp")
    with _written(path, temporary), unfinished.file(temporary, lambda: remove([temporary])):
        with _os_errors(path):
            handle = FileSystems.create(temporary, compression_type=CompressionTypes.UNCOMPRESSED)
        try:
            try:
                yield handle
            finally:
                with _os_errors(path):
                    handle.close()
            with _os_errors(path):
                _replace(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to see
                remove([temporary])
            raise


@contextlib.contextmanager
def _written(path: str, temporary: str = "") -> Iterator[None]:
    """Says of errors of the disk which file could not be written, and what to do.

    Errors that name another file, which is read meanwhile, pass.
    """
    try:
        yield
    except OSError as error:
        about = str(error.filename or "")
        mine = about in ("", temporary) or path.startswith(about)
        if mine and (problem := os_problem(error if error.errno else str(error))):
            raise InputError(f"{path} cannot be written: {problem}.") from error
        raise


def _cut(name: str) -> str:
    """The beginning of a long name, as file systems count its bytes."""
    return name.encode()[:150].decode(errors="ignore")


def upload(local: str, path: str) -> None:
    """Copies a local file to `path`, atomically."""
    with open(local, "rb") as source, atomic_write(path) as target:
        shutil.copyfileobj(source, target, _CHUNK)


def download(path: str, local: str) -> None:
    """Copies a file to a local path."""
    with open_read(path) as source, _written(local), open(local, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)


def _replace(source: str, target: str) -> None:
    if is_local(target):
        os.replace(source, target)
        return
    try:
        FileSystems.rename([source], [target])
    except BeamIOError:
        # Some file systems (HDFS) do not rename over a file.
        if not (exists(source) and exists(target)):
            raise
        FileSystems.delete([target])
        FileSystems.rename([source], [target])


def remove(paths: Iterable[str]) -> None:
    """Deletes files, ignoring those that are missing. Never deletes a local directory."""
    for path in paths:
        if is_local(path):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        elif exists(path):
            FileSystems.delete([path])


def read_json(path: str) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: the file is not JSON.
    """
    with open_read(path) as handle:
        return parse_json(handle.read(), path)


def parse_json(content: bytes, where: str) -> Any:
    """Parses JSON that came from `where`, which an `InputError` names if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise InputError(f"{where} is not valid JSON ({error}): mend or remove it") from error


def write_json(path: str, obj: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as handle:
        handle.write((json.dumps(obj, indent=1) + "\n").encode())
