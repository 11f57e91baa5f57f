"""A sample of a run's data goes through the engine before the run: recall by dim, and speeds."""

import dataclasses
import itertools
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from tracin_beam.config import Config
from tracin_beam.errors import InputError
from tracin_beam.inputs import counting
from tracin_beam.planning import dims, plan
from tracin_beam.planning.dims import Expected
from tracin_beam.stages import embed, workers
from tracin_beam.stages.workers import EngineSource, Loaded
from tracin_beam.storage import embeddings, files, records, runs
from tracin_beam.storage.embeddings import Embeddings
from tracin_beam.storage.records import Record
from tracin_beam.storage.runs import CheckpointFile, Output, Shard, Unit

_log = logging.getLogger(__name__)

# The sample: as many training examples as the time allows, and queries.
_MOST_ROWS, _FEWEST_ROWS, _SECONDS = 2048, 128, 20.0
_QUERIES, _MOST_BLOCKS = 32, 4
# Shards that it comes from, and how much of the beginning of each is read for it.
_SHARDS, _READ_BYTES = 16, 16 << 20
# Checkpoints at which it is computed, spread evenly, the last among them.
_CHECKPOINTS = 3
# The embed stage is timed for about so long.
_TIMED_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Choice:
    """The dim that was chosen, and why.

    Attributes:
      dim: the smallest that reaches the recall, or the largest tried.
      wanted: the recall that was wanted, at `top_k` with so many `candidates`.
      table: what was tried, in rising order.
      rows, queries, checkpoints: size of the pilot sample.
      training_rows: number of training examples that the recall is expected for.
    """

    dim: int
    wanted: float
    top_k: int
    candidates: int
    table: tuple[Expected, ...]
    rows: int
    queries: int
    checkpoints: int
    training_rows: int

    @property
    def reached(self) -> bool:
        return dims.smallest(self.table, self.wanted) is not None

    def lines(self) -> list[str]:
        """The choice as text."""
        what = f"recall@{self.top_k} of {self.candidates} candidates"
        said = [
            f"Pilot of {self.rows} training examples and {self.queries} queries at "
            f"{self.checkpoints} checkpoint(s); {what} to expect among {self.training_rows:,}:",
            f"{'dim':>6}  {'recall':>6}  {'embeddings':>12}  {'index':>12}",
        ]
        said += [
            f"{row.dim:>6}  {row.recall:>6.3f}  {plan.size(row.embedding_bytes):>12}  "
            f"{plan.size(row.index_bytes):>12}"
            for row in self.table
        ]
        if self.reached:
            said.append(f"{self.dim} is the smallest with {self.wanted:g} or more.")
        else:
            said.append(
                f"None of them is expected to reach {self.wanted:g}: {self.dim} comes closest. "
                "A larger --rescore helps more than a larger dim."
            )
        return said


@dataclasses.dataclass(frozen=True)
class Counts:
    """Records of the shards of both sets, in their order."""

    train: counting.Count
    test: counting.Count


def count(config: Config, train: Sequence[Shard], test: Sequence[Shard]) -> Counts:
    """Counts or estimates the records of both sets."""

    def of(pattern: str | None, shards: Sequence[Shard]) -> counting.Count:
        if not shards:
            return counting.Count((), True)
        matched = {files.full(info.path): info for info in files.match(pattern or "")}
        return counting.count([matched[shard.path] for shard in shards])

    return Counts(of(config.train, train), of(config.test, test))


