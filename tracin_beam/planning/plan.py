"""What a run will take, as arithmetic over counts, sizes and measured speeds.

Speeds are those of one worker like the machine that measured them. What a search takes was measured
once, on two cores (see `scoring.cost`), and is an order of magnitude elsewhere.
"""

import dataclasses
import math
from collections.abc import Sequence

from tracin_beam.inputs import counting
from tracin_beam.scoring import cost, sketch
from tracin_beam.stages import index, joining, rescore, search
from tracin_beam.stages.joining import Census, Group
from tracin_beam.storage import embeddings, runs
from tracin_beam.storage.runs import Shard, ShardResult

# Bytes held while an index is built, as multiples of its rows': copies, and ScaNN's own.
_BUILD_COPIES, _BRUTE_FORCE_COPIES = 5.1, 3.0
# Bytes of a tree's index by number of its rows: the number as int8, and half a byte quantised.
_TREE_BYTES = 1.5
_ROW_BYTES = 3  # of rows.parquet
# A unit should be long against a worker's overhead, and short against what a failure costs.
SHORT_UNIT, LONG_UNIT = 10.0, 1800.0


@dataclasses.dataclass(frozen=True)
class Data:
    """A set's shards.

    Attributes:
      records: number of records of each shard.
      exact: whether they were counted, rather than estimated from the shards' sizes.
      units: how many (shard, checkpoint) pairs there are.
      todo: records of the units that are not done yet, all checkpoints together.
      units_todo: how many units that are.
    """

    records: tuple[int, ...]
    exact: bool
    units: int
    todo: int
    units_todo: int

    @property
    def total(self) -> int:
        return sum(self.records)


@dataclasses.dataclass(frozen=True)
class Slow:
    """The weights that no rule is for, which take a product for each example.

    Attributes:
      weights: their paths.
      total: how many weights there are.
      layers: which are run for each example; empty if the whole model is.
      factor: how many times as long embedding takes as without these weights.
    """

    weights: tuple[str, ...]
    total: int
    layers: tuple[str, ...]
    factor: float

    def __str__(self) -> str:
        more = len(self.weights) - 10
        shown = ", ".join(self.weights[:10]) + (f" and {more} more" if more > 0 else "")
        how = f"layer {', '.join(self.layers[:5])}" if self.layers else "the whole model"
        return (
            f"No rule is for {len(self.weights)} of {self.total} weights: {shown}. For them {how} "
            f"is run for each example, and embedding takes {self.factor:.1f} times as long as "
            "without them."
        )


