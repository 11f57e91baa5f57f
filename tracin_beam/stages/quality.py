"""Embeddings and feature files → what is wrong with each training example."""

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.errors import InputError
from tracin_beam.gradients import kinds
from tracin_beam.inputs import formats
from tracin_beam.scoring import sketch
from tracin_beam.signals import (
    confidence,
    influence,
    mislabel,
    neighbours,
    nights,
    registry,
    ridge,
    trajectory,
)
from tracin_beam.stages import neighbours as around
from tracin_beam.stages.embed import batches, parse_records
from tracin_beam.stages.evidence import Evidence
from tracin_beam.stages.joining import Census, Join
from tracin_beam.stages.self_influence import Moments, Squares
from tracin_beam.stages.workers import EngineSource
from tracin_beam.storage import (
    arrays,
    embeddings,
    features,
    files,
    marks,
    records,
    runs,
    sinks,
    tables,
)
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.features import Features
from tracin_beam.storage.runs import TRAIN, CheckpointFile, Output, ShardResult

VERSION = 6  # of the signals
_VERSION = 3  # of the feature files
_ENOUGH = 200  # examples of a cohort that is calibrated by itself
_EVIDENCE = 2000  # examples of a shard that confidence is judged by

# What the other examples say of a class: the likeliest one, its probability, and the one that the
# example is confidently taken for, if any.
OTHERS = ("others_label", "others_probability", "confident_label")

