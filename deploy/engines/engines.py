"""Starts an engine on this machine and says with which flags a pipeline runs on it.

`python deploy/engines/engines.py ENGINE [--workers 2]` starts one and runs it until Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fetch import ENGINES, HERE, Missing, part, tool

ROOT = HERE.parents[1]
_START_SECONDS = 60

_OPENS = [
    f"--add-opens=java.base/{package}=ALL-UNNAMED"
    for package in ("java.util", "java.lang", "java.lang.invoke", "java.nio", "sun.nio.ch")
]

# Else it listens at the machine's own address, and shows its page to everybody.
_SPARK = [
    "-Dspark.driver.host=localhost",
    "-Dspark.driver.bindAddress=127.0.0.1",
    "-Dspark.ui.enabled=false",
]


class Engine:
    """A running engine: its processes, and the flags of a pipeline that shall run on it.

    Attributes:
      folder: for its files and logs.
      workers: how many bundles it works on at the same time.
      flags: Beam's flags.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder = folder
        self.workers = workers
        self.flags: list[str] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[Sequence[str], int | None]] = {}

    def start(self, name: str, command: Sequence[str], port: int | None = None) -> None:
        """Starts a process and waits until it listens at the port.

        Raises:
          Missing: it has ended, or does not listen.
        """
        self._commands[name] = command, port
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while port is not None and not _listens(port):
            if self._processes[name].poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                raise Missing(f"{name} does not start:\n{tail}")
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """Ends a process, and all that it has started, as a power cut does."""
        process = self._processes.pop(name)
        _kill(descendants(process.pid))
        process.kill()
        process.wait()

    def pids(self) -> list[int]:
        """The process ids of all of the engine's processes, and of what they have started."""
        own = [process.pid for process in self._processes.values()]
        return [*own, *(pid for parent in own for pid in descendants(parent))]

    def restart(self, name: str) -> None:
        """Ends a process as `kill` does, and starts it again at the same port."""
        command, port = self._commands[name]
        self.kill(name)
        self.start(name, command, port)

    def names(self, prefix: str = "") -> list[str]:
        """Of the engine's processes, those that begin so."""
        return [name for name in self._processes if name.startswith(prefix)]

    def pid(self, name: str) -> int:
        """The process id of one of the engine's processes."""
        return self._processes[name].pid

    def stop(self) -> None:
        """Ends all processes."""
        started = [pid for process in self._processes.values() for pid in descendants(process.pid)]
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _kill(started)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have, and so on."""
    shown = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    children: dict[int, list[int]] = {}
    for line in shown.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def running(name: str, folder: Path, workers: int = 2) -> Iterator[Engine]:
    """Starts an engine, fetching it if need be, and ends it at exit.

    Args:
      name: of fetch.ENGINES.
      folder: an empty folder for its files and logs.
      workers: how many bundles it is to work on at the same time.

    Raises:
      Missing: it cannot be fetched or does not start.
    """
    engine = Engine(folder, workers)
    try:
        _STARTERS[name](engine)
        yield engine
    finally:
        engine.stop()


def _job_service(engine: Engine) -> None:
    # Beam's own job service in Python, with a process of its own for each worker.
    port = free_port()
    command = [sys.executable, str(HERE / "job_service.py"), f"--port={port}"]
    engine.start("job-service", command, port)
    engine.flags = [
        *_portable(port),
        "--environment_type=beam:env:harness_subprocess_python:v1",
        f"--environment_config={sys.executable} -m apache_beam.runners.worker.sdk_worker_main",
        f"--direct_num_workers={engine.workers}",
    ]


def _prism(engine: Engine) -> None:
    port = free_port()
    program = str(part("prism") / "prism")
    engine.start("prism", [program, f"-job_port={port}", "-serve_http=false"], port)
    engine.flags = [*_portable(port), "--environment_type=LOOPBACK"]


def _flink(engine: Engine) -> None:
    _flink_job_server(engine, "[local]")
    engine.flags += ["--environment_type=LOOPBACK", f"--parallelism={engine.workers}"]


def _flink_cluster(engine: Engine) -> None:
    conf = engine.folder / "conf"
    conf.mkdir()
    rest, rpc = free_port(), free_port()
    (conf / "flink-conf.yaml").write_text(
        (HERE / "flink-conf.yaml").read_text()
        + f"rest.port: {rest}\njobmanager.rpc.port: {rpc}\n"
        + f"io.tmp.dirs: {engine.folder}\n"
    )
    command = _java(engine, "flink-job-server", "-Xmx512m")
    entry = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
    engine.start("job-manager", [*command, entry, "--configDir", str(conf)], rest)
    for number in range(engine.workers):
        start_task_manager(engine, f"task-manager-{number}")
    _flink_job_server(engine, f"localhost:{rest}")
    worker = {
        "command": str(HERE / "worker.sh"),
        "env": {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "WORKER_BOOT": str(part("boot") / "boot"),
            "WORKER_FOLDER": str(engine.folder / "workers"),
        },
    }
    engine.flags += [
        "--environment_type=PROCESS",
        f"--environment_config={json.dumps(worker)}",
        f"--parallelism={engine.workers}",
    ]


def start_task_manager(engine: Engine, name: str) -> None:
    """Starts a task manager, of one slot, of a Flink cluster."""
    engine.start(
        name,
        [
            *_java(engine, "flink-job-server", "-Xmx256m", "-XX:MaxDirectMemorySize=352m"),
            "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
            *("--configDir", str(engine.folder / "conf")),
            f"-Dtaskmanager.resource-id={name}",
        ],
    )


def _flink_job_server(engine: Engine, master: str) -> None:
    _job_server(
        engine,
        _java(engine, "flink-job-server", "-Xmx1g"),
        "org.apache.beam.runners.flink.FlinkJobServerDriver",
        f"--flink-master={master}",
    )


def _spark(engine: Engine) -> None:
    _job_server(
        engine,
        _java(engine, "spark-job-server", "-Xmx1g", *_SPARK),
        "org.apache.beam.runners.spark.SparkJobServerDriver",
        f"--spark-master-url=local[{engine.workers}]",
    )
    engine.flags += ["--environment_type=LOOPBACK"]


def _job_server(engine: Engine, java: list[str], driver: str, *flags: str) -> None:
    port = free_port()
    staged = engine.folder / "staged"
    ports = [f"--job-port={port}", "--artifact-port=0", "--expansion-port=-1"]
    engine.start("job-server", [*java, driver, *flags, *ports, f"--artifacts-dir={staged}"], port)
    engine.flags = _portable(port)


def _portable(port: int) -> list[str]:
    return ["--runner=PortableRunner", f"--job_endpoint=localhost:{port}"]


def _java(engine: Engine, name: str, *memory: str) -> list[str]:
    temporary = f"-Djava.io.tmpdir={engine.folder}"
    return [
        *_on_loopback(),
        tool("java", name),
        *memory,
        temporary,
        *_OPENS,
        "-cp",
        f"{part(name)}/*",
    ]


def _on_loopback() -> list[str]:
    """What to start a program with, so that no port of it is open to other machines."""
    if sys.platform != "linux":
        return []  # where programs take no library from others
    return ["env", f"LD_PRELOAD={part('loopback') / 'loopback.so'}"]


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
        return True
    return False


_STARTERS: dict[str, Callable[[Engine], None]] = {
    "job_service": _job_service,
    "prism": _prism,
    "flink": _flink,
    "flink_cluster": _flink_cluster,
    "spark": _spark,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix=f"{given.engine}-"))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        with running(given.engine, folder, given.workers) as engine:
            print(f"{given.engine} is running. Give these flags to a pipeline:\n")
            print("  " + " \\\n  ".join(_quoted(flag) for flag in engine.flags))
            print(f"\nIts logs are in {folder}. Ctrl-C ends it.", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _quoted(flag: str) -> str:
    plain = all(c.isalnum() or c in "-_=:./" for c in flag)
    return flag if plain else "'" + flag.replace("'", "'\\''") + "'"


if __name__ == "__main__":
    sys.exit(main())
