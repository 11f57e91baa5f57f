"""The configuration of a run."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run, checked. Names and meanings are those of `TracInOptions`."""

    task: str
    checkpoints: str
    train: str
    output: str
    test: str | None
    learning_rate: tuple[float, ...] | None
    test_name: str
    target: str
    top_k: int
    rescore: int
    layers: str
    projection: str
    dim: int | Literal["auto"]
    recall: float
    seed: int
    norms: str
    ways: str
    batch_size: int
    index_rows: int
    recall_queries: int
    max_rejected: float
    report_examples: int
    overwrite: bool


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """The flags of `pipelines.plan` alone.

    Attributes:
      hours: wanted wall time of the run.
      worker_memory: bytes that a worker may take.
      json: whether to print the plan for a program.
    """

    hours: float
    worker_memory: int
    json: bool
