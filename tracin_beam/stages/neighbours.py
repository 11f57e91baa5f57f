"""Feature files → each training example's nearest others in φ, and what follows from where it lies.

The exact product of all pairs, in blocks. What was found is kept by shard, with which shards it was
found among: of shards that came only the product with these is new, and only for the examples that
lose neighbours with a shard that went all others are looked through again. Of very many examples
each is compared with a sample of them (see `MOST_ROWS`).
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import apache_beam as beam
import numpy as np

from tracin_beam.errors import InputError
from tracin_beam.scoring import sketch
from tracin_beam.signals import neighbours, suspects
from tracin_beam.signals.neighbours import COUNT, Around, Found, Nearest
from tracin_beam.storage import arrays, embeddings, features, files, marks, runs, tables
from tracin_beam.storage.runs import TRAIN, Output, ShardResult

_VERSION = 1
# More than are used, so that the exact ones stay known when a shard with some of them goes.
_KEPT = COUNT + 6
_QUERY_BYTES = 64 << 20  # of features of queries that go through all rows together
# With more rows, each example is compared with a share of them (those of the lowest content
# hashes), so that the cost grows with the number of examples and not with its square: 2·n·m·D
# operations for n examples, m rows and D features, or two hours of a core for each million at 1024.
# Near-duplicates are then found where the other is among the sample.
MOST_ROWS = 200_000
_SUPPORTING = 5
_SKETCHED = 64  # features that sums of classes are kept of
_TYPICAL = 5
_CLASSES = (*(field.name for field in dataclasses.fields(suspects.Sums)), "typical")


class Site(Protocol):
    """What is asked of `stages.quality.Night`."""

    @property
    def output(self) -> Output: ...

    @property
    def kind(self) -> str: ...

    @property
    def trusted(self) -> Collection[str]:
        """Paths of the shards that are trusted to be right."""

    def lookout(self, result: ShardResult) -> str:
        """The feature file in which neighbours are looked for."""

    def embeddings(self, result: ShardResult) -> str:
        """An embedding file of the shard."""

    def made_from(self, result: ShardResult) -> str:
        """A digest of what that file was made from."""


def path_of(site: Site, result: ShardResult, among: str = TRAIN) -> str:
    """The neighbours of a shard's examples among the rows of a set."""
    return site.output.path("_state", "quality", "neighbours", among, result.shard.name + ".npz")


TRUSTED = "train=trusted"  # among which rows: no test set has such a name


def rows_of(site: Site, shards: Sequence[ShardResult], among: str) -> list[ShardResult]:
    """The shards of a set: `runs.TRAIN`, `TRUSTED` or the name of a test set."""
    if among == TRUSTED:
        found = [one for one in shards if one.shard.path in site.trusted]
    else:
        found = [one for one in shards if one.set_name == among]
    return sorted(found, key=lambda one: one.shard.path)


def share_of(rows: int) -> float:
    """The share of so many rows that each example is compared with: 1, ½, ¼, …"""
    return float(min(1.0, 2.0 ** np.floor(np.log2(MOST_ROWS / max(rows, 1)))))


def in_share(hashes: np.ndarray, share: float) -> np.ndarray:
    return hashes <= np.uint64(min(share * 2.0**64, 2.0**64 - 2048)) if share < 1 else hashes >= 0


def grouped(site: Site, shards: Sequence[ShardResult]) -> Iterator[tuple[str, list[ShardResult]]]:
    """Shards whose examples go through all rows of a set together, with the set's name.

    Training examples are compared with each other, with the test set and with what is trusted, and
    what is trusted with itself.
    """
    train = rows_of(site, shards, TRAIN)
    width = features.width(site.lookout(train[0])) if train else 0
    tests = sorted({one.set_name for one in shards} - {TRAIN})
    trusted = rows_of(site, shards, TRUSTED)
    queries = dict.fromkeys((TRAIN, *tests), train)
    if trusted:
        queries[TRUSTED] = [*train, *(one for one in trusted if one.set_name != TRAIN)]
    for among, results in queries.items():
        group: list[ShardResult] = []
        held = 0
        for result in results:
            if group and (held + result.used) * width * 4 > _QUERY_BYTES:
                yield among, group
                group, held = [], 0
            group.append(result)
            held += result.used
        if group:
            yield among, group


