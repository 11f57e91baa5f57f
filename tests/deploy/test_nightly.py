"""deploy/nightly: each way to start the job, with the flags that exist, and what a rerun costs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from manifests import (
    CACHE,
    DEPLOY,
    check_flags,
    check_kubernetes,
    kustomize,
    launcher_argv,
    only,
    unavailable,
)
from tiny import Tiny, rows, snapshot

from tracin_beam.jobs.registry import JOBS

NIGHTLY = DEPLOY / "nightly"
AIRFLOW = ("apache-airflow-core==3.3.2", "apache-airflow-providers-standard==1.21.0")


def local(argv):
    """Flags with the configuration file of the checkout."""
    return [flag.replace("=/etc/tracin-beam/", f"={NIGHTLY}/") for flag in argv]


@pytest.fixture(scope="module")
def cronjob(tmp_path_factory):
    documents = kustomize("nightly", tmp_path_factory.mktemp("kustomize"))
    check_kubernetes(documents)
    return only(documents, "CronJob")


class TestCronJob:
    def test_its_flags_exist(self, cronjob):
        job, argv = launcher_argv(cronjob)
        assert job in JOBS
        config, _ = check_flags(local(argv))
        pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        mounts = {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert config.task.startswith("/etc/tracin-beam/")
        for path in (*config.checkpoints, config.train, config.output):
            assert "/" + path.split("/")[1] in mounts

    def test_it_neither_overlaps_nor_repeats_what_cannot_succeed(self, cronjob):
        spec = cronjob["spec"]
        job = spec["jobTemplate"]["spec"]
        assert spec["concurrencyPolicy"] == "Forbid"
        assert 0 < job["activeDeadlineSeconds"] < 24 * 3600
        assert 0 < spec["startingDeadlineSeconds"] <= 24 * 3600
        fails = job["podFailurePolicy"]["rules"][0]
        (container,) = job["template"]["spec"]["containers"]
        assert fails["onExitCodes"]["containerName"] == container["name"]
        assert fails["onExitCodes"]["values"] == [2, 3]  # bad input, and an error gate


def script(tmp_path, *flags, **environment):
    given = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "STATE": str(tmp_path / "state"),
        "CONFIG": str(NIGHTLY / "nightly.yaml"),
        "PYTHON": sys.executable,
        **environment,
    }
    return subprocess.run(
        [NIGHTLY / "nightly.sh", *flags],
        env=given,
        cwd=DEPLOY.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


class TestScript:
    def test_what_it_runs(self, tmp_path):
        stand_in = program(tmp_path / "python", 'printf "%s\\n" "$@"')
        done = script(tmp_path, "--dim=64", PYTHON=stand_in)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        (log,) = (tmp_path / "state" / "log").iterdir()
        _, *argv, _ = log.read_text().splitlines()
        assert argv[:4] == ["-m", "tracin_beam", "quality", "--config"]
        config, _ = check_flags([f"--config={argv[4]}", *argv[5:]])
        assert config.dim == 64

    def test_one_at_a_time(self, tmp_path):
        inner = f"PYTHON=true {NIGHTLY / 'nightly.sh'}; echo inner $?"
        done = script(tmp_path, PYTHON=program(tmp_path / "python", inner))
        assert done.returncode == 0
        (log,) = (tmp_path / "state" / "log").iterdir()
        assert "an earlier run is not over\ninner 75\n" in log.read_text()
        assert script(tmp_path, PYTHON="true").returncode == 0

    def test_a_failure_is_told(self, tmp_path):
        done = script(tmp_path, "--topk=3")
        assert done.returncode == 2
        assert "Did you mean --top_k?" in done.stderr

    def test_too_long_a_run_ends(self, tmp_path):
        stand_in = program(tmp_path / "python", "exec sleep 60")
        assert script(tmp_path, PYTHON=stand_in, LIMIT="0.1s").returncode == 124

    def test_a_night_costs_the_shards_that_came(self, tmp_path, launch):
        tiny = Tiny(tmp_path)
        flags = {
            "task": f"{tmp_path}/task.py:task",
            "checkpoints": f"{tmp_path}/ckpts",
            "train": f"{tmp_path}/train/*/train-*.tfrecord",
            "output": tiny.out,
        }

        def arrive(day):
            (tmp_path / "train" / day).mkdir(parents=True)
            tiny.write(f"train/{day}/train-0.tfrecord", rows(day, 8, 0))

        arrive("2026-11-21")
        arrive("2026-11-22")
        assert launch("quality", date="2026-11-22", **flags) == 0
        before = snapshot(tiny.out / "embeddings")
        arrive("2026-11-23")
        done = script(tmp_path, *(f"--{name}={value}" for name, value in flags.items()))
        assert done.returncode == 0, done.stderr
        after = snapshot(tiny.out / "embeddings")
        assert before.items() <= after.items()
        assert len(after) == len(before) * 3 // 2
        night = sorted((tiny.out / "quality").glob("20*"))[-1]
        ids = pq.read_table(night / "signals.parquet").column("id").to_pylist()
        assert len(set(ids)) == 24


def flags_of_crontab():
    lines = (NIGHTLY / "crontab").read_text().splitlines()
    (line,) = (line for line in lines if line and line[0] in "*0123456789")
    *schedule, command = line.split(maxsplit=5)
    return " ".join(schedule), command


def test_all_start_at_the_same_time(cronjob, dag):
    schedule, command = flags_of_crontab()
    assert (DEPLOY.parent / command.removeprefix("/opt/tracin-beam/")).stat().st_mode & 0o111
    assert schedule == cronjob["spec"]["schedule"] == dag["schedule"]
    default = re.search(r"SCHEDULE:-([^}]+)}", (NIGHTLY / "schedule.sh").read_text())[1]
    assert schedule == default


class TestScheduler:
    @pytest.fixture
    def launched(self, tmp_path):
        """A function that runs schedule.sh with a stand-in for gcloud: its calls and the body."""

        def run(exists):
            program(
                tmp_path / "bin" / "gcloud",
                f'printf "%s\\n" "$*" >> {tmp_path}/calls\n'
                f"[[ $* == *describe* ]] && exit {int(not exists)}\n"
                "for a; do [[ $a == --message-body-from-file=* ]] && "
                f"cp ${{a#*=}} {tmp_path}/body; done; exit 0",
            )
            environment = {"PROJECT": "my-project", "REGION": "europe-west4", "BUCKET": "my-bucket"}
            path = f"{tmp_path}/bin:{os.environ['PATH']}"
            subprocess.run(
                [NIGHTLY / "schedule.sh"],
                env={"PATH": path, **environment},
                check=True,
                timeout=60,
            )
            calls = (tmp_path / "calls").read_text().splitlines()
            (tmp_path / "calls").unlink()
            return calls, json.loads((tmp_path / "body").read_text())

        return run

    def test_the_job_is_made_or_changed(self, launched):
        (_, created), _ = launched(exists=False)
        (_, updated), _ = launched(exists=True)
        assert created.startswith("scheduler jobs create http tracin-beam-nightly --project=my-pro")
        assert updated.startswith("scheduler jobs update http tracin-beam-nightly --project=my-pro")
        uri = "https://dataflow.googleapis.com/v1b3/projects/my-project/locations/europe-west4"
        for call in (created, updated):
            assert f"--uri={uri}/flexTemplates:launch " in call
            assert "--schedule=15 2 * * *" in call
            assert "--oauth-token-scope=https://www.googleapis.com/auth/cloud-platform " in call
            assert "--oauth-service-account-email=tracin-beam-scheduler@my-project.iam." in call

    def test_the_body_is_a_launch_of_the_template(self, launched):
        _, body = launched(exists=False)
        text = json.dumps(body)
        assert "BUCKET" not in text
        assert "PROJECT" not in text
        assert body.keys() == {"launchParameter"}
        given = body["launchParameter"]
        parameters = given["parameters"]
        assert all(isinstance(value, str) for value in parameters.values())
        stage, *flags = (f"--{name}={value}" for name, value in parameters.items())
        assert stage.removeprefix("--stage=") in JOBS
        check_flags(flags)

    def test_the_template_takes_the_parameters(self, launched):
        _, body = launched(exists=False)
        parameters = body["launchParameter"]["parameters"]
        metadata = json.loads((DEPLOY / "dataflow" / "metadata.json").read_text())
        declared = {p["name"]: p for p in metadata["parameters"]}
        assert {name for name, p in declared.items() if not p["isOptional"]} <= parameters.keys()
        assert parameters.keys() <= declared.keys()
        for name, value in parameters.items():
            for regex in declared[name].get("regexes", []):
                assert re.fullmatch(regex, value), name

    def test_dataflow_knows_the_request(self, launched):
        dataflow = pytest.importorskip("google.cloud.dataflow_v1beta3")
        _, body = launched(exists=False)
        request = dataflow.LaunchFlexTemplateRequest.from_json(json.dumps(body))
        assert request.launch_parameter.job_name == "tracin-beam-nightly"
        assert request.launch_parameter.environment.max_workers > 0


@pytest.fixture(scope="module")
def airflow():
    """The Python of a virtual environment with Airflow, which does not go with ours; kept."""
    folder = CACHE / "-".join(["airflow", *(name.split("==")[1] for name in AIRFLOW)])
    done = folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = subprocess.run([*pip, *AIRFLOW], capture_output=True, text=True, timeout=900)
        if made.returncode:
            unavailable(f"Airflow cannot be installed: {made.stderr[-500:]}")
        done.touch()
    return folder / "bin" / "python"


IMPORT = """
import json, sys
from airflow.dag_processing.dagbag import DagBag

