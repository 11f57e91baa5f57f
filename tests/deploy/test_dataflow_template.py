"""deploy/dataflow: image, parameters, build and launch script."""

import argparse
import json
import os
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import apache_beam
import pytest
import yaml
from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam.jobs.options import TracInOptions
from tracin_beam.jobs.registry import JOBS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/dataflow"
METADATA = json.loads((FOLDER / "metadata.json").read_text())
PARAMETERS = {parameter["name"]: parameter for parameter in METADATA["parameters"]}


# Parameters.


def flags(*classes):
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for options in classes:
        options._add_argparse_args(parser)
    return {action.dest: action for action in parser._actions}


def test_the_parameters_are_up_to_date():
    made = runpy.run_path(str(FOLDER / "metadata.py"))["metadata"]()
    assert made == METADATA, "run python deploy/dataflow/metadata.py"


def test_each_flag_is_a_parameter_and_each_parameter_a_flag():
    ours = flags(TracInOptions)
    assert set(ours) <= set(PARAMETERS)
    beams = set(PARAMETERS) - set(ours) - {"stage", "config"}
    assert beams <= set(flags(*PipelineOptions.__subclasses__()))
    for name, action in ours.items():
        assert PARAMETERS[name]["helpText"].startswith(action.help.split("%")[0].split("(")[0])
    assert [name for name, p in PARAMETERS.items() if not p["isOptional"]] == ["stage"]


def test_the_stages_are_the_jobs():
    [regex] = PARAMETERS["stage"]["regexes"]
    found = re.findall(r"\w+", regex)
    assert set(found) == {job.name for job in JOBS.values() if job.on_beam}
    launchers = {path.stem for path in (ROOT / "pipelines").glob("[!_]*.py")}
    assert set(found) <= launchers


@pytest.mark.parametrize("name", sorted(flags(TracInOptions)))
def test_a_default_is_of_the_form_that_a_parameter_must_have(name):
    default = flags(TracInOptions)[name].default
    text = str(default).lower() if isinstance(default, bool) else str(default)
    for regex in PARAMETERS[name].get("regexes", []):
        assert default in (None, "", ()) or re.match(regex, text)


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("train", "gs://b/a-*,gs://b/c.tfrecord", True),
        ("train", "data/a-*", False),
        ("output", "gs://b/out", True),
        ("output", "gs://b/out*", False),
        ("task", "gs://b/tasks/my_task.py:task", True),
        ("task", "package.module:task", True),
        ("task", "my_task.py", False),
        ("dim", "auto", True),
        ("top_k", "ten", False),
        ("max_rejected", "1e-3", True),
        ("overwrite", "yes", False),
    ],
)
def test_the_forms(name, value, good):
    assert all(re.match(regex, value) for regex in PARAMETERS[name]["regexes"]) == good


def test_dataflow_knows_the_metadatas_fields():
    dataflow = pytest.importorskip("google.cloud.dataflow_v1beta3")
    found = dataflow.TemplateMetadata.from_json(json.dumps(METADATA), ignore_unknown_fields=False)
    assert len(found.parameters) == len(PARAMETERS)
    assert all(p.label and p.help_text for p in found.parameters)


# The image.


@pytest.fixture(scope="module")
def dockerfile():
    parse = pytest.importorskip("dockerfile_parse")
    with open(FOLDER / "Dockerfile", "rb") as file:
        parser = parse.DockerfileParser(fileobj=file)
        found = parser.structure
    return [step for step in found if step["instruction"] != "COMMENT"]


def values(dockerfile, instruction):
    return [step["value"] for step in dockerfile if step["instruction"] == instruction]


def arguments(dockerfile):
    """The ARGs' defaults, with what they refer to filled in."""
    found = {}
    for value in values(dockerfile, "ARG"):
        name, equals, default = value.partition("=")
        if equals:
            found[name] = re.sub(r"\$\{(\w+)\}", lambda m: found[m[1]], default)
    return found


def test_versions_are_those_of_setup_py(dockerfile):
    given = arguments(dockerfile)
    assert given["BEAM_VERSION"] == apache_beam.__version__
    setup = (ROOT / "setup.py").read_text()
    assert f"tested with {given['BEAM_VERSION']}" in setup
    assert f'python_requires=">={given["PYTHON_VERSION"]}' in setup
    python = given["PYTHON_VERSION"]
    assert given["SDK_IMAGE"] == f"apache/beam_python{python}_sdk:{apache_beam.__version__}"
    assert f"python{python.replace('.', '')}-template-launcher-base" in given["LAUNCHER_IMAGE"]


def test_what_is_copied_is_there_and_is_all_that_is_installed(dockerfile):
    copied = []
    for value in values(dockerfile, "COPY"):
        *sources, _ = [word for word in value.split() if not word.startswith("--")]
        if "--from=" not in value:
            copied += sources
    assert all((ROOT / source).exists() for source in copied)
    assert {"setup.py", "README.md", "tracin_beam"} <= set(copied)
    [install] = values(dockerfile, "RUN")
    assert '"/template[gcp]" "apache-beam[gcp]==${BEAM_VERSION}" "${TENSORFLOW}"' in install
    assert "pip check" in install


