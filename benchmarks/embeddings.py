"""How fast embedding files are written and read back.

    python embeddings.py [--rows 60000] [--dim 1024] [--checkpoints 3]

Writes a shard's files, and reads them by every reader in turn, several times, from the page cache:
the bytes alone, as arrays into a matrix, as rows, and by TensorFlow's parser, which is what reads
records of other programs. Medians, and rates of the files' bytes.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from engine import medians

from tracin_beam.storage import embeddings, records
from tracin_beam.storage.embeddings import Embeddings, MatrixReader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--varying_ids", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| way | seconds | MB/s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, str(c)) for c in range(args.checkpoints)]
        ways: dict[str, Callable[[], Any]] = {"written": lambda: write(paths, rng, args)}
        taken = medians(ways, 1)
        out = np.zeros((4096, args.dim * args.checkpoints), np.float32)
        whole = np.zeros((args.rows, args.dim * args.checkpoints), np.float32)
        taken |= medians(
            {
                "the bytes alone": lambda: [alone(path) for path in paths],
                "blocks of a matrix": lambda: blocks(paths, out),
                "blocks, scaled": lambda: blocks(paths, out, [0.1] * len(paths)),
                "one matrix": lambda: MatrixReader(paths).read(whole),
                "rows": lambda: list_of(embeddings.read_checkpoints(paths, [])),
                "a hundred positions": lambda: embeddings.read_at(paths[0], np.arange(0, 1000, 10)),
                "TensorFlow's parser": lambda: [parsed(path) for path in paths],
            },
            5,
        )
        size = sum(map(os.path.getsize, paths))
        for way, seconds in taken.items():
            print(f"| {way} | {seconds:.3f} | {size / seconds / 1e6:.0f} |")


def write(paths: list[str], rng: np.random.Generator, args: argparse.Namespace) -> None:
    for path in paths:
        with open(path, "wb") as handle:
            writer = embeddings.EmbeddingWriter(handle)
            for start in range(0, args.rows, 256):
                position = np.arange(start, min(start + 256, args.rows))
                ids = [b"x" * (p * 7919 % 50 * args.varying_ids) + b"%d" % p for p in position]
                floats = rng.random((len(embeddings.FLOATS), len(position)), np.float32)
                vectors = rng.random((len(position), args.dim), np.float32)
                writer.write(Embeddings(np.array(ids, object), position, *floats, vectors))


def alone(path: str) -> None:
    with open(path, "rb") as handle:
        while handle.read(1 << 22):
            pass


def blocks(paths: list[str], out: np.ndarray, scales: list[float] | None = None) -> None:
    reader = MatrixReader(paths, scales=scales)
    while len(reader.read(out)):
        pass


def list_of(parts: Any) -> int:
    return sum(len(part[0]) for part in parts)


def parsed(path: str) -> None:
    batch: list[bytes] = []
    for record in records.read_records(path):
        assert isinstance(record, records.Record)
        batch.append(record.data)
        if len(batch) == 4096:
            embeddings.decode(batch)
            batch = []
    embeddings.decode(batch)


if __name__ == "__main__":
    main()
