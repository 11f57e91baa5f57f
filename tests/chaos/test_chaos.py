"""A little of what `make chaos` does."""

import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ["--seed=1", "--kills=2", "--damages=3", "--inputs=300", "--whole=3", "--meets=1"]
SHORT += ["--engine_kills=0"]


@pytest.mark.timeout(600)
def test_nothing_is_wrong_after_a_little_chaos():
    # In a process that has computed nothing, as only such a one can be forked.
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("chaos.py")), *SHORT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
