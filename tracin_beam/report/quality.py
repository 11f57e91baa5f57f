"""The page of a night: its suspects, to be looked at and judged in a browser.

The page takes the worst suspects of each kind, `MOST_SUSPECTS` together, and tables are read a
piece at a time. Its script draws the plots itself, as SVG: a library that inlines its own takes a
quarter of the page's bytes (Bokeh) or needs `eval`, which the page's policy forbids (Vega), and
none knows the list that its marks are to filter.
"""

import base64
import collections
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tracin_beam.report import packed, pages, sprites, words
from tracin_beam.report.explanations import Place
from tracin_beam.report.show import Shown
from tracin_beam.storage import files, tables

MOST_SUSPECTS = 10_000
MOST_EXAMPLES = 12_000  # whose content is shown: suspects, and the evidence of the worst
LARGEST = 5_000_000  # bytes of a page
_MOST_EVIDENCE = 8  # supporting examples of a suspect
_ROLES = ("supporting_ids", "proponents", "opponents")
_LONGEST_ID = 10_000  # characters, as in a ledger
_MOST_CURVES = 12  # checkpoints of a curve
_BINS = 24
_CURVE_BINS = 12
_MOST_LISTED = 12  # shards
_KEYS = 1 << 16  # first halves of float32 numbers

# What a column is, for who points at its plot; others are shown by their names alone.
SIGNALS = {
    "mislabel_score": "how unlikely the given label is beside another",
    "loss": "at the last checkpoint",
    "best_other_ratio": "probability of the best other label over that of the given one",
    "aum": "mean margin of the given label's logit over the checkpoints",
    "self_influence": "how much the example lowers its own loss",
    "probability_mean": "mean probability of the given label over the checkpoints",
    "probability_std": "spread of the given label's probability over the checkpoints",
    "forgetting": "how often it was right and then wrong again",
    "el2n": "length of the error of the predicted probabilities",
    "neighbour_agreement": "share of its nearest neighbours that have its label",
    "neighbour_distance": "distance to its nearest neighbours",
}
_NOT_SIGNALS = {"position", "label", "prediction", "suggested_label"}

_log = logging.getLogger(__name__)


