"""The jobs' Beam graphs, put together from the stages' transforms."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam

from tracin_beam.jobs.preflight import Run, write_run
from tracin_beam.storage import files, runs
from tracin_beam.storage.runs import TRAIN, ShardResult


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
    _finish(pipeline, run, results, None, None, "embed")


def self_influence_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.self_influence`."""
    from tracin_beam.stages.self_influence import SelfInfluence

    results = embed_stage(pipeline, run)
    paths = results | "SelfInfluence" >> SelfInfluence(
        run.output, run.checkpoints, [shard.path for shard in run.train]
    )
    _finish(pipeline, run, results, paths, None, "self_influence")


def influence_graph(pipeline: beam.Pipeline, run: Run) -> None:
    """The graph of `pipelines.influence`."""
    from tracin_beam.stages import index
    from tracin_beam.stages.evaluate import Quality
    from tracin_beam.stages.influence import Influence, Sets

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
    write_run(run, earlier, news)
    if paths:
        folder = os.path.dirname(paths[0])
        stale = {info.path for info in files.match(files.join(folder, "*.parquet"))} - set(paths)
        files.remove(sorted(stale))
    if stage == "influence":
        from tracin_beam.report.write import write_influence_report

        name, count = run.config.test_name, run.config.report_examples
        write_influence_report(run.output, name, run.source.get(), runs.read_run(run.output), count)
        done = run.output.done("influence", name)
        files.write_json(
            done, {"fingerprint": influence_fingerprint(run), "quality": news["quality"]}
        )


def is_done(run: Run) -> bool:
    """Whether the influence tables are there already; then run.json is made to tell of them."""
    path = run.output.done("influence", run.config.test_name)
    done = files.read_json(path) if files.exists(path) else {}
    earlier = runs.read_run(run.output)
    if done.get("fingerprint") != influence_fingerprint(run) or "counts" not in earlier:
        return False
    write_run(run, earlier, {"quality": done["quality"]})
    names = [runs.numbered("influence", i, len(run.test)) for i in range(len(run.test))]
    every = [run.output.influence(run.config.test_name, n) for n in names]
    return all(files.exists(path) for path in [*every, run.output.report(run.config.test_name)])


GRAPHS: dict[str, Callable[[beam.Pipeline, Run], None]] = {
    "embed": embed_graph,
    "influence": influence_graph,
    "self_influence": self_influence_graph,
}