class Search(beam.DoFn):
    """What `grouped` yields → path of each of these shards, once its neighbours are known."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def process(
        self, pair: tuple[str, Sequence[ShardResult]], shards: Sequence[ShardResult]
    ) -> Iterator[str]:
        site, (among, group) = self._site, pair
        rows = rows_of(site, shards, among)
        share = share_of(sum(one.used for one in rows))
        wanted = [runs.digest([site.made_from(one), share]) for one in rows]
        states = [_State.read(site, one, among) for one in group]
        stale = [state for state in states if set(wanted) != set(state.among)]
        if stale:
            _search(site, stale, rows, wanted, share)
            for state in stale:
                state.write(site, among)
        yield from (one.shard.path for one in group)


@dataclasses.dataclass
class _State:
    """What is known of a shard's examples.

    Attributes:
      result: the shard.
      among: fingerprints of the shards that `found` is from, by the numbers there.
      found: the nearest of their rows.
      radius: float32 [n], up to which distance none is missing, since shards have gone.
      classes: what `suspects.Sums` has of the shard, and rows that are typical of each class.
    """

    result: ShardResult
    among: list[str]
    found: Found | None = None
    radius: np.ndarray | None = None
    classes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, site: Site, result: ShardResult, among: str) -> "_State":
        path = path_of(site, result, among)
        fingerprint = runs.digest([_VERSION, site.made_from(result)])
        if marks.read(marks.beside(path), site.output.root, fingerprint, {path}) is None:
            return cls(result, [])
        kept = arrays.read(path)
        return cls(
            result,
            kept["among"].tolist(),
            Found(kept["shard"], kept["row"], kept["distance"]),
            kept["radius"],
            {name: kept[name] for name in _CLASSES if name in kept},
        )

    def write(self, site: Site, among: str) -> None:
        path = path_of(site, self.result, among)
        files.remove([marks.beside(path)])
        assert self.found is not None
        assert self.radius is not None
        kept = {
            **{"among": np.array(self.among, "U16"), "radius": self.radius},
            **vars(self.found),
            **self.classes,
        }
        fingerprint = runs.digest([_VERSION, site.made_from(self.result)])
        stamp = arrays.write(path, kept)
        marks.write(marks.beside(path), site.output.root, fingerprint, {path: stamp})


def _search(
    site: Site,
    states: Sequence[_State],
    rows: Sequence[ShardResult],
    wanted: Sequence[str],
    share: float,
) -> None:
    """Brings what is known of some shards' examples up to the rows there are."""
    queries = [_vectors(site, state.result) for state in states]
    for state, phi in zip(states, queries, strict=True):
        state.classes = state.classes or _classes(site, state.result, phi)
    starts = np.cumsum([0, *map(len, queries)])
    spans = [slice(int(a), int(b)) for a, b in itertools.pairwise(starts)]
    # By query, which of the rows' shards it knows.
    known = np.concatenate(
        [_renumber(s, len(q), wanted) for s, q in zip(states, queries, strict=True)]
    )
    nearest = Nearest(
        np.concatenate(queries), _KEPT, _joined([s.found for s in states if s.found is not None])
    )
    begins = {state.result.shard.path: at.start for state, at in zip(states, spans, strict=True)}
    names = ("features",) if share == 1 else ("features", "content_hash")
    for number, result in enumerate(rows):
        only = np.flatnonzero(~known[:, number])
        begin = begins.get(result.shard.path)
        first = 0
        for piece in features.read(site.lookout(result), columns=names) if len(only) else ():
            size = len(piece.position)
            taken = np.arange(size)
            if share < 1:
                taken = taken[in_share(features.short_hashes(piece.content_hash), share)]
            own = None
            if begin is not None:
                own = np.full(starts[-1], -1)
                own[begin + first + taken] = np.arange(len(taken))
            nearest.add(piece.features[taken], number, first + taken, own, only)
            first += size
    for state, at in zip(states, spans, strict=True):
        state.among, state.found = list(wanted), nearest.found.take(at)


