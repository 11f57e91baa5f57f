"""How the jobs scale: wall time by workers, bytes that cross between workers, memory.

    python scaling.py workers [--model mlp resnet20] [--way …] [--repeats 3] [--keep FILE]
    python scaling.py shuffle
    python scaling.py memory

Times and memory are each of a process of its own, on random examples of the models in models.py:
what they hold changes neither.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pipeline import PipelineVisitor

from tracin_beam.jobs import launch, options, preflight
from tracin_beam.jobs.registry import JOBS

HERE = pathlib.Path(__file__).resolve().parent

TASK = """
import keras
import models
import tracin_beam

task = tracin_beam.Task(
    models.{model},
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    tracin_beam.{parser!r},
)
"""

FEATURES = {"mlp": ((784,), "float32"), "resnet20": ((32, 32, 3), "float32")}


def make(
    folder: pathlib.Path, model: str, train: int, shards: int, test: int = 0, ids: bool = False
) -> list[str]:
    """Writes a task, a checkpoint and shards.

    Returns:
      The flags of a job on them, but `--output`.
    """
    import tracin_beam
    from tracin_beam.inputs.task import load_task

    rng = np.random.default_rng(0)
    shape, dtype = FEATURES[model]
    for name, count, pieces in (("train", train, shards), ("test", test, 2)):
        if count:
            data = {
                "features": rng.random((count, *shape), dtype=dtype),
                "label": rng.integers(0, 10, count),
            }
            if ids:
                data["id"] = [f"{name}-{i:09d}" for i in range(count)]
            pattern = str(folder / f"{name}-*.tfrecord")
            parser = tracin_beam.write_shards(data, pattern, shards=pieces)
    # Beside the task, so that it reaches the workers with it.
    shutil.copy(HERE / "models.py", folder)
    (folder / "job.py").write_text(TASK.format(model=model, parser=parser))
    weights = folder / "checkpoint-1.weights.h5"
    load_task(f"{folder}/job.py:task")[0].model().save_weights(weights)
    flags = [f"--task={folder}/job.py:task", f"--checkpoints={weights}", "--learning_rate=0.1"]
    flags += [f"--train={folder}/train-*.tfrecord"]
    return flags + [f"--test={folder}/test-*.tfrecord"] * (test > 0)


# What crosses between workers.


class CountBytes(beam.DoFn):
    """Counts the elements that pass and their encoded bytes, under a name."""

    def __init__(self, name: str, coder: Any) -> None:
        self._coder = coder
        self._bytes = Metrics.counter("crossing bytes", name)
        self._elements = Metrics.counter("crossing elements", name)

    def process(self, element: Any) -> Iterator[Any]:
        self._bytes.inc(len(self._coder.encode(element)))
        self._elements.inc()
        return iter(())


def crossing(stage: str, run: preflight.Run) -> dict[str, tuple[int, int]]:
    """Runs a job and counts what its graph lets cross between workers.

    That is the input of each GroupByKey, of which Reshuffle, CoGroupByKey and CombinePerKey are
    made (of the last before any combining on the sender's side), and each side input.

    Returns:
      (elements, bytes) of each, by the name of the transform.
    """
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    JOBS[stage].parts.graph(pipeline, run)
    watched: dict[str, beam.PCollection] = {}

    class Visitor(PipelineVisitor):
        def visit_transform(self, node: Any) -> None:
            if isinstance(node.transform, beam.GroupByKey):
                watched[node.full_label.removesuffix("/GroupByKey")] = node.inputs[0]
            for i, side in enumerate(node.side_inputs):
                watched[f"{node.full_label} (side input {i})"] = side.pvalue

        enter_composite_transform = visit_transform

    pipeline.visit(Visitor())
    for i, (name, collection) in enumerate(watched.items()):
        coder = beam.coders.registry.get_coder(collection.element_type)
        _ = collection | f"Count{i}" >> beam.ParDo(CountBytes(name, coder))
    result = pipeline.run()
    result.wait_until_finish()

    def counted(what: str) -> dict[str, int]:
        found = result.metrics().query(MetricsFilter().with_namespace(f"crossing {what}"))
        return {c.key.metric.name: c.committed for c in found["counters"]}

    elements, sizes = counted("elements"), counted("bytes")
    return {name: (elements.get(name, 0), sizes.get(name, 0)) for name in watched}


def graph_bytes(stage: str, run: preflight.Run) -> int:
    """Size of a job's graph as it is submitted."""
    pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
    JOBS[stage].parts.graph(pipeline, run)
    return len(pipeline.to_runner_api().SerializeToString())


def prepared(flags: Sequence[str], stage: str) -> preflight.Run:
    config, _ = options.parse(flags, JOBS[stage])
    with preflight.prepared(config, JOBS[stage]) as run:
        return dataclasses.replace(run, lease=None)


def shuffle(arguments: argparse.Namespace) -> None:
    from tracin_beam.stages import joining

    # As for a large training set, where the candidates alone are scored exactly.
    joining.ALL_PAIRS = 0
    train, test = 8192, 64
    details = []
    print("| ids | dim | job | elements | bytes | by training example | by query |")
    print("|---|---|---|---|---|---|---|")
    for ids, dim in ((False, 1024), (True, 64), (True, 1024)):
        with tempfile.TemporaryDirectory() as name:
            flags = make(pathlib.Path(name), "mlp", train, 16, test, ids)
            flags += [f"--dim={dim}", f"--output={name}/out", "--index_rows=2048"]
            for stage in ("embed", "self_influence", "influence"):
                run = prepared(flags, stage)
                found = crossing(stage, run)
                elements, size = map(sum, zip(*found.values(), strict=True))
                print(
                    f"| {'given' if ids else 'none'} | {dim} | {stage} | {elements:,} | {size:,} "
                    f"| {size / train:,.1f} | {size / test:,.0f} |",
                    flush=True,
                )
            details = [(size, label) for label, (_, size) in found.items()]
            graph = graph_bytes("self_influence", prepared(flags, "self_influence"))
    print("\n| influence: what crosses | bytes | by training example | by query |")
    print("|---|---|---|---|")
    for size, label in sorted(details, reverse=True)[:14]:
        print(f"| {label} | {size:,} | {size / train:,.1f} | {size / test:,.0f} |")
    with tempfile.TemporaryDirectory() as name:
        flags = make(pathlib.Path(name), "mlp", train, 64, test, True) + [f"--output={name}/out"]
        more = graph_bytes("self_influence", prepared(flags, "self_influence"))
    print(f"\nThe graph grows by {(more - graph) / 48:.0f} bytes for a shard × checkpoint.")


# Wall time by workers.

# Name, Beam's mode, workers, cores.
WAYS = (
    ("1 thread on 1 core", "multi_threading", 1, 1),
    ("1 thread on 2 cores", "multi_threading", 1, 2),
    ("2 threads on 2 cores", "multi_threading", 2, 2),
    ("1 process on 1 core", "multi_processing", 1, 1),
    ("2 processes on 2 cores", "multi_processing", 2, 2),
)
FLINK = (
    ("1 Flink task manager on 1 core", "flink_cluster", 1, 1),
    ("2 Flink task managers on 2 cores", "flink_cluster", 2, 2),
)
# Whole batches in each shard: the last of a shard costs as much when it is not full.
SIZES = {"mlp": (20_480, 81_920), "resnet20": (512, 1_536)}
SHARDS = {"mlp": 8, "resnet20": 2}


@contextlib.contextmanager
def runner(mode: str, count: int, cores: int) -> Iterator[list[str]]:
    """The flags of a runner with so many workers, started if need be."""
    if mode != "flink_cluster":
        yield [
            "--runner=FnApiRunner",
            f"--direct_running_mode={mode}",
            f"--direct_num_workers={count}",
        ]
        return
    sys.path.append(str(HERE.parent / "deploy" / "engines"))
    import engines

    everything = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, sorted(everything)[:cores])
        try:
            with engines.running(mode, pathlib.Path(folder), count) as engine:
                yield engine.flags
        finally:
            os.sched_setaffinity(0, everything)


