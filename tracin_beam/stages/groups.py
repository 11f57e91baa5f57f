"""Embeddings and test shards → the influence of groups on groups, and what slices rest on.

A set is a group of test examples or a slice. The sum of its examples' gradients is taken as
`total` takes the whole test set's, for some test shards at a checkpoint at a time; the training
set is gone through once for all sets. What crosses the workers is moments of scores and the few
best rows of a slice.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.errors import InputError
from tracin_beam.gradients.engine import Queries
from tracin_beam.scoring import groups
from tracin_beam.scoring.groups import Known, Slice, Spread
from tracin_beam.scoring.topk import ROLES, SIGNS
from tracin_beam.stages import joining, total
from tracin_beam.stages.joining import Join
from tracin_beam.stages.metrics import Counters, Tally
from tracin_beam.stages.rescore import records_at
from tracin_beam.storage import arrays, embeddings, files, marks, records, runs, sinks, tables
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.runs import ShardResult

_log = logging.getLogger(__name__)

# Of sets' gradients at all checkpoints that are held together.
_SET_BYTES = 256 << 20
# Sets of a test set, and groups of a training set, at most: a table of more is read by nobody.
_MOST = 10_000
_COUNTED = (
    *("sums_found", "sums_made", "shards_found", "shards_scored", "records", "batches"),
    *("sum_msec", "compute_msec"),
)
GROUP, SLICE = "group_influence", "slice_influence"


@dataclasses.dataclass(frozen=True)
class Sets:
    """Which sets of test examples are asked for, and of what training examples.

    Attributes:
      by: what the training and the test set are grouped by; None for no groups.
      slices: of the test set.
      top_k: proponents, and opponents, of a slice.
      threshold: above which a prediction, which is then a score, stands for the class 1.
    """

    by: tuple[str, str] | None
    slices: tuple[Slice, ...]
    top_k: int
    threshold: float | None

    @property
    def asked(self) -> bool:
        return bool(self.by or self.slices)

    @property
    def identity(self) -> list[object]:
        return [self.by, [one.name for one in self.slices], self.top_k, self.threshold]

    def uses_group(self, side: int) -> bool:
        """Whether the training (0) or the test set (1) is told by what parse gives."""
        grouped = bool(self.by and self.by[side] == "group")
        return grouped or (side == 1 and any("group" in one.uses for one in self.slices))


@dataclasses.dataclass(frozen=True)
class Part:
    """Some test shards at a checkpoint.

    Attributes:
      checkpoint: its place.
      shards: of the test set.
      path: of the file with the sums of their sets' gradients; named by all it depends on.
    """

    checkpoint: int
    shards: tuple[ShardResult, ...]
    path: str


def parts_of(join: Join, sets: Sets, tests: Iterable[ShardResult]) -> list[Part]:
    """The parts whose sums are taken one by one."""
    together = total.in_groups(tests)
    found = []
    for place, checkpoint in enumerate(join.checkpoints):
        for group in together:
            content = [[join.units[r.shard.path], r.excluded] for r in group]
            # Labels and predictions are those at the last checkpoint, which units tell of.
            of: list[object] = [checkpoint.identity, join.target, content, sets.by and sets.by[1]]
            of += [[one.name for one in sets.slices], sets.threshold, join.score.on_embeddings]
            path = join.output.path(
                "evaluation", join.test_name, "sets", checkpoint.folder, f"{runs.digest(of)}.npz"
            )
            found.append(Part(place, tuple(group), path))
    return found


def known_of(sets: Sets, rows: Embeddings, given: np.ndarray | None, shard: str) -> Known:
    """What groups and slices are told by, of examples of a shard.

    Args:
      sets: which are asked for.
      rows: at the last checkpoint.
      given: object [n] of bytes, the groups that parse gives, or None.
      shard: its path.
    """
    prediction = rows.prediction.astype(np.float64)
    if sets.threshold is not None:
        above = (prediction > sets.threshold).astype(np.float64)
        prediction = np.where(np.isnan(prediction), np.nan, above)
    group = None if given is None else np.array([tables.text(g) for g in given], dtype=np.str_)
    return Known(rows.label.astype(np.float64), prediction, group, shard)


def _batches(
    join: Join, set_name: str, result: ShardResult, places: Sequence[int], parse: bool
) -> Iterator[tuple[list[Embeddings], list[records.Record], Any]]:
    """A shard's usable examples, a batch at a time.

    Args:
      join, set_name, result: which.
      places: of the checkpoints whose embeddings are wanted.
      parse: whether their records are.

    Yields:
      Their embeddings by checkpoint; their records, and these parsed, or [] and None.
    """
    loaded = join.source.get()
    size = loaded.engine.batch_size
    every = join.files(set_name, result.shard)
    wanted = set(joining.usable(result).tolist()) if parse else set()
    found = records_at(result.shard.path, wanted) if wanted else iter(())
    for rows in embeddings.read_checkpoints([every[p] for p in places], result.excluded):
        for start in range(0, len(rows[0]), size):
            index = np.arange(start, min(start + size, len(rows[0])))
            some = list(itertools.islice(found, len(index)))
            batch = loaded.parse([record.data for record in some]) if parse else None
            yield [part.take(index) for part in rows], some, batch


def summed(join: Join, sets: Sets, part: Part) -> dict[str, np.ndarray]:
    """Sums over a part's examples by set: "names" text [S], "counts" int64 [S], "sums" [S, N].

    A set is "group:<name>" or "slice:<number>". The sums are those of ∇t, float64, or of S∇t where
    the score is of embeddings.

    Raises:
      InputError: there are too many groups.
    """
    loaded = join.source.get()
    engine = loaded.engine
    on_embeddings = join.score.on_embeddings
    places = [part.checkpoint, -1] if on_embeddings else [-1]
    parse = not on_embeddings or sets.uses_group(1)
    counts: collections.Counter[str] = collections.Counter()
    sums: dict[str, np.ndarray] = {}
    waiting: dict[str, list[bytes]] = {}

    def add(name: str, total: np.ndarray) -> None:
        sums[name] = sums[name] + total if name in sums else total

    def flush(name: str) -> None:
        values = engine.values(join.checkpoints[part.checkpoint].path)
        add(name, engine.summed(values, loaded.parse(waiting.pop(name)), join.target))

    for result in part.shards:
        for rows, some, batch in _batches(join, join.test_name, result, places, parse):
            known = known_of(sets, rows[-1], batch and batch.groups, result.shard.path)
            for name, index in members(sets, known):
                counts[name] += len(index)
                if on_embeddings:
                    add(name, rows[0].embedding[index].sum(axis=0, dtype=np.float64))
                    continue
                for i in index:
                    waiting.setdefault(name, []).append(some[i].data)
                    if len(waiting[name]) == engine.batch_size:
                        flush(name)
            _check_few(sets, len(counts), 1)
    for name in list(waiting):
        flush(name)
    names = sorted(sums)
    size = engine.dim if on_embeddings else sum(spec.size for spec in engine.specs)
    return {
        "names": np.array(names, dtype=np.str_),
        "counts": np.array([counts[name] for name in names], np.int64),
        "sums": np.stack([sums[name] for name in names]) if names else np.zeros((0, size)),
    }


def _check_few(sets: Sets, count: int, side: int) -> None:
    if count > _MOST:
        raise InputError(
            f"--group_by={','.join(sets.by or ())}: the {('training', 'test')[side]} set has more "
            f"than {_MOST:,} groups; take something in which fewer examples differ."
        )


def members(sets: Sets, known: Known) -> Iterator[tuple[str, np.ndarray]]:
    """Each set that examples are in, and which of them: int64 [m]."""
    if sets.by:
        names = groups.names_of(sets.by[1], known)
        for name in np.unique(names):
            yield f"group:{name}", np.flatnonzero(names == name)
    for number, one in enumerate(sets.slices):
        index = np.flatnonzero(one.of(known))
        if len(index):
            yield f"slice:{number}", index


class SumSets(beam.DoFn):
    """Part → Part, when its file is there."""

    def __init__(self, join: Join, sets: Sets) -> None:
        self._join = join
        self._sets = sets
        self._counters = Counters("groups", *_COUNTED)

    def process(self, part: Part) -> Iterator[Part]:
        tally = Tally()
        root, name = self._join.output.root, os.path.basename(part.path)

        def make() -> files.Stamp:
            with tally.timed("sum"):
                found = summed(self._join, self._sets, part)
            checkpoint = self._join.checkpoints[part.checkpoint]
            runs.check_unchanged([*(result.shard for result in part.shards), checkpoint])
            return arrays.write(part.path, found)

        found = marks.kept_or_made(part.path, root, name, make)
        tally.add("sums_found" if found else "sums_made")
        self._counters.take(tally)
        yield part


@dataclasses.dataclass(frozen=True)
class Queried:
    """All sets of the test set.

    Attributes:
      names: text [S], sorted.
      counts: int64 [S], test examples.
    """

    names: np.ndarray
    counts: np.ndarray


def every_set(parts: Sequence[Part]) -> Queried:
    """The sets that are in any part."""
    counts: collections.Counter[str] = collections.Counter()
    for part in parts:
        if part.checkpoint == 0:
            found = arrays.read(part.path)
            counts.update(dict(zip(found["names"].tolist(), found["counts"].tolist(), strict=True)))
    names = sorted(counts)
    return Queried(np.array(names, dtype=np.str_), np.array([counts[n] for n in names], np.int64))


def queries_of(join: Join, parts: Sequence[Part], names: np.ndarray) -> list[list[np.ndarray]]:
    """T_c of the summed gradients of sets, by checkpoint: float64 [S, N] cut by weight.

    Where the score is of embeddings they are not cut.
    """
    found = []
    for place in range(len(join.checkpoints)):
        sums = np.zeros(0)
        for path in sorted(part.path for part in parts if part.checkpoint == place):
            stored = arrays.read(path)
            if not len(sums):
                sums = np.zeros((len(names), stored["sums"].shape[1]))
            known = np.isin(stored["names"], names)
            sums[np.searchsorted(names, stored["names"][known])] += stored["sums"][known]
        queries = total.transformed(join, place, sums)
        found.append([queries] if join.score.on_embeddings else total.by_weight(join, queries))
    return found


# What a row of the slices' table has only once all are known; until then it has its slice's number.
_LATER = ("slice", "test_examples", "role", "rank")
_BEST = pa.schema(
    [*(field for field in tables.SLICE_INFLUENCE if field.name not in _LATER), ("n", pa.int64())]
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a training shard's scores come to.

    Attributes:
      spreads: by training group, for the sets that are groups.
      best: rows of `_BEST`, the ends of each slice; their scores are sums over the slice.
    """

    spreads: dict[str, Spread]
    best: pa.Table