def _classes(site: Site, result: ShardResult, phi: np.ndarray) -> dict[str, np.ndarray]:
    """Sums of a shard's classes, and "typical" int [c, t]: the rows next to each class's mean."""
    sketched = sketch.sketch(phi, dim=_SKETCHED)
    label = _labels(site, result)
    one = label[:, 0] if site.kind == "classification" else np.zeros(len(label))
    sums = suspects.class_sums(sketched, one)
    typical = np.full((len(sums.classes), _TYPICAL), -1)
    for i, name in enumerate(sums.classes):
        mine = np.flatnonzero(one == name)
        far = np.square(sketched[mine] - sums.total[i] / sums.count[i]).sum(axis=1)
        nearest = mine[np.argsort(far, kind="stable")[:_TYPICAL]]
        typical[i, : len(nearest)] = nearest
    return {**vars(sums), "typical": typical}


def _labels(site: Site, result: ShardResult) -> np.ndarray:
    """float32 [n, L]."""
    pieces = [p.labels for p in features.read(site.lookout(result), columns=("labels",))]
    return np.concatenate(pieces) if pieces else np.zeros((0, 1), np.float32)


def _vectors(site: Site, result: ShardResult) -> np.ndarray:
    pieces = [p.features for p in features.read(site.lookout(result), columns=("features",))]
    return np.concatenate(pieces) if pieces else np.zeros((0, 0), np.float32)


def _renumber(state: _State, n: int, wanted: Sequence[str]) -> np.ndarray:
    """Leaves what a shard knows of the rows there are, and tells of which shards: [n, shards]."""
    seen = np.zeros((n, len(wanted)), bool)
    if state.found is None or state.radius is None or len(state.radius) != n:
        state.found, state.radius = neighbours.nothing(n, _KEPT), np.full(n, np.inf, np.float32)
        return seen
    place = {fingerprint: i for i, fingerprint in enumerate(wanted)}
    numbers = np.array([*(place.get(one, -1) for one in state.among), -1], np.int32)
    shard = numbers[state.found.shard]
    gone = (shard < 0) & (state.found.shard >= 0)
    # Beyond the last that was kept others may come next now.
    last = np.where(gone.any(axis=1), state.found.distance[:, -1], np.inf)
    state.radius = np.minimum(state.radius, last).astype(np.float32)
    distance = np.where(gone, np.inf, state.found.distance).astype(np.float32)
    seen[:, numbers[numbers >= 0]] = True
    certain = (distance <= state.radius[:, None]) & np.isfinite(distance)
    lost = (certain.sum(axis=1) < COUNT) & np.isfinite(state.radius)
    seen[lost], distance[lost], state.radius[lost] = False, np.inf, np.inf
    order = np.argsort(distance, axis=1, kind="stable")
    none = np.isinf(distance)
    state.found = Found(
        *(
            np.take_along_axis(column, order, axis=1)
            for column in (
                np.where(none, -1, shard),
                np.where(none, -1, state.found.row),
                distance,
            )
        )
    )
    return seen


def _joined(parts: Sequence[Found]) -> Found:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Found(*(np.concatenate(column) for column in columns))


def columns_of(site: Site, result: ShardResult) -> str:
    """The columns of `neighbours.COLUMNS` of a shard's examples."""
    return site.output.path("_state", "quality", "around", result.shard.name + ".npz")


