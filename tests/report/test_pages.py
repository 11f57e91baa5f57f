"""Pages as a browser shows them: clicks, keys, filters, verdicts, and what is hostile."""

import json

import browser as b
import influence_table as influence
import night_tables as n
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny as t
from influence_table import HOSTILE

from tracin_beam.__main__ import main
from tracin_beam.report import quality
from tracin_beam.report.influence import influence_page
from tracin_beam.report.show import Shown, show_example
from tracin_beam.storage import verdicts

COUNT = 300


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """The one browser of these tests."""
    found = b.Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.driver.quit()


def made(found, shown=None, run=n.RUN, **others):
    return quality.quality_page(found, shown or {}, n.metrics(len(found.suspects)), run, **others)


@pytest.fixture(scope="module")
def night():
    found = n.found(COUNT)
    shown = dict(zip(found.own, n.pictures(COUNT), strict=True))
    return made(found, shown, label_names=["cat", "dog", "cow"], store="a")


@pytest.fixture
def page(chromium, night):
    chromium.open(night)
    yield chromium
    assert chromium.log() == []


def chosen(page):
    """The id of the suspect that is shown, which is the list's too."""
    name = page.text("#detail h2")
    assert name in page.text("[aria-selected=true]")
    return name


def counted(page):
    """How many suspects pass the filters, as the page says and as the list has."""
    said = int(page.text("#count").split()[0].replace(",", ""))
    assert page.run("document.getElementById('rows').offsetHeight") == 72 * said
    return said


class TestList:
    def test_has_what_is_seen(self, page):
        assert counted(page) == COUNT
        assert chosen(page) == "train-0"
        assert 5 < page.run("document.querySelectorAll('.row').length") < 40
        page.press("End")
        assert chosen(page) == f"train-{COUNT - 1}"
        assert page.run("document.querySelectorAll('.row').length") < 40
        page.press("Home", "Down", "n", "p")
        assert chosen(page) == "train-1"
        option = page.run("document.getElementById('list').getAttribute('aria-activedescendant')")
        assert (
            page.run("document.getElementById(arguments[0]).getAttribute('aria-posinset')", option)
            == "2"
        )

    def test_shows_pictures_and_evidence(self, page):
        page.wait("document.querySelector('#detail .picture canvas').getContext('2d')"
                  ".getImageData(14, 14, 1, 1).data[3] === 255")  # fmt: skip
        assert page.texts(".evidence li")[0].split() == ["dog", "train-1"]
        assert page.texts(".evidence li")[1] == "elsewhere"
        assert page.run("document.querySelectorAll('.evidence canvas').length") == 1
        assert page.text(".labels") == "cat→dog"

    def test_sorts(self, page):
        losses = n.signals(COUNT)["loss"].to_numpy()[:COUNT]
        page.press("n")
        page.choose("#sort", "loss")
        assert chosen(page) == f"train-{losses.argmax()}"
        page.click("#reverse")
        assert chosen(page) == f"train-{losses.argmin()}"


class TestFilters:
    def test_a_cell_of_the_matrix(self, page):
        page.click("[aria-label^='given cat, suggested dog']")
        assert counted(page) == COUNT / 3
        assert set(page.texts(".row .to")) == {"dog"}
        assert page.text("[aria-label^='given dog, suggested cow']") == str(
            COUNT // 3
        )  # unfiltered
        page.click("[aria-label^='given cat, suggested dog']")
        assert counted(page) == COUNT

    def test_a_bar_and_a_range(self, page):
        losses = n.signals(COUNT)["loss"].to_numpy()
        edges = np.array(quality._bins(losses[:COUNT], _everywhere(losses))["edges"])
        bins = (np.searchsorted(edges, losses[:COUNT], side="right") - 1).clip(0, 23)
        bar = "[aria-label^='loss: filter']"
        page.click(bar, 1.5 / 24, 0.9)
        # float16 may put one over an edge.
        assert abs(counted(page) - (bins == 1).sum()) <= 1
        page.run("document.querySelector(arguments[0]).focus()", bar)
        page.press("Right", "Right")
        title = page.run("document.querySelector(arguments[0]).getAttribute('aria-valuetext')", bar)
        page.press("Enter")
        assert title.endswith(f": {counted(page)} suspects")
        page.click("#clear")
        assert counted(page) == COUNT

    def test_a_cell_of_the_curves(self, page):
        cell = "[aria-label^='loss by checkpoint']"
        page.click(cell, 0.5, 0.95)
        losses = np.array(n.signals(COUNT)["loss_by_checkpoint"].to_pylist())[:COUNT]
        edges = quality._bins(losses.ravel(), None, 12)["edges"]
        assert abs(counted(page) - (losses[:, 1] < edges[1]).sum()) <= 1
        page.click(cell, 0.5, 0.95)
        assert counted(page) == COUNT

    def test_search_and_choices(self, page):
        page.press("/", *"TRAIN-29")
        page.wait("document.getElementById('count').innerText.startsWith('11 of')")
        page.press("Escape")
        page.choose("#choose-cohort", "new")
        assert counted(page) == 6  # 29 and 291, 293 …
        page.choose("#choose-given", "dog")
        assert set(page.texts(".row bdi")[::3]) == {"dog"}
        page.click("#clear")
        page.choose("#choose-shard", "train-1.tfrecord")
        assert counted(page) == COUNT / 2

    def test_nothing_passes(self, page):
        page.press("/", *"nothing like it")
        page.wait("document.getElementById('count').innerText.startsWith('0 of')")
        assert "No suspect passes" in page.text("#detail")
        page.press("Escape", "k", "n")
        assert not page.stored()


class TestVerdicts:
    def test_by_keyboard_and_undone(self, page):
        page.press("k", "r", "d", "s")
        assert chosen(page) == "train-4"
        kept = {one["id"]: one for one in page.stored().values()}
        assert [kept[f"train-{i}"]["verdict"] for i in range(4)] == [
            "keep",
            "relabel",
            "drop",
            "snooze",
        ]
        assert kept["train-1"]["label"] == 2.0  # the suggestion
        assert kept["train-3"]["until"] > n.DATE
        assert page.texts(".row .mark") == ["keep", "relabel", "drop", "snooze"]
        page.press("u", "u")
        assert chosen(page) == "train-2"
        assert len(page.stored()) == 2
        assert page.text("#verdict [aria-pressed=true]") if page.press("p") else True
        page.choose("#choose-verdict", "without one")
        assert counted(page) == COUNT - 2

    def test_stays_for_the_next_time(self, page, night):
        page.press("k")
        page.open(night, keep=True)
        assert page.texts(".row .mark") == ["keep"]
        assert page.text("#progress").startswith("1 of 300")
        other = made(n.found(3), store="b")
        assert not page.open(other, keep=True).texts(".row .mark")  # other data

    def test_one_on_another_label_does_not_hold(self, page):
        page.press("k", "k")
        changed = n.suspects(3).set_column(3, "label", pa.array([0.0, 2.0, 2.0]))
        page.open(made(n.found(3, table=changed), store="a"), keep=True)
        assert page.texts(".row .mark") == ["keep"]

    def test_export(self, page):
        page.press("k")
        page.choose("#label", "cat")
        page.press("r", "w", *"its tail", "Enter", "s", "e")
        assert page.run("document.activeElement.id") == "who"
        page.press(*'Ada "L" <b>', "Enter")
        page.click("#export")
        path = page.saved()
        assert path.name == f"verdicts-{n.DATE}-Ada-L-b-.jsonl"
        rows = {row["id"]: row for row in verdicts.read_file(str(path)).to_pylist()}
        path.unlink()
        assert rows["train-0"]["verdict"] == "keep"
        assert rows["train-0"]["content_hash"] == b"\xff" * 16
        assert rows["train-0"]["given_label"] == 0.0
        assert (rows["train-1"]["verdict"], rows["train-1"]["label"]) == ("relabel", 0.0)
        assert (rows["train-2"]["verdict"], rows["train-2"]["why"]) == ("snooze", "its tail")
        assert {row["who"] for row in rows.values()} == {'Ada "L" <b>'}


