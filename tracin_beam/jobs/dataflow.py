"""What Dataflow needs to be told, and what is better said before its workers start."""

import importlib.util
import re

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    TestOptions,
    WorkerOptions,
)

from tracin_beam.config import Config
from tracin_beam.errors import InputError
from tracin_beam.storage import files, patterns

MACHINE_TYPE = "n1-standard-4"
_CONTAINERS = ("use_multiple_sdk_containers", "no_use_multiple_sdk_containers")


def is_chosen(options: PipelineOptions) -> bool:
    """Whether the pipeline is to run on Dataflow."""
    runner = (options.view_as(StandardOptions).runner or "").rpartition(".")[2].lower()
    return runner.removesuffix("runner") in ("dataflow", "testdataflow")


def set_defaults(options: PipelineOptions) -> None:
    """Sets what suits TensorFlow on Dataflow's workers, where nothing else was chosen.

    One process for each worker, as each process holds the model, all checkpoints and, of a GPU,
    all memory; in it a thread for each core, as each holds a batch and its gradients. Without
    this Dataflow starts a process for each core, of twelve threads each.
    """
    debug, worker = options.view_as(DebugOptions), options.view_as(WorkerOptions)
    if not any(debug.lookup_experiment(name) for name in _CONTAINERS):
        debug.add_experiment("no_use_multiple_sdk_containers")
    if not worker.machine_type and not _chooses_machines(options):
        worker.machine_type = MACHINE_TYPE
    if not debug.number_of_worker_harness_threads:
        debug.number_of_worker_harness_threads = _cores(worker.machine_type or MACHINE_TYPE)


def _chooses_machines(options: PipelineOptions) -> bool:
    """Dataflow Prime takes machines by the resource hints, and refuses a machine type."""
    service = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    return "enable_prime" in service or bool(
        options.view_as(DebugOptions).lookup_experiment("enable_prime")
    )


def _cores(machine_type: str) -> int:
    """n1-standard-4 → 4; e2-custom-8-16384 → 8; 2 where the name does not say."""
    found = re.search(r"custom-(\d+)-|-(\d+)(?:-lssd)?$", machine_type)
    return int(found[1] or found[2]) if found else 2


def check(config: Config, options: PipelineOptions) -> None:
    """Looks for what would fail only on the workers, minutes later.

    Raises:
      InputError: a path that they cannot read, or a package that they or this machine lack.
    """
    try:
        installed = importlib.util.find_spec("google.cloud.dataflow") is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        raise InputError(
            "--runner=DataflowRunner needs Google's packages: pip install 'tracin-beam[gcp]', or "
            "'.[gcp]' in a checkout."
        )
    for name in ("checkpoints", "train", "test", "output"):
        given = getattr(config, name) or ()
        every = (given,) if isinstance(given, str) else given
        for path in [path for one in every for path in patterns.split(one)]:
            if files.is_local(path):
                raise InputError(
                    f"--{name}={path} is on this machine, where Dataflow's workers cannot "
                    "reach it: copy it to a bucket and give its gs:// path."
                )
    setup, worker = options.view_as(SetupOptions), options.view_as(WorkerOptions)
    brought = (setup.setup_file, setup.requirements_file, setup.extra_packages)
    if not (any(brought) or worker.sdk_container_image):
        raise InputError(
            "Dataflow's workers do not have this package: give --sdk_container_image, an image "
            "that has it (deploy/dataflow/README.md), or --setup_file=./setup.py, which installs "
            "it on each of them."
        )
    if options.view_as(TestOptions).dry_run and config.overwrite:
        raise InputError("--dry_run with --overwrite would remove results: give one of them.")


def only_written(options: PipelineOptions) -> str | None:
    """What is made instead of a job with --dry_run or --template_location; None without them."""
    if not is_chosen(options):
        return None
    if options.view_as(TestOptions).dry_run:
        return "The job is valid. Nothing was submitted, because of --dry_run."
    template = options.view_as(GoogleCloudOptions).template_location
    return f"The job's template was written to {template}" if template else None
