"""The one command, and the package that it is installed with."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tracin_beam
from tracin_beam.__main__ import main
from tracin_beam.jobs.registry import JOBS

ROOT = Path(__file__).parents[1]


def test_it_lists_the_jobs(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for job in JOBS.values():
        assert f"{job.name} " in said
        assert job.about in said
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tracin-beam {tracin_beam.__version__}\n"


@pytest.mark.parametrize("words", [[], ["influenc", "--task=x"], ["--task=x"]])
def test_it_names_the_jobs_where_none_is_named(capsys, words):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "self_influence" in said
    assert (repr(words[0]) if words else "name a job") in said


def test_each_job_has_its_launcher_in_the_checkout():
    assert {path.stem for path in (ROOT / "pipelines").glob("[!_]*.py")} == set(JOBS)
    for job in JOBS:
        assert f'JOBS["{job}"].main(' in (ROOT / f"pipelines/{job}.py").read_text()


def test_the_wheel_has_the_command_and_no_other_package(tmp_path):
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", f"{build}"], cwd=_copy(tmp_path), check=True, capture_output=True
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [entry] = [name for name in names if name.endswith("entry_points.txt")]
        assert "tracin-beam = tracin_beam.__main__:main" in archive.read(entry).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tracin_beam"}
    assert "tracin_beam/report/templates/influence.html" in names


def _copy(tmp_path):
    """The checkout's files that a package is made from, where a build may leave things behind."""
    import shutil

    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("tracin_beam", "pipelines"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy
