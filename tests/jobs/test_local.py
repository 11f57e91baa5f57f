"""Beam's servers in this process: no element is cut, and nobody outside can reach them."""

import os
import socket
import sys
import threading
import time

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability import local_job_service
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.worker import worker_pool_main
from apache_beam.testing.util import assert_that, equal_to

from tests import sockets
from tracin_beam.errors import InputError
from tracin_beam.jobs import launch, local, worker_errors

THREADS = ["--runner=FnApiRunner", "--direct_running_mode=multi_threading"]


class Slow:
    """A value that is half written for longer than the flush waits.

    A pair of a key and such a value is written key first, then the value is pickled.
    """

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        time.sleep(0.15)
        return Slow, (self.number,)


def group(pipeline):
    """Runs pairs with slow values through a shuffle, and holds what comes out against them."""
    groups = (
        pipeline
        | beam.Create(range(4))
        | beam.Map(lambda i: (f"key-{i % 2}", Slow(i)))
        | beam.GroupByKey()
        | beam.Map(lambda group: (group[0], sorted(slow.number for slow in group[1])))
    )
    assert_that(groups, equal_to([("key-0", [0, 2]), ("key-1", [1, 3])]))


@pytest.fixture
def beams_flush(monkeypatch):
    """Beam's periodic flush as it is by default, but more often, so that a test can wait for it."""
    monkeypatch.setattr(worker_handlers, "DATA_BUFFER_TIME_LIMIT_MS", 20)


def test_an_element_that_takes_long_to_write_arrives_whole(beams_flush):
    options = PipelineOptions(THREADS)
    local.prepare(options)
    with beam.Pipeline(options=options) as pipeline:
        group(pipeline)


def test_with_beams_flush_it_does_not(beams_flush):
    # Should this fail one day, Beam has mended it, and `secure` need not set the limit.
    with pytest.raises(Exception), beam.Pipeline(options=PipelineOptions(THREADS)) as pipeline:  # noqa: B017, PT011
        group(pipeline)


def test_a_job_runs_without_the_flush(beams_flush):
    launch.execute_graph(group, PipelineOptions(THREADS))


def test_the_flush_cannot_be_asked_for():
    options = PipelineOptions(["--experiments=data_buffer_time_limit_ms=1000"])
    with pytest.raises(InputError, match="would lose data"):
        local.prepare(options)
    local.prepare(PipelineOptions(["--experiments=data_buffer_time_limit_ms=0"]))


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_a_run_listens_on_loopback_only(mode, tmp_path):
    launcher, found = os.getpid(), tmp_path / "sockets"

    def look(_):
        every = sockets.listening(launcher, os.getpid())
        found.write_text("\n".join(sorted(address for address, _ in every)))

    def graph(pipeline):
        _ = pipeline | beam.Create([None]) | beam.Map(look)

    before = sockets.listening()
    flags = ["--runner=FnApiRunner", f"--direct_running_mode={mode}", "--direct_num_workers=2"]
    launch.execute_graph(graph, PipelineOptions(flags))
    addresses = found.read_text().split()
    assert len(addresses) >= 4 + len(before)  # control, data, state and logging
    assert set(addresses) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("engine", ["worker pool", "job service"])
def test_what_beam_starts_for_engines_listens_on_loopback_only(engine):
    local.secure()
    before = set(sockets.listening())
    if engine == "worker pool":
        _, server = worker_pool_main.BeamFnExternalWorkerPoolServicer.start()
    else:
        server = local_job_service.LocalJobServicer(None)
        server.start_grpc_server()
    addresses = {address for address, _ in set(sockets.listening()) - before}
    server.stop(0)
    assert addresses
    assert addresses <= {"127.0.0.1", "::1"}


def test_the_kernel_tells_of_sockets_that_listen_everywhere():
    for family, anywhere, address in (
        (socket.AF_INET, "0.0.0.0", "0.0.0.0"),
        (socket.AF_INET6, "::", "::"),
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
    ):
        with socket.socket(family) as server:
            server.bind((anywhere, 0))
            server.listen()
            assert (address, server.getsockname()[1]) in sockets.listening()


WORKER = """
import sys, traceback
print("before", file=sys.stderr)
try:
    try:
        1 / 0
    except ZeroDivisionError:
        raise KeyError("two\\n\\n  lines")
except KeyError:
    print(traceback.format_exc(), file=sys.stderr)
print("after", file=sys.stderr)
"""


@pytest.mark.parametrize("shown", [False, True])
def test_worker_processes_show_no_traces(shown, monkeypatch, capfd):
    monkeypatch.setenv(worker_errors.TRACE_VARIABLE, "1" if shown else "")
    before = set(threading.enumerate())
    process = local._QUIET.Popen([sys.executable, "-c", WORKER])
    passing = set(threading.enumerate()) - before
    assert process.wait() == 0
    for thread in passing:
        thread.join()
    said = capfd.readouterr().err
    assert "before" in said
    assert "after" in said
    assert ("Traceback" in said) == ("Error" in said) == ("lines" in said) == shown
