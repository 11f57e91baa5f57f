"""Training embeddings → a night's `signals.parquet` and `suspects.parquet`.

Labels are judged by a ridge regression on label-free features of the early checkpoints, with each
example left out (`signals.ridge`, `signals.mislabel`). What is needed of the whole training set is
sums over its shards.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.inputs import formats
from tracin_beam.signals import mislabel, ridge
from tracin_beam.signals.nights import summary
from tracin_beam.stages.embed import parse_records
from tracin_beam.stages.workers import EngineSource
from tracin_beam.storage import embeddings, files, marks, records, runs, sinks, tables
from tracin_beam.storage.runs import CheckpointFile, Output, ShardResult

FEATURES = pa.schema(
    [
        ("id", pa.binary()),
        ("position", pa.int64()),
        ("label", pa.float32()),
        ("content_hash", pa.binary(16)),
        ("log_probabilities", pa.list_(pa.float16())),
        ("features", pa.list_(pa.float32())),
    ]
)
SIGNALS = pa.schema(
    [
        *(("id", pa.string()), ("shard", pa.string()), ("position", pa.int64())),
        *(("cohort", pa.string()), ("label", pa.float64()), ("prediction", pa.float64())),
        *((name, pa.float64()) for name in ("self_influence", "loss", "mislabel_score")),
        *((name, pa.float64()) for name in ("suggested_label", "best_other_ratio")),
        ("content_hash", pa.binary()),
    ]
)
SUSPECTS = pa.schema(
    [
        *(("id", pa.string()), ("kind", pa.string()), ("score", pa.float64())),
        *((name, pa.float64()) for name in ("label", "suggested_label", "confidence")),
        ("best_other_ratio", pa.float64()),
        ("supporting_ids", pa.list_(pa.string())),
        *(("shard", pa.string()), ("position", pa.int64()), ("cohort", pa.string())),
        *(("first_seen", pa.string()), ("content_hash", pa.binary())),
    ]
)


@dataclasses.dataclass(frozen=True)
class WriteFeatures:
    """(ShardResult, checkpoint) → (step, ShardResult), once its feature file is there."""

    output: Output
    source: EngineSource
    fingerprints: Mapping[str, str]

    def __call__(
        self, work: tuple[ShardResult, CheckpointFile]
    ) -> Iterator[tuple[int, ShardResult]]:
        result, checkpoint = work
        path = self.output.features(checkpoint.step, result.shard)
        mark = path + ".json"
        fingerprint = runs.digest(
            [self.fingerprints[result.shard.path], checkpoint.identity, result.excluded, 1]
        )
        if not marks.read(mark, self.output.root, fingerprint, {path}):
            files.remove([mark])
            stamp = sinks.write_parquet(path, FEATURES, self._pieces(result, checkpoint))
            marks.write(mark, self.output.root, fingerprint, {path: stamp})
        yield checkpoint.step, result

    def _pieces(self, result: ShardResult, checkpoint: CheckpointFile) -> Iterator[pa.Table]:
        loaded = self.source.get()
        excluded = set(result.excluded)
        kept = self.output.embeddings(result.set_name, checkpoint.step, result.shard)
        source = (
            record
            for record in formats.read(result.shard.path)
            if isinstance(record, records.Record) and record.position not in excluded
        )
        for (rows,) in embeddings.read_checkpoints([kept], result.excluded):
            some = [next(source) for _ in range(len(rows))]
            if [one.position for one in some] != rows.position.tolist():
                raise runs.changed_while_used(result.shard)
            batch, _, refused = parse_records(loaded, some)
            if refused:
                raise runs.changed_while_used(result.shard)
            phi, log = loaded.engine.features(loaded.engine.values(checkpoint.path), batch)
            yield pa.table(
                {
                    "id": [bytes(name) for name in rows.ids],
                    "position": rows.position,
                    "label": rows.label,
                    "content_hash": [
                        hashlib.blake2b(one.data, digest_size=16).digest() for one in some
                    ],
                    "log_probabilities": list(log.astype(np.float16)),
                    "features": list(np.nan_to_num(phi, posinf=0, neginf=0)),
                },
                schema=FEATURES,
            )


def _at(
    result: ShardResult, checkpoints: Sequence[CheckpointFile]
) -> Iterator[tuple[ShardResult, CheckpointFile]]:
    for checkpoint in checkpoints:
        yield result, checkpoint


def _read(output: Output, step: int, result: ShardResult) -> dict[str, Any]:
    table = tables.read(output.features(step, result.shard))
    label = np.asarray(table["label"].to_numpy(zero_copy_only=False), np.float64)
    logs = np.array(table["log_probabilities"].to_pylist(), np.float64)
    phi = np.array(table["features"].to_pylist(), np.float64)
    classes = logs.shape[1] if len(table) else 0
    known = np.isfinite(label) & (label >= 0) & (label < classes)
    place = np.where(known, label, 0).astype(np.int64)
    return {
        "known": known,
        "label": place,
        "target": np.eye(max(classes, 1))[place],
        "p": np.exp(logs),
        "phi": phi,
        "content_hash": table["content_hash"],
    }


def _labelled(output: Output, pair: tuple[int, ShardResult]) -> Iterator[tuple[int, Any, Any]]:
    step, result = pair
    read = _read(output, step, result)
    if read["known"].any():
        yield step, read["phi"][read["known"]], read["target"][read["known"]]


def _sums(pair: tuple[int, ShardResult], output: Output) -> Iterator[tuple[int, ridge.Sums]]:
    for step, phi, target in _labelled(output, pair):
        yield step, ridge.sums(phi, target)


def _added(parts: Iterable[Any]) -> Any:
    whole = None
    for part in parts:
        whole = part if whole is None else whole + part
    return whole


def _fits(pair: tuple[int, Any]) -> Iterator[tuple[int, ridge.Fitted]]:
    step, whole = pair
    if whole is not None and whole.count >= 2:
        yield step, ridge.fit(whole)


def _errors(
    pair: tuple[int, ShardResult], fits: Any, output: Output
) -> Iterator[tuple[int, np.ndarray]]:
    for step, phi, target in _labelled(output, pair):
        if step in fits:
            yield step, ridge.errors(fits[step], phi, target)


def _likelihoods(
    pair: tuple[int, ShardResult],
    fits: Any,
    errors: Any,
    output: Output,
) -> Iterator[tuple[int, np.ndarray]]:
    for step, phi, target in _labelled(output, pair):
        if step in fits:
            choice = int(errors[step].argmin())
            out = ridge.leave_one_out(fits[step], choice, phi, target)
            yield step, ridge.likelihoods(out, target)


@dataclasses.dataclass(frozen=True)
class Judge:
    """ShardResult → its path and rows of the night's signals."""

    output: Output
    checkpoints: Sequence[CheckpointFile]
    early: Sequence[CheckpointFile]

    def __call__(
        self,
        result: ShardResult,
        fits: Any,
        errors: Any,
        likelihoods: Any,
    ) -> tuple[str, pa.Table]:
        q, p, read = [], [], {}
        for step in (checkpoint.step for checkpoint in self.early):
            read = _read(self.output, step, result)
            if not len(read["known"]):
                return result.shard.path, SIGNALS.empty_table()
            p.append(read["p"])
            if step not in fits:  # too few labels for a regression: the network alone is asked
                q.append(read["p"])
                continue
            fitted, choice = fits[step], int(errors[step].argmin())
            out = ridge.leave_one_out(fitted, choice, read["phi"], None)
            own = ridge.leave_one_out(fitted, choice, read["phi"], read["target"])
            out = np.where(read["known"][:, None], own, out)
            q.append(ridge.probabilities(out, ridge.TEMPERATURES[int(likelihoods[step].argmax())]))
        m = mislabel.mixed(np.stack(q, 1), np.stack(p, 1))
        return result.shard.path, self._table(result, m, read)

    def _table(self, result: ShardResult, m: np.ndarray, read: Mapping[str, Any]) -> pa.Table:
        paths = [
            self.output.embeddings(result.set_name, c.step, result.shard) for c in self.checkpoints
        ]
        parts = list(embeddings.read_checkpoints(paths, result.excluded))
        last = [some[-1] for some in parts]
        rates = np.array([c.learning_rate for c in self.checkpoints])
        norms = np.concatenate([np.stack([e.squared_norm for e in s], 1) for s in parts])
        loss = np.concatenate([np.stack([e.loss for e in s], 1) for s in parts])
        known, label = read["known"], read["label"]
        ratio = mislabel.best_other_ratio(m, label) if m.shape[1] > 1 else np.zeros(len(m))
        return pa.table(
            {
                "id": [tables.text(name) for e in last for name in e.ids],
                "shard": [result.shard.path] * len(m),
                "position": np.concatenate([e.position for e in last]),
                "cohort": ["unknown"] * len(m),
                "label": tables.numbers(np.concatenate([e.label for e in last])),
                "prediction": tables.numbers(np.concatenate([e.prediction for e in last])),
                "self_influence": norms.astype(np.float64) @ rates,
                "loss": loss.astype(np.float64).mean(1),
                "mislabel_score": tables.numbers(
                    np.where(known, mislabel.scores(m, label), np.nan)
                ),
                "suggested_label": mislabel.suggestions(m).astype(np.float64),
                "best_other_ratio": tables.numbers(np.where(known, ratio, np.nan)),
                "content_hash": read["content_hash"].cast(pa.binary()),
            },
            schema=SIGNALS,
        )


