"""How fast is a worker like this machine? The embed stage and exact scores, timed on a sample."""

import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from tracin_beam.gradients.batches import Batch
from tracin_beam.planning import plan
from tracin_beam.planning.sample import sample, usable
from tracin_beam.stages import embed
from tracin_beam.stages.metrics import Tally
from tracin_beam.stages.workers import EngineSource, Loaded
from tracin_beam.storage import files, records, runs
from tracin_beam.storage.records import Record
from tracin_beam.storage.runs import CheckpointFile, Output, Shard, Unit

# Records of the sample.
_ROWS = 2048
# The embed stage is timed for about so long.
_TIMED_SECONDS = 3.0


def measure(source: EngineSource, checkpoint: CheckpointFile, train: Sequence[Shard]) -> plan.Speed:
    """Times the embed stage and exact scores on a sample, warm, and takes the peak of memory."""
    loaded = source.get()
    size = loaded.engine.batch_size
    some = sample(train, max(_ROWS, 2 * size))
    _embed(source, checkpoint, some[:size])  # traces
    probe = some[: 4 * size]
    seconds = _embed(source, checkpoint, probe)
    wanted = int(len(probe) / max(seconds, 1e-3) * _TIMED_SECONDS)
    rate = len(probe) / max(seconds, 1e-6)
    if wanted > len(probe):
        enough = list(itertools.islice(itertools.cycle(some), wanted))
        rate = wanted / _embed(source, checkpoint, enough)
    memory = _peak_memory()
    good, _ = usable(loaded, [checkpoint], "loss", some[: 4 * size])
    values = loaded.engine.values(checkpoint.path)
    gradients = loaded.engine.queries(values, loaded.parse([q.data for q in good[:size]]))
    _score(loaded, values, gradients, good[:size])  # traces
    started = time.monotonic()
    _score(loaded, values, gradients, good)
    taken = time.monotonic() - started
    return plan.Speed(
        rate,
        len(good) / max(taken, 1e-6),
        size,
        loaded.engine.query_bytes(),
        max(memory, _peak_memory()),
        slow(loaded, checkpoint, loaded.parse([record.data for record in good[:size]])),
    )


def slow(loaded: Loaded, checkpoint: CheckpointFile, batch: Batch) -> plan.Slow | None:
    """The weights that no rule is for, and what they cost; None if each has one."""
    engine = loaded.engine
    found = engine.slow_weights()
    if not found:
        return None
    layers = set(found.values())
    return plan.Slow(
        tuple(found),
        len(engine.weights),
        () if None in layers else tuple(sorted(name for name in layers if name)),
        engine.slowdown(engine.values(checkpoint.path), batch),
    )


def _score(loaded: Loaded, values: Any, gradients: Any, some: Sequence[Record]) -> None:
    size = loaded.engine.batch_size
    for i in range(0, len(some), size):
        batch = loaded.parse([record.data for record in some[i : i + size]])
        loaded.engine.scores(values, batch, gradients)


def _embed(source: EngineSource, checkpoint: CheckpointFile, some: Sequence[Record]) -> float:
    """Seconds that a unit of these records takes, from its shard to its embedding file."""
    with tempfile.TemporaryDirectory() as folder:
        path = files.join(folder, "sample")
        with open(path, "wb") as handle:
            writer = records.RecordWriter(handle)
            for record in some:
                writer.write(record.data)
        unit = Unit(runs.TRAIN, Shard(path, "sample", *runs.identify(path)), checkpoint, "loss", "")
        started = time.monotonic()
        embed.embed_unit(Output(folder), source, unit, 1.0, Tally())
        return time.monotonic() - started


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
