"""Files on any file system that Beam knows: local, gs://, s3://, hdfs:// and others."""

import contextlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import google_crc32c
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from tracin_beam.errors import InputError, os_problem
from tracin_beam.storage import unfinished

_CHUNK = 1 << 20
_REQUESTS = 32  # made of a file system at a time
_COARSE = 1_000_000  # nanoseconds: times that are whole multiples tell little

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class FileInfo:
    """A file and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class Stamp:
    """What tells a file's content from any other.

    Attributes:
      size: in bytes.
      checksum: its CRC-32C, as `Crc` writes it.
      version: its `signature`, so that it need not be read to be compared; "" where there is none.
    """

    size: int
    checksum: str
    version: str = ""


class Crc:
    """The CRC-32C and size of bytes that come in pieces."""

    def __init__(self) -> None:
        self._crc = 0
        self.size = 0

    def update(self, data: Any) -> None:
        """Takes the next piece, of any type that `bytes` takes."""
        piece = data if isinstance(data, bytes) else bytes(data)
        self._crc = google_crc32c.extend(self._crc, piece)
        self.size += len(piece)

    def hexdigest(self) -> str:
        """Eight hex digits."""
        return f"{self._crc:08x}"


def in_parallel(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]`, many at a time where they are many.

    A request to a remote file system takes as long as thousands of instructions.
    """
    if len(items) < 4:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_REQUESTS, len(items))) as pool:
        return list(pool.map(function, items))


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
    if is_local(base):  # Beam asks all file systems which of them it is, each time
        return os.path.join(base, *parts)
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
        found = []
        for entry in _scan(folder, deep):
            with contextlib.suppress(FileNotFoundError):  # it has gone in the meantime
                if entry.is_file():
                    found.append(FileInfo(entry.path, entry.stat().st_size))
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


def under(folder: str) -> dict[str, int]:
    """All files in a folder of ours and its folders, hidden ones too: size by path."""
    return {info.path: info.size for info in list_folder(folder, deep=True)}


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
      The CRC-32C of a local file, as `Crc` writes it; elsewhere the checksum the file system
      keeps.
    """
    if not is_local(path):
        with _os_errors(path):
            return FileSystems.checksum(path)
    return _read_crc(path).hexdigest()


def size(path: str) -> int:
    """The size of a file in bytes.

    Raises:
      OSError: it is not there.
    """
    if is_local(path):
        return os.path.getsize(path)
    with _os_errors(path):
        return FileSystems.get_filesystem(path).metadata(path).size_in_bytes


def signature(path: str) -> str:
    """A text that stays the same while a file certainly does, made without reading the file.

    For a local file it holds the file's number, size and the times of its last changes, one of
    which no program can set; elsewhere it is the checksum that the file system keeps. It is "",
    which tells nothing, where the file system's clock is too coarse to tell two changes apart. (On
    Linux before 6.13 two changes within one tick, some milliseconds, have one time too.)

    Raises:
      OSError: it is not there.
    """
    if not is_local(path):
        return checksum(path)
    found = os.stat(path)
    if found.st_ctime_ns % _COARSE == 0:
        return ""
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def is_certainly(path: str, known: str) -> bool:
    """Whether a file has a known `signature`; False where that tells nothing.

    Raises:
      OSError: it is not there.
    """
    return bool(known) and signature(path) == known


def written_since(paths: Iterable[str], other: str) -> list[str]:
    """Those local files whose content was written to later than another local file's."""
    since = os.stat(other).st_mtime_ns
    return [path for path in paths if os.stat(path).st_mtime_ns > since]


def _read_crc(path: str) -> Crc:
    crc = Crc()
    with open_read(path) as handle:
        while chunk := handle.read(_CHUNK):
            crc.update(chunk)
    return crc


def stamp(path: str) -> Stamp:
    """Reads a file and says what it holds."""
    version = signature(path)  # before it is read, so that a change meanwhile is not vouched for
    crc = _read_crc(path)
    return Stamp(crc.size, crc.hexdigest(), version)