def suspects_of(signals: pa.Table, first_seen: Mapping[tuple[str, bytes], str], date: str) -> Any:
    """Examples whose suggested label is another than the given one, worst first."""
    rows = []
    for row in signals.to_pylist():
        score, suggested = row["mislabel_score"], row["suggested_label"]
        if score is None or suggested == row["label"]:
            continue
        seen = first_seen.get((row["id"], row["content_hash"]), date)
        given = 1 - score
        confidence = min(1.0, given * (row["best_other_ratio"] or 0.0))
        extra = {"kind": "mislabelled", "score": score, "confidence": confidence}
        rows.append({**row, **extra, "supporting_ids": [], "first_seen": seen})
    rows.sort(key=lambda row: (-row["score"], row["id"]))
    return pa.Table.from_pylist(
        [{name: row[name] for name in SUSPECTS.names} for row in rows], schema=SUSPECTS
    )


def _write(_: Any, judged: Any, output: Output, date: str, shards: Any) -> dict[str, Any]:
    """Writes a night's tables; the summaries of its shards."""
    judged = sorted(judged, key=lambda one: one[0])
    whole = pa.concat_tables([table for _, table in judged])
    sinks.write_parquet(output.path("quality", date, "signals.parquet"), SIGNALS, [whole])
    suspects = suspects_of(whole, _seen_before(output, date), date)
    sinks.write_parquet(output.path("quality", date, "suspects.parquet"), SUSPECTS, [suspects])
    return {path: summary(table, True, shards[path]) for path, table in judged}


