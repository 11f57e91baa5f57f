"""The job `quality`: a night's look at the training data, and what of it is wrong."""

import dataclasses
import datetime
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracin_beam.config import Config
from tracin_beam.errors import InputError
from tracin_beam.inputs import trained
from tracin_beam.jobs import graphs, kept, night
from tracin_beam.jobs.kept import Kept
from tracin_beam.jobs.parts import Parts
from tracin_beam.jobs.preflight import Run
from tracin_beam.jobs.registry import JOBS
from tracin_beam.signals import gates, mislabel
from tracin_beam.signals.gates import Gate
from tracin_beam.storage import files, listings, runs, sinks, tables, verdicts
from tracin_beam.storage.files import Stamp
from tracin_beam.storage.runs import Made, Output, ShardResult

_VERSION = 1
_KEY = ["id", "kind", "content_hash"]  # what makes two nights' suspects the same
_FILES = (
    *("signals.parquet", "suspects.parquet", "metrics.json", "metrics.prom"),
    *("openlineage.json", "datalab.parquet"),
)
# Columns of ids, by what has the places of the examples before.
_EVIDENCE = {"supporting": "supporting_ids", "proponents": "proponents", "opponents": "opponents"}
_RANGE = ("wrong_labels_low", "wrong_labels_high")
_OF_RANGE = ("label", "others_label", "confident_label", "others_probability")
# Where the first checkpoint knows nearly all given labels, wrong ones are learnt too.
_LATE = 0.97

SUSPECTS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("score", pa.float64()),  # 1 is the worst
        ("label", pa.float64()),
        ("suggested_label", pa.float64()),
        ("confidence", pa.float64()),
        ("best_other_ratio", pa.float64()),
        ("supporting_ids", pa.list_(pa.string())),
        ("proponents", pa.list_(pa.string())),  # of its own loss; of the worst mislabelled ones
        ("opponents", pa.list_(pa.string())),
        ("shard", pa.string()),
        ("position", pa.int64()),
        ("cohort", pa.string()),
        ("first_seen", pa.string()),
        ("content_hash", pa.binary()),
    ]
)


def date_of(run: Run) -> str:
    """The night's date; that of the run's start in UTC if none was given."""
    if run.config.date:
        return night.check_date(run.config.date)
    return datetime.datetime.fromtimestamp(run.started, datetime.UTC).date().isoformat()


def _conditions(run: Run) -> list[Gate]:
    return gates.parse_all(run.config.warn_if, run.config.error_if or ())


def _cohorts(run: Run) -> dict[str, str]:
    """The cohort of each training shard, by its path."""
    return trained.cohorts(run.train, files.home(run.config.checkpoints[0]), run.config.trained)


def _trusted(run: Run) -> frozenset[str]:
    """Paths of the shards that are trusted to be right.

    Raises:
      InputError: one is no shard of this run.
    """
    if not run.config.trusted:
        return frozenset()
    found = {info.path for info in runs.matched(run.config.trusted, "trusted")}
    if others := found - {shard.path for shard in (*run.train, *run.test)}:
        raise InputError(
            f"--trusted names {min(others)}, which neither --train nor --test names: give it there "
            "as well."
        )
    return frozenset(found)


def _data(run: Run) -> str:
    """A digest of all that a night's tables are made from, but for its date and the verdicts."""
    from tracin_beam.stages import quality

    config = run.config
    parts = [run.shard_fingerprints, run.explicit_ids, config.max_rejected, run.kind]
    parts += [config.features, *_preconditioner(config)]
    return runs.digest([*parts, _cohorts(run), sorted(_trusted(run)), _VERSION, quality.VERSION])


def _preconditioner(config: Config) -> list[object]:
    return [] if config.preconditioner == "none" else [config.preconditioner, config.damping]


