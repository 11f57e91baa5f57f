"""Leases: which runs are at work in an output directory.

A run writes a file of its own into a folder, lists the folder, and goes on if no other lease there
is in its way. So it takes nothing but writing, listing and reading: it works on every file system,
also where no file can be created exclusively. Of two runs that begin at once one gives way, by the
bakery's rule (Lamport 1974): both choose before they look, the one with the smaller token waits
until the other has made up its mind, the other withdraws.

A lease holds who has it, and a number that counts up while its run lives. One is stale when the
process is gone, where that can be seen, and otherwise when its number has stood still; clocks are
only asked how long it has certainly stood still.
"""

import contextlib
import dataclasses
import getpass
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tracin_beam.errors import InputError
from tracin_beam.storage import files, unfinished

_log = logging.getLogger(__name__)

BEAT = 15.0  # seconds from one sign of life to the next
_STALE = 180.0  # without one
_DETACHED_STALE = 24 * 3600.0  # of a job whose launcher did not wait for it
_LOOK = 0.2

_SHAPE = {
    "token": str,
    "owner": str,
    "host": str,
    "machine": str,
    "pid": int,
    "born": str,
    "job": str,
    "claims": [str],
    "shared": str,
    "holds": bool,
    "detached": bool,
    "beat": int,
    "time": int | float,
}


@dataclasses.dataclass
class Lease:
    """What a run has, or asks for.

    Attributes:
      path: of its file.
      token: that no other lease has.
      job: for a reader, such as "influence of the test set 'test'".
      claims: what nobody else may claim at the same time; "*" claims everything.
      shared: all that are at work at the same time must have the same.
      detached: whether the job goes on without the process that has the lease, and gives it back.
    """

    path: str
    token: str
    job: str
    claims: tuple[str, ...]
    shared: str = ""
    detached: bool = False

    def is_held(self) -> bool:
        """Whether it is there still, so that nobody has taken it for stale."""
        return files.exists(self.path)


class Taken(InputError):
    """Another run is at work; the message says which."""


@contextlib.contextmanager
def held(folder: str, job: str, claims: tuple[str, ...], shared: str = "") -> Iterator[Lease]:
    """Holds a lease, and shows that its holder is alive.

    Args:
      folder: where the leases are.
      job: as of `Lease`.
      claims: as of `Lease`.
      shared: as of `Lease`.

    Yields:
      The lease; its file is removed at the exit, unless it was made `detached`.

    Raises:
      Taken: another run has what is claimed, or something else in common.
      OSError: the folder cannot be written to.
    """
    token = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
    lease = Lease(files.join(folder, token + ".json"), token, job, claims, shared)
    heart = _Heart(lease)

    def give_back() -> None:
        if not lease.detached:
            files.remove([lease.path])

    try:
        with unfinished.file(lease.path, give_back):
            heart.beat()
            _settle(folder, lease)
            heart.holds = True
            heart.beat()
            heart.start()
            yield lease
    except BaseException:
        lease.detached = False
        raise
    finally:
        heart.stop()
        with contextlib.suppress(OSError):
            give_back()
            if lease.detached and lease.is_held():
                heart.beat()


def waited_for(folder: str, job: str, claim: str) -> contextlib.AbstractContextManager[Lease]:
    """A lease for a moment: waits for whoever has it, a minute or two at most.

    Raises:
      Taken: the other run keeps the lease.
    """
    return _retried(folder, job, claim)


@contextlib.contextmanager
def _retried(folder: str, job: str, claim: str) -> Iterator[Lease]:
    with contextlib.ExitStack() as stack:
        end = time.monotonic() + 2 * _STALE
        while True:
            try:
                lease = stack.enter_context(held(folder, job, (claim,)))
                break
            except Taken:
                if time.monotonic() > end:
                    raise
            time.sleep(_LOOK * (1 + os.getpid() % 7 / 7))
        yield lease


def others(folder: str, lease: Lease) -> list[dict[str, Any]]:
    """What the other leases say, without the stale ones, which are removed."""
    found = []
    for path in sorted(files.under(folder)):
        if path == lease.path or not path.endswith(".json") or "/." in path:
            continue
        stored = _read(path)
        if stored is None:
            continue
        if _is_dead(path, stored):
            _log.warning(
                "the run of %s (process %d on %s) ended without a word: going on from where it was",
                stored["job"], stored["pid"], stored["host"],
            )  # fmt: skip
            files.remove([path])
            continue
        found.append(stored)
    return found