def test_hostile_data_runs_nothing(chromium):
    evil = [
        HOSTILE,
        '"><img src=x onerror="window.ran=1">',
        "</script><script>window.ran=1</script>",
        "javascript:window.ran=1",
        "'; window.ran=1; //{{7*7}}${window.ran=1}",
        "a\u202eb\u2066c\u2028d",
        "x" * (1 << 20),
    ]
    columns = ("kind", "shard", "cohort", "first_seen")
    rows = [
        n.suspect(i, id=one, supporting_ids=evil[:2], **dict.fromkeys(columns, one[:99]))
        for i, one in enumerate(evil)
    ]
    table = pa.Table.from_pylist(rows, schema=n.SUSPECTS)
    found = n.found(len(evil), table=table)
    shown = {place: Shown("text", one[:400]) for place, one in zip(found.own, evil, strict=True)}
    shown[found.own[1]] = Shown("features", tuple((one[:99], one[:99]) for one in evil))
    names = [one[:99].replace("\u2028", "") for one in evil[:3]]
    gates = [
        {"gate": one[:99], "level": "error", "fired": True, "reason": one[:999]} for one in evil
    ]
    night = n.metrics(7, gates=gates)
    chromium.open(quality.quality_page(found, shown, night, n.RUN, label_names=names))
    for _ in evil:
        assert "x" * 101 not in chromium.text("#detail h2")
        chromium.press("d")
    assert chromium.run("window.ran") is None
    assert not chromium.run("document.querySelector('main img, main b b, main a')")
    kept = sorted(one["id"] for one in chromium.stored().values())
    assert kept == sorted(evil[:-1])  # a ledger takes no id of a megabyte
    assert r"a\u202eb\u2066c\u2028d" in "".join(chromium.texts(".row"))
    assert chromium.log() == []


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_other_tasks(chromium, kind):
    rows = n.suspects(5).set_column(3, "label", pa.array(np.linspace(0.1, 0.123456789, 5)))
    if kind == "multilabel":
        rows = rows.set_column(3, "label", pa.nulls(5, pa.float64()))
        rows = rows.set_column(4, "suggested_label", pa.nulls(5, pa.float64()))
    run = n.RUN | {"kind": {"name": kind}}
    chromium.open(made(n.found(5, table=rows), run=run))
    assert not chromium.run("document.querySelector('.matrix')")
    chromium.press("k", "r")
    kept = {one["id"]: one for one in chromium.stored().values()}
    if kind == "regression":
        assert kept["train-1"]["given_label"] == rows["label"][1].as_py()  # to the last digit
        assert kept["train-1"]["label"] == 2.0
    else:
        assert set(kept) == {"train-0"}
        assert "given_label" not in kept["train-0"]
        assert not chromium.run("document.querySelector('#verdict .relabel')")
    assert chromium.log() == []


def test_few_and_none(chromium):
    chromium.open(made(n.found(1)))
    chromium.press("k")
    assert "No suspect here is left" in chromium.text("#progress")
    assert "No suspects tonight." in chromium.open(made(n.found(0))).text("main")
    assert chromium.log() == []


def test_on_a_phone(chromium, night):
    chromium.open(night, wide=360, high=740, dark=True)
    assert chromium.run("document.documentElement.scrollWidth") == 360
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 25)"
    assert not chromium.run("document.getElementById('detail').checkVisibility()")
    chromium.click(".row")
    box = chromium.run("document.getElementById('detail').getBoundingClientRect().toJSON()")
    assert (box["width"], box["height"]) == (360, 740)
    chromium.click("#verdict .drop")
    assert chromium.text("#detail h2") == "train-1"
    chromium.click("#back")
    assert not chromium.run("document.getElementById('detail').checkVisibility()")
    assert chromium.texts(".row .mark") == ["drop"]
    assert chromium.log() == []