def graph(pipeline: beam.Pipeline, run: Run) -> None:
    """Embeds, describes the examples, and writes the night's tables."""
    from tracin_beam.jobs import joins
    from tracin_beam.stages.quality import Night, judge

    kind = run.kind["name"]
    if kind not in ("classification", "multilabel", "regression"):
        raise InputError(
            "quality judges labels of a classification, multilabel or regression task, and this "
            f"one is taken for kind={kind!r}: if it is one of them, say so with Task(kind=…)."
        )
    if run.checkpoints[-1].training:
        raise InputError(
            "quality judges labels by the course of one training: give one --checkpoints."
        )
    verdicts.read(run.output)  # a ledger that is damaged is told before work starts
    config = run.config
    date, conditions = date_of(run), _conditions(run)
    fingerprint = _data(run)
    earlier = kept.read(run, fingerprint)
    if earlier:
        results = pipeline | "Results" >> beam.Create(earlier.results)
        made = (
            pipeline
            | "Night" >> beam.Create([None])
            | "CopyNight"
            >> beam.FlatMap(
                lambda _: copy_night(run.output, date, earlier, conditions, fingerprint)
            )
        )
    else:
        results = graphs.embed_stage(pipeline, run)
        trusted = _trusted(run)
        fingerprints = {f"{u.checkpoint.folder}/{u.shard.path}": u.fingerprint for u in run.units}
        units = listings.of_dict(run.output, fingerprints)
        cohorts = listings.of_dict(run.output, _cohorts(run))
        phi, threshold = config.features, run.kind["threshold"]
        what = Night(
            run.output, run.source, run.checkpoints, units, kind, cohorts, trusted, phi, threshold
        )
        join = joins.join_of(run) if config.preconditioner != "none" else None
        parts, others, proof = judge(results, what, join)
        made = (
            pipeline
            | "Night" >> beam.Create([None])
            | "WriteNight"
            >> beam.FlatMap(
                lambda _, parts, others, proof, results: write_night(
                    run.output,
                    date,
                    dict(parts),
                    others,
                    proof,
                    conditions,
                    kind,
                    results,
                    fingerprint,
                    trusted,
                ),
                beam.pvalue.AsList(parts),
                beam.pvalue.AsList(others),
                beam.pvalue.AsList(proof),
                beam.pvalue.AsList(results),
            )
        )
    graphs.finish_with(pipeline, run, JOBS["quality"], results, made)


def write_night(
    output: Output,
    date: str,
    parts: Mapping[str, tuple[str, Mapping[str, Any]]],
    others: Sequence[Mapping[str, Any]],
    proof: Sequence[Mapping[str, Any]],
    conditions: Sequence[Gate],
    kind: str,
    results: Sequence[ShardResult],
    fingerprint: str,
    trusted: Collection[str] = (),
) -> Iterator[Made]:
    """Writes all that lies in a night's folder, and keeps it for the next.

    Args:
      output: the output directory.
      date: of the night.
      parts: path of the signals and `nights.summary` of each training shard, by its path.
      others: suspects of other kinds than mislabelled, by "shard" and "position".
      proof: what speaks for and against the labels of some, as of `stages.evidence`.
      conditions: the gates.
      kind: of the task.
      results: of embedding.
      fingerprint: as of `_data`.
      trusted: paths of the shards whose labels are right.

    Yields:
      Path and stamp of each file.
    """
    from tracin_beam.stages.quality import SIGNALS, curves

    rows: list[dict[str, Any]] = [dict(row) for row in others]
    proven = {(row["shard"], row["position"]): dict(row) for row in proof}
    named = _Names([*rows, *proven.values()])
    judged: list[pa.Table] = []
    cohorts: dict[str, list[str]] = {}
    for shard, (part, summary) in sorted(parts.items()):
        if shard not in trusted:
            cohorts.setdefault(summary["cohort"], []).append(part)
    stated = curves(cohorts) if kind == "classification" else {}

    def looked_at() -> Iterator[pa.Table]:
        for shard in sorted(parts):
            piece = tables.read(parts[shard][0])
            named.look(piece)
            if len(piece) and piece["shard"][0].as_py() not in trusted:
                rows.extend(_mislabelled(piece, kind, stated))
                judged.append(piece.select(["mislabel_score", *_OF_RANGE]))
            yield piece

    path = output.path("quality", date, "signals.parquet")
    stamp = sinks.write_parquet(path, SIGNALS, looked_at())
    named.fill()
    shards = {shard: summary for shard, (_, summary) in parts.items()}
    for row in rows:
        if row["kind"] == "mislabelled":
            some = proven.get((row["shard"], row["position"]), {})
            row.update({name: some[name] for name in _EVIDENCE.values() if name in some})
        row["cohort"] = shards[row["shard"]]["cohort"]
    rows.sort(key=lambda row: (row["kind"], -row["score"], row["shard"], row["position"]))
    wrong = _range(judged) if kind == "classification" else {}
    made = Kept(path, stamp, shards, wrong, tuple(results))
    yield from _finish(output, date, made, rows, conditions, fingerprint)