def scored(
    join: Join,
    sets: Sets,
    result: ShardResult,
    every: Queried,
    queries_of: Callable[[np.ndarray], list[list[np.ndarray]]],
    tally: Tally | None = None,
) -> Scored:
    """Goes through a training shard for all sets, some sets at a time.

    Args:
      join: what is joined.
      sets: which are asked for.
      result: the shard.
      every: the sets there are.
      queries_of: from the names of some of them, as the function of this name gives them.
      tally: takes records, batches and seconds.
    """
    tally = tally or Tally()
    numbers = join.numbers
    if not join.score.on_embeddings:
        numbers = len(join.checkpoints) * sum(s.size for s in join.source.get().engine.specs)
    step = max(1, _SET_BYTES // (4 * numbers))
    spreads: list[dict[str, Spread]] = []
    best = _BEST.empty_table()
    for start in range(0, len(every.names), step):
        names = every.names[start : start + step]
        queries = queries_of(names)
        grouped = np.array([name.startswith("group:") for name in names])
        mine: dict[str, Spread] = {}
        for rows, known, terms in _terms(join, sets, result, queries, tally):
            if grouped.any() and sets.by:
                found = groups.spreads(groups.names_of(sets.by[0], known), terms[:, grouped])
                mine = groups.merged([mine, found])
                _check_few(sets, len(mine), 0)
            for place in np.flatnonzero(~grouped):
                number = int(names[place].partition(":")[2])
                some = _rows(rows, terms[:, place], result.shard.path, number)
                best = ends(pa.concat_tables([best, some]), sets.top_k)
        spreads.append(mine)
    return Scored(_side_by_side(spreads), best)


def _side_by_side(spreads: Sequence[Mapping[str, Spread]]) -> dict[str, Spread]:
    """Moments of the same training groups for some sets after the other."""
    some = [one for one in spreads if one]
    return {
        name: Spread(
            some[0][name].count,
            np.concatenate([one[name].mean for one in some]),
            np.concatenate([one[name].squares for one in some]),
        )
        for name in (some[0] if some else ())
    }


def _terms(
    join: Join,
    sets: Sets,
    result: ShardResult,
    queries: Sequence[Sequence[np.ndarray]],
    tally: Tally,
) -> Iterator[tuple[Embeddings, Known, np.ndarray]]:
    """Rows at the last checkpoint, what is known of them, and terms of their scores [n, S, C]."""
    engine = join.source.get().engine
    on_embeddings = join.score.on_embeddings
    places = [*range(len(queries))] if on_embeddings else [-1]
    parse = not on_embeddings or sets.uses_group(0)
    for rows, _, batch in _batches(join, runs.TRAIN, result, places, parse):
        with tally.timed("compute"):
            if on_embeddings:
                products = [
                    part.embedding.astype(np.float64) @ query[0].T
                    for part, query in zip(rows, queries, strict=True)
                ]
            else:
                products = [
                    engine.scores(
                        engine.values(checkpoint.path),
                        batch,
                        Queries(len(query[0]), list(query), written_out=True, summed=True),
                    )
                    for checkpoint, query in zip(join.checkpoints, queries, strict=True)
                ]
        tally.add("records", len(rows[-1]))
        tally.add("batches", len(products))
        known = known_of(sets, rows[-1], batch and batch.groups, result.shard.path)
        yield rows[-1], known, join.score.by_checkpoint(np.stack(products, axis=2))


def _rows(rows: Embeddings, terms: np.ndarray, shard: str, number: int) -> pa.Table:
    return pa.table(
        {
            "score": terms.sum(axis=1),
            "score_by_checkpoint": list(terms),
            "train_id": [tables.text(identity) for identity in rows.ids],
            "train_label": tables.numbers(rows.label),
            "train_prediction": tables.numbers(rows.prediction),
            "train_shard": [shard] * len(rows),
            "train_position": rows.position,
            "n": [number] * len(rows),
        },
        schema=_BEST,
    )


def ends(rows: pa.Table, count: int) -> pa.Table:
    """The rows with the greatest and with the least scores of each slice, in their order."""
    number, score = rows["n"].to_numpy(), rows["score"].to_numpy()
    kept = np.zeros(len(rows), bool)
    for n in np.unique(number):
        mine = np.flatnonzero(number == n)
        for sign in (-1, 1):
            kept[mine[np.argsort(sign * score[mine], kind="stable")[:count]]] = True
    return rows.filter(pa.array(kept))


def packed(found: Scored) -> dict[str, np.ndarray]:
    """A shard's scores as arrays, for a file."""
    names = sorted(found.spreads)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _BEST) as writer:
        writer.write_table(found.best)
    return {
        "names": np.array(names, dtype=np.str_),
        "counts": np.array([found.spreads[n].count for n in names], np.int64),
        "means": np.array([found.spreads[n].mean for n in names]),
        "squares": np.array([found.spreads[n].squares for n in names]),
        "best": np.frombuffer(sink.getvalue(), np.uint8),
    }