@dataclasses.dataclass(frozen=True)
class Speed:
    """What the pilot measured.

    Attributes:
      embed_rows: examples per second and checkpoint, the whole way from shard to embedding file.
      score_rows: the same of exact scores for one block of queries.
      batch_size: examples computed at a time; a block of queries holds as many.
      query_bytes: of a block's gradients.
      memory: peak of the measuring process in bytes.
      slow: the weights without a rule, or None if each has one.
    """

    embed_rows: float
    score_rows: float
    batch_size: int
    query_bytes: int
    memory: int
    slow: Slow | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
      checkpoints: how many.
      dim: length of an embedding.
      top_k, rescore, recall_queries, index_rows: the flags.
      choice: how candidates are found; None without a test set.
      hours: wanted wall time.
      worker_memory: bytes.
      passes: what else goes through the gradients of the whole training set, once each.
    """

    checkpoints: int
    dim: int
    top_k: int
    rescore: int
    recall_queries: int
    index_rows: int
    choice: cost.Choice | None
    hours: float
    worker_memory: int
    passes: tuple[str, ...] = ()


def embedding_bytes(
    dim: int, shards: Sequence[Shard], count: counting.Count, identity: float | None, dtype: str
) -> int:
    """Bytes of a set's embedding files at one checkpoint.

    Args:
      dim: length of an embedding.
      shards: of the set.
      count: of their records.
      identity: mean length of an id, or None where ids are made of shards' names and positions.
      dtype: of the embeddings on disk.
    """
    total = 0.0
    for shard, number in zip(shards, count.records, strict=True):
        # Most positions have as many digits.
        length = len(f"{shard.name}#{number // 2}") if identity is None else identity
        whole = int(length)
        total += number * (embeddings.record_bytes(dim, whole, dtype=dtype) + length - whole)
    return round(total)


def groups(records: Sequence[int], index_rows: int) -> list[Group]:
    """The groups that shards with so many records will be in."""
    shards = [Shard(f"{i:09d}", "", "") for i in range(len(records))]
    results = [
        ShardResult(runs.TRAIN, shard, count, ())
        for shard, count in zip(shards, records, strict=True)
    ]
    return index.plan(results, {shard.path: "" for shard in shards}, index_rows, {})


def pieces(records: Sequence[int], index_rows: int) -> list[int]:
    """Rows of what is indexed together."""
    every = [piece for g in groups(records, index_rows) for piece in index.pieces(g, index_rows)]
    return [piece.stop - piece.start for piece in every]


def piece_bytes(rows: int, numbers: int) -> int:
    """Bytes of a piece of the index, in files and in a worker that searches it.

    Args:
      rows: how many.
      numbers: in an embedding, over all checkpoints; of which a sketch is indexed.
    """
    width = min(numbers, sketch.DIM)
    if rows < index.BRUTE_FORCE_ROWS:
        return rows * (width + _ROW_BYTES)
    leaves = round(math.sqrt(rows))
    return int(rows * (_TREE_BYTES * width + 4 + _ROW_BYTES) + 8 * leaves * width)


def index_bytes(
    way: cost.Index | None, records: Sequence[int], numbers: int, index_rows: int
) -> int:
    """Bytes of the whole index, which the exact product does without."""
    if way != "scann":
        return 0
    return sum(piece_bytes(rows, numbers) for rows in pieces(records, index_rows))


def build_memory(rows: int, numbers: int) -> int:
    """Bytes that a worker holds while it builds a piece of the index."""
    copies = _BRUTE_FORCE_COPIES if rows < index.BRUTE_FORCE_ROWS else _BUILD_COPIES
    return int(copies * 4 * rows * min(numbers, sketch.DIM))


def product_memory(tests: int, numbers: int) -> int:
    """Bytes that a worker holds while it takes the products of queries with a block of rows."""
    queries = min(tests, search.queries_at_a_time(numbers))
    block = joining.block_rows(numbers)
    return 4 * (2 * queries * numbers + 3 * block * numbers + 3 * queries * block)


def fitting_rows(memory: int, numbers: int) -> int:
    """The most rows of a piece of the index that this memory is enough for; two digits of it."""
    rows = int(memory / (_BUILD_COPIES * 4 * min(numbers, sketch.DIM)))
    if rows < 1:
        return 0
    digit = 10 ** max(0, len(str(rows)) - 2)
    return rows // digit * digit


def rescore_memory(tests: int, job: Job, speed: Speed) -> int:
    """Bytes that a worker holds while it scores candidates: of queries, and of their records."""
    if not (tests and job.rescore):
        return 0
    blocks = math.ceil(tests / speed.batch_size) * job.checkpoints
    kept = min(rescore.QUERY_CACHE_BYTES, blocks * speed.query_bytes)
    return max(kept, speed.query_bytes) + rescore.CHUNK_BYTES


def rescored(train: Sequence[int], tests: int, job: Job, batch_size: int) -> float:
    """Examples whose gradients are computed anew, all checkpoints together, to score candidates.

    Queries go through a group of shards in blocks of a batch, each with the union of its
    candidates, in whole batches.
    """
    if not (tests and job.rescore):
        return 0.0
    rows = [group.rows for group in groups(train, job.index_rows)]
    total = sum(rows)
    if Census.all_pairs_of(total, tests):
        per_block = float(sum(_padded(count, batch_size) for count in rows))
    else:
        in_block = min(tests, batch_size) * 2 * min(job.rescore, total)
        per_block = 0.0
        for count in rows:
            asked = in_block * count / total
            distinct = count * -math.expm1(-asked / count)
            per_block += min(1.0, distinct) * _padded(max(1.0, distinct), batch_size)
    return job.checkpoints * math.ceil(tests / batch_size) * per_block


def checked(train: Sequence[int], tests: int, job: Job, batch_size: int) -> float:
    """The same for the queries by which the recall is measured: all of the training set.

    They share blocks, most often one.
    """
    blocks = math.ceil(min(job.recall_queries, tests) / batch_size)
    rows = [group.rows for group in groups(train, job.index_rows)]
    return job.checkpoints * blocks * float(sum(_padded(count, batch_size) for count in rows))


def _padded(count: float, batch_size: int) -> float:
    return math.ceil(count / batch_size) * batch_size


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
      embedding_bytes: of all embedding files of both sets, those that are there already included.
      index_bytes: of the index; 0 where there is none.
      seconds: of one worker, by stage.
      workers: suggested number.
      memory: bytes of a worker, the most that any stage takes.
      index_rows: suggested `--index_rows`.
      parts: of the index, with the `--index_rows` that were asked for; 0 where there is none.
      index: how candidates are found, and why; None without a test set.
      advice: sentences.
    """

    embedding_bytes: int
    index_bytes: int
    seconds: dict[str, float]
    workers: int
    memory: int
    index_rows: int
    parts: int
    index: cost.Choice | None
    advice: tuple[str, ...]

    @property
    def worker_hours(self) -> float:
        return sum(self.seconds.values()) / 3600


