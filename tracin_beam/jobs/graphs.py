"""What all jobs' Beam graphs begin and end with."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam

from tracin_beam.errors import InputError
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import Job
from tracin_beam.jobs.run_json import write_run
from tracin_beam.storage import files, marks, runs
from tracin_beam.storage.runs import CheckpointFile, Made, Shard, ShardResult

# To see whether embeddings are as they were when nothing is to be done: bytes that are read in any
# case, and files whose file system is asked for what it knows of their content.
_READ_AT_MOST = 4 << 30
_ASKED_AT_MOST = 2_000


def embed_stage(pipeline: beam.Pipeline, run: Run) -> beam.PCollection:
    """All ShardResults of a run, of both sets."""
    from tracin_beam.stages.embed import Embed

    return pipeline | "Embed" >> Embed(
        run.output,
        run.source,
        run.units,
        run.explicit_ids,
        run.config.max_rejected,
        run.config.embedding_dtype,
    )


def of_set(results: beam.PCollection, name: str, label: str) -> beam.PCollection:
    """The results of one set."""
    return results | label >> beam.Filter(lambda r, name=name: r.set_name == name)


def mark_of(job: Job, run: Run) -> tuple[str, ...]:
    """What tells a job's results from those of others in the same output."""
    return (job.name, run.config.test_name) if run.test else (job.name,)


def fingerprint_of(job: Job, run: Run) -> str:
    """A digest of all that a job's results are made from."""
    parts = [run.shard_fingerprints, run.explicit_ids, run.config.max_rejected]
    return runs.digest([*parts, *job.parts.made_by(run)])


def finish_with(
    pipeline: beam.Pipeline,
    run: Run,
    job: Job,
    results: beam.PCollection,
    made: beam.PCollection | None = None,
    entries: Mapping[str, Any] | None = None,
    found: Mapping[str, beam.PCollection] | None = None,
) -> None:
    """Lets a job end with `finish`, once all of it is done.

    Args:
      pipeline: of the job.
      run: its run.
      job: which one it is.
      results: ShardResults, as `embed_stage` gives them.
      made: path and stamp of each file of a table.
      entries: what to write to run.json.
      found: what to write to run.json and is known at the end only: one value each.
    """
    found = dict(found or {})
    _ = (
        pipeline
        | "Once" >> beam.Impulse()
        | "Finish"
        >> beam.Map(
            lambda _, results, made, *values, names=tuple(found): finish(
                run,
                job,
                {**(entries or {}), **{n: v[0] for n, v in zip(names, values, strict=True) if v}},
                results,
                made,
            ),
            beam.pvalue.AsList(results),
            beam.pvalue.AsList(made) if made else [],
            *map(beam.pvalue.AsList, found.values()),
        )
    )


def finish(
    run: Run,
    job: Job,
    entries: Mapping[str, Any],
    results: Sequence[ShardResult],
    made: Sequence[Made],
) -> None:
    """Writes run.json, the job's page and its mark, and removes what an earlier run left.

    Raises:
      InputError: an input file has become another since the run began.
    """
    if run.lease and not run.lease.is_held():
        raise InputError(
            "another run took this one for dead, as it gave no sign of life for minutes: what it "
            "made is not marked as whole. Run again."
        )
    inputs: list[Shard | CheckpointFile] = [*run.train, *run.test, *run.checkpoints]
    inputs += [c.moments for c in run.checkpoints if c.moments]
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
    state = write_run(run, {**entries, "counts": counts, "timings": {job.name: timing}})
    vouched = dict(made)
    _remove_others(vouched)
    vouched.update(job.parts.page(run, state))
    rejected = [run.output.rejected(r.set_name, r.shard) for r in results if r.rejected]
    vouched.update(zip(rejected, files.in_parallel(files.stamp, rejected), strict=True))
    marks.write(
        run.output.done(*mark_of(job, run)),
        run.output.root,
        fingerprint_of(job, run),
        vouched,
        news={**entries, "counts": counts},
        embeddings=marks.as_json(dict(embeddings(run, results)), run.output.root),
    )
    if run.lease and run.lease.detached:
        files.remove([run.lease.path])


def write_counters(run: Run, job: Job, counters: dict[str, dict[str, int]]) -> None:
    """Adds what the workers counted to the timings in run.json, if the runner tells it."""
    timing = runs.read_run(run.output).get("timings", {}).get(job.name)
    if counters and timing:
        write_run(run, {"timings": {job.name: {**timing, "counters": counters}}})


def embeddings(run: Run, results: Sequence[ShardResult]) -> Iterator[Made]:
    """Path and stamp of the embedding files of some results."""
    for result in results:
        for checkpoint, stamp in zip(run.checkpoints, result.stamps, strict=True):
            yield run.output.embeddings(result.set_name, checkpoint, result.shard), stamp


def _remove_others(made: Collection[str]) -> None:
    """Removes what else lies in the folders of tables: what an earlier run had more of."""
    for folder in sorted({os.path.dirname(path) for path in made}):
        files.remove(sorted({info.path for info in files.list_folder(folder)} - set(made)))


def is_known(job: Job, run: Run) -> bool:
    """Whether a job has ended with these inputs, whatever has become of its results."""
    return marks.is_of(run.output.done(*mark_of(job, run)), fingerprint_of(job, run))


def is_done(job: Job, run: Run) -> bool:
    """Whether a job's results are there already; then run.json is made to tell of them."""
    wanted = set(job.parts.results(run))
    mark = run.output.done(*mark_of(job, run))
    done = marks.read(mark, run.output.root, fingerprint_of(job, run), wanted)
    if done is None:
        return False
    made = marks.from_json(done["embeddings"], run.output.root)
    if change := changed_embeddings(run, mark, made):
        marks.refuse(mark, change)
        return False
    write_run(run, done["news"])
    return True


def changed_embeddings(run: Run, mark: str, made: dict[str, files.Stamp]) -> str:
    """What is the matter with the first embedding file that is not what it was; "" if none is.

    A job that is done reads no embeddings, and later jobs check those that they read. So where
    many may be others, as in a copy of an output, only those are read that were written to after
    the job's mark, and in a bucket only as many are asked for as can be in some seconds.
    """
    there = files.under(run.output.path("embeddings"))
    for path, stamp in made.items():
        if there.get(path) != stamp.size:
            size = there.get(path)
            return f"{path}: it has {'no' if size is None else size} bytes of {stamp.size}"
    if not files.is_local(run.output.root):
        known = {path: stamp for path, stamp in made.items() if stamp.version}
        return marks.first_change(known) if len(known) <= _ASKED_AT_MOST else ""
    made = {path: s for path, s in made.items() if not files.is_certainly(path, s.version)}
    if sum(stamp.size for stamp in made.values()) > _READ_AT_MOST:
        made = {path: made[path] for path in files.written_since(made, mark)}
    return marks.first_change(made)
