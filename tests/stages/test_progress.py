"""How far the work is, as whoever waits for it reads it."""

import threading

import pytest
import tiny as t

from tracin_beam.stages import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what a test adds to it."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_parts", {})
    return clock


@pytest.fixture
def reported(clock):
    with progress.reported(lambda parts, seconds: None, 1000):
        yield


def test_rate_share_and_time_left(clock, reported):
    progress.expect("embedding", 4000)
    with progress.piece("embedding", 1000) as piece:
        clock.now += 2
        piece.add(50, 500)
        (found,) = progress.read()
        assert (found.examples, found.rate, found.share) == (50, 25, 0.125)
        assert found.seconds_left == pytest.approx(14)
        assert str(found) == "embedding: 50 examples, 25 a second; 12% done, about 14 s left"
    assert progress.read() == []
    with progress.piece("embedding", 1000):  # the first counts whole, whatever it said of itself
        clock.now += 2
        assert progress.read()[0].share == 0.25


def test_what_was_found_is_not_left_to_do(clock, reported):
    progress.expect("embedding", 4000)
    progress.skip("embedding", 3000)
    with progress.piece("embedding", 1000) as piece:
        clock.now += 1
        piece.add(1, 250)
        assert progress.read()[0].share == 0.25


def test_more_than_the_size_of_a_piece(clock, reported):
    with progress.piece("embedding", 100) as piece:
        clock.now += 1
        piece.add(7, 1e6)  # compressed: more bytes come out than the file has
        (found,) = progress.read()
        assert (found.examples, found.share, found.seconds_left) == (7, 1.0, 0.0)


def test_nothing_is_said_of_the_time_left_before_anything_is_done(clock, reported):
    with progress.piece("scoring", 100):
        clock.now += 1
        assert str(progress.read()[0]) == "scoring: 0 examples, 0 a second"


def test_lines_come_while_a_piece_is_worked_on(monkeypatch):
    monkeypatch.setattr(progress, "_reporters", [])  # other tests' work left theirs, as workers do
    lines, two = [], threading.Event()

    def show(parts, seconds):
        lines.extend(str(part) for part in parts if part.examples)
        if len(lines) >= 2:
            two.set()

    with progress.reported(show, 0.01), progress.piece("embedding", 10) as piece:
        piece.add(3, 1)
        assert two.wait(60)
    assert all(line.startswith("embedding: 3 examples") for line in lines)
    assert not progress._reporters


def test_a_workers_process_says_it_in_its_log(monkeypatch):
    monkeypatch.setattr(progress, "_reporters", [])
    with progress.piece("embedding", 10):
        assert len(progress._reporters) == 1
    with progress.piece("embedding", 10):
        assert len(progress._reporters) == 1
    progress._reporters[0].set()


def test_seconds_are_spelt_out():
    assert [progress.spelt_out(s) for s in (0.4, 99, 600, 7200)] == [
        "0 s",
        "99 s",
        "10 min",
        "2.0 h",
    ]


def test_a_job_says_how_far_it_is_inside_a_shard(tmp_path, launch, monkeypatch):
    job = t.Tiny(tmp_path, launch).write_all(train=1, test=0)
    said = []
    add = progress.Piece.add

    def spy(self, examples, size):
        add(self, examples, size)
        said.extend((part.part, part.examples, part.share) for part in progress.read())

    monkeypatch.setattr(progress.Piece, "add", spy)
    assert job.run("embed", test=None, batch_size=2) == 0
    assert [(part, examples) for part, examples, _ in said[:3]] == [
        ("embedding", 2),
        ("embedding", 4),
        ("embedding", 6),
    ]
    shares = [share for *_, share in said]
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.2
    assert shares[-1] == pytest.approx(1, abs=0.2)