@dataclasses.dataclass
class _Whole:
    """What is held of all training examples, shard after shard.

    Attributes:
      shards: in the order of paths.
      starts: int64 [shards + 1].
      label: float32 [N, L].
      position: int64 [N].
      content: uint64 [N], see `features.short_hashes`.
      nearest, kth, mean: float32 [N], distances to neighbours.
    """

    shards: list[ShardResult]
    starts: np.ndarray
    label: np.ndarray
    position: np.ndarray
    content: np.ndarray
    nearest: np.ndarray
    kth: np.ndarray
    mean: np.ndarray

    def place(self, index: int) -> tuple[str, int]:
        """The shard's path and the position of an example."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.shards[shard].shard.path, int(self.position[index])

    def places(self, found: Found) -> np.ndarray:
        """Where the neighbours of some examples are in these arrays; −1 for none."""
        return np.where(found.shard >= 0, self.starts[found.shard] + found.row, -1)


def look(site: Site, shards: Sequence[ShardResult]) -> Iterator[dict[str, Any]]:
    """Writes the columns of neighbours of every training shard, and finds who stands out.

    Holds some dozen bytes for each example.

    Args:
      site: where things are.
      shards: of the training set and of the test set, after `Search`.

    Yields:
      Suspects: rows of `suspects.parquet` with "shard" and "position", and "supporting", (shard,
      position) of training examples, where there are some; "supporting_ids" are of test examples.

    Raises:
      InputError: there are too few trusted examples to compare others with.
    """
    train, trusted = rows_of(site, shards, TRAIN), rows_of(site, shards, TRUSTED)
    whole = _gathered(site, train, TRAIN)
    reference, among = whole, TRAIN
    if trusted:
        reference, among = _gathered(site, trusted, TRUSTED), TRUSTED
        if len(reference.position) <= COUNT:
            raise InputError(
                f"--trusted: its shards have {len(reference.position)} examples that can be used; "
                f"at least {COUNT + 1} are needed to compare others with."
            )
    count = max(1, min(COUNT, len(whole.position) - 1))
    close = suspects.closeness(whole.nearest, whole.kth, count)
    tolerance = _tolerance(site, whole) if site.kind == "regression" else 0.0
    outlying, distance = np.full((2, len(whole.position)), np.nan)
    pairs = []
    for at, result in _spans(whole):
        found = _read(site, result, TRAIN)
        nearest = found if among == TRAIN else _read(site, result, among)
        columns = _columns(site, whole.label[at], nearest, reference)
        arrays.write(columns_of(site, result), columns)
        outlying[at], distance[at] = (
            columns["neighbour_outlyingness"],
            columns["neighbour_distance"],
        )
        near = found.distance <= close.limit * close.usual[at, None]
        one, other = np.nonzero(near & (found.shard >= 0))
        pairs.append((at.start + one, whole.places(found)[one, other], found.distance[one, other]))
    right = set(site.trusted)
    for suspect in (
        *_same(whole, close, pairs, tolerance),
        *_outliers(whole, distance, outlying),
        *_shifts(site, whole),
    ):
        if suspect["kind"] == "duplicate" or suspect["shard"] not in right:
            yield suspect
    for name in sorted({one.set_name for one in shards} - {TRAIN}):
        yield from _leaked(site, whole, close, rows_of(site, shards, name), name)


def _outliers(
    whole: _Whole, distance: np.ndarray, outlying: np.ndarray
) -> Iterator[dict[str, Any]]:
    rates = suspects.outlier_rates(distance, outlying)
    typical = float(np.median(distance))
    for i in np.flatnonzero(rates <= suspects.OUTLIER_LEVEL).tolist():
        shard, position = whole.place(i)
        yield {
            "kind": "outlier",
            "shard": shard,
            "position": position,
            "score": float(1 - 1 / max(outlying[i], distance[i] / typical, 1)),
            "confidence": float(1 - rates[i]),
        }


def _leaked(
    site: Site,
    whole: _Whole,
    close: suspects.Closeness,
    tests: Sequence[ShardResult],
    among: str,
) -> Iterator[dict[str, Any]]:
    """Training examples that are, to the byte or nearly, in the test set as well."""
    known = [_described(site, result) for result in tests]
    content = np.concatenate([one[2] for one in known])
    starts = np.cumsum([0, *(len(one[2]) for one in known)])
    # By content, wherever the other is; near ones by the nearest.
    order = np.argsort(content, kind="stable")
    at = np.minimum(np.searchsorted(content[order], whole.content), len(content) - 1)
    same: np.ndarray = content[order][at] == whole.content
    found = [_read(site, result, among).first(1) for result in whole.shards]
    distance = np.concatenate([one.distance[:, 0] for one in found])
    other = np.concatenate([starts[one.shard[:, 0]] + one.row[:, 0] for one in found])
    ratio, rate = suspects.leaks(distance, close, len(content) / len(whole.position))
    ratio, rate = np.where(same, 0, ratio), np.where(same, 0, rate)
    other = np.where(same, order[at], other)
    named: dict[int, dict[int, str]] = {}
    mine = np.flatnonzero(rate <= suspects.LEVEL)
    of = np.searchsorted(starts, other, side="right") - 1
    for shard in np.unique(of[mine]).tolist():
        rows = other[mine][of[mine] == shard] - starts[shard]
        path = site.embeddings(tests[shard])
        kept = embeddings.read_at(path, known[shard][1][rows])
        named[shard] = dict(zip(kept.position.tolist(), map(tables.text, kept.ids), strict=True))
    for i in mine.tolist():
        shard, position = whole.place(i)
        test = int(of[i])
        yield {
            "kind": "leaked",
            "shard": shard,
            "position": position,
            "score": 1.0 if same[i] else min(1 - float(ratio[i]), 0.999),
            "confidence": float(1 - rate[i]),
            "supporting_ids": [named[test][int(known[test][1][other[i] - starts[test]])]],
        }


def _described(site: Site, result: ShardResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, positions and contents of a shard's examples."""
    pieces = list(features.read(site.lookout(result), columns=("labels", "content_hash")))
    return (
        np.concatenate([p.labels for p in pieces]),
        np.concatenate([p.position for p in pieces]),
        np.concatenate([features.short_hashes(p.content_hash) for p in pieces]),
    )


