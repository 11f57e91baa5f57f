"""The jobs: flags → checks → one Beam graph → result.

All that can be wrong with the input is looked for before the graph is made: the task is imported,
the checkpoints loaded, and some records go through the whole computation once.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam import files, options, runs
from tracin_beam._version import __version__
from tracin_beam.checkpoints import read_checkpoints
from tracin_beam.errors import InputError, reason
from tracin_beam.options import Config
from tracin_beam.runs import TRAIN, CheckpointFile, Output, Shard, ShardResult, Unit
from tracin_beam.task import Task, load_task

_log = logging.getLogger(__name__)

# Records that are tried together before a run, and how many of each set at most, should they all
# be unusable.
_PILOT = 64
_MOST_TRIED = 1024


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked configuration and what follows from it.

    Attributes:
      config: the flags.
      output: the output directory.
      checkpoints: in training order.
      train, test: shards; no test shards where the job needs none.
      units: what is to be embedded.
      source: the engine.
      explicit_ids: whether the task gives ids.
      fingerprint: of task and projection, by what a user calls its parts.
      started: seconds since the epoch.
    """

    config: Config
    output: Output
    checkpoints: tuple[CheckpointFile, ...]
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    units: tuple[Unit, ...]
    source: Any
    explicit_ids: bool
    fingerprint: dict[str, str]
    started: float

    @property
    def shard_fingerprints(self) -> dict[str, str]:
        """By path of a shard: what its embeddings and their scores depend on."""
        rates = [c.learning_rate for c in self.checkpoints]
        by_shard: dict[str, list[str]] = {}
        for unit in self.units:
            by_shard.setdefault(unit.shard.path, []).append(unit.fingerprint)
        return {path: runs.digest([marks, rates]) for path, marks in by_shard.items()}


def prepare(config: Config, *, with_test: bool) -> Run:
    """Checks a configuration against what it names.

    Raises:
      InputError: anything that the run would trip over.
    """
    started = time.time()
    output = Output(config.output)
    checkpoints = tuple(
        CheckpointFile(c.path, c.step, c.epoch, c.learning_rate, files.checksum(c.path))
        for c in read_checkpoints(config.checkpoints, config.learning_rate)
    )
    earlier = runs.read_run(output)
    sets = earlier.get("sets", {})
    train = _shards(config.train, TRAIN, "train", sets)
    test = _shards(config.test, config.test_name, "test", sets) if with_test and config.test else ()
    both = {files.absolute(s.path) for s in train} & {files.absolute(s.path) for s in test}
    if both:
        raise InputError(f"--train and --test both name {sorted(both)[0]}")

    source, fingerprint, explicit_ids = _try_out(config, checkpoints, train, test)
    changed = stale = runs.changes(earlier.get("fingerprint", fingerprint), fingerprint)
    target = sets.get(config.test_name, {}).get("target", config.target)
    if test and target != config.target:
        changed = [
            *stale,
            f"target of the test set {config.test_name!r} ({target} → {config.target}; "
            "another --test_name keeps both)",
        ]
    if changed and not config.overwrite:
        raise InputError(
            f"{config.output} holds results of another run; what changed: {', '.join(changed)}. "
            "Choose another --output, or --overwrite the results that are there."
        )
    if stale:
        runs.clear(output)
        earlier, sets = {}, {}
    sides = ((TRAIN, train, "loss"), (config.test_name, test, config.target))
    units = tuple(
        Unit(
            name,
            shard,
            checkpoint,
            target,
            runs.digest(
                [fingerprint, target, shard.path, shard.name, shard.identity, checkpoint.identity]
            ),
        )
        for name, shards, target in sides
        for shard, checkpoint in itertools.product(shards, checkpoints)
    )
    run = Run(
        config,
        output,
        checkpoints,
        train,
        test,
        units,
        source,
        explicit_ids,
        fingerprint,
        started,
    )
    described: dict[str, Any] = {TRAIN: {"shards": {s.path: s.name for s in train}}}
    if test:
        described[config.test_name] = {
            "shards": {s.path: s.name for s in test},
            "target": config.target,
        }
    gone = [
        output.rejected(name, Shard(path, shard, ""))
        for name in described
        for path, shard in sets.get(name, {}).get("shards", {}).items()
        if path not in described[name]["shards"]
    ]
    try:
        files.remove(gone)
        _write_run(run, earlier, {"sets": {**sets, **described}})
    except OSError as error:
        raise InputError(f"--output={config.output} cannot be written to: {error}") from error
    return run


