"""A run of a million examples from shards to tables, in one go, by the layout of its shards.

    python million.py [--examples 1000000] [--layout 100 1 5000]

A small MLP on 64 inputs, three checkpoints, `--dim` 256, 200 test examples; the training set lies
in a hundred shards, in one, and in five thousand. Each job is a process of its own. "over" is what
the run took beside its stages: to start, to check the input, and to end.
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile

import launched
import numpy as np

TASK = launched.mlp_task(64, (64,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--layout", type=int, nargs="+", default=[100, 1, 5_000], help="shards")
    parser.add_argument("--job", nargs="+", default=["influence", "self_influence"])
    parser.add_argument("--flags", default="", help="more flags for the jobs")
    parser.add_argument("--show", action="store_true", help="also print what the jobs say")
    parser.add_argument("--keep", type=pathlib.Path, help="where to leave data and results")
    arguments = parser.parse_args()
    print("| shards | job | seconds | by stage | peak MB |\n|---|---|---|---|---|")
    for shards in arguments.layout:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.keep / str(shards) if arguments.keep else pathlib.Path(temporary)
            prepare(folder, arguments.examples, arguments.tests, shards)
            for what in arguments.job:
                for again in ("", ", nothing new"):
                    flags = arguments.flags.split()
                    seconds, peak, said = run(folder, what, flags)
                    if arguments.show:
                        print(said, file=sys.stderr)
                    print(
                        f"| {shards:,} | {what}{again} | {seconds:.1f} | "
                        f"{'' if again else stages(folder, said)} | {peak:,.0f} |",
                        flush=True,
                    )


def prepare(folder: pathlib.Path, examples: int, tests: int, shards: int) -> None:
    """Writes the task, the shards and the checkpoints of a model trained on some of it."""
    import keras

    import tracin_beam

    if (folder / "checkpoints").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "million_task.py").write_text(TASK)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 64)).astype("float32")
    y = rng.integers(0, 10, examples + tests)
    x = centres[y] + 1.5 * rng.standard_normal((examples + tests, 64), np.float32)
    for part, rows, count in (
        ("train", slice(0, examples), shards),
        ("test", slice(examples, None), 1),
    ):
        columns = {"features": x[rows], "label": y[rows]}
        tracin_beam.write_shards(columns, f"{folder}/{part}-*.tfrecord", shards=count)
    sys.path.insert(0, str(folder))
    sys.modules.pop("million_task", None)
    import million_task

    model = million_task.build_model()
    model.compile(keras.optimizers.SGD(0.1), million_task.task.loss)
    callbacks = [tracin_beam.TracInCheckpoint(f"{folder}/checkpoints")]
    some = min(examples, 20_000)
    model.fit(x[:some], y[:some], batch_size=128, epochs=3, verbose=0, callbacks=callbacks)
    sys.path.remove(str(folder))


def run(folder: pathlib.Path, stage: str, flags: list[str]) -> tuple[float, float, str]:
    """Seconds of a job, megabytes of its process at most, and what it said."""
    test = [f"--test={folder}/test-*.tfrecord"] if stage == "influence" else []
    return launched.run(
        folder, "million_task", stage, f"--output={folder}/out", "--dim=256", *test, *flags
    )


def stages(folder: pathlib.Path, said: str) -> str:
    """When each kind of line of the log was last said, as seconds since the one before."""
    state = json.loads((folder / "out" / "run.json").read_text())
    found: dict[str, int] = {}
    first = 0
    for hours, minutes, seconds, verb in re.findall(r"(?m)^(\d\d):(\d\d):(\d\d) (\w+)", said):
        at = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
        first = first or at
        found.pop(verb, None)
        found[verb] = at
    parts, before = [], first
    for verb, at in found.items():
        parts.append(f"{verb} {at - before} s")
        before = at
    seconds = state.get("timings", {})
    whole = ", ".join(f"{name} {entry['seconds']} s in all" for name, entry in seconds.items())
    return f"{', '.join(parts)}; {whole}"


if __name__ == "__main__":
    main()