def workers(arguments: argparse.Namespace) -> None:
    taken: dict[tuple[str, str, int], list[float]] = collections.defaultdict(list)
    if arguments.keep and arguments.keep.exists():
        for line in arguments.keep.read_text().splitlines():
            model, way, examples, seconds = json.loads(line)
            taken[model, way, examples].append(seconds)
    with tempfile.TemporaryDirectory() as name:
        made = {}
        for model in arguments.model:
            for examples in SIZES[model]:
                folder = pathlib.Path(name, f"{model}-{examples}")
                folder.mkdir()
                made[model, examples] = make(folder, model, examples, SHARDS[model])
        for _ in range(arguments.repeats):
            for way, mode, count, cores in WAYS + FLINK:
                if way not in arguments.way:
                    continue
                with runner(mode, count, cores) as runner_flags:
                    for (model, examples), flags in made.items():
                        output = f"{name}/out"
                        given = [*flags, f"--output={output}", *runner_flags]
                        seconds = child("embed", cores, given)["seconds"]
                        shutil.rmtree(output)
                        taken[model, way, examples].append(seconds)
                        if arguments.keep:
                            with arguments.keep.open("a") as file:
                                file.write(json.dumps([model, way, examples, seconds]) + "\n")
    print("| model | workers | repeats | seconds for | | examples/s | by core | start |")
    print("|---|---|---|---|---|---|---|---|")
    for model in SIZES:
        few, many = SIZES[model]
        for way, _, _, cores in WAYS + FLINK:
            if taken[model, way, few]:
                short = statistics.median(taken[model, way, few])
                long = statistics.median(taken[model, way, many])
                rate = (many - few) / (long - short)
                print(
                    f"| {model} | {way} | {len(taken[model, way, few])} | {few:,}: {short:.2f} "
                    f"| {many:,}: {long:.2f} | {rate:,.0f} | {rate / cores:,.0f} "
                    f"| {short - few / rate:.1f} s |"
                )