SIGNALS = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),
        ("position", pa.int64()),
        ("cohort", pa.string()),
        ("label", pa.float64()),
        ("prediction", pa.float64()),
        ("self_influence", pa.float64()),
        ("self_influence_preconditioned", pa.float64()),
        ("self_influence_by_checkpoint", pa.list_(pa.float64())),
        ("self_influence_preconditioned_by_checkpoint", pa.list_(pa.float64())),
        ("loss", pa.float64()),
        ("loss_by_checkpoint", pa.list_(pa.float32())),
        *((function.__name__, pa.float64()) for function in trajectory.COLUMNS),
        *((name, pa.float64()) for name in (*neighbours.COLUMNS, *OTHERS)),
        ("mislabel_score", pa.float64()),
        ("suggested_label", pa.float64()),
        ("best_other_ratio", pa.float64()),
        ("content_hash", pa.binary()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Night:
    """What the transforms of a night need to know.

    Attributes:
      output: the output directory.
      source: the engine.
      checkpoints: in training order.
      units: fingerprint of every training shard's embeddings, by the folder of the checkpoint, a
        slash, and the shard's path.
      kind: of the task: "classification", "multilabel" or "regression".
      cohorts: "trained", "new" or "unknown", by the path of the shard; see `inputs.trained`.
      trusted: paths of the shards that are trusted to be right.
      phi: what φ is, "gradient" or "inputs"; see `Engine.describe`.
      threshold: above which a prediction, which is then a score, stands for the class 1.
    """

    output: Output
    source: EngineSource
    checkpoints: tuple[CheckpointFile, ...]
    units: Mapping[str, str]
    kind: str
    cohorts: Mapping[str, str]
    trusted: frozenset[str] = frozenset()
    phi: str = "gradient"
    threshold: float | None = None

    @property
    def model(self) -> str:
        """A digest of the checkpoints: what they say is not comparable with what others said."""
        return runs.digest([checkpoint.identity for checkpoint in self.checkpoints])

    @property
    def places(self) -> list[int]:
        """The checkpoints for which φ is kept: the middle and the end of their first half."""
        half = mislabel.first_half(len(self.checkpoints))
        return sorted({half - 1, (half - 1) // 2})

    def predicted(self, rows: Embeddings) -> np.ndarray:
        """Predictions, of a classification the classes: float64 [n], NaN where there is none."""
        value = rows.prediction.astype(np.float64)
        if self.kind != "classification" or self.threshold is None:
            return value
        return np.where(np.isnan(value), np.nan, value > self.threshold)

    def features(self, place: int, result: ShardResult) -> str:
        return self.output.features(result.set_name, self.checkpoints[place], result.shard)

    def fingerprint(self, place: int, result: ShardResult) -> str:
        """Of all that a feature file is made from."""
        unit = self.units[f"{self.checkpoints[place].folder}/{result.shard.path}"]
        made_of = [unit, result.excluded, _VERSION, place in self.places, self.kind, self.phi]
        return runs.digest(made_of)

    def lookout(self, result: ShardResult) -> str:
        """The feature file in which neighbours are looked for: the last that has φ."""
        return self.features(self.places[-1], result)

    def embeddings(self, result: ShardResult) -> str:
        """An embedding file of the shard."""
        return self.output.embeddings(result.set_name, self.checkpoints[0], result.shard)

    def described(self, result: ShardResult) -> list[int]:
        """The checkpoints at which a shard is described: a test shard for its neighbours alone."""
        if self.is_judged_by(result):
            return list(range(len(self.checkpoints)))
        return [self.places[-1]]

    def is_judged_by(self, result: ShardResult) -> bool:
        """Whether a shard's labels tell of others': the training set's, and what is trusted."""
        return result.set_name == TRAIN or result.shard.path in self.trusted

    def made_from(self, result: ShardResult) -> str:
        """A digest of what that file was made from."""
        return self.fingerprint(self.places[-1], result)

    def part(self, result: ShardResult) -> str:
        """The signals of a shard."""
        return self.output.path("_state", "quality", "parts", result.shard.name + ".parquet")

    def evidence(self, result: ShardResult) -> str:
        """What some of a shard's examples tell of how sure their scores are."""
        return evidence_of(self.part(result))

    def sums(self, result: ShardResult) -> str:
        """The sums of a shard, under a name that says what they are of."""
        made_of = [self.fingerprint(place, result) for place in self.places]
        digest = runs.digest([made_of, self.kind])
        return files.join(self.all_sums, f"{result.shard.name}-{digest}.npz")

    @property
    def all_sums(self) -> str:
        return self.output.path("_state", "quality", "sums")

    def fit(self, place: int) -> str:
        return self.output.path("_state", "quality", f"ridge-{place}.npz")

    def read(self, result: ShardResult) -> Iterator[tuple[list[Embeddings], list[Features]]]:
        """The rows of a shard at all checkpoints, some at a time."""
        paths = [self.output.embeddings(result.set_name, c, result.shard) for c in self.checkpoints]
        described = [
            features.read(self.features(place, result)) for place in range(len(self.checkpoints))
        ]
        waiting: list[list[Embeddings]] = []
        rows = embeddings.read_checkpoints(paths, result.excluded)
        held = 0
        for pieces in zip(*described, strict=True):
            while held < len(pieces[0].position):
                waiting.append(next(rows))
                held += len(waiting[-1][0])
            joined = [embeddings.concatenate(list(parts)) for parts in zip(*waiting, strict=True)]
            size = len(pieces[0].position)
            now = [part.take(np.arange(size)) for part in joined]
            waiting = [[part.take(np.arange(size, held)) for part in joined]] if held > size else []
            held -= size
            if any((part.position != pieces[0].position).any() for part in now):
                raise InputError(
                    f"{self.features(0, result)} does not fit the embeddings beside it: remove it, "
                    "and run again."
                )
            yield now, list(pieces)


class WriteFeatures(beam.DoFn):
    """(place of a checkpoint, ShardResult) → (path of the shard, ShardResult).

    A file that is there for the same input is kept.
    """

    def __init__(self, night: Night) -> None:
        self._night = night

    def process(self, pair: tuple[int, ShardResult]) -> Iterator[tuple[str, ShardResult]]:
        place, result = pair
        night = self._night
        path = night.features(place, result)
        fingerprint = night.fingerprint(place, result)
        marks.kept_or_made(
            path,
            night.output.root,
            fingerprint,
            lambda: self._write(path, place, result, place in night.places),
        )
        yield result.shard.path, result

    def _write(self, path: str, place: int, result: ShardResult, wanted: bool) -> files.Stamp:
        pieces = self._pieces(place, result, wanted)
        first = next(pieces)
        widths = (x.shape[1] for x in (first.log_probabilities, first.features, first.labels))
        classes, dim, labels = widths
        kind = self._night.kind
        single = kind == "classification"
        schema = features.schema(classes, dim, labels, kind != "regression", single)
        return sinks.write_parquet(
            path, schema, (piece.table(schema) for some in ([first], pieces) for piece in some)
        )

    def _pieces(self, place: int, result: ShardResult, wanted: bool) -> Iterator[Features]:
        loaded = self._night.source.get()
        values = loaded.engine.values(self._night.checkpoints[place].path)
        excluded = set(result.excluded)
        source = (r for r in formats.read(result.shard.path) if r.position not in excluded)

        def described(waiting: Sequence[records.Record]) -> Features:
            batch, positions, rejected = parse_records(loaded, waiting)
            if rejected or batch is None:
                raise runs.changed_while_used(result.shard)
            outputs, phi = loaded.engine.describe(values, batch, wanted, self._night.phi)
            if phi is not None and loaded.engine.config.dim and self._night.phi == "inputs":
                phi = sketch.sketch(phi, dim=loaded.engine.config.dim)
            if self._night.kind == "multilabel":
                labels = np.asarray(batch.label, np.float32)
            else:
                labels = np.asarray(kinds.labels(batch.label, outputs, loaded.engine.kind))[:, None]
            outputs = np.nan_to_num(outputs, nan=features.LEAST_LOG)
            phi = np.zeros((len(positions), 0), np.float32) if phi is None else phi
            return Features(
                np.array(positions, np.int64),
                np.array([records.content_hash(r.data) for r in waiting], object),
                np.maximum(outputs, features.LEAST_LOG),
                np.nan_to_num(phi, posinf=0, neginf=0),
                labels,
            )

        for waiting, bad in batches(source, loaded.engine.batch_size):
            if bad or not waiting:  # embedding has excluded those
                raise runs.changed_while_used(result.shard)
            yield described(waiting)
        # Before the file has its name.
        runs.check_unchanged([result.shard])


def _targets(night: Night, last: Embeddings, described: Features) -> tuple[np.ndarray, np.ndarray]:
    """What the ridge is to tell, [n, K], and which examples have it."""
    if night.kind == "multilabel":
        return described.labels.astype(np.float64), np.ones(len(last), bool)
    label = last.label.astype(np.float64)
    if night.kind == "regression":
        known = np.isfinite(label)
        return np.where(known, label, 0)[:, None], known
    classes = described.log_probabilities.shape[1]
    known = np.isfinite(label) & (label >= 0) & (label < classes)
    return np.eye(classes)[np.where(known, label, 0).astype(int)], known


# What reading a file of arrays raises where it is gone, or not as it was written.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Sums = dict[int, ridge.Sums]
"""Those of some shards, by place of the checkpoint."""


def summed(result: ShardResult, night: Night) -> tuple[str, ShardResult]:
    """Writes the sums of a shard, unless they are there: their path, and the shard."""
    path = night.sums(result)
    if not files.exists(path):
        whole: Sums = {}
        for rows, described in night.read(result):
            target, known = _targets(night, rows[-1], described[0])
            for place in night.places:
                some = ridge.sums(described[place].features[known], target[known])
                whole[place] = whole[place] + some if place in whole else some
        _write_sums(path, whole)
    return path, result


def _write_sums(path: str, whole: Sums) -> files.Stamp:
    return arrays.write(
        path,
        {
            f"{place}.{name}": np.asarray(value)
            for place, some in whole.items()
            for name, value in vars(some).items()
        },
    )


def _read_sums(path: str) -> Sums:
    kept: dict[str, Any] = arrays.read(path)
    names = [field.name for field in dataclasses.fields(ridge.Sums)]
    return {
        place: ridge.Sums(**{name: kept[f"{place}.{name}"] for name in names})
        for place in sorted({int(key.partition(".")[0]) for key in kept})
    }


def total(pairs: Iterable[tuple[str, ShardResult]], night: Night) -> Iterator[tuple[int, str]]:
    """Fits the ridge of each checkpoint to the sums of all shards.

    The total of the last night is kept, so that only the sums of shards that came are added to it,
    and those of shards that have gone, or were others, subtracted.

    Args:
      pairs: as of `summed`, of all shards.
      night: what is known of it.

    Yields:
      Place of the checkpoint, and path of the fit.
    """
    wanted = dict(pairs)
    path = files.join(night.all_sums, "total.npz")
    mark = marks.beside(path)
    kept = marks.read(mark, night.output.root, "total", {path})
    before = {files.join(night.all_sums, name) for name in kept["of"]} if kept else set()
    there = {info.path for info in files.list_folder(night.all_sums)}
    gone, came = before - wanted.keys(), wanted.keys() - before
    whole: Sums = {}
    # What little is left of a large sum would be lost in its rounding.
    if before and 2 * len(gone) <= len(before & wanted.keys()):
        try:
            whole = _read_sums(path)
            for some in map(_read_sums, sorted(gone)):
                whole = {place: whole[place] - some[place] for place in some}
        except _DAMAGED:
            whole = {}
    if not whole:
        gone, came = set(), set(wanted)
    for name in sorted(came):
        try:
            some = _read_sums(name)
        except _DAMAGED:
            files.remove([name])
            some = _read_sums(summed(wanted[name], night)[0])
        whole = {place: whole[place] + some[place] if whole else some[place] for place in some}
    if gone or came:
        files.remove([mark])
        stamp = _write_sums(path, whole)
        names = sorted(name.rpartition("/")[2] for name in wanted)
        marks.write(mark, night.output.root, "total", {path: stamp}, of=names)
    files.remove(there - wanted.keys() - {path, mark})
    for place, of_all in whole.items():
        yield fitted(place, of_all, night)


def _added(parts: Iterable[Any]) -> Any:
    return functools.reduce(lambda a, b: a + b, parts)


def fitted(place: int, whole: ridge.Sums, night: Night) -> tuple[int, str]:
    """Fits the ridge of a checkpoint, and writes it to a file that workers read."""
    if whole.count < 2:
        raise InputError(f"only {whole.count} training examples have a label: too few to judge by")
    fit = vars(ridge.fit(whole))
    arrays.write(night.fit(place), {name: np.asarray(value) for name, value in fit.items()})
    return place, night.fit(place)


def _read_fits(fits: Mapping[int, str]) -> dict[int, ridge.Fitted]:
    found = {}
    for place, path in fits.items():
        kept: dict[str, Any] = arrays.read(path)
        found[place] = ridge.Fitted(
            **{**kept, "count": int(kept["count"]), "lambdas": tuple(kept["lambdas"].tolist())}
        )
    return found


def judged(
    result: ShardResult, night: Night, fits: Mapping[int, str]
) -> Iterator[tuple[tuple[int, str, bool], np.ndarray]]:
    """What tells the best λ and temperature of a checkpoint.

    By cohort, and whether the examples are trusted, too.

    float64 [L, 2 + T + (1 + T) K], a row for each λ: the examples, the summed squared leave-one-out
    error, log-likelihoods by temperature; the examples of each class, and the summed probability
    of their class, by temperature and class. Of a regression K is 0.
    """
    ridges = _read_fits(fits)
    found: dict[int, np.ndarray] = {}
    for rows, described in night.read(result):
        target, known = _targets(night, rows[-1], described[0])
        for place, one in ridges.items():
            phi, y = described[place].features[known], target[known]
            lines = []
            for choice in range(len(one.lambdas)):
                output = ridge.leave_one_out(one, choice, phi, y)
                line = [len(y), np.square(output - y).sum(), *np.zeros(len(ridge.TEMPERATURES))]
                if night.kind != "regression":
                    likely, own = ridge.tempered(output, y, night.kind == "multilabel")
                    line[2:] = [*likely, *y.sum(axis=0), *own.ravel()]
                lines.append(line)
            found[place] = found.get(place, 0) + np.array(lines)
    for place, table in found.items():
        path = result.shard.path
        yield (place, night.cohorts.get(path, "new"), path in night.trusted), table


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a checkpoint and a cohort.

    Attributes:
      place: of λ.
      temperature: of the outputs.
      error: mean squared leave-one-out error.
      usual: float64 [K], mean probability of the given class by class; NaN where it has no example.
    """

    place: int
    temperature: float
    error: float
    usual: np.ndarray


def choices(judged: Mapping[tuple[int, str, bool], np.ndarray], cohort: str) -> dict[int, Choice]:
    """What is chosen for a cohort, by place of the checkpoint.

    λ is that of all examples. The others are the cohort's own where it has some hundred examples:
    features that an example's label has had a part in fit it better than those of a new one. Where
    as many are trusted to be right, these alone choose.
    """
    found, warm = {}, len(ridge.TEMPERATURES)
    for place in sorted({place for place, _, _ in judged}):
        of = {key[1:]: table for key, table in judged.items() if key[0] == place}
        trusted = {key: table for key, table in of.items() if key[1]}
        if sum(table[0, 0] for table in trusted.values()) >= _ENOUGH:
            of = trusted
        whole = np.sum(list(of.values()), axis=0)
        best = int(whole[:, 1].argmin())
        own = np.sum([table for (own, _), table in of.items() if own == cohort], axis=0)
        count, error, *rest = (own if np.ndim(own) and own[0, 0] >= _ENOUGH else whole)[best]
        chosen = int(np.argmax(rest[:warm]))
        by_class = np.array(rest[warm:]).reshape(1 + warm, -1)
        usual = np.full(by_class.shape[1], np.nan)
        if by_class.size:
            np.divide(by_class[1 + chosen], by_class[0], out=usual, where=by_class[0] > 0)
        found[place] = Choice(best, ridge.TEMPERATURES[chosen], error / count, usual)
    return found


def spread(
    result: ShardResult,
    night: Night,
    fits: Mapping[int, str],
    judged: Mapping[tuple[int, str, bool], np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Of a regression, Σ |residual| and below it Σ φ |residual| of a shard: float64 [1 + D, 1]."""
    if night.kind != "regression":
        return
    cohort = night.cohorts.get(result.shard.path, "new")
    ridges, chosen = _read_fits(fits), choices(judged, cohort)
    found: dict[int, np.ndarray] = {}
    for rows, described in night.read(result):
        target, known = _targets(night, rows[-1], described[0])
        for place, one in ridges.items():
            phi, y = described[place].features[known].astype(np.float64), target[known]
            output = ridge.leave_one_out(one, chosen[place].place, phi, y)
            size = np.abs(y - output)
            some = np.concatenate([size.sum(axis=0)[None], phi.T @ size])
            found[place] = found.get(place, 0) + some
    yield from found.items()


def signals_of(
    night: Night,
    shard: str,
    rows: Sequence[Embeddings],
    described: Sequence[Features],
    ridges: Mapping[int, ridge.Fitted],
    choices: Mapping[int, Choice],
    spreads: Mapping[int, np.ndarray],
    near: Mapping[str, np.ndarray],
    preconditioned: Sequence[Embeddings] | None = None,
) -> tuple[pa.Table, dict[str, Any], dict[str, np.ndarray]]:
    """Rows of `signals.parquet` for the same examples at every checkpoint.

    Args:
      night: what is known of it.
      shard: path.
      rows, described: of the examples, by checkpoint.
      ridges: by place of the checkpoint.
      choices: those of the shard's cohort.
      spreads: of all shards, see `spread`.
      near: see `neighbours.read_columns`.
      preconditioned: the rows with ⟨g, T g⟩ for ‖g‖², where there is a preconditioner.

    Returns:
      The rows; of classes `nights.surprises`; and of those of them that have a label, the arrays
      that `confidence.judged` takes.
    """
    last = rows[-1]
    size = len(last)
    near = dict(near)
    labels_around = near.pop("labels", np.zeros((size, 0)))
    surprises: dict[str, Any] = {}
    evidence: dict[str, np.ndarray] = {}
    target, known = _targets(night, last, described[0])
    logs = np.stack([one.log_probabilities for one in described], axis=1).astype(np.float64)
    outputs = np.stack(
        [
            ridge.leave_one_out(
                ridges[place], choices[place].place, described[place].features, target
            )
            for place in night.places
        ],
        axis=1,
    )
    columns = {function.__name__: np.full(size, np.nan) for function in trajectory.COLUMNS}
    ratio, suggested = np.full(size, np.nan), np.full(size, np.nan)
    others = {name: np.full(size, np.nan) for name in OTHERS}
    if night.kind == "regression":
        suggested = outputs[:, :, 0].mean(axis=1)
        residual = target[:, 0] - suggested
        local, everywhere = np.zeros(size), 0.0
        for i, place in enumerate(night.places):
            # How far off examples like it are, by a regression of |residual| in its turn.
            fit = ridge.refitted(ridges[place], spreads[place][0], spreads[place][1:])
            far = np.abs(target - outputs[:, i])
            phi = described[place].features
            local += ridge.leave_one_out(fit, choices[place].place, phi, far)[:, 0]
            everywhere += float(fit.constant[0])
        parts = len(night.places)
        score = mislabel.as_score(mislabel.surprise(residual, local / parts, everywhere / parts))
    else:
        q = np.stack(
            [
                ridge.probabilities(
                    outputs[:, i], choices[place].temperature, night.kind == "multilabel"
                )
                for i, place in enumerate(night.places)
            ],
            axis=1,
        )
        p = np.exp(logs[:, : mislabel.first_half(len(rows))])
        m = mislabel.mixed(q, p)
        if night.kind == "multilabel":
            score = mislabel.separate_scores(m, target).max(axis=1)
        else:
            label = np.where(known, target.argmax(axis=1), 0)
            surprises = nights.kept_surprises(
                logs, m, night.cohorts[shard], np.where(known, label, -1)
            )
            shares = ridges[night.places[-1]].constant
            votes = mislabel.votes(labels_around, shares)
            m = mislabel.joined(q, p[:, -1], votes)
            score, suggested = mislabel.scores(m, label), mislabel.suggestions(m).astype(float)
            ratio = mislabel.best_other_ratio(m, label)
            mean = q.mean(axis=1)
            of = {"score": score, "evidence": (mean + votes) / 2, "label": label}
            evidence = {name: column[known] for name, column in of.items()}
            usual = np.mean([choices[place].usual for place in night.places], axis=0)
            taken = mislabel.confident(mean, usual).astype(float)
            values = mean.argmax(axis=1), mean.max(axis=1), np.where(taken < 0, np.nan, taken)
            others = {
                name: np.where(known, column, np.nan)
                for name, column in zip(OTHERS, values, strict=True)
            }
            for function in trajectory.COLUMNS:
                columns[function.__name__] = np.where(known, function(logs, label), np.nan)
    own = _self_influence(night, rows)
    transformed = own * np.nan if preconditioned is None else _self_influence(night, preconditioned)
    numbers = {
        "label": last.label,
        "prediction": night.predicted(last),
        "self_influence": own.sum(axis=1),
        "self_influence_preconditioned": transformed.sum(axis=1),
        "loss": last.loss,
        **columns,
        **near,
        **others,
        "mislabel_score": np.where(known, score, np.nan),
        "suggested_label": suggested,
        "best_other_ratio": np.where(known, ratio, np.nan),
    }
    table = pa.table(
        {
            "id": [tables.text(identity) for identity in last.ids],
            "shard": [shard] * size,
            "position": last.position,
            "cohort": [night.cohorts[shard]] * size,
            **{name: tables.numbers(values) for name, values in numbers.items()},
            "self_influence_by_checkpoint": list(own),
            "self_influence_preconditioned_by_checkpoint": (
                [None] * size if preconditioned is None else list(transformed)
            ),
            "loss_by_checkpoint": list(np.stack([one.loss for one in rows], axis=1)),
            "content_hash": pa.array(list(described[0].content_hash), pa.binary()),
        },
        schema=SIGNALS,
    )
    return table, surprises, evidence


def _self_influence(night: Night, rows: Sequence[Embeddings]) -> np.ndarray:
    """By checkpoint: float64 [n, C]."""
    rates = [checkpoint.rate for checkpoint in night.checkpoints]
    return influence.self_influence_by_checkpoint(registry.rows_of(rows, rates, ("squared_norm",)))


class WriteSignals(beam.DoFn):
    """ShardResult → (path of the shard, (path of its signals, `nights.summary`))."""

    def __init__(self, night: Night, join: Join | None = None) -> None:
        self._night = night
        self._join = join

    def process(
        self,
        result: ShardResult,
        fits: Mapping[int, str],
        judged: Mapping[tuple[int, str, bool], np.ndarray],
        spreads: Mapping[int, np.ndarray],
        suspects: Sequence[Mapping[str, Any]],
        census: Sequence[Census] = (),
    ) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
        del census  # which there is when the preconditioner's moments are on disk
        squares = Squares(self._join, result) if self._join else None
        night, ridges, summaries = self._night, _read_fits(fits), []
        mine = choices(judged, night.cohorts[result.shard.path])
        near = around.read_columns(night, result)  # which are there, since the suspects are
        told: list[dict[str, np.ndarray]] = []
        stride = -(-result.used // _EVIDENCE)

        def pieces() -> Iterator[pa.Table]:
            done = 0
            for rows, described in night.read(result):
                done += len(rows[-1])
                at = slice(done - len(rows[-1]), done)
                some = {name: column[at] for name, column in near.items()}
                transformed = squares.of(rows) if squares else None
                piece, surprises, told_of = signals_of(
                    night,
                    result.shard.path,
                    rows,
                    described,
                    ridges,
                    mine,
                    spreads,
                    some,
                    transformed,
                )
                told.append({name: column[::stride] for name, column in told_of.items()})
                classes, first = night.kind == "classification", night.predicted(rows[0])
                found = nights.summary(piece, classes, result.shard.identity, first)
                summaries.append({**found, **surprises, "model": night.model})
                yield piece

        path = night.part(result)
        sinks.write_parquet(path, SIGNALS, pieces())
        if night.kind == "classification":
            joined = {name: np.concatenate([one[name] for one in told]) for name in told[0]}
            arrays.write(night.evidence(result), joined)
        yield result.shard.path, (path, nights.merged(summaries))


def evidence_of(part: str) -> str:
    """`Night.evidence` of a shard, from `Night.part`."""
    folder, _, name = part.rpartition("/")
    name = name.removesuffix(".parquet") + ".npz"
    return files.join(folder.rpartition("/")[0], "evidence", name)


def curves(parts: Mapping[str, Sequence[str]]) -> dict[str, confidence.Curve]:
    """The probability of a wrong label by mislabel score, by cohort.

    Args:
      parts: by cohort, the signals of shards that are not trusted.
    """
    found = {cohort: _evidence(some) for cohort, some in parts.items()}
    few = [cohort for cohort, told in found.items() if len(told["label"]) < _ENOUGH]
    if few:
        every = _evidence([part for some in parts.values() for part in some])
        found |= dict.fromkeys(few, every)
    return {c: confidence.judged(**told) for c, told in found.items() if len(told["label"])}


def _evidence(parts: Sequence[str]) -> dict[str, np.ndarray]:
    """What examples of some shards tell, of as many as are looked at, from all over them."""
    classes = arrays.read(evidence_of(parts[0]))["evidence"].shape[1]
    most = max(1, confidence.LARGEST // (_EVIDENCE * classes))
    told = [arrays.read(evidence_of(part)) for part in parts[:: -(-len(parts) // most)]]
    return {name: np.concatenate([one[name] for one in told]) for name in told[0]}


def contents(pair: tuple[str, tuple[str, dict[str, Any]]]) -> Iterator[tuple[bytes, dict]]:
    """What tells duplicates: each example's row by its content."""
    shard, (path, _) = pair
    names = ["id", "position", "label", "content_hash"]
    for row in tables.read(path, names).to_pylist():
        yield row.pop("content_hash"), {**row, "shard": shard}


def duplicates(group: tuple[bytes, Iterable[dict]]) -> Iterator[dict[str, Any]]:
    """Suspects of which an earlier example has the same content."""
    content, rows = group
    first, *others = sorted(rows, key=lambda row: (row["shard"], row["position"]))
    for row in others:
        yield {
            **row,
            "kind": "duplicate",
            "score": 1.0,
            "confidence": 1.0,
            "supporting_ids": [first["id"]],
            "content_hash": content,
        }


def at_checkpoints(result: ShardResult, night: Night) -> Iterator[tuple[int, ShardResult]]:
    """A shard's result for each place of a checkpoint at which it is described."""
    for place in night.described(result):
        yield place, result


def any_of(group: tuple[str, Iterable[ShardResult]]) -> ShardResult:
    """The one result of a shard, once its files at all checkpoints are there."""
    return next(iter(group[1]))


def judge(
    results: beam.PCollection, night: Night, join: Join | None = None
) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
    """ShardResults of both sets → what `WriteSignals` yields, suspects of other kinds, evidence.

    Args:
      results: of embedding.
      night: what is known of it.
      join: of the preconditioner, where there is one.
    """
    every = (
        results
        | "Used" >> beam.Filter(lambda result: result.used > 0)
        | "Checkpoints" >> beam.FlatMap(at_checkpoints, night)
        | "SpreadFeatures" >> beam.Reshuffle()
        | "Features" >> beam.ParDo(WriteFeatures(night))
        | "ByShardOfFeatures" >> beam.GroupByKey()
        | "Shards" >> beam.Map(any_of)
    )
    shards = every | "Judging" >> beam.Filter(night.is_judged_by)
    fits = (
        shards
        | "Sums" >> beam.Map(summed, night)
        | "Together" >> beam.WithKeys(None)
        | "AllSums" >> beam.GroupByKey()
        | "Fit" >> beam.FlatMap(lambda group, night: total(group[1], night), night)
    )
    tables_of_judged = (
        shards
        | "Judge" >> beam.FlatMap(judged, night, beam.pvalue.AsDict(fits))
        | "AddTables" >> beam.CombinePerKey(_added)
    )
    spreads = (
        shards
        | "Spread"
        >> beam.FlatMap(
            spread, night, beam.pvalue.AsDict(fits), beam.pvalue.AsDict(tables_of_judged)
        )
        | "AddSpreads" >> beam.CombinePerKey(_added)
    )
    suspects = every | "Neighbours" >> around.Neighbours(night)
    judged_ones = every | "Training" >> beam.Filter(lambda result: result.set_name == TRAIN)
    known: dict[str, Any] = {}
    if join:
        train = results | "TrainResults" >> beam.Filter(lambda result: result.set_name == TRAIN)
        known["census"] = beam.pvalue.AsList(train | "Moments" >> Moments(join))
    parts = judged_ones | "Signals" >> beam.ParDo(
        WriteSignals(night, join),
        beam.pvalue.AsDict(fits),
        beam.pvalue.AsDict(tables_of_judged),
        beam.pvalue.AsDict(spreads),
        beam.pvalue.AsList(suspects),
        **known,
    )
    found = (
        parts
        | "Contents" >> beam.FlatMap(contents)
        | "SameContent" >> beam.GroupByKey()
        | "Duplicates" >> beam.FlatMap(duplicates)
    )
    proof = {"parts": parts, "shards": judged_ones} | "Evidence" >> Evidence(night)
    return parts, (found, suspects) | "Suspects" >> beam.Flatten(), proof