@dataclass
class Found:
    """What the tables say of the suspects of a page.

    Attributes:
      suspects: the worst rows of `suspects.parquet`, worst first.
      counts: how many suspects of each kind the whole table has.
      signals: columns of `signals.parquet`, float64 [suspects], NaN where there is none.
      curves: columns of numbers by checkpoint, float64 [suspects, C].
      labels: label and prediction of examples that have several, as text, by place.
      places: where supporting examples are, by id.
      given: their labels, by id.
      everywhere: counts of all training examples' values by the first 16 bits of their float32.
    """

    suspects: pa.Table
    counts: dict[str, int]
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[Place, tuple[str, str]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    given: dict[str, float] = field(default_factory=dict)
    everywhere: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def own(self) -> list[Place]:
        """Where each suspect is."""
        shards, positions = self.suspects["shard"].to_pylist(), self.suspects["position"]
        return list(zip(shards, positions.to_pylist(), strict=True))

    @property
    def evidence(self) -> list[list[tuple[str, int]]]:
        """The ids of what speaks for or against each suspect, and the place in `_ROLES` of each."""
        found: list[list[tuple[str, int]]] = [[] for _ in range(len(self.suspects))]
        for role, name in enumerate(_ROLES):
            if name in self.suspects.column_names:
                for row, ids in enumerate(self.suspects[name].to_pylist()):
                    found[row] += [(one, role) for one in (ids or [])[:_MOST_EVIDENCE]]
        return found

    def shown(self) -> list[Place]:
        """The examples whose content is worth the page's bytes, in the order of their worth."""
        places = dict.fromkeys(self.own)
        for some in self.evidence:
            places.update(dict.fromkeys(self.places[i] for i, _ in some if i in self.places))
        return list(places)[:MOST_EXAMPLES]


def read(folder: str, most: int = MOST_SUSPECTS) -> Found:
    """Reads what the page shows of a night's tables.

    Args:
      folder: of the night, with `suspects.parquet` and `signals.parquet`. Columns that are missing
        are not shown.
      most: suspects to show; each kind has its share of the worst.
    """
    found = Found(*worst(tables.pieces(files.join(folder, "suspects.parquet")), most))
    look_up(found, tables.pieces(files.join(folder, "signals.parquet")))
    return found


def worst(pieces: Iterator[pa.Table], most: int) -> tuple[pa.Table, dict[str, int]]:
    """The worst suspects, as many of each kind as there are or as is its share.

    Args:
      pieces: of `suspects.parquet`, at least one.
      most: rows to keep.

    Returns:
      Rows with the worst first, and the number of all suspects by kind.
    """
    kept: dict[str, pa.Table] = {}
    counts = collections.Counter[str]()
    empty = None
    for piece in pieces:
        empty = piece.slice(0, 0) if empty is None else empty
        for kind in pc.unique(piece["kind"]).to_pylist():
            mine = piece.filter(pc.equal(piece["kind"], kind))
            counts[kind] += len(mine)
            both = pa.concat_tables([kept.get(kind, empty), mine])
            order = np.argsort(-_floats(both["score"]), kind="stable")[:most]
            kept[kind] = both.take(pa.array(order, pa.int64()))
    if empty is None:
        raise ValueError("no pieces")
    shares = dict.fromkeys(sorted(kept), 0)
    left = most
    while left and (open_ := [kind for kind in shares if shares[kind] < len(kept[kind])]):
        share = max(1, left // len(open_))
        for kind in open_:
            more = min(share, len(kept[kind]) - shares[kind], left)
            shares[kind] += more
            left -= more
    rows = pa.concat_tables([empty, *(kept[kind].slice(0, n) for kind, n in shares.items())])
    order = np.argsort(-_floats(rows["score"]), kind="stable")
    return rows.take(pa.array(order, pa.int64())), dict(sorted(counts.items()))


def look_up(found: Found, pieces: Iterator[pa.Table]) -> None:
    """Fills in what `signals.parquet` says of the suspects and of what supports them."""
    rows_of: dict[Place, list[int]] = {}
    for row, place in enumerate(found.own):
        rows_of.setdefault(place, []).append(row)
    positions = pa.array(sorted({position for _, position in rows_of}), pa.int64())
    ids = pa.array(sorted({one for some in found.evidence for one, _ in some}), pa.string())
    size = len(found.suspects)
    for piece in pieces:
        names = _signals(piece.schema)
        for name in names:
            values = _floats(piece[name]).astype(np.float32)
            values = values[np.isfinite(values)]
            counted = np.bincount(values.view(np.uint32) >> 16, minlength=_KEYS)
            found.everywhere[name] = found.everywhere.get(name, 0) + counted
        if len(ids):
            chosen = piece.filter(pc.is_in(piece["id"], ids))
            places = zip(chosen["shard"].to_pylist(), chosen["position"].to_pylist(), strict=True)
            labels = _floats(chosen["label"]).tolist()
            for one, place, label in zip(chosen["id"].to_pylist(), places, labels, strict=True):
                if one not in found.places:
                    found.places[one], found.given[one] = place, label
        piece = piece.filter(pc.is_in(piece["position"], positions))
        at, to = [], []
        places = zip(piece["shard"].to_pylist(), piece["position"].to_pylist(), strict=True)
        for here, place in enumerate(places):
            for row in rows_of.get(place, ()):
                at.append(here)
                to.append(row)
        piece = piece.take(pa.array(at, pa.int64()))
        for name in names:
            into = found.signals.setdefault(name, np.full(size, np.nan))
            into[to] = _floats(piece[name])
        for name in _curves(piece.schema):
            for row, values in zip(to, piece[name].to_pylist(), strict=True):
                if values:
                    into = found.curves.setdefault(name, np.full((size, len(values)), np.nan))
                    into[row] = [math.nan if value is None else value for value in values]
        if _is_list(piece.schema, "label"):
            columns = zip(*(_texts(piece, name) for name in ("label", "prediction")), strict=True)
            found.labels.update(zip((found.own[row] for row in to), columns, strict=True))


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)
    return np.full(len(column), np.nan)


def _is_list(schema: pa.Schema, name: str) -> bool:
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)


def _texts(piece: pa.Table, name: str) -> list[str]:
    if not _is_list(piece.schema, name):
        return [""] * len(piece)
    lists = piece[name].to_pylist()
    return [" ".join(words.number(v) for v in one[:64] if v is not None) for one in map(_or, lists)]