def _gathered(site: Site, shards: Sequence[ShardResult], among: str) -> _Whole:
    def described(result: ShardResult) -> tuple[np.ndarray, ...]:
        kept = _read(site, result, among).distance
        finite = np.isfinite(kept)
        # The last of them, where there are fewer than are wanted.
        last = np.maximum(finite.sum(axis=1) - 1, 0)
        total = np.where(finite, kept, 0).sum(axis=1)
        mean = np.where(finite[:, 0], total / np.maximum(finite.sum(axis=1), 1), np.inf)
        kth = np.take_along_axis(kept, last[:, None], axis=1)[:, 0]
        return (*_described(site, result), kept[:, 0], kth, mean)

    found = files.in_parallel(described, shards)
    starts = np.cumsum([0, *(len(one[1]) for one in found)])
    columns = (np.concatenate(column) for column in zip(*found, strict=True))
    return _Whole(list(shards), starts, *columns)


def _spans(whole: _Whole) -> Iterator[tuple[slice, ShardResult]]:
    """Where every shard's examples are."""
    for result, (start, end) in zip(whole.shards, itertools.pairwise(whole.starts), strict=True):
        yield slice(int(start), int(end)), result


def _read(site: Site, result: ShardResult, among: str) -> Found:
    """The neighbours of a shard's examples."""
    kept = arrays.read(path_of(site, result, among))
    return Found(kept["shard"], kept["row"], kept["distance"]).first(COUNT)


def nearest_of(site: Site, result: ShardResult, positions: np.ndarray) -> Found:
    """The nearest training examples of some of a shard's: row numbers of the shards `rows_of`."""
    own = _described(site, result)[1]
    return _read(site, result, TRAIN).take(np.searchsorted(own, positions))


def _columns(
    site: Site, label: np.ndarray, found: Found, reference: _Whole
) -> dict[str, np.ndarray]:
    """The columns of a shard's examples with these labels."""
    found = found.first(max(1, int((found.shard >= 0).all(axis=0).sum())))
    places = reference.places(found)
    labels = reference.label[places]
    if site.kind != "multilabel":
        label, labels = label[:, 0], labels[:, :, 0]
    around = Around(label, labels, found.distance, reference.mean[places])
    columns = {name: function(around) for name, function in neighbours.COLUMNS.items()}
    if site.kind == "regression":
        columns["neighbour_agreement"][:] = np.nan
    if site.kind == "classification":
        columns["labels"] = labels
    return columns


def _tolerance(site: Site, whole: _Whole) -> float:
    """Between targets of examples that are alike: thrice what is usual between nearest others."""
    differences = [
        np.abs(whole.label[at] - whole.label[whole.places(found)[:, 0]])
        for at, result in _spans(whole)
        for found in [_read(site, result, TRAIN)]
    ]
    known = np.concatenate(differences)
    known = known[np.isfinite(known)]
    return 3 * float(np.median(known)) if len(known) else np.inf


