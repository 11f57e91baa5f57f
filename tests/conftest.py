"""What all tests share: the runner, the launchers, and data too large for the repository."""

import shlex
from pathlib import Path

import pytest


def pytest_addoption(parser):
    # DirectRunner is not one engine: it takes Prism where it can be downloaded.
    parser.addoption(
        "--test-pipeline-options",
        default="--runner=FnApiRunner",
        help="Beam's flags for the tests of whole pipelines (%(default)s).",
    )
    parser.addoption(
        "--engines",
        default="",
        help="Engines of deploy/engines to run tests/engines on, with commas, or all; they are "
        "fetched if need be (default: none).",
    )


@pytest.fixture(scope="session", autouse=True)
def _beam_remembers():
    import beam_memo

    beam_memo.install()


@pytest.fixture(scope="session")
def pipeline_options(request):
    return shlex.split(request.config.getoption("--test-pipeline-options"))


@pytest.fixture(scope="session")
def launch(pipeline_options):
    """A function that runs a job with some flags and gives its exit status."""
    from tracin_beam.jobs.registry import JOBS

    def run(stage, **flags):
        given = [
            f"--{name}={value}"
            for name, values in flags.items()
            for value in (values if isinstance(values, list) else [values])
            if value is not True
        ]
        given += [f"--{name}" for name, value in flags.items() if value is True]
        return JOBS[stage].main([*given, *pipeline_options])

    return run


@pytest.fixture
def start(pipeline_options):
    """A function that starts a job in a process of its own, which ends with the test."""
    import processes

    started = []

    def run(stage, argv, *args, **kwargs):
        started.append(processes.Job(stage, [*argv, *pipeline_options], *args, **kwargs))
        return started[-1]

    yield run
    for job in started:
        job.end()


@pytest.fixture(scope="session")
def shared_data():
    """A function from a file's name to its path; skips the test where there is no such file."""
    folder = Path(__file__).parents[1].parent / "shared" / "data"

    def path(name):
        if not (folder / name).exists():
            pytest.skip(f"needs {name} in ../shared/data")
        return folder / name

    return path
