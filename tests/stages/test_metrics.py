"""What the workers counted stands in run.json."""

import threading

import tiny as t

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
