"""The jobs' Beam graphs, put together from the stages' transforms."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import apache_beam as beam

from tracin_beam.errors import InputError
from tracin_beam.jobs.preflight import Run, write_run
from tracin_beam.storage import files, marks, runs
from tracin_beam.storage.runs import TRAIN, CheckpointFile, Made, Shard, ShardResult

_log = logging.getLogger(__name__)


# Bytes of embeddings that are read to see whether they are as they were when nothing is to be done.
_READ_AT_MOST = 4 << 30


def embed_stage(pipeline: beam.Pipeline, run: Run) -> beam.PCollection:
    """All ShardResults of a run, of both sets."""
    from tracin_beam.stages.embed import Embed

    return pipeline | "Embed" >> Embed(
        run.output, run.source, run.units, run.explicit_ids, run.config.max_rejected
    )


def _of_set(results: beam.PCollection, name: str, label: str) -> beam.PCollection:
    return results | label >> beam.Filter(lambda r, name=name: r.set_name == name)


def embed_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.embed`."""
    results = embed_stage(pipeline, run)
    _finish(pipeline, run, results, None, None, "embed", {})


def self_influence_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.self_influence`."""
    from tracin_beam.stages.self_influence import SelfInfluence

    results = embed_stage(pipeline, run)
    fingerprints = run.shard_fingerprints
    made = results | "SelfInfluence" >> SelfInfluence(
        run.output,
        run.checkpoints,
        {shard.path: fingerprints[shard.path] for shard in run.train},
    )
    _finish(pipeline, run, results, made, None, "self_influence", {})


def influence_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.influence`."""
    from tracin_beam.planning import retrieval
    from tracin_beam.scoring import methods
    from tracin_beam.stages.influence import Influence
    from tracin_beam.stages.joining import Join
    from tracin_beam.stages.retrieval import Retrieval
    from tracin_beam.stages.total import TotalInfluence

    config = run.config
    results = embed_stage(pipeline, run)
    train = _of_set(results, TRAIN, "TrainResults")
    tests = _of_set(results, config.test_name, "TestResults")
    engine = run.source.get().engine
    numbers = engine.dim * len(run.checkpoints)
    choice = retrieval.choose(config, run.train, run.test, numbers)
    _log.info("candidates by %s: %s", choice.index, choice.why)
    join = Join(
        run.output,
        run.train,
        run.test,
        config.test_name,
        config.target,
        run.checkpoints,
        run.source,
        run.shard_fingerprints,
        methods.DEFAULT,
        numbers,
        engine.batch_size,
    )
    joined = {"train": train, "tests": tests} | "Join" >> Influence(
        join, choice.index, config.index_rows, config.top_k, config.rescore, config.recall_queries
    )
    retrieved = None
    if config.recall_queries:
        retrieved = joined | "Retrieval" >> Retrieval(join, config.top_k, config.rescore > 0)
    made = joined["made"]
    if config.total:
        totals = {"train": train, "tests": tests} | "Total" >> TotalInfluence(join)
        made = (made, totals) | "AllTables" >> beam.Flatten()
    news = {"index": dataclasses.asdict(choice)}
    _finish(pipeline, run, results, made, retrieved, "influence", news)


def job_of(stage: str, run: Run) -> tuple[str, ...]:
    """What tells a job's results from those of others in the same output."""
    named = stage == "influence" or (stage == "embed" and run.test)
    return (stage, run.config.test_name) if named else (stage,)


def fingerprint_of(stage: str, run: Run) -> str:
    """Of all that a job's results are made from."""
    config = run.config
    parts: list[Any] = [run.shard_fingerprints, run.explicit_ids, config.max_rejected]
    if stage == "self_influence":
        from tracin_beam.stages import self_influence

        parts.append(self_influence.made_by())
    if stage == "influence":
        parts += [
            config.top_k,
            config.rescore,
            config.index_rows,
            config.recall_queries,
            config.index,
            config.total,
            config.total,
            config.report_examples,
            run.source.get().task.label_names,
        ]
    return runs.digest(parts)


def _finish(
    pipeline: beam.Pipeline,
    run: Run,
    results: beam.PCollection,
    made: beam.PCollection | None,
    retrieved: beam.PCollection | None,
    stage: str,
    news: dict[str, Any],
) -> None:
    nothing = beam.pvalue.AsList(pipeline | "Nothing" >> beam.Create([]))
    _ = (
        pipeline
        | "Once" >> beam.Create([None])
        | "Finish"
        >> beam.Map(
            lambda _, *inputs: finish(run, stage, news, *inputs),
            beam.pvalue.AsList(results),
            beam.pvalue.AsList(made) if made else nothing,
            beam.pvalue.AsList(retrieved) if retrieved else nothing,
        )
    )


