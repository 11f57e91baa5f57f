"""What CONTRIBUTING.md says of the code is so."""

import re
from pathlib import Path

import pytest

from tracin_beam.gradients import projections, rules, targets
from tracin_beam.inputs import formats
from tracin_beam.jobs import parts, registry
from tracin_beam.scoring import methods
from tracin_beam.signals import registry as signals
from tracin_beam.storage import embeddings, sinks

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
ROWS = [line.split(" | ") for line in TEXT.splitlines() if line.startswith("| a")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("| "))
def test_files_that_a_row_names_are_there(row):
    paths = re.findall(r"`((?:tracin_beam|tests|pipelines)/[^`]*)`", " ".join(row))
    assert any(path.startswith("tracin_beam") for path in paths)
    assert any(path.startswith("tests") for path in paths)
    for path in paths:
        assert (ROOT / path.replace("NAME", "influence")).exists(), path


def test_names_that_the_rows_have_exist():
    assert callable(rules.rule)
    assert callable(projections.projection)
    assert callable(targets.target)
    assert callable(methods.method)
    assert callable(signals.signal)
    assert callable(sinks.write_parquet)
    assert embeddings.Embeddings
    assert formats.Format
    for job in registry.JOBS.values():
        if job.on_beam:
            assert isinstance(job.parts, parts.Parts)


def test_the_order_of_floors_is_the_one_that_is_held():
    from test_floors import FLOORS

    said = re.search(r"`(errors config [\w\s]*jobs)`", TEXT)[1].split()
    assert [{name} for name in said] == FLOORS[1 : len(said) + 1]


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"(?:`|    )make ([a-z-]+)", TEXT):
        assert f"\n{name}: " in makefile, name
