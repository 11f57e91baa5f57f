"""What tests of deploy/ share: flags that exist, manifests as kubectl makes them, fetched files."""

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam import config as config_flags
from tracin_beam.jobs import options
from tracin_beam.jobs.registry import JOBS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracin-beam"


def unavailable(why):
    """Skips the test, but not in CI, where everything is to be had."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def run(*command, **keywords):
    """A program's standard output; the test is skipped where the program is missing."""
    if not shutil.which(command[0]):
        unavailable(f"needs {command[0]} on PATH")
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, check=False, **keywords
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def maven(artifact):
    """The jar of group:name:version, fetched once and kept."""
    _, name, version = artifact.split(":")
    jar = CACHE / "maven" / f"{name}-{version}.jar"
    if not jar.exists():
        if not shutil.which("mvn"):
            unavailable("needs mvn on PATH")
        goal = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy"
        jar.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=jar.parent) as folder:
            done = subprocess.run(
                ["mvn", "-B", "-q", goal, f"-Dartifact={artifact}", f"-DoutputDirectory={folder}"],
                capture_output=True,
                timeout=300,
                check=False,
            )
            if done.returncode:
                unavailable(f"{artifact} cannot be fetched: {done.stdout.decode()[-500:]}")
            (Path(folder) / jar.name).rename(jar)
    return jar


def check_flags(argv):
    """Fails for a flag that neither we nor Beam know, whatever the runner; gives both's values."""
    parser = argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    parser.add_argument("--config")
    todo = [PipelineOptions]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls is not PipelineOptions:
            cls._add_argparse_args(parser)
    written = [*argv]
    for flag in argv:
        if flag.startswith("--config="):
            content = yaml.safe_load(Path(flag.removeprefix("--config=")).read_text())
            written += [f"--{name}" for name in content]
    names = {flag.split("=")[0] for flag in written}
    ours = {f"--{name}" for name in config_flags.flags()}
    unknown = names - ours - set(parser._option_string_actions)
    assert not unknown
    config, beam_options = options.parse(argv, JOBS["quality"])
    return config, beam_options.get_all_options()


def kustomize(folder, tmp_path, task="task = None\n"):
    """What `kubectl apply -k` would apply, with a task file: documents by (kind, name)."""
    copy = tmp_path / "deploy"
    for name in ("nightly", "flink"):
        shutil.copytree(DEPLOY / name, copy / name)
    (copy / "nightly" / "task.py").write_text(task)
    documents = yaml.safe_load_all(run("kubectl", "kustomize", copy / folder))
    return {(d["kind"], d["metadata"]["name"]): d for d in documents}


def only(documents, kind):
    (found,) = (d for (other, _), d in documents.items() if other == kind)
    return found


def check_kubernetes(documents):
    """Holds all but custom resources against the schemas that Kubernetes publishes."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for (kind, _), document in documents.items():
        if kind != "FlinkDeployment":
            kubernetes_validate.validate(document, "1.33", strict=True)


def launcher_argv(cronjob):
    """The job and the flags that the CronJob's only container runs."""
    pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    words = [*container["command"], *container["args"]]
    for name, value in values.items():
        words = [word.replace(f"$({name})", value) for word in words]
    assert words[:3] == ["python", "-m", "tracin_beam"]
    return words[3], words[4:]