def _or(values: list[Any] | None) -> list[Any]:
    return values or []


def _signals(schema: pa.Schema) -> list[str]:
    numbers = [
        f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)
    ]
    return [*(n for n in SIGNALS if n in numbers),
            *(n for n in numbers if n not in SIGNALS and n not in _NOT_SIGNALS)]  # fmt: skip


def _curves(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name.endswith("_by_checkpoint")]


def quality_page(
    found: Found,
    shown: Mapping[Place, Shown],
    night: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    earlier: Sequence[Mapping[str, Any]] = (),
    label_names: Sequence[str] | None = None,
    store: str = "",
    largest: int = LARGEST,
) -> str:
    """Makes the page.

    Args:
      found: what the tables say.
      shown: what to show of examples; of others only the id is shown.
      night: what `metrics.json` holds.
      run: what run.json holds.
      earlier: what the `metrics.json` of earlier nights hold, oldest first.
      label_names: names of the classes 0, 1, …; without them labels are shown as numbers.
      store: tells the verdicts that a browser keeps for this data from those for other data.
      largest: bytes of the page, for which contents of examples are made smaller and left out. The
        rest of the page takes some 100 kB and some 100 bytes for each suspect.

    Returns:
      A whole HTML document that refers to nothing outside itself.
    """
    names = [words.shown(name) for name in label_names] if label_names is not None else None
    total = sum(found.counts.values())
    size = len(found.suspects)
    while True:
        order, core = _core(found, size, night, run, names, store)
        # What is hostile enough to fill half a page with ids takes the place of other suspects.
        if len(core) <= largest // 2 or size < 2:
            break
        size //= 2
    said = []
    if size < total:
        said.append(
            f"The page has the worst {size:,} of {total:,} suspects, of each kind its share."
        )
    context = {
        "date": night["date"],
        "night": _night(night, earlier),
        "core": core,
        "total": total,
        "shown": size,
    }
    bare = {**context, "contents": "", "sheets": [], "said": said}
    budget = largest - len(_render(bare, run).encode()) - 1000
    contents, sheets, left_out = _contents(order, shown, budget)
    if left_out:
        said = [*said, *left_out]
    for line in said:
        _log.info("%s", line)
    return _render({**context, "contents": contents, "sheets": sheets, "said": said}, run)


def _render(context: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    return pages.render(
        "quality.html", context, run, styles=("page.css", "quality.css"), scripts=("quality.js",)
    )


@dataclass
class _Examples:
    """The examples of a page, each once: the suspects' own first, then what supports them.

    Attributes:
      places: None where it is not known.
      hashes: 16 bytes for each suspect's own; zeros for one that cannot be judged.
    """

    ids: list[str] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)
    numbers: dict[Place | str, int] = field(default_factory=dict)

    def number(self, one: str, place: Place | None, label: float, content: Any = None) -> int:
        """The number of an example, a new one if it has none."""
        key = one if place is None else place
        if key not in self.numbers:
            self.numbers[key] = len(self.ids)
            long = len(one) > _LONGEST_ID
            self.ids.append(words.shown(one) if long else one)
            self.places.append(place)
            self.labels.append(label)
            if isinstance(content, bytes):
                self.hashes += bytes(16) if long or len(content) != 16 else content
        return self.numbers[key]