def test_it_is_launcher_and_worker(dockerfile):
    stages = values(dockerfile, "FROM")
    assert stages == ["${LAUNCHER_IMAGE} AS launcher", "${SDK_IMAGE}"]
    binary = "/opt/google/dataflow/python_template_launcher"
    assert f"--from=launcher {binary} {binary}" in values(dockerfile, "COPY")
    assert values(dockerfile, "ENTRYPOINT") == ['["/opt/apache/beam/boot"]']
    [environment] = values(dockerfile, "ENV")
    assert "FLEX_TEMPLATE_PYTHON_PY_FILE=/template/main.py" in environment
    assert "TRACIN_BEAM_IMAGE=${IMAGE}" in environment
    assert "deploy/dataflow/main.py main.py" in values(dockerfile, "COPY")


# The build.


def test_the_build():
    build = yaml.safe_load((FOLDER / "cloudbuild.yaml").read_text())
    steps = {step["id"]: step for step in build["steps"]}
    assert list(steps) == ["image", "push", "template"]
    assert "--file=deploy/dataflow/Dockerfile" in steps["image"]["args"]
    template = steps["template"]["args"]
    assert template[:3] == ["dataflow", "flex-template", "build"]
    [metadata] = [a.partition("=")[2] for a in template if a.startswith("--metadata-file=")]
    assert (ROOT / metadata) == FOLDER / "metadata.json"
    used = set(re.findall(r"\$\{(_\w+)\}", json.dumps(build["steps"])))
    assert used == set(build["substitutions"])
    given = [a.partition("=")[2] for a in steps["image"]["args"] if "--build-arg" in a]
    declared = re.findall(r"^ARG (\w+)", (FOLDER / "Dockerfile").read_text(), re.M)
    assert {argument.split("=")[0] for argument in given} <= set(declared)


# The launch script, with a gcloud that writes down what it was given.

GCLOUD = """#!{python}
import json, sys
given, flags = sys.argv[1:-1], sys.argv[-1].removeprefix("--flags-file=")
with open({log!r}, "w") as file:
    json.dump([given, json.load(open(flags))], file)
print("launched")
sys.exit({status})
"""