def finish(
    run: Run,
    stage: str,
    news: dict[str, Any],
    results: Sequence[ShardResult],
    made: Sequence[Made],
    retrieved: Sequence[dict[str, Any]],
) -> None:
    """Writes run.json, the report and the mark of the job, and removes what an earlier run left.

    Raises:
      InputError: an input file has become another since the run began.
    """
    if run.lease and not run.lease.is_held():
        raise InputError(
            "another run took this one for dead, as it gave no sign of life for minutes: what it "
            "made is not marked as whole. Run again."
        )
    inputs: list[Shard | CheckpointFile] = [*run.train, *run.test, *run.checkpoints]
    for file, same in zip(inputs, files.in_parallel(runs.is_unchanged, inputs), strict=True):
        if not same:
            files.remove(path for path, _ in made)
            raise runs.changed_while_used(file)
    counts = {}
    for name in sorted({result.set_name for result in results}):
        mine = [result for result in results if result.set_name == name]
        counts[name] = {
            "shards": len(mine),
            "read": sum(r.read for r in mine),
            "embedded": sum(r.used for r in mine),
            "rejected": sum(len(r.rejected) for r in mine),
        }
    timing = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.started)),
        "seconds": round(time.time() - run.started, 1),
    }
    if stage == "influence":
        news = {**news, "retrieval": retrieved[0] if retrieved else None}
    state = write_run(run, {**news, "counts": counts, "timings": {stage: timing}})
    vouched = dict(made)
    _remove_others(vouched)
    if stage == "influence":
        from tracin_beam.report.write import write_influence_report

        name, count = run.config.test_name, run.config.report_examples
        vouched[run.output.report(name)] = write_influence_report(
            run.output, name, run.source.get(), state, count
        )
    rejected = [run.output.rejected(r.set_name, r.shard) for r in results if r.rejected]
    vouched.update(zip(rejected, files.in_parallel(files.stamp, rejected), strict=True))
    marks.write(
        run.output.done(*job_of(stage, run)),
        run.output.root,
        fingerprint_of(stage, run),
        vouched,
        news={**news, "counts": counts},
        embeddings=marks.as_json(dict(_embeddings(run, results)), run.output.root),
    )
    if run.lease and run.lease.detached:
        files.remove([run.lease.path])


def write_counters(run: Run, stage: str, counters: dict[str, dict[str, int]]) -> None:
    """Adds what the workers counted to the timings in run.json; nothing, if they told nothing."""
    timing = runs.read_run(run.output).get("timings", {}).get(stage)
    if counters and timing:
        write_run(run, {"timings": {stage: {**timing, "counters": counters}}})


def _embeddings(run: Run, results: Sequence[ShardResult]) -> Iterator[Made]:
    steps = sorted(checkpoint.step for checkpoint in run.checkpoints)
    for result in results:
        for step, stamp in zip(steps, result.stamps, strict=True):
            yield run.output.embeddings(result.set_name, step, result.shard), stamp


def _remove_others(made: Collection[str]) -> None:
    """Removes what else lies in the folders of tables: what an earlier run had more of."""
    for folder in sorted({os.path.dirname(path) for path in made}):
        files.remove(sorted({info.path for info in files.list_folder(folder)} - set(made)))


def is_done(stage: str, run: Run) -> bool:
    """Whether a job's results are there already; then run.json is made to tell of them."""
    wanted = set(_expected(stage, run))
    mark = run.output.done(*job_of(stage, run))
    done = marks.read(mark, run.output.root, fingerprint_of(stage, run), wanted)
    if done is None:
        return False
    if change := _changed_embeddings(run, marks.from_json(done["embeddings"], run.output.root)):
        marks.refuse(mark, change)
        return False
    write_run(run, done["news"])
    return True


def _changed_embeddings(run: Run, made: dict[str, files.Stamp]) -> str:
    """What is the matter with the first embedding file that is not what it was; "" if none is.

    Nothing is made from them now, and what will be reads them again. So where they are many or far
    away their sizes will do.
    """
    there = files.under(run.output.path("embeddings"))
    for path, stamp in made.items():
        if there.get(path) != stamp.size:
            size = there.get(path)
            return f"{path}: it has {'no' if size is None else size} bytes of {stamp.size}"
    near = files.is_local(run.output.root)
    small = sum(stamp.size for stamp in made.values()) <= _READ_AT_MOST
    return marks.first_change(made) if near and small else ""


def _expected(stage: str, run: Run) -> Iterator[str]:
    """Paths of the results that a job's mark must vouch for."""
    name = run.config.test_name
    if stage == "influence":
        yield run.output.report(name)
    elif stage == "self_influence":
        for i in range(len(run.train)):
            numbered = runs.numbered("self_influence", i, len(run.train))
            yield run.output.self_influence(numbered)


GRAPHS: dict[str, Callable[[beam.Pipeline, Run], None]] = {
    "embed": embed_graph,
    "influence": influence_graph,
    "self_influence": self_influence_graph,
}