def unpacked(stored: Mapping[str, np.ndarray]) -> Scored:
    """The inverse of `packed`."""
    columns = (stored[name] for name in ("counts", "means", "squares"))
    spreads = {
        str(name): Spread(int(count), mean, squares)
        for name, count, mean, squares in zip(stored["names"], *columns, strict=True)
    }
    return Scored(spreads, pa.ipc.open_stream(stored["best"].tobytes()).read_all())


def _scores_path(join: Join, result: ShardResult) -> str:
    return join.output.path(
        "evaluation", join.test_name, "sets", "train", result.shard.name + ".npz"
    )


class ScoreShard(beam.DoFn):
    """Training ShardResult → the path of what its scores come to, made unless it is there."""

    def __init__(self, join: Join, sets: Sets) -> None:
        self._join = join
        self._sets = sets
        # Of the shard before, which the next one often wants again.
        self._every: tuple[list[str], Queried] | None = None
        self._queries: tuple[np.ndarray, list[list[np.ndarray]]] | None = None
        self._counters = Counters("groups", *_COUNTED)

    def _every_set(self, parts: Sequence[Part]) -> Queried:
        paths = sorted(part.path for part in parts)
        if self._every is None or self._every[0] != paths:
            self._every, self._queries = (paths, every_set(parts)), None
        return self._every[1]

    def _queries_of(self, parts: Sequence[Part], names: np.ndarray) -> list[list[np.ndarray]]:
        if self._queries is None or not np.array_equal(self._queries[0], names):
            self._queries = None  # before the memory of others is taken
            self._queries = names, queries_of(self._join, parts, names)
        return self._queries[1]

    def process(self, result: ShardResult, parts: Sequence[Part]) -> Iterator[str]:
        join, tally = self._join, Tally()
        path, root = _scores_path(join, result), join.output.root
        content: list[object] = [
            join.units[result.shard.path],
            result.excluded,
            self._sets.identity,
        ]
        content += [sorted(part.path for part in parts), join.score_identity]
        fingerprint = runs.digest(content)

        def make() -> files.Stamp:
            queries = functools.partial(self._queries_of, parts)
            found = scored(join, self._sets, result, self._every_set(parts), queries, tally)
            runs.check_unchanged([result.shard, *join.checkpoints])
            return arrays.write(path, packed(found))

        found = marks.kept_or_made(path, root, fingerprint, make)
        tally.add("shards_found" if found else "shards_scored")
        self._counters.take(tally)
        yield path


