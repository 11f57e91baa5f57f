"""The worst mislabelled suspects → training examples that speak for and against their labels.

Proponents and opponents of a suspect are by TracInCP of the embeddings, its own loss being what is
explained; beside them are its nearest neighbours in φ that have the suggested label.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracin_beam.signals import mislabel
from tracin_beam.stages import neighbours
from tracin_beam.storage import arrays, embeddings, tables
from tracin_beam.storage.runs import TRAIN, CheckpointFile, ShardResult

MOST = 1000  # suspects that have evidence
EACH = 3  # examples of a role
ROLES = ("supporting", "proponents", "opponents")
_COLUMNS = ("query", "role", "value", "position")


class Site(neighbours.Site, Protocol):
    """What is asked of `stages.quality.Night`."""

    @property
    def checkpoints(self) -> Sequence[CheckpointFile]: ...


def _candidates(
    pair: tuple[str, tuple[str, Any]], site: Site
) -> Iterator[tuple[float, str, int, float]]:
    """A shard's worst mislabelled suspects: score, shard, position and suggested label."""
    shard, (path, _) = pair
    if shard in site.trusted:
        return
    names = ["mislabel_score", "position", "suggested_label", "best_other_ratio"]
    piece = tables.read(path, names)
    piece = piece.filter(pc.fill_null(mislabel.suspected(piece, site.kind), False))
    order = np.argsort(-piece["mislabel_score"].to_numpy(), kind="stable")[:MOST]
    for row in piece.take(pa.array(order)).to_pylist():
        suggested = row["suggested_label"]
        suggested = float("nan") if suggested is None else suggested
        yield row["mislabel_score"], shard, row["position"], suggested


def _write_queries(
    worst: Sequence[tuple[float, str, int, float]], shards: Sequence[ShardResult], site: Site
) -> str:
    """Writes what the suspects are looked for with; the path, or nothing where there are none."""
    if not worst:
        return ""
    rows = neighbours.rows_of(site, shards, TRAIN)
    found: dict[str, list[np.ndarray]] = {}
    for result in rows:
        mine = sorted(item[2:] for item in worst if item[1] == result.shard.path)
        if not mine:
            continue
        positions = np.array([position for position, _ in mine])
        parts = [
            embeddings.read_at(site.output.embeddings(TRAIN, c, result.shard), positions)
            for c in site.checkpoints
        ]
        vectors = [
            c.rate * part.embedding[np.argsort(part.position)]
            for c, part in zip(site.checkpoints, parts, strict=True)
        ]
        near = neighbours.nearest_of(site, result, positions)
        one = {
            "vector": np.concatenate(vectors, axis=1).astype(np.float32),
            "shard": np.full(len(mine), result.shard.path),
            "position": positions,
            "suggested": np.array([suggested for _, suggested in mine]),
            "near_shard": near.shard,
            "near_row": near.row,
        }
        for name, values in one.items():
            found.setdefault(name, []).append(values)
    path = site.output.path("_state", "quality", "evidence.npz")
    arrays.write(path, {name: np.concatenate(values) for name, values in found.items()})
    return path


def _found(
    result: ShardResult, site: Site, path: str, shards: Sequence[ShardResult]
) -> Iterator[dict[str, np.ndarray]]:
    """What of a shard is evidence, as columns: at most `EACH` examples of a role and query."""
    if not path:
        return
    asked = arrays.read(path)
    rows = neighbours.rows_of(site, shards, TRAIN)
    number = [one.shard.path for one in rows].index(result.shard.path)
    near, rank = np.nonzero(asked["near_shard"] == number)
    near_row = asked["near_row"][near, rank]
    own = np.where(asked["shard"] == result.shard.path, asked["position"], -1)
    paths = [site.output.embeddings(TRAIN, c, result.shard) for c in site.checkpoints]
    kept: dict[str, np.ndarray] = {}
    start = 0
    for parts in embeddings.read_checkpoints(paths, result.excluded):
        position = parts[-1].position
        products = asked["vector"] @ np.concatenate([p.embedding for p in parts], axis=1).T
        products = np.where(own[:, None] == position, 0, products)
        pieces = [kept] if kept else []
        for role, signed in ((1, products), (2, -products)):
            count = min(EACH, signed.shape[1])
            best = np.argpartition(-signed, count - 1, axis=1)[:, :count]
            query = np.repeat(np.arange(len(signed)), count)
            value, best = signed[query, best.ravel()], best.ravel()
            pieces.append(_columns(query, role, value, position[best], value > 0))
        here = (near_row >= start) & (near_row < start + len(position))
        row = near_row[here] - start
        right = np.ones(len(row), bool)
        if site.kind == "classification":
            right = parts[-1].label[row] == asked["suggested"][near[here]]
        pieces.append(_columns(near[here], 0, -rank[here].astype(float), position[row], right))
        kept = _best(pieces)
        start += len(position)
    if kept:
        yield {**kept, "shard": np.full(len(kept["query"]), result.shard.path, object)}


def _columns(
    query: np.ndarray, role: int, value: np.ndarray, position: np.ndarray, right: np.ndarray
) -> dict[str, np.ndarray]:
    columns = (query, np.full(len(query), role), value, position)
    return {name: column[right] for name, column in zip(_COLUMNS, columns, strict=True)}


def _best(pieces: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The `EACH` rows of the largest values for each query and role."""
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        return {}
    whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    shard = whole["shard"].astype(str) if "shard" in whole else np.zeros(len(whole["query"]))
    order = np.lexsort((whole["position"], shard, -whole["value"], whole["role"], whole["query"]))
    group = whole["query"][order] * len(ROLES) + whole["role"][order]
    first = np.searchsorted(group, group, side="left")
    chosen = order[np.arange(len(order)) - first < EACH]
    return {name: column[chosen] for name, column in whole.items()}


def _rows(best: Mapping[str, np.ndarray], path: str) -> Iterator[dict[str, Any]]:
    """Each suspect's "shard" and "position", and for each of `ROLES` (shard, position) of some."""
    if not path:
        return
    asked = arrays.read(path)
    rows: list[dict[str, Any]] = [
        {"shard": str(shard), "position": int(position), **{role: [] for role in ROLES}}
        for shard, position in zip(asked["shard"], asked["position"], strict=True)
    ]
    if best:
        columns = (best[name].tolist() for name in ("query", "role", "shard", "position"))
        for query, role, shard, position in zip(*columns, strict=True):
            rows[query][ROLES[role]].append((shard, position))
    yield from rows


class Evidence(beam.PTransform):
    """What `WriteSignals` yields, and its shards → what `_rows` yields."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> beam.PCollection:
        site, parts, shards = self._site, inputs["parts"], inputs["shards"]
        every = beam.pvalue.AsList(shards)
        path = beam.pvalue.AsSingleton(
            parts
            | "Candidates" >> beam.FlatMap(lambda pair: _candidates(pair, site))
            | "Worst" >> beam.CombineGlobally(beam.combiners.TopCombineFn(MOST))
            | "WriteQueries"
            >> beam.Map(lambda worst, some: _write_queries(worst, some, site), every)
        )
        return (
            shards
            | "Found"
            >> beam.FlatMap(lambda one, at, some: _found(one, site, at, some), path, every)
            | "Best" >> beam.CombineGlobally(_best)
            | "Rows" >> beam.FlatMap(_rows, path)
        )