def _settle(folder: str, lease: Lease) -> None:
    """Waits until it is certain that nobody else has what is claimed."""
    while True:
        waits = False
        for other in others(folder, lease):
            if not (why := _conflict(lease, other)):
                continue
            if other["holds"] or other["token"] < lease.token:
                raise Taken(_said(other, why, folder))
            waits = True  # the other has not looked yet, or will give way
        if not waits:
            return
        time.sleep(_LOOK)


def _conflict(lease: Lease, other: dict[str, Any]) -> str:
    """Why the holders of both leases cannot be at work together, or ""."""
    claims = set(other["claims"])
    if claims & set(lease.claims) or "*" in claims or "*" in lease.claims:
        return "wait for it, or give another --output or --test_name"
    if lease.shared and other["shared"] and lease.shared != other["shared"]:
        return (
            "with other training data, checkpoints or settings: wait for it, or give another "
            "--output"
        )
    return ""


def _said(other: dict[str, Any], why: str, folder: str) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(int(other["token"][:20]) / 1e9))
    said = (
        f"another run is at work in the output, {other['job']}, process {other['pid']} of "
        f"{other['owner']} on {other['host']}, since {since}: {why}."
    )
    if other["detached"]:
        path = files.join(folder, other["token"] + ".json")
        said += f" It goes on without its launcher; if it has failed, remove {path}."
    return said


class _Heart:
    """Writes a lease again and again in a thread of its own."""

    def __init__(self, lease: Lease) -> None:
        self.holds = False
        self._lease = lease
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def beat(self) -> None:
        self._beats += 1
        files.write_json(
            self._lease.path,
            {
                "token": self._lease.token,
                "owner": _owner(),
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "born": _born(os.getpid()),
                "job": self._lease.job,
                "claims": list(self._lease.claims),
                "shared": self._lease.shared,
                "holds": self.holds,
                "detached": self._lease.detached,
                "beat": self._beats,
                "time": time.time(),
            },
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                if not self._lease.is_held():
                    _log.warning("another run took this one for dead: it will not finish")
                    return
                self.beat()
            except OSError as error:
                _log.warning("the lease cannot be renewed, trying again: %s", error)


def _read(path: str) -> dict[str, Any] | None:
    """What a lease says; None for one that has gone or is not one, which is removed."""
    for _ in range(3):  # one that is being replaced may be gone for a moment
        try:
            stored = files.read_json(path)
        except InputError:
            stored = None
        except OSError:
            time.sleep(_LOOK / 4)
            continue
        token = os.path.basename(path).removesuffix(".json")
        if files.fits(stored, _SHAPE) and stored["token"] == token and token[:20].isdecimal():
            return stored
        _log.warning("%s is not a lease: it is removed", path)
        files.remove([path])
        return None
    return None


def _is_dead(path: str, stored: dict[str, Any]) -> bool:
    if stored["machine"] == _machine() and not stored["detached"]:
        return _born(stored["pid"]) != stored["born"]
    limit = _DETACHED_STALE if stored["detached"] else _STALE
    if 0 <= time.time() - stored["time"] < limit:
        return False
    # The clocks may differ: a beat, or none for a while, tells.
    end = time.monotonic() + 3 * BEAT
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 4))
        now = _read(path)
        if now is None:
            return True
        if now["beat"] != stored["beat"]:
            return False
    return True


def _machine() -> str:
    """This machine, since it was started, or this container: where process ids mean the same."""
    parts = [socket.gethostname()]
    for path, read in _KERNEL.items():
        with contextlib.suppress(OSError):
            parts.append(read(path))
    return "/".join(parts)


def _first_line(path: str) -> str:
    with open(path) as handle:
        return handle.readline().strip()[:8]


_KERNEL: dict[str, Callable[[str], str]] = {
    "/proc/sys/kernel/random/boot_id": _first_line,
    "/proc/self/ns/pid": lambda path: os.readlink(path).strip("pid:[]"),
}


def _born(pid: int) -> str:
    """When a process of this machine began, in whatever unit; "" if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            fields = handle.read().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except OSError:
        pass
    if os.path.isdir("/proc/self"):
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"


def _owner() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())