def _shards(
    pattern: str | None, set_name: str, flag: str, sets: dict[str, Any]
) -> tuple[Shard, ...]:
    known = sets.get(set_name, {}).get("shards", {})
    return tuple(runs.find_shards(pattern or "", flag, known))


def _try_out(
    config: Config,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
) -> tuple[Any, dict[str, str], bool]:
    """Loads everything once and runs some records through it."""
    task, task_source = load_task(config.task)

    from tracin_beam import fingerprints, workers
    from tracin_beam.gradients import projections
    from tracin_beam.gradients.engine import EngineConfig, Parser

    if config.projection not in projections.names():
        raise InputError(
            f"--projection={config.projection} is not known; "
            f"take one of {', '.join(projections.names())}."
        )
    parser = Parser(task)
    engine_config = EngineConfig(
        config.layers, config.projection, config.dim, config.seed, config.batch_size, config.norms
    )
    sample, loaded = _load(task, parser, engine_config, train)
    # Only now, as building the model may have imported more of the user's modules.
    source = workers.EngineSource(task_source(), engine_config, sample)
    workers.adopt(source, loaded)
    for checkpoint in checkpoints:
        usable = _try(loaded, checkpoint, "loss", "train", train)
        if test:
            _try(loaded, checkpoint, config.target, "test", test)
    batch = parser([record.data for record in usable])
    try:
        loaded.engine.verify(loaded.engine.values(checkpoints[-1].path), batch)
    except InputError as error:
        _log.warning("%s. Each example will be computed by itself, which is slower.", error)
        source = dataclasses.replace(source, config=dataclasses.replace(engine_config, rules=False))
        loaded = workers.load(task, parser, source.config, sample)
        workers.adopt(source, loaded)
        loaded.engine.verify(loaded.engine.values(checkpoints[-1].path), batch)
    return source, fingerprints.of_task(task, loaded.engine), parser.gives_ids


def _load(task: Task, parser: Any, engine_config: Any, train: Sequence[Shard]) -> tuple[bytes, Any]:
    """The engine, built for the first record that parses and that the model takes."""
    from tracin_beam import records, workers

    tried, failures, first = 0, 0, ""
    every = (record for shard in train for record in records.read_records(shard.path))
    for record in itertools.islice(every, _MOST_TRIED):
        tried += 1
        try:
            if isinstance(record, records.BadRecord):
                raise ValueError(record.reason)
            parser([record.data])
        except Exception as error:  # whatever the user's parse raises
            first = first or reason(error)
            continue
        try:
            return record.data, workers.load(task, parser, engine_config, record.data)
        except InputError:
            raise
        except Exception as error:  # whatever the user's model raises
            failures += 1
            if failures == 3:
                raise InputError(f"the model fails on what parse gives: {reason(error)}") from error
    if not tried:
        raise InputError(f"--train: {train[0].path} and all other shards are empty")
    raise InputError(
        f"--train: none of the first {tried} records can be parsed. "
        f"The first of {train[0].path}: {first}"
    )


def _try(
    loaded: Any, checkpoint: CheckpointFile, target: str, flag: str, shards: Sequence[Shard]
) -> list[Any]:
    """Some of the first records that can be used at a checkpoint; an InputError if none can."""
    from tracin_beam import embed, records

    tried, first = 0, ""
    for shard in shards:
        found = records.read_records(shard.path)
        while tried < _MOST_TRIED and (some := list(itertools.islice(found, _PILOT))):
            tried += len(some)
            for rows, rejected in embed.embed_records(loaded, checkpoint, target, shard.name, some):
                if rows is not None:
                    usable = set(rows.position.tolist())
                    return [record for record in some if record.position in usable]
                position, why = rejected[0]
                first = first or f"The first is record {position} of {shard.path}: {why}"
    if not tried:
        raise InputError(f"--{flag}: {shards[0].path} and all other shards are empty")
    raise InputError(f"--{flag}: none of the first {tried} records can be used. {first}")


def _write_run(run: Run, earlier: dict[str, Any], news: dict[str, Any]) -> None:
    config = dataclasses.asdict(run.config)
    described = {
        "method": "TracInCP",
        "config": config,
        "versions": _versions(),
        "fingerprint": run.fingerprint,
        "checkpoints": [
            {"path": c.path, "step": c.step, "epoch": c.epoch, "learning_rate": c.learning_rate}
            for c in run.checkpoints
        ],
    }
    files.write_json(run.output.run, {**earlier, **described, **news})


