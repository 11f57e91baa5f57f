"""A night's tables and pictures, made up."""

import numpy as np
import pyarrow as pa

from tracin_beam.jobs.quality import SUSPECTS
from tracin_beam.report.quality import Found, look_up, worst
from tracin_beam.report.show import Shown
from tracin_beam.storage import tables

DATE = "2026-11-22"
RUN = {
    "kind": {"name": "classification"},
    "checkpoints": [{"step": 10}, {"step": 20}, {"step": 30}],
}


def suspect(number, **others):
    label = number % 3
    return {
        "id": f"train-{number}",
        "kind": "mislabelled",
        "score": 1 - number / 1e5,
        "label": float(label),
        "suggested_label": float((label + 1) % 3),
        "confidence": 1 - number / 1e5,
        "best_other_ratio": 2.0 + number,
        "supporting_ids": [f"train-{number + 1}", "elsewhere"],
        "shard": f"train-{number % 2}.tfrecord",
        "position": number,
        "cohort": "new" if number % 2 else "trained",
        "first_seen": DATE,
        "content_hash": number.to_bytes(16, "big") if number else b"\xff" * 16,
    } | others


def suspects(count, **others):
    return pa.Table.from_pylist([suspect(i, **others) for i in range(count)], schema=SUSPECTS)


def signals(count, checkpoints=3):
    """Rows of `signals.parquet`, of the suspects and as many others."""
    rng = np.random.default_rng(0)
    rows = 2 * count
    loss = rng.exponential(size=(rows, checkpoints))
    return pa.table(
        {
            "id": [f"train-{i}" for i in range(rows)],
            "shard": [f"train-{i % 2}.tfrecord" for i in range(rows)],
            "position": pa.array(range(rows), pa.int64()),
            "label": [float(i % 3) for i in range(rows)],
            "prediction": [float(i % 3) for i in range(rows)],
            "mislabel_score": np.where(np.arange(rows) < count, 0.9, 0.1),
            "loss": loss[:, -1],
            "loss_by_checkpoint": list(loss),
            "aum": tables.numbers(rng.normal(size=rows)),
            "self_influence": rng.exponential(size=rows) * 1e6,
        }
    )


def found(count=30, most=10_000, table=None, of=None):
    table = suspects(count) if table is None else table
    result = Found(*worst(iter([table]), most))
    look_up(result, iter([signals(count) if of is None else of]))
    return result


def metrics(count, **others):
    return {
        "date": DATE,
        "metrics": {"examples": 2 * count, "suspects": count, "suspects_rate": 0.5},
        "by_shard": {"train-0.tfrecord": {"examples": count, "suspects": count, "mean_loss": 0.5}},
        "gates": [],
        "changes": {"new": 3, "gone": 1},
    } | others


def pictures(count, side=28, seed=0):
    """Something like a photograph each: smooth, with an edge and some noise."""
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, side)
    for _ in range(count):
        a, b, c, d = rng.uniform(size=4)
        smooth = a * grid[:, None] + b * grid + (grid[:, None] > c) * (grid > d) * 0.7
        noisy = smooth / smooth.max() * 240 + rng.normal(size=(side, side)) * 4
        yield Shown("image", noisy.clip(0, 255).astype(np.uint8))