@pytest.fixture
def script(tmp_path):
    def run(*argv, status=0, gcloud=True, **env):
        log, path = tmp_path / "log.json", tmp_path / "bin"
        path.mkdir(exist_ok=True)
        if gcloud:
            text = GCLOUD.format(python=sys.executable, log=str(log), status=status)
            (path / "gcloud").write_text(text)
            (path / "gcloud").chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if k not in ("PROJECT", "BUCKET", "REGION")}
        done = subprocess.run(
            [sys.executable, FOLDER / "flex_template.py", *argv],
            env={**clean, "PATH": str(path), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done, json.loads(log.read_text()) if log.exists() else None

    return run


WHERE = {"PROJECT": "my-project", "BUCKET": "my-bucket", "REGION": "europe-west4"}
INPUT = [
    "--task=gs://my-bucket/my_task.py:task",
    "--checkpoints=gs://my-bucket/ckpts",
    "--train=gs://my-bucket/a b/train-*.tfrecord,gs://my-bucket/~more=1/*",
    "--output=gs://my-bucket/out",
]


def test_a_launch(script):
    more = ["--test", "gs://my-bucket/test-*", "--overwrite", "--top_k", "7"]
    done, (command, flags) = script("run", "influence", *INPUT, *more, **WHERE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched\n"
    assert command[:3] == ["dataflow", "flex-template", "run"]
    assert re.fullmatch(r"tracin-influence-\d{8}-\d{6}", command[3])
    assert flags.pop("--parameters") == {
        "stage": "influence",
        "task": "gs://my-bucket/my_task.py:task",
        "checkpoints": "gs://my-bucket/ckpts",
        "train": "gs://my-bucket/a b/train-*.tfrecord,gs://my-bucket/~more=1/*",
        "output": "gs://my-bucket/out",
        "test": "gs://my-bucket/test-*",
        "overwrite": "true",
        "top_k": "7",
    }
    assert flags == {
        "--project": "my-project",
        "--region": "europe-west4",
        "--template-file-gcs-location": "gs://my-bucket/templates/tracin-beam.json",
        "--temp-location": "gs://my-bucket/tmp",
        "--staging-location": "gs://my-bucket/staging",
        "--disable-public-ips": True,
        "--worker-machine-type": "n1-standard-4",
        "--launcher-machine-type": "n1-standard-2",
    }


def test_a_launch_with_workers_of_ones_own(script):
    accelerator = "worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver"
    done, (command, flags) = script(
        "run", "self_influence", *INPUT, "--project=other", "--job_name=nightly",
        "--machine_type=n1-highmem-8", "--max_num_workers=20", "--num_workers=2",
        "--service_account_email=w@p.iam", "--public_ips",
        f"--dataflow_service_options={accelerator}", "--number_of_worker_harness_threads=2",
        **WHERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert command[3] == "nightly"
    assert flags["--project"] == "other"
    assert flags["--worker-machine-type"] == "n1-highmem-8"
    assert (flags["--num-workers"], flags["--max-workers"]) == ("2", "20")
    assert flags["--service-account-email"] == "w@p.iam"
    assert flags["--disable-public-ips"] is False
    assert flags["--parameters"]["dataflow_service_options"] == accelerator
    assert flags["--parameters"]["number_of_worker_harness_threads"] == "2"


def test_several_training_runs(script, monkeypatch):
    runs = ["--checkpoints=gs://my-bucket/b", "--checkpoints", "gs://my-bucket/c"]
    done, (_, flags) = script("run", "embed", *INPUT, *runs, "--dim=8", "--dim=16", **WHERE)
    assert done.returncode == 0, done.stderr
    given = flags["--parameters"]
    assert given["checkpoints"] == "gs://my-bucket/ckpts;gs://my-bucket/b;gs://my-bucket/c"
    assert given["dim"] == "16"
    # The launcher's main takes them apart.
    found = []
    monkeypatch.setattr(JOBS["embed"].__class__, "main", lambda job, flags: found.extend(flags))
    launched = runpy.run_path(str(FOLDER / "main.py"))["main"]
    launched([f"--{name}={value}" for name, value in given.items()])
    one, *more = (flag for flag in found if flag.startswith("--checkpoints="))
    assert one == "--checkpoints=gs://my-bucket/ckpts"
    assert more == ["--checkpoints=gs://my-bucket/b", "--checkpoints=gs://my-bucket/c"]
    assert f"--train={given['train']}" in found


def test_a_config_file_may_have_the_input(script):
    done, (_, flags) = script("run", "influence", "--config=gs://my-bucket/run.yaml", **WHERE)
    assert done.returncode == 0, done.stderr
    expected = {"stage": "influence", "config": "gs://my-bucket/run.yaml"}
    assert flags["--parameters"] == expected


def test_the_template_is_built(script):
    image = "images.example/my-project/tracin/tracin-beam:1"
    done, (command, flags) = script("build", f"--image={image}", "--gpu", **WHERE)
    assert done.returncode == 0, done.stderr
    assert command == ["builds", "submit", str(ROOT)]
    assert flags == {
        "--project": "my-project",
        "--config": str(FOLDER / "cloudbuild.yaml"),
        "--substitutions": {
            "_IMAGE": image,
            "_TEMPLATE": "gs://my-bucket/templates/tracin-beam.json",
            "_TENSORFLOW": "tensorflow[and-cuda]",
        },
    }
    build = yaml.safe_load((FOLDER / "cloudbuild.yaml").read_text())
    assert set(flags["--substitutions"]) == set(build["substitutions"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "influence", *INPUT], "--test must be given, or a --config file"),
        (["run", "embed", *INPUT[1:]], "--task must be given"),
        (["run", "everything", *INPUT], "stage=everything is not of the form"),
        (["run", "embed", *INPUT, "--train=data/train-*"], "train=data/train-* is not of the form"),
        (["run", "embed", *INPUT, "--top=3"], "--top=3 is not a parameter"),
        (["run", "embed", *INPUT, "data/b"], "write globs and lists in quotes"),
        (["run", "embed", *INPUT, "--overwrite=yes"], "overwrite=yes is not of the form"),
        (["build"], "--image"),
        (["build", "--image=x", "--machine=y"], "unrecognized arguments: --machine=y"),
    ],
)
def test_what_is_missing_or_wrong_is_said_before_gcloud(script, argv, said):
    done, called = script(*argv, **WHERE)
    assert done.returncode == 2
    assert said in done.stderr
    assert called is None


@pytest.mark.parametrize("name", ["PROJECT", "BUCKET", "REGION"])
def test_where_is_missing(script, name):
    done, called = script("run", "embed", *INPUT, **{k: v for k, v in WHERE.items() if k != name})
    assert done.returncode == 2
    assert f"--{name.lower()}" in done.stderr
    assert called is None


def test_gclouds_status_is_the_scripts(script):
    done, _ = script("run", "embed", *INPUT, status=3, **WHERE)
    assert done.returncode == 3


def test_without_gcloud(script):
    done, _ = script("run", "embed", *INPUT, gcloud=False, **WHERE)
    assert done.returncode == 127
    assert "gcloud is not installed" in done.stderr


def test_the_script_can_be_run():
    assert (FOLDER / "flex_template.py").stat().st_mode & stat.S_IXUSR
