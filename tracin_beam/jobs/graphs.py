"""The jobs' Beam graphs, put together from the stages' transforms."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam

from tracin_beam.jobs.preflight import Run, write_run
from tracin_beam.storage import files, runs
from tracin_beam.storage.runs import TRAIN, ShardResult

_log = logging.getLogger(__name__)


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
    paths = results | "SelfInfluence" >> SelfInfluence(
        run.output, run.checkpoints, [shard.path for shard in run.train]
    )
    _finish(pipeline, run, results, paths, None, "self_influence", {})


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
    paths = joined["paths"]
    if config.total:
        totals = {"train": train, "tests": tests} | "Total" >> TotalInfluence(join)
        paths = (paths, totals) | "AllTables" >> beam.Flatten()
    news = {"index": dataclasses.asdict(choice)}
    _finish(pipeline, run, results, paths, retrieved, "influence", news)


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
            config.index,
            config.total,
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
            beam.pvalue.AsList(paths) if paths else nothing,
            beam.pvalue.AsList(retrieved) if retrieved else nothing,
        )
    )


def finish(
    run: Run,
    stage: str,
    news: dict[str, Any],
    results: Sequence[ShardResult],
    paths: Sequence[str],
    retrieved: Sequence[dict[str, Any]],
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
    news = {**news, "counts": counts, "timings": timings}
    if stage == "influence":
        news["retrieval"] = retrieved[0] if retrieved else None
    write_run(run, earlier, news)
    for folder in sorted({os.path.dirname(path) for path in paths}):
        stale = {i.path for i in files.list_folder(folder) if i.path.endswith(".parquet")} - set(
            paths
        )
        files.remove(sorted(stale))
    if stage == "influence":
        from tracin_beam.report.write import write_influence_report

        name, count = run.config.test_name, run.config.report_examples
        write_influence_report(run.output, name, run.source.get(), runs.read_run(run.output), count)
        done = run.output.done("influence", name)
        files.write_json(
            done,
            {
                "fingerprint": influence_fingerprint(run),
                "retrieval": news["retrieval"],
                "tables": sorted(path.removeprefix(run.output.root) for path in paths),
            },
        )


def write_counters(run: Run, stage: str, counters: dict[str, dict[str, int]]) -> None:
    """Adds what the workers counted to the timings in run.json; nothing, if they told nothing."""
    state = runs.read_run(run.output)
    if counters and stage in state.get("timings", {}):
        state["timings"][stage]["counters"] = counters
        files.write_json(run.output.run, state)


def is_done(run: Run) -> bool:
    """Whether the influence tables are there already; then run.json is made to tell of them."""
    path = run.output.done("influence", run.config.test_name)
    done = files.read_json(path) if files.exists(path) else {}
    earlier = runs.read_run(run.output)
    if done.get("fingerprint") != influence_fingerprint(run) or "counts" not in earlier:
        return False
    write_run(run, earlier, {"retrieval": done["retrieval"]})
    every = [run.output.root + name for name in done["tables"]]
    return all(files.exists(path) for path in [*every, run.output.report(run.config.test_name)])


GRAPHS: dict[str, Callable[[beam.Pipeline, Run], None]] = {
    "embed": embed_graph,
    "influence": influence_graph,
    "self_influence": self_influence_graph,
}
