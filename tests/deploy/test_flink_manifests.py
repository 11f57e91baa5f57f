"""deploy/flink against the published schemas, the flags that exist and the other versions."""

import re
import zipfile

import pytest
import yaml
from apache_beam.utils.subprocess_server import JavaJarServer
from manifests import (
    DEPLOY,
    ROOT,
    check_flags,
    check_kubernetes,
    kustomize,
    launcher_argv,
    maven,
    only,
)

from tracin_beam import __version__
from tracin_beam.jobs.registry import JOBS

jsonschema = pytest.importorskip("jsonschema")

OPERATOR = "org.apache.flink:flink-kubernetes-operator-api:1.10.0"
DOCKERFILE = (DEPLOY / "flink" / "Dockerfile").read_text()
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE, re.M))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return kustomize("flink", tmp_path_factory.mktemp("kustomize"))


@pytest.fixture(scope="module")
def flink(documents):
    return only(documents, "FlinkDeployment")


def closed(schema):
    """The schema with all properties that it does not name forbidden, as kubectl checks it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        result["additionalProperties"] = False
    return result


@pytest.fixture(scope="module")
def crd_schema():
    name = "META-INF/fabric8/flinkdeployments.flink.apache.org-v1.yml"
    with zipfile.ZipFile(maven(OPERATOR)) as jar:
        crd = yaml.load(jar.read(name), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1beta1")
    schema = closed(version["schema"]["openAPIV3Schema"])
    # Every object has these; a CRD does not repeat them.
    schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    return schema


def test_kubernetes_accepts_the_manifests(documents):
    check_kubernetes(documents)


def test_the_operator_accepts_the_cluster(flink, crd_schema):
    errors = jsonschema.Draft7Validator(crd_schema).iter_errors(flink)
    assert [f"{list(e.absolute_path)}: {e.message[:200]}" for e in errors] == []


def test_the_operators_schema_finds_what_is_misspelt(flink, crd_schema):
    container = flink["spec"]["taskManager"]["podTemplate"]["spec"]["containers"][1]
    wrong = yaml.safe_load(yaml.safe_dump(flink).replace("tcpSocket", "tcpSockets"))
    assert "readinessProbe" in container
    assert not jsonschema.Draft7Validator(crd_schema).is_valid(wrong)


def test_flink_knows_its_configuration(flink):
    core = f"org.apache.flink:flink-core:{ARGUMENTS['FLINK_VERSION']}"
    with zipfile.ZipFile(maven(core)) as jar:
        folder = "org/apache/flink/configuration/"
        classes = b"".join(jar.read(n) for n in jar.namelist() if n.startswith(folder))
    unknown = [k for k in flink["spec"]["flinkConfiguration"] if k.encode() not in classes]
    assert unknown == []


def test_the_launchers_flags_fit_the_cluster(documents, flink, tmp_path):
    job, argv = launcher_argv(only(documents, "CronJob"))
    assert job in JOBS
    config_map = only(documents, "ConfigMap")
    for name, text in config_map["data"].items():
        (tmp_path / name).write_text(text)
    mounted = "/etc/tracin-beam/"
    argv = [flag.replace(f"--config={mounted}", f"--config={tmp_path}/") for flag in argv]
    config, beams = check_flags(argv)

    name, _, attribute = config.task.partition(":")
    assert name.removeprefix(mounted) in config_map["data"]
    assert attribute == "task"
    assert beams["runner"] == "FlinkRunner"
    assert beams["flink_submit_uber_jar"]
    # The operator calls the REST service so.
    assert beams["flink_master"] == f"http://{flink['metadata']['name']}-rest:8081"
    settings = flink["spec"]["flinkConfiguration"]
    assert beams["parallelism"] == int(settings["slotmanager.number-of-slots.max"])
    assert beams["parallelism"] % int(settings["taskmanager.numberOfTaskSlots"]) == 0

    delay = settings["restart-strategy.fixed-delay.delay"]
    assert int(beams["environment_cache_millis"]) < 1000 * int(delay.removesuffix(" s"))

    pod = flink["spec"]["taskManager"]["podTemplate"]["spec"]
    main, worker = pod["containers"]
    assert main["name"] == "flink-main-container"
    assert worker["args"] == ["--worker_pool"]
    (port,) = worker["ports"]
    assert beams["environment_type"] == "EXTERNAL"
    assert beams["environment_config"] == f"localhost:{port['containerPort']}"
    probes = [main["livenessProbe"], main["startupProbe"], worker["readinessProbe"]]
    assert {probe["tcpSocket"]["port"] for probe in probes} == {port["containerPort"]}

    launcher = only(documents, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    for container in (worker, launcher["containers"][0]):
        assert container["image"].endswith(f"/tracin-beam:{__version__}")
        folders = {mount["mountPath"] for mount in container["volumeMounts"]}
        for path in (*config.checkpoints, config.train, config.output):
            assert "/" + path.split("/")[1] in folders
    claim = {"claimName": only(documents, "PersistentVolumeClaim")["metadata"]["name"]}
    for volumes in (pod["volumes"], launcher["volumes"]):
        assert claim in [volume.get("persistentVolumeClaim") for volume in volumes]


def test_no_container_is_roots(documents, flink):
    launcher = only(documents, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert launcher["securityContext"]["runAsNonRoot"]
    assert flink["spec"]["podTemplate"]["spec"]["securityContext"]["runAsNonRoot"]
    (flinks,) = flink["spec"]["podTemplate"]["spec"]["containers"]
    worker = flink["spec"]["taskManager"]["podTemplate"]["spec"]["containers"][1]
    for container in (launcher["containers"][0], worker, flinks):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for container in (launcher["containers"][0], worker):
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
    users = [launcher, flink["spec"]["podTemplate"]["spec"]]
    assert re.findall(r"^USER (\d+)", DOCKERFILE, re.M) == [
        str(pod["securityContext"]["runAsUser"]) for pod in users
    ]


def test_versions_agree(flink, documents):
    setup = (ROOT / "setup.py").read_text()
    assert ARGUMENTS["BEAM_VERSION"] == re.search(r"tested with ([\d.]+)", setup)[1]
    images = re.findall(r"^FROM (\S+) AS (\w+)", DOCKERFILE, re.M)
    assert images == [
        ("apache/beam_python3.11_sdk:${BEAM_VERSION}", "worker"),
        ("flink:${FLINK_VERSION}-scala_2.12-java11", "flink"),
    ]
    assert flink["spec"]["image"].endswith(f"/tracin-beam-flink:{__version__}")

    minor = ARGUMENTS["FLINK_VERSION"].rpartition(".")[0]
    assert flink["spec"]["flinkVersion"] == "v" + minor.replace(".", "_")
    flags = yaml.safe_load(only(documents, "ConfigMap")["data"]["nightly.yaml"])
    assert flags["flink_version"] == minor
    engines = (DEPLOY / "engines" / "versions.env").read_text()
    assert re.search(r"^FLINK=([\d]+\.[\d]+)", engines, re.M)[1] == minor


def test_the_image_has_what_the_launcher_sends(documents):
    flags = yaml.safe_load(only(documents, "ConfigMap")["data"]["nightly.yaml"])
    folder = re.search(r"^WORKDIR (\S+)", DOCKERFILE, re.M)[1]
    assert f"'{flags['flink_job_server_jar'].removeprefix(folder + '/')}'" in DOCKERFILE
    target = re.search(r"path_to_beam_jar\('([^']+)'\)", DOCKERFILE)[1]
    minor, version = flags["flink_version"], ARGUMENTS["BEAM_VERSION"]
    url = JavaJarServer.path_to_beam_jar(
        target.replace("${FLINK_VERSION%.*}", minor), version=version
    )
    assert url.endswith(f"/beam-runners-flink-{minor}-job-server-{version}.jar")
    assert f"COPY --from=worker {flags['flink_job_server_jar']} " in DOCKERFILE
    for copied in re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE, re.M):
        assert all((ROOT / name).exists() for name in copied.split())
