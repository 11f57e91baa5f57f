import os

import pytest
from remote_files import PREFIX

from tracin_beam.errors import InputError
from tracin_beam.storage import files, patterns


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else PREFIX + str(tmp_path)


def put(folder, *names):
    for name in names:
        with files.atomic_write(files.join(folder, name)) as handle:
            handle.write(name.encode())


def names(folder, pattern):
    return [info.path.removeprefix(folder + "/") for info in patterns.match(pattern)]


def test_match_is_sorted_without_repeats_and_knows_sizes(folder):
    put(folder, "b.x", "a-10.x", "a-2.x", "sub/c.x", "other")
    everything = f"{folder}/*.x"
    assert names(folder, everything) == ["a-10.x", "a-2.x", "b.x"]
    assert names(folder, f"{folder}/b.x, {everything},{folder}/sub/*") == [
        "a-10.x",
        "a-2.x",
        "b.x",
        "sub/c.x",
    ]
    assert names(folder, f"{folder}/**.x") == ["a-10.x", "a-2.x", "b.x", "sub/c.x"]
    assert patterns.match(f"{folder}/a-10.x") == [files.FileInfo(f"{folder}/a-10.x", len("a-10.x"))]


def test_match_relative_to_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(".", "b.x", "a.x", "sub/c.x")
    assert [info.path for info in patterns.match("*.x,sub/*.x")] == ["a.x", "b.x", "sub/c.x"]
    assert [info.path for info in patterns.match("./*.x")] == ["./a.x", "./b.x"]


def test_match_takes_a_name_with_brackets_as_it_is(tmp_path):
    put(str(tmp_path), "run[1].x")
    assert len(patterns.match(f"{tmp_path}/run[1].x")) == 1


def test_match_skips_hidden_files_unless_asked(folder):
    put(folder, ".hidden.x", "seen.x")
    assert names(folder, f"{folder}/*") == ["seen.x"]
    assert names(folder, f"{folder}/.*.x") == [".hidden.x"]


@pytest.mark.parametrize("pattern", ["{}/no-*.x", "{}/here.x,{}/absent.x", "{}/no/where/*", " , "])
def test_match_names_the_pattern_that_matches_nothing(folder, pattern):
    put(folder, "here.x")
    missing = pattern.format(folder, folder).split(",")[-1].strip()
    with pytest.raises(InputError) as raised:
        patterns.match(pattern.format(folder, folder))
    assert missing in str(raised.value)


def test_match_never_returns_a_directory(tmp_path):
    put(str(tmp_path), "shards.x/inner.y")
    with pytest.raises(InputError, match="is a folder"):
        patterns.match(str(tmp_path / "shards.x"))
    with pytest.raises(InputError, match="No file matches"):
        patterns.match(str(tmp_path / "*.x"))


def test_match_on_an_unknown_file_system():
    with pytest.raises(InputError, match="nowhere://"):
        patterns.match("nowhere://bucket/*")


def test_braces(folder):
    put(folder, "a-1.x", "b-1.x", "c-1.x", "d-2.x")
    assert names(folder, f"{folder}/{{a,b}}-*.x") == ["a-1.x", "b-1.x"]
    assert names(folder, f"{folder}/{{a,{{c,d}}}}-?.x") == ["a-1.x", "c-1.x", "d-2.x"]
    with pytest.raises(InputError, match=r"No file matches .*/e-\*\.x' \(of .*\{a,e\}-"):
        names(folder, f"{folder}/{{a,e}}-*.x")


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a{b,c}d", ["abd", "acd"]),
        ("{a,b}{c,d}", ["ac", "ad", "bc", "bd"]),
        ("{a,{b,c}}", ["a", "b", "c"]),
        ("x{,.gz}", ["x", "x.gz"]),
        ("{a}", ["{a}"]),
        ("{a,b", ["{a,b"]),
        ("a}b", ["a}b"]),
        ("[{]a,b}", ["[{]a,b}"]),
        ("{a}{b,c}", ["{a}b", "{a}c"]),
    ],
)
def test_expand_braces(text, expanded):
    assert patterns.expand_braces(text) == expanded


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(str(tmp_path), "a.x")
    assert patterns.match("~/*.x")[0].path == str(tmp_path / "a.x")
    assert patterns.match("~/a.x")[0].path == str(tmp_path / "a.x")


@pytest.mark.parametrize("name", ["run[1]", "exp [lr=0.1]", "a,b", "{a,b}", "50%25 #1 it's", "-x"])
def test_names_that_are_written_as_they_are(tmp_path, monkeypatch, name):
    """A folder or a file that is there is no pattern, in whatever directory the user works."""
    put(str(tmp_path / name), "t-1.x", "t-2.x", f"{name}.y")
    assert len(patterns.match(f"{tmp_path}/{name}/t-*.x")) == 2
    assert len(patterns.match(f"{tmp_path}/{name}/{name}.y")) == 1
    assert len(patterns.match(f"{tmp_path}/{name}/t-1.x, {tmp_path}/{name}/t-[2].x")) == 2
    monkeypatch.chdir(tmp_path)
    assert len(patterns.match(f"{name}/t-*.x,{name}/{name}.y")) == 3
    monkeypatch.chdir(tmp_path / name)
    assert [info.path for info in patterns.match("t-*.x")] == ["t-1.x", "t-2.x"]
    assert len(patterns.match("**.x")) == 2


def test_commas_and_brackets_between_brackets(folder):
    put(folder, "a,1.x", "b[1].x", "c{1}.x")
    assert names(folder, f"{folder}/a[,]*.x,{folder}/b[[]*.x") == ["a,1.x", "b[1].x"]
    assert names(folder, f"{folder}/c[{{]*.x") == ["c{1}.x"]
    with pytest.raises(InputError, match=r"a comma in a name is written \[,\]"):
        names(folder, f"{folder}/[,]x")


def test_folders_in_the_middle_of_a_pattern(folder):
    put(folder, "2026-01/part/a.x", "2026-02/part/a.x", "2026-02/other/a.x", "2027/part/a.x")
    found = ["2026-01/part/a.x", "2026-02/part/a.x"]
    assert names(folder, f"{folder}/2026-*/part/*.x") == found
    assert len(names(folder, f"{folder}/2026-*/**/*.x")) == 3
    assert len(names(folder, f"{folder}/**.x")) == 4


@pytest.mark.parametrize("name", ["a\nb.x", "a\x1b[2J.x"])
def test_names_with_control_characters_are_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"the file '.*' has a line break or another control"):
        patterns.match(f"{tmp_path}/*.x")
    with pytest.raises(InputError, match="the pattern"):
        patterns.match(f"{tmp_path}/{name}")


def test_names_that_are_not_utf8_are_refused(tmp_path):
    with open(os.fsencode(tmp_path) + b"/a\xff.x", "wb"):
        pass
    with pytest.raises(InputError, match="not UTF-8"):
        patterns.match(f"{tmp_path}/*.x")


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.x")
    with pytest.raises(InputError, match=r"pipe.x is no regular file but a pipe"):
        patterns.match(f"{tmp_path}/*.x")
    os.remove(tmp_path / "pipe.x")
    (tmp_path / "link.x").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"link.x cannot be read: No such file"):
        patterns.match(f"{tmp_path}/*.x")


def test_lines_between_patterns(tmp_path):
    """As YAML's blocks of text have them."""
    put(str(tmp_path), "a.x", "b.x")
    assert len(patterns.match(f"{tmp_path}/a.x,\n{tmp_path}/b.x\n")) == 2
