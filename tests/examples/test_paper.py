"""The scripts of examples/paper, on less data than they take by default."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples/paper"
DATA = {
    "mislabelled_images": "fashion_mnist.npz",
    "house_prices": "california_housing.csv.gz",
    "news_topics": "ag_news_partial.parquet",
}


@pytest.mark.parametrize("name", DATA)
def test_a_script_ends_with_what_it_found(name, shared_data, monkeypatch, capsys):
    script = SCRIPTS / f"{name}.py"
    arguments = ["--data", str(shared_data(DATA[name])), "--examples", "400"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert len(re.findall(r"\d+(?:%| km)", last)) >= 1, last
