"""Dataflow without it: jobs are looked at, executed here, and submitted to a stand-in."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tiny as t
from apache_beam.options.pipeline_options import PipelineOptions
from bucket import ANONYMOUS, ROOT, TinyInBucket, bucket  # noqa: F401

from tracin_beam.jobs import dataflow
from tracin_beam.jobs.registry import JOBS

# Beam's clients try again for minutes where nothing answers.
pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parents[2]
IMAGE = "images.example/my-project/tracin/tracin-beam:1"
CLOUD = ["--runner=DataflowRunner", "--project=my-project", "--region=europe-west4", "--no_auth"]


# Options.


def options(*flags):
    given = PipelineOptions(["--runner=DataflowRunner", *flags])
    dataflow.set_defaults(given)
    return given.get_all_options(drop_default=True)


def test_defaults_suit_tensorflow():
    made = options()
    assert made["machine_type"] == "n1-standard-4"
    assert made["number_of_worker_harness_threads"] == 4
    assert made["experiments"] == ["no_use_multiple_sdk_containers"]


@pytest.mark.parametrize(
    ("machine_type", "threads"),
    [
        ("n1-highmem-16", 16),
        ("e2-custom-8-16384", 8),
        ("n2-custom-6-8192-ext", 6),
        ("c3-standard-8-lssd", 8),
        ("e2-medium", 2),
    ],
)
def test_a_thread_for_each_core(machine_type, threads):
    made = options(f"--machine_type={machine_type}")
    assert made["machine_type"] == machine_type
    assert made["number_of_worker_harness_threads"] == threads


def test_the_users_flags_win():
    made = options(
        "--number_of_worker_harness_threads=1",
        "--worker_machine_type=g2-standard-8",
        "--experiments=use_multiple_sdk_containers,upload_graph",
    )
    assert made["machine_type"] == "g2-standard-8"
    assert made["number_of_worker_harness_threads"] == 1
    assert made["experiments"] == ["use_multiple_sdk_containers", "upload_graph"]


@pytest.mark.parametrize("how", ["--dataflow_service_options", "--experiments"])
def test_prime_chooses_its_machines(how):
    made = options(f"{how}=enable_prime")
    assert "machine_type" not in made
    assert made["number_of_worker_harness_threads"] == 4


@pytest.mark.parametrize(
    ("runner", "chosen"),
    [
        ("DataflowRunner", True),
        ("dataflow", True),
        ("apache_beam.runners.dataflow.dataflow_runner.DataflowRunner", True),
        ("FnApiRunner", False),
    ],
)
def test_names_of_the_runner(runner, chosen):
    assert dataflow.is_chosen(PipelineOptions([f"--runner={runner}"])) == chosen


# What is wrong is said before anything is read.

REMOTE = {
    "checkpoints": "gs://b/c",
    "train": "gs://b/t*",
    "test": "gs://b/e*",
    "output": "gs://b/o",
}


def refused(capfd, *flags, **changes):
    ours = {"task": "nowhere.py:task", **REMOTE, **changes}
    argv = [f"--{name}={value}" for name, value in ours.items() if value]
    assert JOBS["influence"].main([*argv, *CLOUD, *flags]) == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("name", ["checkpoints", "train", "test", "output"])
def test_paths_that_workers_cannot_read(capfd, name):
    pytest.importorskip("google.cloud.dataflow")
    changed = {name: "gs://b/x,data/y" if name in ("train", "test") else "data/y"}
    said = refused(capfd, f"--sdk_container_image={IMAGE}", **changed)
    assert f"--{name}=data/y is on this machine" in said
    assert "gs://" in said


def test_workers_without_the_package(capfd):
    pytest.importorskip("google.cloud.dataflow")
    said = refused(capfd)
    assert "--sdk_container_image" in said
    assert "--setup_file=./setup.py" in said


def test_a_dry_run_removes_nothing(capfd):
    pytest.importorskip("google.cloud.dataflow")
    flags = [f"--sdk_container_image={IMAGE}", "--dry_run=True", "--overwrite"]
    assert "--dry_run with --overwrite" in refused(capfd, *flags)


def test_without_the_gcp_extra(capfd, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.util.find_spec", missing)
    assert "pip install 'tracin-beam[gcp]'" in refused(capfd)


# Jobs.


@pytest.fixture(scope="module")
def tiny(bucket, tmp_path_factory):  # noqa: F811
    """Input in the bucket, and what an undisturbed run makes of it on this machine."""
    pytest.importorskip("google.cloud.dataflow")

    def run(stage, **flags):
        return JOBS[stage].main([*(f"--{k}={v}" for k, v in flags.items()), "--runner=FnApiRunner"])

    tiny = TinyInBucket(bucket, tmp_path_factory.mktemp("dataflow"), run)
    tiny.write_all()
    for stage in ("influence", "self_influence"):
        assert tiny.run(stage, index_rows=16) == 0
    tiny.expected = t.contents(tiny.out)
    tiny.expected_tables = {
        folder: t.table(tiny.out / folder) for folder in ("influence/test", "self_influence")
    }
    return tiny


def clear(tiny):
    for blob in tiny.objects().values():
        blob.delete()


def close(rows, expected):
    """Equal tables, their numbers to 1e-5."""
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert row == {
            key: pytest.approx(value, rel=1e-5, abs=1e-6) if numeric(value) else value
            for key, value in other.items()
        }


def numeric(value):
    return isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))


def write_template(tiny, stage, folder, *flags, **changes):
    """The job and the graph as they would be submitted."""
    os.makedirs(folder, exist_ok=True)
    argv = [
        *tiny.argv(stage, index_rows=16, **changes),
        *CLOUD,
        "--dataflow_endpoint=http://localhost:1",
        f"--temp_location={folder}",
        f"--staging_location={folder}",
        f"--template_location={folder}/job.json",
        f"--sdk_container_image={IMAGE}",
        *flags,
    ]
    assert JOBS[stage].main(argv) == 0
    return json.loads((folder / "job.json").read_text()), read_graph(folder / "pipeline.pb")


def read_graph(path):
    from apache_beam.portability.api import beam_runner_api_pb2

    return beam_runner_api_pb2.Pipeline.FromString(Path(path).read_bytes())


def execute(graph):
    """Runs a staged graph, whose workers would be in containers, in this process."""
    from apache_beam.portability import python_urns
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    from tracin_beam.inputs import task
    from tracin_beam.stages import workers

    workers._loaded.clear()  # as a worker has nothing but the graph
    task._loaded.clear()
    for environment in graph.components.environments.values():
        environment.urn = python_urns.EMBEDDED_PYTHON
        environment.payload = b""
    result = FnApiRunner().run_via_runner_api(graph, PipelineOptions())
    result.wait_until_finish()


@pytest.mark.parametrize("stage", ["embed", "influence", "self_influence"])
def test_the_staged_graph_makes_the_same_tables(tiny, tmp_path, capfd, stage):
    clear(tiny)
    job, graph = write_template(tiny, stage, tmp_path)
    assert f"template was written to {tmp_path}/job.json" in capfd.readouterr().out
    assert set(tiny.objects()) == {"run.json"}
    [pool] = job["environment"]["workerPools"]
    assert pool["machineType"] == "n1-standard-4"
    assert pool["numThreadsPerWorker"] == 4
    assert [image["containerImage"] for image in pool["sdkHarnessContainerImages"]] == [IMAGE]
    assert "no_use_multiple_sdk_containers" in job["environment"]["experiments"]
    assert "use_multiple_sdk_containers" not in job["environment"]["experiments"]
    shown = job["environment"]["sdkPipelineOptions"]["options"]
    assert (shown["train"], shown["dim"]) == (tiny.path("train-*"), 16)
    execute(graph)
    tiny.pull()
    made = t.contents(tiny.out)
    embeddings = {path for path in tiny.expected if path.startswith("embeddings/")}
    if stage == "self_influence":
        embeddings = {path for path in embeddings if path.startswith("embeddings/train/")}
    assert {path: made[path] for path in embeddings} == {
        path: tiny.expected[path] for path in embeddings
    }
    folder = {"influence": "influence/test", "self_influence": "self_influence"}.get(stage)
    if folder:
        close(t.table(tiny.out / folder), tiny.expected_tables[folder])


def test_worker_options_reach_the_job(tiny, tmp_path):
    accelerator = "type:nvidia-tesla-t4;count:1;install-nvidia-driver"
    job, graph = write_template(
        tiny,
        "embed",
        tmp_path,
        "--machine_type=n1-highmem-8",
        "--number_of_worker_harness_threads=2",
        "--num_workers=3",
        "--max_num_workers=20",
        "--disk_size_gb=50",
        f"--dataflow_service_options=worker_accelerator={accelerator}",
        "--resource_hints=min_ram=12GB",
        f"--resource_hints=accelerator={accelerator}",
        "--experiments=use_multiple_sdk_containers",
    )
    environment = job["environment"]
    [pool] = environment["workerPools"]
    assert pool["machineType"] == "n1-highmem-8"
    assert pool["numThreadsPerWorker"] == 2
    assert pool["numWorkers"] == 3
    assert pool["autoscalingSettings"]["maxNumWorkers"] == 20
    assert pool["diskSizeGb"] == 50
    assert environment["serviceOptions"] == [f"worker_accelerator={accelerator}"]
    assert "no_use_multiple_sdk_containers" not in environment["experiments"]
    [hints] = {
        tuple(sorted(environment.resource_hints.items()))
        for environment in graph.components.environments.values()
        if environment.resource_hints
    }
    assert hints == (
        ("beam:resources:accelerator:v1", accelerator.encode()),
        ("beam:resources:min_ram_bytes:v1", b"12000000000"),
    )


def test_a_dry_run(tiny, capfd):
    before = tiny.generations()
    argv = [*tiny.argv("embed"), *CLOUD, f"--sdk_container_image={IMAGE}", "--dry_run=True"]
    assert JOBS["embed"].main([*argv, f"--temp_location={ROOT}/tmp"]) == 0
    assert "Nothing was submitted" in capfd.readouterr().out
    after = tiny.generations()
    before.pop("run.json"), after.pop("run.json")
    assert after == before


def test_flags_that_dataflow_needs(tiny, capfd):
    argv = [*tiny.argv("embed"), "--runner=DataflowRunner", f"--sdk_container_image={IMAGE}"]
    argv += ["--region=europe-west4", f"--temp_location={ROOT}/tmp", "--dry_run=True"]
    assert JOBS["embed"].main(argv) == 2
    assert "Missing required option: project" in capfd.readouterr().err


# The template.


@pytest.mark.parametrize("stage", ["embed", "influence", "self_influence"])
def test_a_launcher_is_a_file_too(tmp_path, stage):
    done = subprocess.run(
        [sys.executable, HERE / f"pipelines/{stage}.py", "--task=x.py:task"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    missing = ["--checkpoints", "--train", *["--test"] * (stage == "influence"), "--output"]
    assert f"pipelines.{stage}: {', '.join(missing)} must be given" in done.stderr


def test_the_templates_entry(tiny, tmp_path):
    """As the Flex Template's launcher starts it: a file, with flags in its own way."""
    argv = [flag for flag in tiny.argv("embed", index_rows=16) if flag != "--overwrite"]
    script = ANONYMOUS + "import runpy, sys\nsys.argv = sys.argv[1:]\n"
    script += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    done = subprocess.run(
        [
            sys.executable, "-c", script, HERE / "deploy/dataflow/main.py", "--stage=embed", *argv,
            "--overwrite=false", "--runner=DataflowRunner", "--project=my-project",
            "--region=europe-west4", "--job_name=nightly", f"--temp_location={ROOT}/tmp",
            f"--staging_location={ROOT}/staging", f"--template_location={ROOT}/launched/job.json",
            "--num_workers=2", "--service_account_email=worker@my-project.iam.gserviceaccount.com",
            '--labels={"goog-dataflow-provided-template-type": "flex"}', "--a_flag_of_its_own=1",
            "--no_auth",
        ],
        env={**os.environ, "PYTHONPATH": str(HERE), "TRACIN_BEAM_IMAGE": IMAGE},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{ROOT}/launched/job.json" in done.stdout
    assert "--a_flag_of_its_own=1 is neither" in done.stderr
    job = json.loads(tiny.bucket.blob("launched/job.json").download_as_bytes())
    assert job["name"] == "nightly"
    [pool] = job["environment"]["workerPools"]
    assert [image["containerImage"] for image in pool["sdkHarnessContainerImages"]] == [IMAGE]


# Submitted, to a service that executes the graph itself.


class Service(BaseHTTPRequestHandler):
    """The three calls of Dataflow's API that a runner makes."""

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.executes:
            execute(read_graph(self.server.folder / "pipeline.pb"))
        self._reply({"id": "2026-11-23_job", "name": job["name"], "currentState": 2})

    def do_GET(self):
        if self.path.split("?")[0].endswith("messages"):
            self._reply({})
        else:
            self._reply({"id": "2026-11-23_job", "currentState": 3 if self.server.executes else 2})

    def _reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def submit(tiny, tmp_path):
    """A function that gives a job to the service."""
    server = HTTPServer(("localhost", 0), Service)
    server.folder = tmp_path
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(stage, *flags, executes):
        server.executes = executes
        argv = [
            *tiny.argv(stage, index_rows=16),
            *CLOUD,
            f"--dataflow_endpoint=http://localhost:{server.server_port}",
            f"--temp_location={tmp_path}",
            f"--staging_location={tmp_path}",
            f"--sdk_container_image={IMAGE}",
        ]
        return JOBS[stage].main([*argv, *flags])

    yield run
    server.shutdown()
    server.server_close()


def test_a_job_that_is_waited_for(tiny, submit, capfd):
    clear(tiny)
    assert submit("self_influence", executes=True) == 0
    said = capfd.readouterr().out
    assert "24 embedded" in said
    assert f"Written to {tiny.path('out')}/self_influence" in said
    tiny.pull()
    tiny.check(tables=["self_influence"])


def test_a_job_that_is_not_waited_for(tiny, submit, capfd):
    clear(tiny)
    assert submit("influence", "--no_wait_until_finish", executes=False) == 0
    assert "Submitted the job 2026-11-23_job" in capfd.readouterr().out
