from tracin_beam.stages.embed import batches
from tracin_beam.storage.records import BadRecord, Record


def test_unreadable_records_fill_a_batch_too():
    source = [Record(0, b"a"), *(BadRecord(i, "bad") for i in range(1, 100)), Record(100, b"b")]
    some = list(batches(iter(source), 8))
    assert max(len(good) + len(bad) for good, bad in some) <= 15
    together = [record for good, bad in some for record in [*good, *bad]]
    assert sorted(together) == sorted(source)
    # The first comes without the rest having been read.
    endless = batches((BadRecord(i, "bad") for i in iter(int, 1)), 8)
    assert len(next(endless)[1]) == 8