def group_rows(spreads: Mapping[str, Spread], every: Queried) -> pa.Table:
    """The table of groups on groups, by the names of both."""
    grouped = np.array([name.startswith("group:") for name in every.names], bool)
    names = [name.removeprefix("group:") for name in every.names[grouped]]
    rows = []
    for train in sorted(spreads):
        spread = spreads[train]
        sums = spread.mean * spread.count
        for place, (test, count) in enumerate(zip(names, every.counts[grouped], strict=True)):
            error = spread.standard_error[place] / count
            rows.append(
                {
                    "train_group": train,
                    "test_group": test,
                    "score_sum": sums[place].sum(),
                    "score_mean": sums[place].sum() / (spread.count * count),
                    "standard_error": None if np.isnan(error) else error,
                    "score_by_checkpoint": sums[place].tolist(),
                    "train_examples": spread.count,
                    "test_examples": int(count),
                }
            )
    return pa.Table.from_pylist(rows, schema=tables.GROUP_INFLUENCE)


def slice_rows(best: Sequence[pa.Table], sets: Sets, every: Queried) -> pa.Table:
    """The table of slices: each one's proponents, then its opponents, best first."""
    counts = dict(zip(every.names.tolist(), every.counts.tolist(), strict=True))
    rows = ends(pa.concat_tables([_BEST.empty_table(), *best]), sets.top_k)
    number, score = rows["n"].to_numpy(), rows["score"].to_numpy()
    found = []
    for n, one in enumerate(sets.slices):
        mine = np.flatnonzero(number == n)
        count = counts.get(f"slice:{n}", 0)
        for role in ROLES if count else ():
            order = mine[np.argsort(-SIGNS[role] * score[mine], kind="stable")][: sets.top_k]
            for rank, row in enumerate(rows.take(order).to_pylist(), start=1):
                del row["n"]
                row["score"] /= count
                row["score_by_checkpoint"] = [x / count for x in row["score_by_checkpoint"]]
                own = {"slice": one.name, "test_examples": count, "role": role, "rank": rank}
                found.append({**row, **own})
    return pa.Table.from_pylist(found, schema=tables.SLICE_INFLUENCE)