def _versions() -> dict[str, str]:
    import keras
    import tensorflow as tf

    return {
        "tracin_beam": __version__,
        "apache_beam": beam.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }


def embed_stage(pipeline: beam.Pipeline, run: Run) -> beam.PCollection:
    """All ShardResults of a run, of both sets."""
    from tracin_beam.embed import Embed

    return pipeline | "Embed" >> Embed(
        run.output, run.source, run.units, run.explicit_ids, run.config.max_rejected
    )


def _of_set(results: beam.PCollection, name: str, label: str) -> beam.PCollection:
    return results | label >> beam.Filter(lambda r, name=name: r.set_name == name)


def embed_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.embed`."""
    results = embed_stage(pipeline, run)
    _finish(pipeline, run, results, None, None, "embed")


def self_influence_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.self_influence`."""
    from tracin_beam.self_influence import SelfInfluence

    results = embed_stage(pipeline, run)
    paths = results | "SelfInfluence" >> SelfInfluence(
        run.output, run.checkpoints, [shard.path for shard in run.train]
    )
    _finish(pipeline, run, results, paths, None, "self_influence")


def influence_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.influence`."""
    from tracin_beam import index
    from tracin_beam.evaluate import Quality
    from tracin_beam.influence import Influence, Sets

    config = run.config
    results = embed_stage(pipeline, run)
    train = _of_set(results, TRAIN, "TrainResults")
    tests = _of_set(results, config.test_name, "TestResults")
    partitions = train | "Index" >> index.Index(
        run.output, run.checkpoints, run.shard_fingerprints, config.index_rows
    )
    sets = Sets(
        run.output,
        run.train,
        run.test,
        config.test_name,
        config.target,
        run.checkpoints,
        run.source,
    )
    joined = {"train": train, "tests": tests, "partitions": partitions} | "Join" >> Influence(
        sets, config.top_k, config.rescore
    )
    quality = None
    if config.recall_queries:
        quality = {"train": train, "tests": tests, "best": joined["best"]} | "Quality" >> Quality(
            sets, config.recall_queries, config.top_k, config.rescore > 0, run.shard_fingerprints
        )
    _finish(pipeline, run, results, joined["paths"], quality, "influence")


def influence_fingerprint(run: Run) -> str:
    """Of all that the influence tables and their report are made from."""
    config = run.config
    return runs.digest(
        [
            run.shard_fingerprints,
            run.explicit_ids,
            config.top_k,
            config.rescore,
            config.index_rows,
            config.recall_queries,
            config.report_examples,
            config.max_rejected,
            run.source.get().task.label_names,
        ]
    )


def _finish(
    pipeline: beam.Pipeline,
    run: Run,
    results: beam.PCollection,
    paths: beam.PCollection | None,
    quality: beam.PCollection | None,
    stage: str,
) -> None:
    nothing = beam.pvalue.AsList(pipeline | "Nothing" >> beam.Create([]))
    _ = (
        pipeline
        | "Once" >> beam.Create([None])
        | "Finish"
        >> beam.Map(
            lambda _, *sides: finish(run, stage, *sides),
            beam.pvalue.AsList(results),
            beam.pvalue.AsList(paths) if paths else nothing,
            beam.pvalue.AsList(quality) if quality else nothing,
        )
    )


def finish(
    run: Run,
    stage: str,
    results: Sequence[ShardResult],
    paths: Sequence[str],
    quality: Sequence[dict[str, Any]],
) -> None:
    """Writes run.json and the report, and removes tables that an earlier run left."""
    earlier = runs.read_run(run.output)
    counts = dict(earlier.get("counts", {}))
    for name in sorted({result.set_name for result in results}):
        mine = [result for result in results if result.set_name == name]
        counts[name] = {
            "shards": len(mine),
            "read": sum(r.read for r in mine),
            "embedded": sum(r.used for r in mine),
            "rejected": sum(len(r.rejected) for r in mine),
        }
    timings = dict(earlier.get("timings", {}))
    timings[stage] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started)),
        "seconds": round(time.time() - run.started, 1),
    }
    news: dict[str, Any] = {"counts": counts, "timings": timings}
    if stage == "influence":
        news["quality"] = quality[0] if quality else None
    _write_run(run, earlier, news)
    if paths:
        folder = os.path.dirname(paths[0])
        stale = {info.path for info in files.match(files.join(folder, "*.parquet"))} - set(paths)
        files.remove(sorted(stale))
    if stage == "influence":
        from tracin_beam.report.write import write_influence_report

        write_influence_report(run, runs.read_run(run.output))
        done = run.output.influence(run.config.test_name, "done.json")
        files.write_json(
            done, {"fingerprint": influence_fingerprint(run), "quality": news["quality"]}
        )