class TestInfluence:
    @pytest.fixture(scope="class")
    def report(self):
        rows = [
            influence.row(test, role, rank, 100.0 / rank, test_label=test % 3, test_prediction=1.0)
            for test in range(6)
            for role in ("proponent", "opponent")
            for rank in range(1, 11)
        ]
        places = [("train.tfrecord", rank) for rank in range(1, 11)]
        shown = dict(zip(places, n.pictures(10), strict=True))
        shown["test.tfrecord", 0] = Shown("features", ((HOSTILE, HOSTILE), ("rooms", "3")))
        shown["test.tfrecord", 1] = show_example({"a": b""}, b"", lambda *_: "one<br />two")
        names = ["cat", HOSTILE, "cow"]
        rows = pa.Table.from_pylist(rows)
        return influence_page(rows, shown, influence.RUN, label_names=names)

    def test_search_and_filters(self, chromium, report):
        page = chromium.open(report)

        def seen():
            return page.run(
                "[...document.querySelectorAll('article')].filter(a => a.checkVisibility())"
                ".map(a => a.querySelector('h2').innerText)"
            )

        assert seen() == ["test-0", "test-2", "test-3", "test-5", "test-1", "test-4"]
        page.press("/", *"TEST-3", "escape")
        assert seen() == ["test-3"]
        assert page.text("#count") == "1 of the 6 test examples here"
        assert len(page.run("[...document.querySelectorAll('nav a')].filter(a => !a.hidden)")) == 1
        page.run("document.getElementById('search').value = ''")
        page.run("document.getElementById('search').dispatchEvent(new Event('input'))")
        page.click("#wrong")
        assert seen() == ["test-0", "test-2", "test-3", "test-5"]
        page.choose("#choose-label", "cow")
        assert seen() == ["test-2", "test-5"]
        assert page.log() == []

    def test_ten_in_a_row_and_tables(self, chromium, report):
        page = chromium.open(report, wide=1200)
        tops = page.run(
            "[...document.querySelector('.proponent ol').children]"
            ".map(e => e.getBoundingClientRect().top)"
        )
        assert len(tops) == 10
        assert len(set(tops)) == 1
        assert page.text(".test .features th").startswith("<script>")
        assert page.texts(".test .text") == ["one\ntwo"]
        assert page.run("typeof window.x") == "undefined"
        assert page.log() == []

    def test_on_a_phone(self, chromium, report):
        page = chromium.open(report, wide=360, high=740, dark=True)
        assert page.run("document.documentElement.scrollWidth") == 360


def test_from_a_night_to_the_next(chromium, tmp_path, launch):
    job = t.Tiny(tmp_path, launch).write_all(test=0)
    flags = {"test": None, "projection": "none", "dim": None}
    assert job.run("quality", date="2026-11-22", **flags) == 0
    folder = job.out / "quality"
    before = pq.read_table(folder / "2026-11-22/suspects.parquet").to_pylist()
    chromium.open(folder / "2026-11-22" / "report.html")
    assert chromium.text("#detail .features").startswith("0\t")
    judged = []
    for key in "kd":
        judged.append(chromium.text("#detail h2"))
        chromium.press(key)
    chromium.click("#who")
    chromium.press(*"me", "Enter")
    chromium.press("e")
    path = chromium.saved()
    assert len(judged) == len(path.read_text().splitlines()) == 2
    assert main(["quality", "verdicts", f"--output={job.out}", f"--add={path}"]) == 0
    path.unlink()
    assert job.run("quality", date="2026-11-23", **flags) == 0
    after = pq.read_table(folder / "2026-11-23/suspects.parquet").to_pylist()
    assert {row["id"] for row in before} - {row["id"] for row in after} == set(judged)
    text = chromium.open(folder / "2026-11-23" / "report.html").text("header")
    assert "since 2026-11-22, 0 came and 2 went" in text
    assert json.loads((folder / "2026-11-23/metrics.json").read_text())["changes"]["gone"] == 2
    assert chromium.log() == []


def _everywhere(values):
    keys = values.astype(np.float32).view(np.uint32) >> 16
    return np.bincount(keys, minlength=1 << 16)