def write_tables(
    join: Join, sets: Sets, train: Sequence[ShardResult], parts: Sequence[Part], _: Sequence[str]
) -> dict[str, Any]:
    """Writes both tables from what the shards' scores come to, in the shards' order.

    Returns:
      "made", path and `Stamp` of each file; "groups" and "slices", what run.json says of them.
    """
    every = every_set(parts)
    ordered = sorted(train, key=lambda result: result.shard.path)
    paths = [_scores_path(join, result) for result in ordered if result.used]
    shards = [unpacked(arrays.read(path)) for path in paths]
    said: dict[str, Any] = {"groups": None, "slices": None}
    made: dict[str, files.Stamp] = {}
    mark = _mark(join)
    files.remove([mark, join.output.done("influence", join.test_name)])
    if sets.by:
        rows = group_rows(groups.merged(shard.spreads for shard in shards), every)
        path = join.output.path(GROUP, join.test_name, runs.numbered(GROUP, 0, 1))
        made[path] = sinks.write_parquet(path, tables.GROUP_INFLUENCE, [rows])
        names = [len(rows[side].unique()) for side in ("train_group", "test_group")]
        said["groups"] = {"by": list(sets.by), "train": names[0], "test": names[1]}
    if sets.slices:
        rows = slice_rows([shard.best for shard in shards], sets, every)
        path = join.output.path(SLICE, join.test_name, runs.numbered(SLICE, 0, 1))
        made[path] = sinks.write_parquet(path, tables.SLICE_INFLUENCE, [rows])
        counts = dict(zip(every.names.tolist(), every.counts.tolist(), strict=True))
        said["slices"] = [
            {"slice": one.name, "test_examples": counts.get(f"slice:{n}", 0)}
            for n, one in enumerate(sets.slices)
        ]
        for one in said["slices"]:
            if not one["test_examples"]:
                _log.warning("--slice=%s: no test example is in it", one["slice"])
    _remove_others(join, [*paths, *(part.path for part in parts)], set(made))
    fingerprint = _fingerprint(join, [*train, *(r for p in parts for r in p.shards)])
    marks.write(mark, join.output.root, fingerprint, made, said=said)
    return {"made": list(made.items()), **said}