def _is_done(run: Run) -> bool:
    """Whether the influence tables are there already; then run.json is made to tell of them."""
    path = run.output.influence(run.config.test_name, "done.json")
    done = files.read_json(path) if files.exists(path) else {}
    earlier = runs.read_run(run.output)
    if done.get("fingerprint") != influence_fingerprint(run) or "counts" not in earlier:
        return False
    _write_run(run, earlier, {"quality": done["quality"]})
    names = [runs.numbered("influence", i, len(run.test)) for i in range(len(run.test))]
    every = [*names, "report.html"]
    return all(files.exists(run.output.influence(run.config.test_name, n)) for n in every)


def main(stage: str, about: str, argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line.

    Args:
      stage: "embed", "influence" or "self_influence".
      about: for `--help`.
      argv: flags; those of the process by default.

    Returns:
      The exit status: 0, or 2 for an input that has to be mended, which is said on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = f"python -m pipelines.{stage}"
    if options.wants_help(argv, prog, about):
        return 0
    try:
        config, beam_options = options.parse(argv, needs_test=stage == "influence", prog=prog)
        _set_up_logging()
        run = prepare(config, with_test=stage != "self_influence")
        if stage == "influence" and _is_done(run):
            _log.info("nothing has changed since the tables were made")
        else:
            graph = {
                "embed": embed_graph,
                "influence": influence_graph,
                "self_influence": self_influence_graph,
            }[stage]
            _execute(graph, run, beam_options)
    except (InputError, OSError) as error:
        from tracin_beam.report.view import printable

        print(f"{prog}: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)
        return 2
    print(_summary(stage, run))
    return 0


def _execute(
    graph: Callable[[beam.Pipeline, Run], None], run: Run, beam_options: PipelineOptions
) -> None:
    try:
        quiet: Any = _WithoutOurTraces(sys.stderr)
        with contextlib.redirect_stderr(quiet), beam.Pipeline(options=beam_options) as pipeline:
            graph(pipeline, run)
    except InputError:
        raise
    except Exception as error:
        # Of a worker's error only the text comes back, in the middle of Beam's stack trace.
        end = r"(?: \[while running|\n\n|\nTraceback|\Z)"
        found = re.search(rf"InputError: (.*?){end}", str(error), re.S)
        if not found:
            raise
        raise InputError(found[1].strip()) from None


def _summary(stage: str, run: Run) -> str:
    from tracin_beam import tables
    from tracin_beam.report import text

    state = runs.read_run(run.output)
    if stage == "influence":
        name = run.config.test_name
        rows = tables.read(run.output.influence(name, "influence-*.parquet"))
        names = run.source.get().task.label_names
        summary = text.influence_summary(rows, state, label_names=names)
        return f"{summary}\nTables and report.html are in {run.output.influence(name)}"
    lines = []
    for name, counts in state["counts"].items():
        parts = ", ".join(f"{value} {key}" for key, value in counts.items())
        lines.append(f"{name}: {parts}")
    where = run.output.path("self_influence" if stage == "self_influence" else "embeddings")
    return "\n".join([*lines, f"Written to {where}"])


class _WithoutOurTraces:
    """A stream that drops the stack traces, which Beam prints, of errors that we report anyway."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        end = self._dropped and text == "\n"
        self._dropped = text.startswith("Traceback") and "InputError" in text
        return len(text) if self._dropped or end else self._stream.write(text)


class _OnlyOurErrors(logging.Filter):
    """Drops Beam's stack traces of errors that are reported in a sentence at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "InputError" not in record.getMessage() and not (
            record.exc_info and isinstance(record.exc_info[1], InputError)
        )


def _set_up_logging() -> None:
    """Our progress without the runners' chatter, and their errors without our own in them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    ours = logging.getLogger("tracin_beam")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    for other in logging.getLogger().handlers:
        other.addFilter(_OnlyOurErrors())
