"""The page of a night, as far as it is made before a browser shows it."""

import base64
import gzip
import hashlib
import json
import re
import struct

import night_tables as n
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from influence_table import HOSTILE, Page

from tracin_beam.report import quality
from tracin_beam.report.show import Shown
from tracin_beam.storage import tables


def page(found, shown=None, **others):
    given = {"night": n.metrics(30), "run": n.RUN} | others
    night, run = given.pop("night"), given.pop("run")
    return quality.quality_page(found, shown or {}, night, run, **given)


def unpacked(source, block="core"):
    text = re.search(f'<script type="text/plain" id="{block}">(.*?)</script>', source)[1]
    whole = gzip.decompress(base64.b64decode(text))
    (length,) = struct.unpack("<I", whole[:4])
    header = json.loads(whole[4 : 4 + length])
    return header, {
        name: np.frombuffer(whole, dtype, size, 4 + length + start)
        for name, (dtype, start, size) in header["arrays"].items()
    }


class TestWorst:
    def test_each_kind_has_its_share(self):
        rows = pa.concat_tables(
            [
                n.suspects(50),
                n.suspects(4, kind="outlier", score=0.1),
                n.suspects(50, kind="x", score=0.2),
            ]
        )
        found, counts = quality.worst(iter([rows.slice(0, 60), rows.slice(60)]), 24)
        assert counts == {"mislabelled": 50, "outlier": 4, "x": 50}
        kinds = found["kind"].to_pylist()
        assert [kinds.count(kind) for kind in counts] == [10, 4, 10]
        scores = found["score"].to_pylist()
        assert scores == sorted(scores, reverse=True)
        assert found["id"].to_pylist()[:10] == [f"train-{i}" for i in range(10)]

    def test_all_where_they_are_few(self):
        found, counts = quality.worst(iter([n.suspects(3)]), 10)
        assert (len(found), counts) == (3, {"mislabelled": 3})

    def test_none(self):
        found, counts = quality.worst(iter([n.suspects(0)]), 10)
        assert (len(found), counts) == (0, {})


def test_reads_the_tables_of_a_night(tmp_path):
    pq.write_table(n.suspects(5), tmp_path / "suspects.parquet")
    pq.write_table(n.signals(5), tmp_path / "signals.parquet")
    found = quality.read(str(tmp_path))
    rows = n.signals(5).to_pylist()
    np.testing.assert_array_equal(found.signals["aum"], [row["aum"] for row in rows[:5]])
    assert found.curves["loss_by_checkpoint"].shape == (5, 3)
    assert found.places["train-3"] == ("train-1.tfrecord", 3)
    assert "elsewhere" not in found.places
    assert found.shown()[:5] == [(f"train-{i % 2}.tfrecord", i) for i in range(5)]
    assert ("train-1.tfrecord", 5) in found.shown()  # evidence that is no suspect
    assert found.everywhere["loss"].sum() == 10


def test_columns_that_are_missing_are_not_shown():
    few = n.suspects(4).select(["id", "kind", "score", "shard", "position", "label"])
    found = n.found(4, table=few, of=n.signals(4).select(["id", "shard", "position", "label"]))
    header, arrays = unpacked(page(found))
    assert [signal["name"] for signal in header["signals"]] == ["score"]
    assert not arrays["supports"].size
    assert not arrays["hash"].any()  # so none can be judged


def test_what_is_packed():
    header, arrays = unpacked(page(n.found(30), label_names=["cat", "dog", "cow"]))
    assert header["ids"][:2] == ["train-0", "train-1"]
    assert header["names"] == ["cat", "dog", "cow"]
    assert arrays["given"][:3].tolist() == [0.0, 1.0, 2.0]
    assert arrays["suggested"][:3].tolist() == [1.0, 2.0, 0.0]
    assert arrays["hash"][16:32].tobytes() == (1).to_bytes(16, "big")
    evidence = arrays["supports"][: arrays["ends"][0]]
    assert [header["ids"][i] for i in evidence] == ["train-1", "elsewhere"]
    by_name = {signal["name"]: signal for signal in header["signals"]}
    signals = n.signals(30).slice(0, 30)
    for name in ("loss", "aum", "self_influence"):
        values = arrays[f"signal {name}"].astype(np.float64) * by_name[name]["scale"]
        np.testing.assert_allclose(values, signals[name].to_numpy(), rtol=5e-4, atol=1e-6)
        assert sum(by_name[name]["everywhere"]) == 60
    assert header["curves"][0]["steps"] == [10, 20, 30]