def kept(join: Join, train: Sequence[ShardResult], tests: Sequence[ShardResult]) -> dict[str, Any]:
    """As `write_tables`, of the tables of an earlier run, if they are of the same data and scores.

    If not they are removed: what lies in the folder of a table is taken for its rows.
    """
    fingerprint = _fingerprint(join, [*train, *tests])
    stored = marks.read(_mark(join), join.output.root, fingerprint)
    if stored is None:
        files.remove([_mark(join)])
        _remove_others(join, [], set())
        return {"made": [], "groups": None, "slices": None}
    return {"made": list(stored["files"].items()), **stored["said"]}


def _fingerprint(join: Join, results: Iterable[ShardResult]) -> str:
    content = sorted({(join.units[r.shard.path], str(r.excluded)) for r in results})
    return runs.digest([content, join.score_identity, join.target])


def _mark(join: Join) -> str:
    return join.output.done(GROUP, join.test_name)


def _remove_others(join: Join, intermediate: Iterable[str], made: Iterable[str]) -> None:
    """Removes tables that are not made now, and what others were made from."""
    wanted = {*made, *(of for path in intermediate for of in (path, marks.beside(path)))}
    sides = [(name, join.test_name) for name in (GROUP, SLICE)]
    folders = [*sides, ("evaluation", join.test_name, "sets")]
    there = {path for parts in folders for path in files.under(join.output.path(*parts))}
    gone = sorted(there - wanted)
    if gone:
        _log.info("removing influence of groups or slices that are not of this run")
    files.remove(gone)


@dataclasses.dataclass
class SetInfluence(beam.PTransform):
    """ShardResults of "train" and "tests" → one dict, as `write_tables` gives it.

    Attributes:
      join: what is joined.
      sets: which are asked for; without any, tables of an earlier run are kept if they hold still.
    """

    join: Join
    sets: Sets

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        once = inputs["train"].pipeline | "Once" >> beam.Create([None])
        train, tests = (beam.pvalue.AsList(inputs[side]) for side in ("train", "tests"))
        if not self.sets.asked:
            return once | "Kept" >> beam.Map(
                lambda _, train, tests, join: kept(join, train, tests), train, tests, self.join
            )
        parts = (
            once
            | "Parts"
            >> beam.FlatMap(
                lambda _, tests, join, sets: parts_of(join, sets, tests),
                tests,
                self.join,
                self.sets,
            )
            | "SpreadParts" >> beam.Reshuffle()
            | "SumSets" >> beam.ParDo(SumSets(self.join, self.sets))
        )
        done = (
            inputs["train"]
            | "Usable" >> beam.Filter(lambda result: result.used > 0)
            | "SpreadTrain" >> beam.Reshuffle()
            | "ScoreShard"
            >> beam.ParDo(ScoreShard(self.join, self.sets), beam.pvalue.AsList(parts))
        )
        return once | "WriteTables" >> beam.Map(
            lambda _, train, parts, done, join, sets: write_tables(join, sets, train, parts, done),
            train,
            beam.pvalue.AsList(parts),
            beam.pvalue.AsList(done),
            self.join,
            self.sets,
        )
