"""The end of a night on tables made by hand: a week, with what other software reads of it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracin_beam.errors import InputError
from tracin_beam.jobs import night
from tracin_beam.signals import gates, nights
from tracin_beam.storage import verdicts
from tracin_beam.storage.records import content_hash
from tracin_beam.storage.runs import Output


def shard(name, seed, bad=0.0, count=1000):
    """Rows of `signals.parquet`: most scores near 0, flips near 1."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(0.3, 4, count)
    flips = rng.random(count) < bad
    scores[flips] = rng.beta(6, 1, int(flips.sum()))
    return pa.table(
        {
            "id": [f"{name}#{i}" for i in range(count)],
            "shard": [name] * count,
            "position": range(count),
            "cohort": ["new"] * count,
            "label": rng.integers(0, 3, count).astype(float),
            "prediction": rng.integers(0, 3, count).astype(float),
            "suggested_label": np.zeros(count),
            "loss": rng.random(count),
            "mislabel_score": scores,
            "content_hash": [content_hash(f"{name}{i}{seed}".encode()) for i in range(count)],
        }
    )


def suspects_of(tables, date, seen):
    whole = pa.concat_tables(tables)
    rows = [row for row in whole.to_pylist() if row["mislabel_score"] > 0.8]
    for row in rows:
        row |= {"kind": "mislabelled", "score": row["mislabel_score"]}
        row["first_seen"] = seen.setdefault((row["id"], row["content_hash"]), date)
    names = ["id", "kind", "score", "label", "shard", "first_seen", "content_hash"]
    types = {"label": pa.float64(), "score": pa.float64(), "content_hash": pa.binary()}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in names])
    return pa.Table.from_pylist([{k: row[k] for k in names} for row in rows], schema)


def finish(output, date, summaries, suspects, conditions, signals=()):
    earlier = night.history(output, date)
    return night.finish(output, date, summaries, suspects, conditions, earlier, signals)


def test_a_week(tmp_path):
    output, seen, found = Output(str(tmp_path)), {}, []
    given = gates.parse_all(None, ["max(by_shard.suspects) > 400"])
    there = {f"d0-{i}": shard(f"d0-{i}", i) for i in range(3)}
    reviewed = None
    for day in range(7):
        date = f"2026-11-{20 + day}"
        if day:
            there[f"d{day}"] = shard(f"d{day}", 10 + day, bad=0.02 * (day == 5))
        if day == 3:
            there["d0-1"] = shard("d0-1", 99)  # changed
            del there["d0-2"]  # vanished
        suspects = suspects_of(list(there.values()), date, seen)
        suspects = verdicts.without_reviewed(suspects, verdicts.read(output), date)
        if reviewed:
            assert reviewed not in suspects["id"].to_pylist()
        summaries = {
            name: nights.summary(
                table, True, str(hash(tuple(table["content_hash"][:2].to_pylist())))
            )
            for name, table in there.items()
        }
        made = finish(output, date, summaries, suspects, given, there.values())
        assert made == finish(output, date, summaries, suspects, given, there.values())
        found.append(made)
        if day == 1:
            row = suspects.to_pylist()[0]
            reviewed = row["id"]
            file = tmp_path / "verdicts.jsonl"
            file.write_text(
                json.dumps(
                    {"id": reviewed, "content_hash": row["content_hash"].hex(), "verdict": "keep",
                     "who": "me", "when": "2026-11-21T08:00:00Z"}
                )
            )  # fmt: skip
            assert verdicts.add(output, [str(file)]) == (1, 1)
    fired = [[r["gate"] for r in made["gates"] if r["fired"]] for made in found]
    assert fired[:5] == [[]] * 5
    assert "new_suspicious_shards > 0" in fired[5]
    assert fired[6] == []
    assert [made["metrics"]["suspicious_shards"] for made in found] == [0] * 5 + [1, 1]
    assert found[1]["metrics"]["new_suspects"] < found[1]["metrics"]["suspects"]
    folder = tmp_path / "quality/2026-11-26"
    assert json.loads((folder / "metrics.json").read_text()) == found[-1]
    assert f"tracin_beam_examples {8000}\n" in (folder / "metrics.prom").read_text()
    assert len(pq.read_table(folder / "datalab.parquet")) == 8000
    assert "dataQualityMetrics" in json.loads((folder / "openlineage.json").read_text())


def test_nights_that_cannot_be_read_are_left_out(tmp_path, caplog):
    output = Output(str(tmp_path))
    empty = suspects_of([shard("a", 0)], "d", {})[:0]
    for date in ("2026-11-20", "2026-11-21", "2026-11-22"):
        finish(output, date, {"a": nights.summary(shard("a", 0), True)}, empty, [])
    (tmp_path / "quality/2026-11-20/metrics.json").write_text("{")
    (tmp_path / "quality/2026-11-21/metrics.json").write_text('{"date": "2026-11-21"}')
    assert [n["date"] for n in night.history(output, "2026-11-23")] == ["2026-11-22"]
    assert night.history(output, "2026-11-20") == []


def test_metrics_are_there_although_a_gate_is_wrong(tmp_path):
    given = [gates.parse("no_such > 3", "error")]
    empty = suspects_of([shard("a", 0)], "d", {})[:0]
    with pytest.raises(InputError, match="no metric 'no_such'"):
        finish(
            Output(str(tmp_path)), "2026-11-20", {"a": nights.summary(shard("a", 0), True)}, empty,
            given,
        )  # fmt: skip
    assert (tmp_path / "quality/2026-11-20/metrics.json").exists()


def test_a_date_is_one():
    assert night.check_date("2026-11-20") == "2026-11-20"
    for text in ("today", "2026-13-01", "../../etc"):
        with pytest.raises(InputError, match="--date="):
            night.check_date(text)
