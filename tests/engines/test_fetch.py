"""Engines are fetched once, completely or not at all, and what is missing is said."""

import shutil

import fetch
import pytest

GO = """#!/bin/sh
echo built >> "$COUNTED"
echo program > "$GOBIN/$(echo "$2" | sed 's/@.*//; s/.*[/]//')"
"""
MAVEN = """#!/bin/sh
for word; do case $word in -DoutputDirectory=*) touch "${word#*=}/half.jar" ;; esac; done
echo "no such artifact"
exit 1
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that puts a script on PATH, which has little else on it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "sed", "touch"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TRACIN_ENGINES", str(tmp_path / "cache"))
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))

    def put(name, content):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)

    return put


def test_what_is_there_is_not_fetched_again(programs, tmp_path):
    programs("go", GO)
    made = fetch.part("boot")
    assert made == tmp_path / "cache" / f"boot-{fetch.versions()['BEAM']}"
    assert (made / "boot").read_text() == "program\n"
    assert fetch.part("boot") == made
    assert (tmp_path / "counted").read_text() == "built\n"
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_another_version_is_fetched_anew(programs, tmp_path, monkeypatch):
    programs("go", GO)
    fetch.part("boot")
    monkeypatch.setattr(fetch, "versions", lambda: {"BEAM": "9.9.9"})
    assert fetch.part("boot").name == "boot-9.9.9"
    assert (tmp_path / "counted").read_text() == "built\nbuilt\n"


def test_a_failure_leaves_nothing(programs, tmp_path):
    programs("mvn", MAVEN)
    programs("java", "#!/bin/sh\n")
    with pytest.raises(fetch.Missing, match="no such artifact"):
        fetch.part("spark-job-server")
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_program_is_named(programs, capsys):
    assert fetch.main(["prism"]) == 1
    assert "go is not on PATH: building prism needs it" in capsys.readouterr().err
    programs("java", "#!/bin/sh\n")
    assert fetch.main(["flink"]) == 1
    assert "mvn is not on PATH: fetching flink-job-server needs it" in capsys.readouterr().err
    assert fetch.main(["dask"]) == 2


def test_versions_are_those_of_the_package():
    tested = (fetch.HERE.parents[1] / "setup.py").read_text()
    assert f"tested with {fetch.versions()['BEAM']}" in tested
