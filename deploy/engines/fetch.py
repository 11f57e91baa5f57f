"""Fetches the engines into a cache: Java artifacts with Maven, Go programs with Go.

`python deploy/engines/fetch.py [ENGINE …]` fetches those of the named engines, by default all. What
is in the cache already is not fetched again.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

# What an engine is made of, see PARTS.
ENGINES: dict[str, tuple[str, ...]] = {
    "job_service": (),
    "prism": ("prism",),
    "flink": ("flink-job-server", "loopback"),
    "flink_cluster": ("flink-job-server", "loopback", "boot"),
    "spark": ("spark-job-server", "loopback"),
}


class Missing(Exception):
    """Something that the user has to install, or that cannot be fetched."""


def versions() -> dict[str, str]:
    """versions.env."""
    lines = (HERE / "versions.env").read_text().splitlines()
    return dict(line.split("=") for line in lines if line and not line.startswith("#"))


def cache() -> Path:
    """The folder that everything is kept in, outside of the checkout."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRACIN_ENGINES") or Path(caches) / "tracin-beam" / "engines")


def part(name: str) -> Path:
    """The folder of a part, which is fetched if it is not there.

    Raises:
      Missing: a tool is not installed, or the part cannot be fetched.
    """
    keys, make = PARTS[name]
    known = versions()
    folder = cache() / "-".join([name, *(known[key] for key in keys)])
    if folder.exists():
        return folder
    print(f"fetching {folder.name} into {folder.parent}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        make(name, known, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # by another process, in the meantime
                raise
    return folder


def tool(name: str, what_for: str) -> str:
    """The path of a program.

    Raises:
      Missing: it is not on PATH.
    """
    found = shutil.which(name)
    if not found:
        raise Missing(f"{name} is not on PATH: {what_for} needs it")
    return found


def _jars(name: str, known: dict[str, str], folder: Path) -> None:
    java = tool("java", name)
    _run(
        [
            tool("mvn", f"fetching {name}"),
            *("--batch-mode", "--quiet", "--file", str(HERE / f"{name}.pom.xml")),
            *(f"-D{key}={value}" for key, value in known.items()),
            "dependency:copy-dependencies",
            f"-DoutputDirectory={folder}",
            "-DincludeScope=runtime",
        ],
        {"JAVA_HOME": os.environ.get("JAVA_HOME") or str(Path(java).resolve().parents[1])},
    )


def _go_program(name: str, known: dict[str, str], folder: Path) -> None:
    package = GO_PACKAGES[name]
    _run(
        [tool("go", f"building {name}"), "install", f"{package}@v{known['BEAM']}"],
        {"GOBIN": str(folder)},
    )
    (folder / package.rpartition("/")[2]).rename(folder / f"{name}.made")
    (folder / f"{name}.made").rename(folder / name)


def _prism(name: str, known: dict[str, str], folder: Path) -> None:
    """Prism with its one port on loopback: it has no flag for that, and no authentication."""
    go = tool("go", "building prism")
    module = f"{GO_MODULE}@v{known['BEAM']}"
    found = json.loads(_run([go, "mod", "download", "-json", module], {}))
    with tempfile.TemporaryDirectory() as temporary:
        copy = shutil.copytree(
            found["Dir"], Path(temporary) / "beam", copy_function=shutil.copyfile
        )
        source = copy / "go/pkg/beam/runners/prism/internal/jobservices/server.go"
        everywhere = 'fmt.Sprintf(":%d", port)'
        text = source.read_text()
        if everywhere not in text:
            raise Missing(f"Prism {known['BEAM']} opens its port elsewhere than in {source.name}")
        source.write_text(text.replace(everywhere, 'fmt.Sprintf("localhost:%d", port)'))
        _run([go, "build", "-C", str(copy), "-o", str(folder / name), "./go/cmd/prism"], {})


def _loopback(name: str, known: dict[str, str], folder: Path) -> None:
    compiler = tool("cc", "keeping engines on loopback")
    library = folder / f"{name}.so"
    _run([compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "loopback.c"), "-ldl"], {})


def _run(command: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise Missing(f"{' '.join(command)} failed:\n{tail}")
    return done.stdout


GO_MODULE = "github.com/apache/beam/sdks/v2"
GO_PACKAGES = {"prism": f"{GO_MODULE}/go/cmd/prism", "boot": f"{GO_MODULE}/python/container"}

# Of each part: the versions that it depends on, and how it is made.
PARTS: dict[str, tuple[tuple[str, ...], Callable[[str, dict[str, str], Path], None]]] = {
    "prism": (("BEAM", "PRISM_PATCH"), _prism),
    "boot": (("BEAM",), _go_program),
    "loopback": (("LOOPBACK",), _loopback),
    "flink-job-server": (("FLINK", "BEAM_JAVA", "BEAM_JOB_SERVICE"), _jars),
    "spark-job-server": (("SPARK", "BEAM_JAVA", "BEAM_JOB_SERVICE"), _jars),
}


def main(names: Sequence[str]) -> int:
    if unknown := set(names) - set(ENGINES):
        print(f"there is no engine {sorted(unknown)[0]}: {', '.join(ENGINES)}", file=sys.stderr)
        return 2
    try:
        for name in names or ENGINES:
            for needed in ENGINES[name]:
                print(part(needed))
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
