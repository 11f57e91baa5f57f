"""The registry of targets: one place from which flags, help and documentation come."""

import json
import subprocess
import sys
from pathlib import Path

from tracin_beam.gradients import targets

ROOT = Path(__file__).parents[2]


def test_a_target_is_one_function(monkeypatch):
    monkeypatch.setattr(targets, "_TARGETS", dict(targets._TARGETS))

    @targets.target("best_other")
    def best_other(scores):
        """The greatest logit of the other classes.

        More of it.
        """
        return scores.best_other

    assert targets.names()[-1] == "best_other"
    assert targets.get("best_other").about == "The greatest logit of the other classes."
    assert targets.get("best_other").of is targets.ClassScores


def test_every_target_is_described():
    for name in targets.names():
        assert targets.get(name).about.endswith(".")


def test_flags_and_documents_name_every_target():
    flags = (ROOT / "docs/flags.md").read_text()
    tasks = (ROOT / "docs/tasks.md").read_text()
    (row,) = [line for line in flags.splitlines() if line.startswith("| `--target`")]
    metadata = json.loads((ROOT / "deploy" / "dataflow" / "metadata.json").read_text())
    (parameter,) = [p for p in metadata["parameters"] if p["name"] == "target"]
    for name in targets.names():
        assert f"`{name}`" in row
        assert name in parameter["helpText"]
        about = targets.get(name).about
        assert f"| `{name}` | {about[0].lower()}{about[1:].removesuffix('.')} |" in tasks


def test_their_names_are_known_without_tensorflow():
    code = "import sys; from tracin_beam.gradients import targets; targets.names(); "
    code += "sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