def copy_night(
    output: Output, date: str, earlier: Kept, conditions: Sequence[Gate], fingerprint: str
) -> Iterator[Made]:
    """Writes all that lies in the folder of a night whose data are those of an earlier one."""
    found = kept.read_suspects(output)
    assert found is not None
    path = output.path("quality", date, "signals.parquet")
    stamp = earlier.stamp if path == earlier.signals else files.copy(earlier.signals, path)
    made = dataclasses.replace(earlier, signals=path, stamp=stamp)
    rows = found.to_pylist()
    yield from _finish(output, date, made, rows, conditions, fingerprint)


def _finish(
    output: Output,
    date: str,
    made: Kept,
    rows: list[dict[str, Any]],
    conditions: Sequence[Gate],
    fingerprint: str,
) -> Iterator[Made]:
    """Writes what depends on the date, the verdicts and the gates, and keeps the rest.

    Args:
      output: the output directory.
      date: of the night.
      made: the night, whose `signals.parquet` is there.
      rows: suspects, of whatever verdict.
      conditions: the gates.
      fingerprint: as of `_data`.
    """
    earlier = night.history(output, date)
    last = _last_suspects(output, earlier[-1]["date"]) if earlier else {}
    first_seen = _first_seen(output, date) | last
    for row in rows:
        row["first_seen"] = first_seen.get(_key(row), date)
    every = pa.Table.from_pylist(rows, schema=SUSPECTS)
    found = verdicts.without_reviewed(every, verdicts.read(output), date)
    folder = output.path("quality", date)
    stamps = {
        "signals.parquet": made.stamp,
        "suspects.parquet": tables.write(files.join(folder, "suspects.parquet"), found),
    }
    kept.write(output, fingerprint, made, every)
    now = {_key(row) for row in found.select(_KEY).to_pylist()}
    night.finish(
        output,
        date,
        made.shards,
        found,
        conditions,
        earlier,
        tables.pieces(made.signals),
        made.wrong,
        {"new": len(now - last.keys()), "gone": len(last.keys() - now)},
    )
    for name in _FILES:
        path = files.join(folder, name)
        yield path, stamps.get(name) or files.stamp(path)


class _Names:
    """What suspects that are known by shard and position are called, and what else is to be said.

    Args:
      rows: the suspects; those of `_EVIDENCE`, places of examples as well, become their ids.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = list(rows)
        self._wanted: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            others = [place for name in _EVIDENCE for place in row.get(name, ())]
            for shard, position in [(row["shard"], row["position"]), *others]:
                self._wanted.setdefault(shard, {})[position] = {}

    def look(self, piece: pa.Table) -> None:
        """Finds those that are in a piece of a shard's signals."""
        wanted = self._wanted.get(piece["shard"][0].as_py()) if len(piece) else None
        if wanted:
            there = pc.is_in(piece["position"], pa.array(list(wanted), pa.int64()))
            names = [name for name in SUSPECTS.names if name in piece.column_names]
            for row in piece.select(names).filter(there).to_pylist():
                wanted[row["position"]] = row

    def fill(self) -> None:
        """Completes the suspects, once all pieces were looked at."""
        for row in self._rows:
            row.update({**self._wanted[row["shard"]][row["position"]], **row})
            for name, column in _EVIDENCE.items():
                ids = [self._wanted[shard][at]["id"] for shard, at in row.pop(name, ())]
                row[column] = [*row.get(column, ()), *ids]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _KEY)


def _last_suspects(output: Output, date: str) -> dict[tuple[Any, ...], str]:
    """When the suspects of a night were first seen."""
    path = output.path("quality", date, "suspects.parquet")
    rows = tables.read(path, [*_KEY, "first_seen"]).to_pylist() if files.exists(path) else []
    return {_key(row): row["first_seen"] for row in rows}


