"""Engines of deploy/engines, one at a time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "engines"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    chosen = item.config.getoption("--engines").split(",")
    for mark in item.iter_markers("engine"):
        (name,) = mark.args
        if name not in chosen and chosen != ["all"]:
            pytest.skip(f"give --engines={name}, or make test-engines")


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    from job import make_job

    return make_job(tmp_path_factory.mktemp("job"))
