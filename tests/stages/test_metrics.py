"""What the workers counted stands in run.json."""

import threading

import tiny as t

from tracin_beam.scoring import cost
from tracin_beam.stages.metrics import Tally


def test_threads_add_to_one_tally():
    tally = Tally()

    def work():
        for _ in range(1000):
            tally.add("batches")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with tally.timed("read"):
        pass
    assert tally.read() == {"batches": 4000, "read_msec": 0}


def test_counters_of_a_job(tmp_path, launch):
    job = t.Tiny(tmp_path, launch).write_all(train=2, test=0)
    job.write("train-1.tfrecord", [*t.rows("more", 7, 5), b"garbage"])
    assert job.run("self_influence") == 0
    timing = job.run_json()["timings"]["self_influence"]
    counted = timing["counters"]["embed"]
    # Two shards of eight records at two checkpoints.
    assert counted["units_embedded"] == 4
    assert counted["records_read"] == 32
    assert counted["records_rejected"] == 2
    assert counted["batches"] == 4
    every = [row.serialized() for row in job.good("train", {("train-1.tfrecord", 7)})]
    assert counted["bytes"] == 2 * (sum(map(len, every)) + len(b"garbage"))
    assert {"read_msec", "compute_msec", "write_msec"} <= set(counted)
    (job.out / "self_influence/self_influence-00000-of-00002.parquet").unlink()
    assert job.run("self_influence") == 0
    again = job.run_json()["timings"]["self_influence"]["counters"]["embed"]
    assert again == {"units_found": 4, "records_read": 32, "records_rejected": 2}


def test_counters_of_every_stage(tmp_path, launch):
    job = t.Tiny(tmp_path, launch).write_all(train=2, test=1)
    train, test = len(job.good("train")), len(job.good("test"))
    flags = {"index": "scann", "index_rows": train // 2, "rescore": 0, "top_k": 2}

    def counted(stage, **changes):
        assert job.run(stage, **{**flags, **changes}) == 0
        return job.run_json()["timings"][stage]["counters"]

    found = counted("influence")
    assert found["index"]["pieces_built"] == found["search"]["batches"] == 2
    assert found["index"]["records"] == found["search"]["records"] == train
    # Of both roles, twice as many as are wanted.
    assert found["search"]["pairs_estimated"] == 2 * (cost.MORE * 2) * test
    for stage in ("index", "search"):
        assert {"batches", "read_msec", "compute_msec"} <= set(found[stage])
    assert "write_msec" in found["index"]
    assert counted("influence", top_k=3)["index"] == {"pieces_found": 2}
    exact = counted("influence", index="exact")
    assert "index" not in exact
    assert exact["search"]["records"] == train

    # All of so few pairs are scored exactly, of two groups at two checkpoints.
    found = counted("influence", rescore=4)["rescore"]
    assert (found["records"], found["pairs"]) == (train, train * test)
    assert (found["batches"], found["queries"] % (2 * test)) == (4, 0)
    assert {"read_msec", "parse_msec", "queries_msec", "compute_msec"} <= set(found)

    found = counted("self_influence")["self_influence"]
    assert (found["tables_written"], found["records"], found["batches"]) == (2, train, 2)
    assert {"read_msec", "compute_msec", "table_msec"} <= set(found)
    (job.out / "self_influence/self_influence-00000-of-00002.parquet").unlink()
    found = counted("self_influence")["self_influence"]
    assert (found["tables_found"], found["tables_written"]) == (1, 1)


def test_counters_of_totals_and_of_the_retrieval(tmp_path, launch):
    job = t.Tiny(tmp_path, launch).write_all(train=2, test=1)
    train, test = len(job.good("train")), len(job.good("test"))

    def counted(**changes):
        assert job.run("influence", total=True, recall_queries=2, **changes) == 0
        return job.run_json()["timings"]["influence"]["counters"]

    found = counted(index_rows=8)
    # The test set is one part, at two checkpoints; each training shard is a table.
    assert (found["total"]["sums_made"], found["total"]["test_records"]) == (2, test)
    assert (found["total"]["tables_written"], found["total"]["records"]) == (2, train)
    assert found["total"]["batches"] == 4
    assert {"sum_msec", "read_msec", "compute_msec", "table_msec"} <= set(found["total"])
    assert found["retrieval"]["groups_judged"] == 2
    assert (found["retrieval"]["records"], found["retrieval"]["pairs"]) == (train, 2 * train)
    assert {"read_msec", "compute_msec", "estimate_msec"} <= set(found["retrieval"])
    found = counted(index_rows=8, top_k=3)
    assert found["total"] == {"sums_found": 2, "tables_found": 2}
    assert found["retrieval"] == {"groups_found": 2}