def _same(
    whole: _Whole,
    close: suspects.Closeness,
    pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    tolerance: float,
) -> Iterator[dict[str, Any]]:
    """Duplicates, each of its first, and those of which the labels differ, each of the other."""
    conflicts: dict[int, dict[int, float]] = {}
    earlier: dict[int, dict[int, float]] = {}
    one, other, distance = (np.concatenate(column) for column in zip(*pairs, strict=True))
    apart = np.abs(whole.label[one] - whole.label[other]).max(axis=1) > tolerance
    known = np.isfinite(whole.label[one] + whole.label[other]).all(axis=1)
    conflict = known & apart
    ratio = distance / close.usual[one]
    # What is the same to the last byte is told by its content.
    copies = whole.content[one] == whole.content[other]
    for i, j, r, is_conflict in zip(
        one[~copies].tolist(),
        other[~copies].tolist(),
        ratio[~copies].tolist(),
        conflict[~copies].tolist(),
        strict=True,
    ):
        if is_conflict:
            for a, b in ((i, j), (j, i)):
                found = conflicts.setdefault(a, {})
                found[b] = min(r, found.get(b, np.inf))
        else:
            found = earlier.setdefault(max(i, j), {})
            found[min(i, j)] = min(r, found.get(min(i, j), np.inf))
    for kind, groups in (("conflicting duplicate", conflicts), ("duplicate", earlier)):
        for i, others in sorted(groups.items()):
            shard, position = whole.place(i)
            nearest = min(others.values())
            order = sorted(others, key=lambda j, others=others: (others[j], j))  # type: ignore[misc]
            # Only what has the same bytes is a duplicate for certain.
            most = 1.0 if kind == "conflicting duplicate" else 0.999
            rates = min(close.rate[i], *(close.rate[j] for j in others), suspects.LEVEL)
            yield {
                "kind": kind,
                "shard": shard,
                "position": position,
                "score": min(1 - nearest, most),
                "confidence": float(1 - rates),
                "supporting": [whole.place(j) for j in order[:_SUPPORTING]],
            }


def _shifts(site: Site, whole: _Whole) -> Iterator[dict[str, Any]]:
    """One suspect for each class of a shard that lies elsewhere: its most typical example there."""
    kept = [arrays.read(path_of(site, result)) for result in whole.shards]
    sums = [
        suspects.Sums(**{name: one[name] for name in _CLASSES if name != "typical"}) for one in kept
    ]
    for shift in suspects.shifted(sums):
        at = int(np.flatnonzero(sums[shift.shard].classes == shift.label)[0])
        rows = kept[shift.shard]["typical"][at]
        places = [whole.place(int(whole.starts[shift.shard] + row)) for row in rows if row >= 0]
        (shard, position), *others = places
        yield {
            "kind": "shifted class",
            "shard": shard,
            "position": position,
            "score": shift.score,
            "confidence": 1 - shift.rate,
            "supporting": others,
        }


def read_columns(site: Site, result: ShardResult) -> Mapping[str, np.ndarray]:
    """A shard's columns of `neighbours.COLUMNS`, float64 [n] each.

    Of classes also "labels" of the nearest others, float32 [n, k].
    """
    return arrays.read(columns_of(site, result))


class Neighbours(beam.PTransform):
    """ShardResults of both sets → suspects (see `look`), once the columns are written."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        every = beam.pvalue.AsList(shards)
        searched = (
            shards.pipeline
            | "ToSearch" >> beam.Create([None])
            | "Groups" >> beam.FlatMap(lambda _, some, site=self._site: grouped(site, some), every)
            | "SpreadGroups" >> beam.Reshuffle()
            | "Search" >> beam.ParDo(Search(self._site), every)
        )
        return (
            shards.pipeline
            | "ToLook" >> beam.Create([None])
            | "Look"
            >> beam.FlatMap(
                lambda _, some, done, site=self._site: look(site, some),
                every,
                beam.pvalue.AsList(searched),
            )
        )