def _first_seen(output: Output, date: str) -> dict[tuple[Any, ...], str]:
    """When those were first seen, up to a date, that a verdict may have held back since."""
    found = kept.read_suspects(output)
    rows = found.select([*_KEY, "first_seen"]).to_pylist() if found is not None else []
    return {_key(row): row["first_seen"] for row in rows if row["first_seen"] <= date}


def _mislabelled(
    piece: pa.Table, kind: str, stated: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> Iterator[dict[str, Any]]:
    """The examples of which another label is likelier than their own.

    Of a regression: whose target is further from what the others say than three times the usual.

    Args:
      piece: rows of `signals.parquet`.
      kind: of the task.
      stated: confidence by mislabel score, by cohort; the score itself where there is none.
    """
    suspect = mislabel.suspected(piece, kind)
    for row in piece.filter(pc.fill_null(suspect, False)).to_pylist():
        score = row["mislabel_score"]
        curve = stated.get(row["cohort"], np.asarray)
        yield {
            **{name: row[name] for name in SUSPECTS.names if name in row},
            "kind": "mislabelled",
            "score": score,
            "confidence": float(curve(np.float64(score))),
            "supporting_ids": [],
        }


def _range(pieces: Sequence[pa.Table]) -> dict[str, int]:
    """Between which numbers the wrong labels are, by `mislabel.wrong_labels`."""
    if not pieces:
        return dict.fromkeys(_RANGE, 0)
    known = pa.concat_tables(pieces).filter(pc.is_finite(pc.field("mislabel_score")))
    label, likeliest, taken, probability = (
        np.nan_to_num(known[name].to_numpy(), nan=-1) for name in _OF_RANGE
    )
    found = mislabel.wrong_labels(
        label.astype(int), taken.astype(int), likeliest.astype(int), probability
    )
    return dict(zip(_RANGE, found, strict=True))


def _made_by(run: Run) -> list[object]:
    config, ledger = run.config, run.output.verdicts
    reviewed = files.checksum(ledger) if files.exists(ledger) else ""
    return [
        _VERSION,
        date_of(run),
        config.warn_if,
        config.error_if,
        config.features,
        _preconditioner(config),
        reviewed,
        run.kind,
        _cohorts(run),
        sorted(_trusted(run)),
        run.source.get().task.label_names,
    ]


def _results(run: Run) -> Iterator[str]:
    names = (*_FILES, "report.html")
    return (run.output.path("quality", date_of(run), name) for name in names)


def _page(run: Run, state: Mapping[str, Any]) -> dict[str, Stamp]:
    from tracin_beam.report.write import write_quality_report

    earlier = night.history(run.output, date_of(run))
    stamp = write_quality_report(run.output, _state(run), run.source.get(), state, earlier)
    return {run.output.path("quality", date_of(run), "report.html"): stamp}


def _state(run: Run) -> Any:
    return files.read_json(run.output.path("quality", date_of(run), "metrics.json"))


def _summary(run: Run, state: Mapping[str, Any]) -> str:
    found = _state(run)
    metrics = found["metrics"]
    kinds = [
        f"{metrics[name]:g} {name.removeprefix('suspects.')}"
        for name in metrics
        if name.startswith("suspects.") and metrics[name]
    ]
    lines = [
        f"{metrics['examples']:,} training examples, {metrics['suspects']:,} suspects "
        f"({metrics['new_suspects']:,} new): {', '.join(kinds) or 'none'}"
    ]
    if "wrong_labels_low" in metrics:
        low, high = metrics["wrong_labels_low"], metrics["wrong_labels_high"]
        lines.append(f"wrong labels: between {low:,} and {high:,}")
    if metrics.get("accuracy_first_checkpoint", 0) > _LATE:
        lines.append(
            "The first checkpoint already predicts nearly all given labels, wrong ones too: save "
            "some of the first epochs next time, with TracInCheckpoint(save_freq=…)."
        )
    lines.append(f"Written to {run.output.path('quality', date_of(run))}: see report.html")
    return "\n".join([*lines, *gates.lines(found["gates"])])


def _status(run: Run) -> int:
    return gates.status(_state(run)["gates"])


PARTS = Parts(graph, _summary, _made_by, _results, _page, _status)