def _seen_before(output: Output, date: str) -> dict[tuple[str, bytes], str]:
    """Since when the suspects of the night before have been such."""
    nights = sorted(
        path
        for path in files.under(output.path("quality"))
        if path.endswith("/suspects.parquet") and path.split("/")[-2] < date
    )
    if not nights:
        return {}
    table = tables.read(nights[-1], columns=["id", "content_hash", "first_seen"])
    return {(r["id"], r["content_hash"]): r["first_seen"] for r in table.to_pylist()}


@dataclasses.dataclass
class Quality(beam.PTransform):
    """Training ShardResults → one dict: `nights.summary` of each shard, its tables being written.

    Attributes:
      output: the output directory.
      source: the engine.
      checkpoints: in training order.
      fingerprints: of every training shard's embeddings, by path.
      date: of the night.
    """

    output: Output
    source: EngineSource
    checkpoints: Sequence[CheckpointFile]
    fingerprints: Mapping[str, str]
    date: str

    def expand(self, results: beam.PCollection) -> beam.PCollection:
        early = list(self.checkpoints[: mislabel.first_half(len(self.checkpoints))])
        kept = (
            results
            | "AtEarly" >> beam.FlatMap(_at, early)
            | "Spread" >> beam.Reshuffle()
            | "Features"
            >> beam.FlatMap(WriteFeatures(self.output, self.source, dict(self.fingerprints)))
            | "Kept" >> beam.Reshuffle()
        )
        fits = beam.pvalue.AsDict(
            kept
            | "Sums" >> beam.FlatMap(_sums, self.output)
            | "AddSums" >> beam.CombinePerKey(_added)
            | "Fit" >> beam.FlatMap(_fits)
        )
        errors = beam.pvalue.AsDict(
            kept
            | "Errors" >> beam.FlatMap(_errors, fits, self.output)
            | "AddErrors" >> beam.CombinePerKey(_added)
        )
        likelihoods = beam.pvalue.AsDict(
            kept
            | "Likelihoods" >> beam.FlatMap(_likelihoods, fits, errors, self.output)
            | "AddLikelihoods" >> beam.CombinePerKey(_added)
        )
        judged = (
            kept
            | "First" >> beam.Filter(lambda pair, step=early[0].step: pair[0] == step)
            | "Shard" >> beam.Values()
            | "Judge"
            >> beam.Map(Judge(self.output, self.checkpoints, early), fits, errors, likelihoods)
        )
        return (
            results.pipeline
            | "TheNight" >> beam.Create([None])
            | "Write"
            >> beam.Map(
                _write, beam.pvalue.AsList(judged), self.output, self.date, dict(self.fingerprints)
            )
        )