# Memory.


def memory(arguments: argparse.Namespace) -> None:
    print("| job | examples of a shard, or rows of a partition | peak MB | over the empty job |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        empty = None
        for size in (64, 2_000, 20_000, 80_000):
            folder = pathlib.Path(name, str(size))
            folder.mkdir()
            flags = [*make(folder, "mlp", size, 1), f"--output={folder}/out"]
            flags += ["--runner=FnApiRunner", "--direct_num_workers=1"]
            for job in ("embed", "self_influence"):
                peak = child(job, 2, flags)["peak"]
                empty = empty or peak
                print(f"| {job} | {size:,} | {peak / 1e6:,.0f} | {(peak - empty) / 1e6:,.0f} |")
        rows = 60_000
        folder = pathlib.Path(name, "index")
        folder.mkdir()
        flags = [*make(folder, "mlp", rows, 30, 64), f"--output={folder}/out"]
        child("embed", 2, flags)
        empty = child("embed", 2, flags)["peak"]
        for index_rows in (2_000, 10_000, 20_000, 60_000):
            for job in ("build", "search"):
                peak = child(job, 2, [*flags, f"--index_rows={index_rows}"])["peak"]
                over = peak - empty
                matrix = index_rows * 1024 * 4
                print(
                    f"| {job} a partition | {index_rows:,} | {peak / 1e6:,.0f} | {over / 1e6:,.0f} "
                    f"({over / matrix:.1f} × its {matrix / 1e6:,.0f} MB of vectors) |",
                    flush=True,
                )


def child(job: str, cores: int, flags: Iterable[str]) -> dict[str, float]:
    """Runs `measure` in a process of its own."""
    command = [sys.executable, __file__, "measure", job, str(cores), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(job: str, cores: int, flags: Sequence[str]) -> dict[str, float]:
    """Seconds that a job takes after its checks, and this process's peak memory in bytes."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    _, beam_options = options.parse(flags, JOBS["embed"])
    run = prepared(flags, "influence" if job in ("build", "search") else job)
    start = time.perf_counter()
    if job in ("build", "search"):
        one_partition(job, run)
    else:
        launch.execute(JOBS[job], run, beam_options)
    seconds = time.perf_counter() - start
    # Not getrusage's, which counts in what the parent held when it started this process.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return {"seconds": seconds, "peak": peak}


def one_partition(job: str, run: preflight.Run) -> None:
    """Builds the first partition of the index, or searches in it for all test examples."""
    from tracin_beam.scoring import methods
    from tracin_beam.stages import embed, index, joining, search
    from tracin_beam.stages.joining import Join
    from tracin_beam.stages.metrics import Tally
    from tracin_beam.storage import runs

    results = []
    for unit in run.units:
        found = runs.read_unit(run.output, unit)
        if found is None:
            found = embed.embed_unit(run.output, run.source, unit, 0.0, Tally())
        results.append(runs.merge_results([found]))
    train = [r for r in results if r.set_name == runs.TRAIN]
    tests = [r for r in results if r.set_name != runs.TRAIN]
    config = run.config
    engine = run.source.get().engine
    join = Join(
        run.output,
        run.train,
        run.test,
        "test",
        "loss",
        run.checkpoints,
        run.source,
        run.shard_fingerprints,
        methods.DEFAULT,
        engine.dim * len(run.checkpoints),
        engine.batch_size,
    )
    groups = index.plan(train, join.units, config.index_rows, {})
    piece = index.pieces(groups[0], config.index_rows)[0]
    if job == "build":
        index.build(join, piece)
        return
    census = joining.take_census(join, groups, train, tests, 0)
    for _ in search.by_index(join, census, piece, config.rescore):
        pass


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        _, _, job, cores, *flags = sys.argv
        print(json.dumps(measure(job, int(cores), flags)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["workers", "shuffle", "memory"])
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--way",
        nargs="+",
        default=[name for name, *_ in WAYS],
        choices=[name for name, *_ in WAYS + FLINK],
        help="By default all but Flink.",
    )
    parser.add_argument(
        "--keep", type=pathlib.Path, help="Adds to the times in this file; medians are of all."
    )
    arguments = parser.parse_args()
    {"workers": workers, "shuffle": shuffle, "memory": memory}[arguments.what](arguments)


if __name__ == "__main__":
    main()
