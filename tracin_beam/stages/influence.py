"""Test and training embeddings → influence tables with exact scores.

Each step has its module: `joining` what is joined, `index` and `search` the candidates, `rescore`
their exact scores. Here these are put together, and the best of them become rows.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa

from tracin_beam.scoring import cost, topk
from tracin_beam.scoring.topk import ROLES
from tracin_beam.stages import curvature, index, joining
from tracin_beam.stages.index import Piece
from tracin_beam.stages.joining import Census, Join, TableFile
from tracin_beam.stages.rescore import Rescore, all_places, places_by_group
from tracin_beam.stages.search import (
    BothScored,
    Estimate,
    SearchByIndex,
    SearchByProduct,
    TopOfBlock,
    by_group,
)
from tracin_beam.storage import embeddings, files, runs, sinks, tables
from tracin_beam.storage.runs import Made, ShardResult

# Rows of a file that are made at a time.
_PIECE_ROWS = 50_000


class Picked(NamedTuple):
    """Rows of the influence table, before they say whose they are.

    Attributes:
      query: int64 [n].
      role, rank: int32 [n], the role's place in ROLES, and the rank from 1.
      shard, position: int32 and int64 [n], of the training example.
      score: float64 [n].
      by_checkpoint: float64 [n, C].
    """

    query: np.ndarray
    role: np.ndarray
    rank: np.ndarray
    shard: np.ndarray
    position: np.ndarray
    score: np.ndarray
    by_checkpoint: np.ndarray


def ranked(both: BothScored) -> Picked:
    """Both roles' rows, best first, with their ranks."""
    parts = []
    for place, rows in enumerate(both):
        rank = topk.ranks_within(rows.query) + 1
        role = np.full(len(rank), place, np.int32)
        parts.append(Picked(rows.query, role, rank.astype(np.int32), *rows[1:]))
    return Picked(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def picked_by_group(
    pair: tuple[int, BothScored], census: Census, join: Join
) -> Iterator[tuple[int, Picked]]:
    """(block, both roles' best) → (group, their rows there)."""
    picked = ranked(pair[1])
    group_of = census.group_of(join.train)[picked.shard]
    for group in np.unique(group_of):
        mine = group_of == group
        yield int(group), Picked(*(column[mine] for column in picked))


class DescribeTrain(beam.DoFn):
    """(group, [Picked]) → (number of a file, rows with the training examples' columns)."""

    def __init__(self, join: Join, top_k: int) -> None:
        self._join = join
        self._top_k = top_k

    def process(
        self, pair: tuple[int, Iterable[Picked]], census: Census
    ) -> Iterator[tuple[int, pa.Table]]:
        parts = list(pair[1])
        picked = Picked(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        order = np.argsort(picked.shard, kind="stable")
        picked = Picked(*(column[order] for column in picked))
        starts = np.array([file.start for file in census.files(self._top_k)])
        stops = np.array([file.stop for file in census.files(self._top_k)])
        filled = np.flatnonzero(stops > starts)
        number = filled[np.searchsorted(starts[filled], picked.query, side="right") - 1]
        table = self._described(picked)
        for file in np.unique(number):
            yield int(file), table.take(np.flatnonzero(number == file))

    def _described(self, picked: Picked) -> pa.Table:
        """Rows in the order of their training shards, in the same order."""
        found = []
        for shard in np.unique(picked.shard):
            at = picked.position[picked.shard == shard]
            path = self._join.files(runs.TRAIN, self._join.train[shard])[-1]
            rows = embeddings.read_at(path, np.unique(at))
            found.append(rows.take(np.searchsorted(rows.position, at)))
        train = embeddings.concatenate(found)
        shards = pa.array([shard.path for shard in self._join.train], pa.string())
        checkpoints = picked.by_checkpoint.shape[1]
        offsets = np.arange(0, checkpoints * len(picked.query) + 1, checkpoints, dtype=np.int32)
        return pa.table(
            {
                "query": picked.query,
                "role": pa.DictionaryArray.from_arrays(picked.role, pa.array(ROLES)),
                "rank": picked.rank,
                "score": picked.score,
                "score_by_checkpoint": pa.ListArray.from_arrays(
                    offsets, picked.by_checkpoint.ravel()
                ),
                "train_id": [tables.text(identity) for identity in train.ids],
                "train_label": tables.numbers(train.label),
                "train_prediction": tables.numbers(train.prediction),
                "train_shard": pa.DictionaryArray.from_arrays(picked.shard, shards),
                "train_position": picked.position,
            }
        ).unify_dictionaries()


def rows_of_file(
    join: Join, census: Census, file: TableFile, parts: Sequence[pa.Table], exact: bool
) -> Iterator[pa.Table]:
    """The rows of a file of the influence table, in their order, some thousand at a time.

    Args:
      join, census: what is joined.
      file: which.
      parts: its rows from every group, from `DescribeTrain`.
      exact: whether the scores are.
    """
    if not parts:
        return
    rows = pa.concat_tables([part.unify_dictionaries() for part in parts]).unify_dictionaries()
    query, rank = rows["query"].to_numpy(), rows["rank"].to_numpy()
    role = rows["role"].combine_chunks().indices.to_numpy()
    rows = rows.take(np.lexsort((rank, role, query)))
    shard = join.test[file.shard]
    _, positions = census.places(np.arange(file.start, file.stop))
    tests = embeddings.read_at(join.files(join.test_name, shard)[-1], positions)
    ids = pa.array([tables.text(identity) for identity in tests.ids], pa.string())
    described = pa.table(
        {
            "test_id": ids,
            "test_label": tables.numbers(tests.label),
            "test_prediction": tables.numbers(tests.prediction),
            "test_position": tests.position,
        }
    )
    for start in range(0, len(rows), _PIECE_ROWS):
        piece = rows.slice(start, _PIECE_ROWS)
        own = described.take(piece["query"].to_numpy() - file.start)
        for name in own.column_names:
            piece = piece.append_column(name, own[name])
        piece = piece.append_column("test_shard", pa.array([shard.path] * len(piece)))
        yield piece.append_column("exact", pa.array([exact] * len(piece)))


class WriteTable(beam.DoFn):
    """(number of a file, its rows) → (path, Stamp) of the file."""

    def __init__(self, join: Join, top_k: int, exact: bool) -> None:
        self._join = join
        self._top_k = top_k
        self._exact = exact

    def process(
        self, pair: tuple[int, Mapping[str, Iterable[pa.Table]]], census: Census
    ) -> Iterator[Made]:
        number, parts = pair
        every = census.files(self._top_k)
        rows = rows_of_file(self._join, census, every[number], list(parts["rows"]), self._exact)
        name = runs.numbered("influence", number, len(every))
        path = self._join.output.influence(self._join.test_name, name)
        # What vouches for the tables of an earlier run must not do so for these.
        files.remove([self._join.output.done("influence", self._join.test_name)])
        yield path, sinks.write_parquet(path, tables.INFLUENCE, rows)


@dataclasses.dataclass
class Influence(beam.PTransform):
    """ShardResults of "train" and "tests" → tables.

    The outputs are the "made" tables, "best" as (block, both roles' `Scored`), "groups" and
    "census".

    Attributes:
      join: what is joined.
      index: how candidates are found.
      index_rows: training examples that are indexed together.
      top_k: rows per query and role.
      rescore: candidates per query and role to be scored exactly, more where all pairs are few;
        0 for estimates.
      recall_queries: queries to sample, for the retrieval to be judged by.
    """

    join: Join
    index: cost.Index
    index_rows: int
    top_k: int
    rescore: int
    recall_queries: int

    def expand(self, inputs: Mapping[str, beam.PCollection]) -> dict[str, beam.PCollection]:
        join, count = self.join, self.join.score.more * self.rescore or self.top_k
        # A score that is defined on embeddings is exact by their products.
        rescored = self.rescore > 0 and not join.score.on_embeddings
        exact = self.rescore > 0 or join.score.on_embeddings
        counted = (
            inputs["train"].pipeline
            | "Once" >> beam.Create([None])
            | "Census"
            >> beam.Map(
                self._census,
                beam.pvalue.AsList(inputs["train"]),
                beam.pvalue.AsList(inputs["tests"]),
            )
        )
        if join.score.preconditioner != "none":
            counted = counted | "Curvature" >> curvature.TakeCurvature(join)
        census = beam.pvalue.AsSingleton(counted)
        groups = counted | "Groups" >> beam.FlatMap(_groups) | "SpreadGroups" >> beam.Reshuffle()
        if self.index == "exact":
            found = groups | "Search" >> beam.ParDo(SearchByProduct(join, count, rescored), census)
            candidates = found | "Candidates" >> beam.CombinePerKey(TopOfBlock(count))
        else:
            found = (
                counted
                | "Pieces" >> beam.FlatMap(self._pieces)
                | "SpreadPieces" >> beam.Reshuffle()
                | "Build" >> beam.ParDo(index.BuildPiece(join))
                | "Search" >> beam.ParDo(SearchByIndex(join, count, rescored), census)
            )
            candidates = found | "Candidates" >> beam.CombinePerKey(TopOfBlock(cost.MORE * count))
        if self.index == "scann" or not rescored:
            estimated = (
                candidates
                | "CandidatesOfGroup" >> beam.FlatMap(by_group, census, join)
                | "OfGroup" >> beam.GroupByKey()
                | "Estimate" >> beam.ParDo(Estimate(join), census)
            )
            candidates = estimated | "Estimated" >> beam.CombinePerKey(TopOfBlock(count))
        best = candidates
        if rescored:
            places = candidates | "PlacesOfGroup" >> beam.FlatMap(places_by_group, census, join)
            every = counted | "AllPlaces" >> beam.FlatMap(all_places, join)
            scored = (
                (places, every)
                | beam.Flatten()
                | "Places" >> beam.GroupByKey()
                | "Rescore" >> beam.ParDo(Rescore(join, self.top_k), census)
            )
            best = scored | "Best" >> beam.CombinePerKey(TopOfBlock(self.top_k))
        rows = (
            best
            | "PickedOfGroup" >> beam.FlatMap(picked_by_group, census, join)
            | "Picked" >> beam.GroupByKey()
            | "DescribeTrain" >> beam.ParDo(DescribeTrain(join, self.top_k), census)
        )
        # A shard without any usable example has a table too, an empty one.
        every_file = counted | "Files" >> beam.FlatMap(_files, self.top_k)
        made = (
            {"rows": rows, "every": every_file}
            | "RowsOfFile" >> beam.CoGroupByKey()
            | "WriteTable" >> beam.ParDo(WriteTable(join, self.top_k, exact), census)
        )
        return {"best": best, "made": made, "groups": groups, "census": counted}

    def _census(
        self, _: None, train: Sequence[ShardResult], tests: Sequence[ShardResult]
    ) -> Census:
        groups = index.planned_groups(self.join, train, self.index_rows)
        return joining.take_census(self.join, groups, train, tests, self.recall_queries)

    def _pieces(self, census: Census) -> list[Piece]:
        return [piece for g in census.groups for piece in index.pieces(g, self.index_rows)]


def _groups(census: Census) -> Iterator[joining.Group]:
    return iter(census.groups)


def _files(census: Census, top_k: int) -> list[tuple[int, None]]:
    return [(number, None) for number in range(len(census.files(top_k)))]
