"""A floor imports only itself and floors below it; some import no Beam."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tracin_beam"
# Lowest first; what stands together is one floor.
FLOORS = [
    {"_version"},
    {"errors"},
    {"config"},
    {"storage"},
    {"inputs"},
    {"gradients"},
    {"scoring"},
    {"signals"},
    {"stages"},
    {"planning"},
    {"report"},
    {"jobs"},
    {"api", "__init__", "__main__"},
]
WITHOUT_BEAM = {"gradients", "scoring", "signals"}


def floor_of(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere in it, with what it takes from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        if module.startswith("tracin_beam."):
            other = module.split(".")[1]
            assert floor_of(other) <= floor_of(name), f"{path} imports {module}, of a higher floor"
        if name in WITHOUT_BEAM:
            assert module.split(".")[0] != "apache_beam", f"{path} imports {module}"