def make(train: Data, test: Data | None, stored: int, speed: Speed, job: Job) -> Plan:
    """Puts the numbers together.

    Args:
      train, test: the sets.
      stored: bytes of the embedding files of both at one checkpoint.
      speed: as measured.
      job: what is asked for.
    """
    sets = [data for data in (train, test) if data]
    tests = test.total if test else 0
    numbers = job.dim * job.checkpoints
    seconds = {"embed": sum(data.todo for data in sets) / speed.embed_rows}
    built = job.choice is not None and job.choice.index == "scann"
    parts = pieces(train.records, job.index_rows) if built else []
    memory = speed.memory
    if job.choice:
        # The seconds are of this run alone; the choice is for later runs as well.
        if built:
            candidates = job.rescore or job.top_k
            seconds["index and search"] = cost.scann_seconds(
                train.total, numbers, tests, candidates
            )
            held = build_memory(max(parts, default=0), numbers)
        else:
            seconds["search"] = cost.exact_seconds(train.total, numbers, tests)
            held = product_memory(tests, numbers)
        scored = rescored(train.records, tests, job, speed.batch_size)
        seconds["rescore"] = scored / speed.score_rows
        seen = checked(train.records, tests, job, speed.batch_size)
        seconds["recall"] = seen / speed.score_rows
        # The test set's gradients are summed, and products of the training set's taken with that.
        once = job.checkpoints * (train.total + tests) / speed.score_rows
        seconds |= dict.fromkeys(job.passes, once)
        memory += max(held, rescore_memory(tests, job, speed))
    units = sum(data.units_todo for data in sets)
    wanted = max(1, math.ceil(sum(seconds.values()) / (3600 * job.hours)))
    workers = max(1, min(wanted, max(units, len(parts))))
    fits = fitting_rows(job.worker_memory - speed.memory, numbers)
    even = max(index.BRUTE_FORCE_ROWS, math.ceil(train.total / workers))
    advice = [
        *_about_shards(train, speed, job, units, wanted),
        *_about_memory(memory, job, fits, built),
    ]
    return Plan(
        job.checkpoints * stored,
        sum(piece_bytes(rows, numbers) for rows in parts),
        seconds,
        workers,
        memory,
        max(1, min(fits, even, train.total)),
        len(parts),
        job.choice,
        tuple(advice),
    )


def _about_shards(train: Data, speed: Speed, job: Job, units: int, wanted: int) -> list[str]:
    said = []
    if units and wanted > units:
        shards = math.ceil(wanted / job.checkpoints)
        said.append(
            f"--hours={job.hours:g} would take {wanted} workers, but there are only {units} units "
            f"(shards × checkpoints) to embed: cut the training set into {shards} shards or more."
        )
    longest = max(train.records, default=0) / speed.embed_rows
    typical = train.total / max(1, len(train.records)) / speed.embed_rows
    if longest > LONG_UNIT:
        rows = int(LONG_UNIT * speed.embed_rows)
        said.append(
            f"The largest training shard takes a worker {duration(longest)} at each checkpoint, "
            f"which is lost if the worker is: {rows:,} examples take {duration(LONG_UNIT)}."
        )
    if units > 1000 and typical < SHORT_UNIT:
        rows = int(SHORT_UNIT * speed.embed_rows)
        said.append(
            f"A training shard takes only {duration(typical)} at each checkpoint, little against "
            f"what a worker needs to begin and end one: put {rows:,} or more examples in a shard."
        )
    return said


def _about_memory(memory: int, job: Job, fits: int, built: bool) -> list[str]:
    if memory <= job.worker_memory:
        return []
    said = f"A worker needs {size(memory)}, more than --worker_memory={size(job.worker_memory)}: "
    if not built or not fits:
        return [said + "give it more, or lower --batch_size."]
    return [said + f"take --index_rows={fits}."]


def size(count: float) -> str:
    """A number of bytes, in units of 1024."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1024 or unit == "TB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def duration(seconds: float) -> str:
    """A time, rounded."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