def difference(path: str, known: Stamp) -> str:
    """How a file differs from what it was, in words; "" if it does not.

    A file that is certainly the same by its `signature` is not read.

    Raises:
      OSError: the file system does not say.
    """
    if not exists(path):
        return "it is missing"
    if is_certainly(path, known.version):
        return ""
    if is_local(path) and (size := os.path.getsize(path)) != known.size:
        return f"it has {size:,} bytes and had {known.size:,}"
    crc = _read_crc(path)
    if crc.size != known.size:
        return f"it has {crc.size:,} bytes and had {known.size:,}"
    return "" if crc.hexdigest() == known.checksum else "its content is another"


def _require_regular(path: str) -> None:
    """Refuses what is no file and would be waited for, as a FIFO is."""
    mode = os.stat(path).st_mode
    for test, said in _IRREGULAR.items():
        if test(mode):
            raise InputError(f"{path} is {said}, and not a file: name a file that holds the data.")


_IRREGULAR = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def open_read(path: str) -> BinaryIO:
    """Opens a file for reading its raw bytes, never decompressed whatever its suffix.

    Raises:
      OSError: it cannot be opened.
    """
    if is_local(path):
        _require_regular(path)
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


class Writing:
    """A binary handle that counts and checks what goes through it.

    Attributes:
      stamp: of the whole file, once it is under its name.
    """

    stamp: Stamp

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.crc = Crc()

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        self.crc.update(data)
        return self._handle.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[Any]:
    """Yields a binary handle whose bytes appear under `path` all at once, at a normal exit.

    Until then they lie in a hidden file beside it, which an exception removes. A file that was at
    `path` is replaced; missing folders are made. After the exit the handle, a `Writing`, has the
    `stamp` of what was written.

    Raises:
      InputError: the disk is full, the name too long, or the place forbidden.
      OSError: it cannot be written for another reason.
    """
    folder, name = FileSystems.split(path)
    temporary = join(folder, f".{_cut(name)}.{uuid.uuid4().hex}.tmp")
    with _written(path, temporary), unfinished.file(temporary, lambda: remove([temporary])):
        with _os_errors(path):
            handle = FileSystems.create(temporary, compression_type=CompressionTypes.UNCOMPRESSED)
        writing = Writing(handle)
        try:
            try:
                yield writing
            finally:
                with _os_errors(path):
                    handle.close()
            with _os_errors(path):
                _replace(temporary, path)
            writing.stamp = Stamp(writing.crc.size, writing.crc.hexdigest(), signature(path))
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


def upload(local: str, path: str) -> Stamp:
    """Copies a local file to `path`, atomically."""
    return copy(local, path)


def copy(source: str, path: str) -> Stamp:
    """Copies a file of any file system to `path`, atomically."""
    with open_read(source) as handle, atomic_write(path) as target:
        shutil.copyfileobj(handle, target, _CHUNK)
    return target.stamp


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
        # Some file systems (HDFS) do not rename over a file. The old file is put aside until the
        # new one has its name, as the error may have had another cause, and may come again.
        if not (exists(source) and exists(target)):
            raise
        aside = source.removesuffix(".tmp") + ".old.tmp"
        FileSystems.rename([target], [aside])
        try:
            FileSystems.rename([source], [target])
        except BeamIOError:
            if not exists(target):
                FileSystems.rename([aside], [target])
            raise
        FileSystems.delete([aside])


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


def write_json(path: str, obj: Any) -> Stamp:
    """Writes a JSON file atomically."""
    with atomic_write(path) as handle:
        handle.write((json.dumps(obj, indent=1) + "\n").encode())
    return handle.stamp


def fits(value: Any, shape: Any) -> bool:
    """Whether a value that came from JSON has a shape.

    Args:
      value: made of dicts, lists, strings, numbers, bools and None.
      shape: a type, or several with `|`; a list of one shape, for a list of any length; a tuple
        of shapes, for a list of so many; a dict of shapes by key, for a dict that has these
        keys at least; or `{str: shape}`, for a dict of any keys.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if str in shape:
            return all(fits(item, shape[str]) for item in value.values())
        return all(key in value and fits(value[key], wanted) for key, wanted in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(fits, value, shape))
    if isinstance(value, bool):
        return shape is bool
    return isinstance(value, shape)