def _core(
    found: Found,
    size: int,
    night: Mapping[str, Any],
    run: Mapping[str, Any],
    names: Sequence[str] | None,
    store: str,
) -> tuple[list[Place | None], str]:
    """Where the page's examples are, in order, and what is packed of its first suspects."""
    rows, own = found.suspects.slice(0, size), found.own[:size]

    def column(name: str, absent: Any) -> list[Any]:
        there = rows[name].to_pylist() if name in rows.column_names else [None] * size
        return [absent if value is None else value for value in there]

    def numbers(name: str) -> np.ndarray:
        return _floats(rows[name]) if name in rows.column_names else np.full(size, np.nan)

    examples = _Examples()
    suspects = zip(
        column("id", ""), own, numbers("label").tolist(), column("content_hash", b""), strict=True
    )
    example = [examples.number(*one) for one in suspects]
    supports: list[int] = []
    roles: list[int] = []
    ends = []
    for some in found.evidence[:size]:
        for one, role in some:
            roles.append(role)
            label = found.given.get(one, math.nan)
            supports.append(examples.number(one, found.places.get(one), label))
        ends.append(len(supports))
    arrays: dict[str, np.ndarray] = {
        "example": np.array(example, np.int32),
        "position": np.array([position for _, position in own], np.float64),
        "hash": np.frombuffer(bytes(examples.hashes), np.uint8),
        "given": np.array(examples.labels, np.float64),
        "suggested": numbers("suggested_label"),
        "supports": np.array(supports, np.int32),
        "roles": np.array(roles, np.uint8),
        "ends": np.array(ends, np.int32),
    }
    choices = {}
    for name, absent in {"kind": "", "shard": "", "cohort": "unknown", "first_seen": ""}.items():
        chosen = column(name, absent)
        choices[name] = sorted(set(chosen))
        codes = {value: code for code, value in enumerate(choices[name])}
        arrays[name] = np.array([codes[value] for value in chosen], np.int32)
    signals = {"score": numbers("score"), "confidence": numbers("confidence")}
    signals |= {name: values[:size] for name, values in found.signals.items()}
    described = []
    for name, values in signals.items():
        if np.isfinite(values).any():
            arrays[f"signal {name}"], scale = packed.halves(values)
            bins = _bins(values, found.everywhere.get(name))
            about = SIGNALS.get(name, "")
            described.append({"name": name, "scale": scale, "about": about, **bins})
    steps = [one.get("step") for one in run.get("checkpoints") or []]
    curves = []
    for name, values in found.curves.items():
        values = values[:size]
        if np.isfinite(values).any() and values.shape[1] > 1:
            at = np.linspace(0, values.shape[1] - 1, _MOST_CURVES).round().astype(int)
            at = np.unique(at)
            arrays[f"curve {name}"], scale = packed.halves(values[:, at].ravel())
            known = steps if len(steps) == values.shape[1] else range(1, values.shape[1] + 1)
            curves.append(
                {
                    "name": name.removesuffix("_by_checkpoint"),
                    "column": f"curve {name}",
                    "scale": scale,
                    "steps": [known[i] for i in at],
                    **_bins(values.ravel(), None, _CURVE_BINS),
                }
            )
    kind = run.get("kind")
    header = {
        "date": night["date"],
        "store": store,
        "task": kind.get("name") if isinstance(kind, Mapping) else None,
        "ids": examples.ids,
        "names": names,
        "choices": choices,
        "signals": described,
        "curves": curves,
        "labels": {
            str(examples.numbers[place]): texts
            for place, texts in found.labels.items()
            if place in examples.numbers
        },
    }
    return examples.places, packed.pack(header, arrays)


def _bins(values: np.ndarray, everywhere: np.ndarray | None, count: int = _BINS) -> dict[str, Any]:
    """Edges of a histogram, whether they are equally far apart in the logarithm, and all's counts.

    What lies beyond the last edge belongs to the last bin.
    """
    finite = values[np.isfinite(values)]
    least, most = float(finite.min()), float(finite.max())
    low, high = np.quantile(finite, [0.005, 0.995]).tolist()
    all_values, counts = np.zeros(0), np.zeros(0)
    if everywhere is not None:
        keys = np.flatnonzero(everywhere)
        # The middle of what has the same 16 bits.
        all_values = ((keys.astype(np.uint32) << 16) | 0x8000).view(np.float32).astype(np.float64)
        order = np.argsort(all_values)
        all_values, counts = all_values[order], everywhere[keys[order]]
    if len(counts):
        shares = counts.cumsum() / counts.sum()
        low = min(low, float(all_values[np.searchsorted(shares, 0.005)]))
        high = max(high, float(all_values[np.searchsorted(shares, 0.995)]))
    log = least > 0 and most > 1 and 300 * float(np.quantile(finite, 0.25)) < high
    if log:
        edges = np.geomspace(max(low, least, high * 1e-6), high, count + 1)
    else:
        if least >= 0 and most <= 1 and high - low > 0.3:
            low, high = 0.0, 1.0
        if high <= low:
            high = low + abs(low) / 2 + 1
        # Bins narrower than what float16 tells apart would have gaps.
        low = min(low, high - count * max(abs(low), abs(high)) / 1024)
        edges = np.linspace(low, high, count + 1)
    at = (np.searchsorted(edges, all_values, side="right") - 1).clip(0, count - 1)
    everyone = np.bincount(at, counts, minlength=count).astype(int).tolist() if len(at) else []
    return {"edges": edges.tolist(), "log": log, "everywhere": everyone}