def sample(shards: Sequence[Shard], wanted: int) -> list[Record]:
    """Records from all over the shards, in random order, numbered anew.

    Of each of up to 16 shards, spread evenly, they come from its first megabytes.
    """
    chosen = [shards[i] for i in _spread(len(shards), _SHARDS)]
    found: list[bytes] = []
    for i, shard in enumerate(chosen):
        read, size = [], 0
        for record in records.read_records(shard.path):
            if isinstance(record, Record):
                read.append(record.data)
                size += len(record.data)
            if size >= _READ_BYTES:
                break
        # What a shard is too small for, those after it make up.
        share = -(-(wanted - len(found)) // (len(chosen) - i))
        found += [read[j] for j in _spread(len(read), share)]
    order = np.random.default_rng(0).permutation(len(found))
    return [Record(i, found[j]) for i, j in enumerate(order)]


def _spread(count: int, wanted: int) -> list[int]:
    """So many indices below count (all, if there are fewer), evenly spread, the last among them."""
    wanted = min(wanted, count)
    return [(i + 1) * count // wanted - 1 for i in range(wanted)]


def choose_dim(
    config: Config,
    source: EngineSource,
    checkpoints: Sequence[CheckpointFile],
    train: Sequence[Shard],
    test: Sequence[Shard],
    counts: Counts,
) -> Choice:
    """Finds the smallest dim of `dims.DIMS` with which the wanted recall is to be expected.

    Args:
      config: the flags.
      source: an engine of any dim.
      checkpoints, train, test: the run's; without a test set training examples are the queries.
      counts: of both sets.
    """
    loaded = source.get()
    pilot_checkpoints = [checkpoints[i] for i in _spread(len(checkpoints), _CHECKPOINTS)]
    target = config.target if test else "loss"
    asked = min(_QUERIES, _MOST_BLOCKS * loaded.engine.batch_size)
    if test:
        rows, queries = sample(train, _MOST_ROWS), sample(test, asked)
    else:
        both = sample(train, _MOST_ROWS + asked)
        asked = min(asked, len(both) // 4)
        rows, queries = both[asked:], both[:asked]
    rows = rows[: _affordable(loaded, pilot_checkpoints, rows, len(queries))]
    rows, mine = _usable(loaded, pilot_checkpoints, "loss", rows)
    queries, theirs = _usable(loaded, pilot_checkpoints, target, queries)
    if not (rows and queries):
        raise InputError(
            "--dim=auto: too few of the sampled examples can be used; give --dim a number."
        )
    exact = _exact(loaded, pilot_checkpoints, rows, queries, target)
    spread = np.sqrt(np.outer(_norms(pilot_checkpoints, mine), _norms(pilot_checkpoints, theirs)))
    candidates = config.rescore or config.top_k
    identities = [id_bytes(source, shards) for shards in (train, test)]
    parameters = sum(spec.size for spec in loaded.engine.specs)
    table: list[Expected] = []
    for dim in dims.DIMS:
        if table and (table[-1].recall >= config.recall or table[-1].dim >= parameters):
            break
        if dim != source.config.dim:
            changed = dataclasses.replace(source.config, dim=dim)
            loaded = workers.load(loaded.task, loaded.parser, changed, source.sample)
            _, mine = _usable(loaded, pilot_checkpoints, "loss", rows)
            _, theirs = _usable(loaded, pilot_checkpoints, target, queries)
        estimate = _estimate(pilot_checkpoints, mine, theirs)
        recall = dims.expected_recall(
            exact, estimate, spread, counts.train.total, config.top_k, candidates
        )
        table.append(
            Expected(
                dim,
                recall,
                len(checkpoints)
                * (
                    embedding_bytes(dim, train, counts.train, identities[0])
                    + embedding_bytes(dim, test, counts.test, identities[1])
                ),
                plan.index_bytes(counts.train.records, dim * len(checkpoints), config.index_rows),
            )
        )
    best = dims.smallest(table, config.recall) or max(table, key=lambda row: row.recall)
    return Choice(
        best.dim,
        config.recall,
        config.top_k,
        candidates,
        tuple(table),
        len(rows),
        len(queries),
        len(pilot_checkpoints),
        counts.train.total,
    )


def embedding_bytes(
    dim: int, shards: Sequence[Shard], count: counting.Count, identity: float | None
) -> int:
    """Bytes of a set's embedding files at one checkpoint.

    Args:
      dim: length of an embedding.
      shards: of the set.
      count: of their records.
      identity: mean length of an id, or None where ids are made of shards' names and positions.
    """
    total = 0.0
    for shard, number in zip(shards, count.records, strict=True):
        # Most positions have as many digits.
        length = len(f"{shard.name}#{number // 2}") if identity is None else identity
        whole = int(length)
        total += number * (embeddings.record_bytes(dim, whole) + length - whole)
    return round(total)


def id_bytes(source: EngineSource, shards: Sequence[Shard]) -> float | None:
    """Mean length of the ids in a sample; None where the task gives none."""
    loaded = source.get()
    if not (shards and loaded.parser.gives_ids):
        return None
    batch, _, _ = embed.parse_records(loaded, sample(shards, _FEWEST_ROWS))
    return None if batch is None else float(np.mean([len(identity) for identity in batch.ids]))


def _affordable(
    loaded: Loaded, checkpoints: Sequence[CheckpointFile], rows: Sequence[Record], queries: int
) -> int:
    """How many rows can be embedded and scored in the time that there is."""
    size = loaded.engine.batch_size
    some = rows[:size]
    taken = 0.0
    for _ in range(2):  # the first time, functions are traced
        started = time.monotonic()
        usable, _ = _usable(loaded, checkpoints[-1:], "loss", some)
        if not usable:
            return len(rows)
        _exact(loaded, checkpoints[-1:], usable, usable[:1], "loss")
        taken = time.monotonic() - started
    # What was timed is a pass to embed the rows, one for the query, and one to score them.
    passes = (1 + -(-queries // size)) * len(checkpoints)
    rate = len(some) / max(taken / 3, 1e-3)
    return max(_FEWEST_ROWS, int(rate * _SECONDS / passes))


def _usable(
    loaded: Loaded,
    checkpoints: Sequence[CheckpointFile],
    target: str,
    some: Sequence[Record],
) -> tuple[list[Record], list[Embeddings]]:
    """The records that can be used at all checkpoints, and their embeddings at each."""
    parts = []
    for checkpoint in checkpoints:
        found = [
            rows
            for rows, _ in embed.embed_records(loaded, checkpoint, target, "", some)
            if rows is not None
        ]
        if not found:
            return [], []
        parts.append(embeddings.concatenate(found))
    positions = parts[0].position
    for part in parts[1:]:
        positions = np.intersect1d(positions, part.position)
    kept = [part.take(np.isin(part.position, positions)) for part in parts]
    wanted = set(positions.tolist())
    return [record for record in some if record.position in wanted], kept


def _exact(
    loaded: Loaded,
    checkpoints: Sequence[CheckpointFile],
    rows: Sequence[Record],
    queries: Sequence[Record],
    target: str,
) -> np.ndarray:
    """Exact TracInCP scores: float64 [rows, queries]."""
    engine = loaded.engine
    scores = np.zeros((len(rows), len(queries)))
    for checkpoint in checkpoints:
        values = engine.values(checkpoint.path)
        for j in range(0, len(queries), engine.batch_size):
            block = loaded.parse([q.data for q in queries[j : j + engine.batch_size]])
            gradients = engine.queries(values, block, target)
            for i in range(0, len(rows), engine.batch_size):
                batch = loaded.parse([r.data for r in rows[i : i + engine.batch_size]])
                found = engine.scores(values, batch, gradients, target).astype(np.float64)
                scores[i : i + batch.size, j : j + block.size] += checkpoint.learning_rate * found
    return scores


def _estimate(
    checkpoints: Sequence[CheckpointFile], mine: Sequence[Embeddings], theirs: Sequence[Embeddings]
) -> np.ndarray:
    return np.sum(
        [
            c.learning_rate * (a.embedding.astype(np.float64) @ b.embedding.astype(np.float64).T)
            for c, a, b in zip(checkpoints, mine, theirs, strict=True)
        ],
        axis=0,
    )


def _norms(checkpoints: Sequence[CheckpointFile], parts: Sequence[Embeddings]) -> np.ndarray:
    """Σ_c η_c ‖∇ℓ‖², float64 [n]."""
    return np.sum(
        [
            c.learning_rate * part.squared_norm.astype(np.float64)
            for c, part in zip(checkpoints, parts, strict=True)
        ],
        axis=0,
    )


def measure(source: EngineSource, checkpoint: CheckpointFile, train: Sequence[Shard]) -> plan.Speed:
    """Times the embed stage and exact scores on a sample, warm, and takes the peak of memory."""
    loaded = source.get()
    size = loaded.engine.batch_size
    some = sample(train, max(_MOST_ROWS, 2 * size))
    _embed(source, checkpoint, some[:size])  # traces
    probe = some[: 4 * size]
    seconds = _embed(source, checkpoint, probe)
    wanted = int(len(probe) / max(seconds, 1e-3) * _TIMED_SECONDS)
    rate = len(probe) / max(seconds, 1e-6)
    if wanted > len(probe):
        enough = list(itertools.islice(itertools.cycle(some), wanted))
        rate = wanted / _embed(source, checkpoint, enough)
    memory = _peak_memory()
    usable, _ = _usable(loaded, [checkpoint], "loss", some[: 4 * size])
    queries = usable[:size]
    _exact(loaded, [checkpoint], usable[:size], queries, "loss")
    values = loaded.engine.values(checkpoint.path)
    gradients = loaded.engine.queries(values, loaded.parse([q.data for q in queries]))
    started = time.monotonic()
    for i in range(0, len(usable), size):
        batch = loaded.parse([r.data for r in usable[i : i + size]])
        loaded.engine.scores(values, batch, gradients)
    taken = time.monotonic() - started
    return plan.Speed(
        rate,
        len(usable) / max(taken, 1e-6),
        size,
        loaded.engine.query_bytes(),
        max(memory, _peak_memory()),
    )


def _embed(source: EngineSource, checkpoint: CheckpointFile, some: Sequence[Record]) -> float:
    """Seconds that a unit of these records takes, from its shard to its embedding file."""
    with tempfile.TemporaryDirectory() as folder:
        path = files.join(folder, "sample")
        with open(path, "wb") as handle:
            writer = records.RecordWriter(handle)
            for record in some:
                writer.write(record.data)
        unit = Unit(runs.TRAIN, Shard(path, "sample", ""), checkpoint, "loss", "")
        started = time.monotonic()
        embed.embed_unit(Output(folder), source, unit, 1.0)
        return time.monotonic() - started


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