def how(task, status):
    command, task.bash_command = task.bash_command, f"exit {status}"
    try:
        task.execute({"ti": None})
    except Exception as error:
        return type(error).__name__
    finally:
        task.bash_command = command

bag = DagBag(sys.argv[1])
found = {
    "errors": bag.import_errors,
    "dags": [
        {
            "id": dag.dag_id,
            "schedule": dag.schedule,
            "catchup": dag.catchup,
            "max_active_runs": dag.max_active_runs,
            "tasks": [
                {
                    "type": task.task_type,
                    "retries": task.retries,
                    "command": task.bash_command,
                    "ends": {status: how(task, status) for status in range(4)},
                }
                for task in dag.tasks
            ],
        }
        for dag in bag.dags.values()
    ],
}
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def dag(airflow, tmp_path_factory):
    """The only DAG, as Airflow imports it."""
    folder = tmp_path_factory.mktemp("airflow")
    (folder / "dags").mkdir()
    shutil.copy(NIGHTLY / "airflow_dag.py", folder / "dags")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "AIRFLOW_HOME": str(folder / "home"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    }
    done = subprocess.run(
        [airflow, "-c", IMPORT, folder / "dags"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == {}
    (dag,) = found["dags"]
    return dag


class TestAirflow:
    def test_the_dag(self, dag):
        assert dag["id"] == "tracin_beam_nightly"
        assert dag["catchup"] is False
        assert dag["max_active_runs"] == 1

    def test_what_it_runs(self, dag):
        (task,) = dag["tasks"]
        assert task["type"] == "Job"
        assert task["retries"] == 2
        assert task["ends"] == {
            "0": None,
            "1": "AirflowException",  # which is tried again
            "2": "AirflowFailException",
            "3": "AirflowFailException",
        }
        _, option, module, job, *argv = task["command"].split()
        assert (option, module) == ("-m", "tracin_beam")
        assert job in JOBS
        check_flags(local(argv))


def test_all_run_the_same_job(cronjob, dag):
    job, _ = launcher_argv(cronjob)
    script_text = (NIGHTLY / "nightly.sh").read_text()
    assert f"JOB=${{JOB:-{job}}}" in script_text
    assert f" -m tracin_beam {job} " in dag["tasks"][0]["command"]
    body = json.loads((NIGHTLY / "flex_template_launch.json").read_text())
    assert body["launchParameter"]["parameters"]["stage"] == job
    assert yaml.safe_load((NIGHTLY / "nightly.yaml").read_text()).keys() >= {"task", "output"}