def _contents(
    places: Sequence[Place | None], shown: Mapping[Place, Shown], budget: int
) -> tuple[str, list[str], list[str]]:
    """What is packed of the examples' contents, the sprites in base64, and what was left out."""
    there = [
        (i, shown[place]) for i, place in enumerate(places) if place is not None and place in shown
    ]
    pictures = [(i, one) for i, one in there if one.kind == "image"]
    others = [(i, one) for i, one in there if one.kind != "image"]
    said = []
    share = budget if not pictures else budget // 2
    every = len(others)
    while len(text := _texts_of(others)) > share and others:
        others = others[: min(len(others) - 1, int(len(others) * 0.9 * share / len(text)))]
    if len(others) < every:
        said.append(
            f"The contents of {every - len(others):,} of {len(there):,} examples are left out."
        )
    if not pictures:
        return text, [], said
    left = (budget - len(text) - len(pictures) * 12) * 3 // 4
    kept = len(pictures)
    sheets = None
    while kept and not (sheets := sprites.fitting([p.value for _, p in pictures[:kept]], left)):
        kept //= 2
    if kept < len(pictures):
        said.append(f"{len(pictures) - kept:,} of {len(pictures):,} pictures are left out.")
    if sheets is None:
        return text, [], said
    native = max(max(one.value.shape[:2]) for _, one in pictures)
    if sheets.side < native or sheets.quality < 70:
        said.append(
            f"Pictures have {sheets.side} pixels at most and WebP's quality {sheets.quality}, so "
            "that the page stays small."
        )
    boxes = np.full((len(places), 5), -1, np.int32)
    boxes[[i for i, _ in pictures[:kept]]] = sheets.boxes
    text = _texts_of(others, boxes, native <= 64)
    return text, [base64.b64encode(one).decode("ascii") for one in sheets.files], said


def _texts_of(
    others: Sequence[tuple[int, Shown]], boxes: np.ndarray | None = None, pixelated: bool = False
) -> str:
    contents = {}
    for i, one in others:
        if one.kind == "audio":
            contents[i] = {"wav": base64.b64encode(one.wav).decode("ascii")}
        else:
            contents[i] = one.value
    arrays = {} if boxes is None else {"boxes": boxes.ravel()}
    return packed.pack({"contents": contents, "pixelated": pixelated}, arrays)


def _night(night: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page says of the night: metrics beside the last night's, gates, and shards."""
    last = next((one for one in reversed(earlier) if one["date"] < night["date"]), None)
    before = last["metrics"] if last else {}
    numbers = {k: v for k, v in (night.get("metrics") or {}).items() if _is_number(v)}
    metrics = []
    for name, value in numbers.items():
        old = before.get(name)
        change = _written(value - old, sign=True) if _is_number(old) and value != old else ""
        if value or old:
            metrics.append(
                {"name": name, "value": _written(value), "old": _written(old), "change": change}
            )
    shards = night.get("by_shard") or {}
    order = sorted(shards, key=lambda path: -(shards[path].get("suspects") or 0))[:_MOST_LISTED]
    columns = ("examples", "suspects", "mean_loss")
    return {
        "last": last["date"] if last else None,
        "numbers": numbers,
        "metrics": metrics,
        "changes": {k: v for k, v in (night.get("changes") or {}).items() if _is_number(v)},
        "gates": sorted(
            night.get("gates") or [],
            key=lambda gate: (not gate["fired"], gate["level"] != "error"),
        ),
        "shards": [
            (words.shown(path), {name: _written(shards[path].get(name)) for name in columns})
            for path in order
        ],
        "more_shards": len(shards) - len(order),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _written(value: Any, *, sign: bool = False) -> str:
    if not _is_number(value):
        return ""
    plus = "+" if sign else ""
    whole = float(value).is_integer() and abs(value) < 1e15
    text = f"{int(value):{plus},}" if whole else words.number(value, sign=sign)
    return text.replace("-", "−")