def test_proponents_and_opponents_are_packed_beside_the_evidence():
    rows = n.suspects(3)
    for name, ids in {"proponents": ["train-5"], "opponents": ["train-4", "train-5"]}.items():
        column = pa.array([None, ids, []], pa.list_(pa.string()))
        rows = rows.set_column(rows.column_names.index(name), name, column)
    found = n.found(3, table=rows)
    header, arrays = unpacked(page(found))
    start, end = arrays["ends"][:2]
    shown = [header["ids"][i] for i in arrays["supports"][start:end]]
    assert shown[-3:] == ["train-5", "train-4", "train-5"]
    assert arrays["roles"][start:end].tolist() == [0] * (end - start - 3) + [1, 2, 2]
    assert {("train-0.tfrecord", 4), ("train-1.tfrecord", 5)} <= set(found.shown())


def test_the_same_example_of_two_kinds_is_one():
    rows = pa.concat_tables([n.suspects(2), n.suspects(1, kind="duplicate")])
    header, arrays = unpacked(page(n.found(2, table=rows)))
    assert arrays["example"].tolist().count(0) == 2
    assert header["choices"]["kind"] == ["duplicate", "mislabelled"]


def test_labels_of_a_multilabel_task_are_texts():
    rows = n.signals(2)
    lists = pa.array([[1.0, 0.0], [0.0, 0.5], [], []], pa.list_(pa.float64()))
    rows = rows.set_column(rows.column_names.index("label"), "label", lists)
    few = n.suspects(2).set_column(3, "label", pa.nulls(2, pa.float64()))
    header, arrays = unpacked(page(n.found(2, table=few, of=rows)))
    assert header["labels"] == {"0": ["1.000 0", ""], "1": ["0 0.5000", ""]}
    assert np.isnan(arrays["given"]).all()


def test_nothing_runs_but_its_own_script():
    table = n.suspects(2, id=HOSTILE, kind=HOSTILE, shard=HOSTILE, cohort=HOSTILE)
    night = n.metrics(
        2,
        by_shard={HOSTILE: {"examples": 2, "suspects": 2, "mean_loss": None}},
        gates=[{"gate": HOSTILE, "level": "error", "fired": True, "reason": HOSTILE}],
    )
    shown = {
        (HOSTILE, 0): Shown("text", HOSTILE),
        (HOSTILE, 1): Shown("features", ((HOSTILE, HOSTILE),)),
    }
    run = n.RUN | {"config": {HOSTILE: HOSTILE}}
    found = page(n.found(2, table=table), shown, night=night, run=run, label_names=[HOSTILE] * 3)
    read = Page(found)
    scripts = [s for s in read.all("script") if s.get("type") != "text/plain"]
    assert len(scripts) == 1
    policy = next(m["content"] for m in read.all("meta") if m.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", found, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") or name == "style" for _, a in read.elements for name in a)
    assert all(not a.get("src") and not a.get("href") for _, a in read.elements)
    assert "alert" not in "".join(re.findall("<script>(.*?)</script>", found, re.DOTALL))


def test_says_what_changed_and_which_gates_fired():
    gates = [
        {"gate": "a", "level": "warn", "fired": False, "reason": "not so"},
        {"gate": "b", "level": "error", "fired": True, "reason": "b is 7 > 5"},
    ]
    last = n.metrics(30, date="2026-11-21", metrics={"suspects": 25})
    text = Page(page(n.found(), night=n.metrics(30, gates=gates), earlier=[last])).text
    assert "since 2026-11-21, 3 came and 1 went" in text
    assert text.index("b is 7 > 5") < text.index("not so")
    assert re.search(r"suspects\s*30\s*25\s*\+5", text)


def test_no_suspects():
    text = Page(page(n.found(0))).text
    assert "No suspects tonight." in text


def test_stays_within_its_bytes_and_says_how():
    found = n.found(400)
    shown = dict(zip(found.own, n.pictures(400), strict=True))
    whole = page(found, shown)
    assert whole.count('class="sheet"') == 1
    assert "WebP" not in Page(whole).text
    tight = page(found, shown, largest=len(whole) - 40_000)
    assert len(tight.encode()) <= len(whole) - 40_000
    assert "WebP's quality" in Page(tight).text
    texts = {
        place: Shown("text", np.random.default_rng(i).bytes(200).hex())
        for i, place in enumerate(found.own)
    }
    tight = page(found, texts, largest=len(whole))
    assert len(tight.encode()) <= len(whole)
    assert re.search(r"contents of \d+ of 400 examples are left out", Page(tight).text)


def test_ids_that_would_fill_the_page():
    rng = np.random.default_rng(0)
    table = n.suspects(60).set_column(
        0, "id", pa.array([rng.bytes(4_000).hex() for _ in range(60)])
    )
    found = page(n.found(60, table=table), largest=300_000)
    assert len(found.encode()) <= 300_000
    assert re.search(r"the worst \d+ of 60 suspects", Page(found).text)


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [5.0], [-1e300, 1e300], [1e-9, 1.0, 1e9], [np.nan, 1.0]]
)
def test_bins_of_any_numbers(values):
    found = quality._bins(np.array(values), None)
    assert np.isfinite(found["edges"]).all()
    assert (np.diff(found["edges"]) > 0).all()
    assert tables.number(found["edges"][0]) is not None
