"""The ledger of verdicts: what it takes, what it refuses, and which suspects it hides."""

import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracin_beam.errors import InputError
from tracin_beam.storage import verdicts
from tracin_beam.storage.records import content_hash
from tracin_beam.storage.runs import Output

HASH = content_hash(b"a record")


def row(**changes):
    given = {
        "id": "a",
        "content_hash": HASH.hex(),
        "verdict": "keep",
        "who": "me",
        "when": "2026-11-22T07:30:00Z",
        "why": "",
    }
    return {k: v for k, v in {**given, **changes}.items() if v is not None}


def lines(path, *rows):
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return str(path)


@pytest.fixture
def output(tmp_path):
    return Output(str(tmp_path / "OUT"))


def test_all_formats_say_the_same(tmp_path):
    rows = [row(), row(id="b", verdict="relabel", label=3, why='a "b", c\nd')]
    expected = verdicts.read_file(lines(tmp_path / "x.jsonl", *rows))
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(rows, indent=1))
    (tmp_path / "x.csv").write_text(
        "id,content_hash,verdict,label,who,when,why,page\r\n"
        f"a,{HASH.hex()},keep,,me,2026-11-22T07:30:00Z,,1\r\n"
        f'b,{HASH.hex()},relabel,3,me,2026-11-22T08:30:00+01:00,"a ""b"", c\nd",1\r\n'
    )
    pq.write_table(expected, tmp_path / "x.parquet")
    for name in ("x.json", "x.csv", "x.parquet"):
        assert verdicts.read_file(str(tmp_path / name)).equals(expected), name
    assert expected.schema == verdicts.SCHEMA
    assert expected.to_pylist()[1]["label"] == 3.0
    assert expected.to_pylist()[1]["content_hash"] == HASH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "neither JSON nor CSV of verdicts"),
        (b"[]", "has no verdicts"),
        (b"[1]", "row 1 is no verdict"),
        (b"{", "no sound JSON"),
        (b"[" * 100_000, "no sound JSON"),
        (b"PAR1nothing", "no sound Parquet"),
        (b"\xff\xfe\x00", "neither Parquet nor text"),
        (b"id,verdict\na,keep\n", "no column content_hash, who, when"),
        (b'id,content_hash,verdict,who,when\n"a', "no sound JSON or CSV"),
        (json.dumps(row(verdict="delete")).encode(), "row 1: the verdict 'delete' is none of"),
        (json.dumps(row(id=3)).encode(), "id is not a text"),
        (json.dumps(row(id=None)).encode(), "id is missing"),
        (json.dumps(row(id="\ud800")).encode(), "no Unicode"),
        (json.dumps(row(content_hash="xyz")).encode(), "not hexadecimal"),
        (json.dumps(row(content_hash="abcd")).encode(), "not 16 bytes"),
        (json.dumps(row(verdict="relabel")).encode(), "relabel needs a label"),
        (json.dumps(row(verdict="relabel", label="cat")).encode(), "label 'cat' is not a number"),
        (json.dumps(row(verdict="relabel", label=1e999)).encode(), "is not a number"),
        (json.dumps(row(verdict="relabel", label=True)).encode(), "is not a number"),
        (json.dumps(row(verdict="snooze", until="soon")).encode(), "until 'soon' is not a date"),
        (json.dumps(row(verdict="snooze")).encode(), "until None is not a date"),
        (json.dumps(row(when="now")).encode(), "when 'now' is not a time"),
        (json.dumps(row(why="x" * 20_000)).encode(), "20000 characters"),
    ],
    ids=range(23),
)
def test_what_is_no_verdict_is_said_in_a_sentence(tmp_path, output, content, said):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as raised:
        verdicts.add(output, [lines(tmp_path / "good", row()), str(path)])
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(verdicts.read(output)) == 0  # nothing of the good file either


def test_the_latest_counts_whatever_the_order_of_files(tmp_path, output):
    early = lines(tmp_path / "1", row(verdict="drop", when="2026-11-22T09:00:00+02:00"))
    late = lines(tmp_path / "2", row(verdict="keep", when="2026-11-22T08:00:00Z"))
    assert verdicts.add(output, [late]) == (1, 1)
    assert verdicts.add(output, [early]) == (1, 2)
    assert verdicts.latest(verdicts.read(output))["a", HASH]["verdict"] == "keep"
    before = (tmp_path / "OUT/quality/verdicts.parquet").stat()
    assert verdicts.add(output, [early, late]) == (0, 2)
    assert (tmp_path / "OUT/quality/verdicts.parquet").stat().st_ino == before.st_ino


def test_several_add_at_a_time_and_none_is_lost(tmp_path, output):
    paths = [lines(tmp_path / str(i), row(id=str(i))) for i in range(3)]
    threads = [threading.Thread(target=verdicts.add, args=(output, [p])) for p in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts.read(output)["id"].to_pylist() == ["0", "1", "2"]


def test_a_reviewed_example_comes_back_only_when_it_changes(tmp_path, output):
    suspects = pa.table(
        {"id": ["a", "a", "b", "c"], "content_hash": [HASH, HASH, HASH, HASH], "label": [1.0] * 4}
    )
    given = [
        row(given_label=1),
        row(id="b", verdict="snooze", until="2026-11-25"),
    ]
    verdicts.add(output, [lines(tmp_path / "x", *given)])
    ledger = verdicts.read(output)

    def left(table, date="2026-11-24"):
        return verdicts.without_reviewed(table, ledger, date)["id"].to_pylist()

    assert left(suspects) == ["c"]
    assert left(suspects, "2026-11-25") == ["b", "c"]
    changed = suspects.set_column(1, "content_hash", pa.array([content_hash(b"new")] * 4))
    assert left(changed) == ["a", "a", "b", "c"]
    relabelled = suspects.set_column(2, "label", pa.array([2.0] * 4))
    assert left(relabelled) == ["a", "a", "c"]  # of b it is not known what was seen
    many = suspects.set_column(2, "label", pa.array([[1.0]] * 4))
    assert left(many) == ["c"]


def test_a_ledger_that_is_none_is_said(output, tmp_path):
    (tmp_path / "OUT/quality").mkdir(parents=True)
    (tmp_path / "OUT/quality/verdicts.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no ledger of verdicts"):
        verdicts.read(output)
