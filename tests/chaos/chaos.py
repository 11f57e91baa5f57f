"""Kills, damage, mutated inputs and runs that meet, by chance but as the seed says.

    python tests/chaos/chaos.py --seed=0 --kills=100 --engine_kills=10 --inputs=1000

Whole jobs are run in children of one process that has imported everything and computed nothing, so
that a run costs a second or two. Whatever was done to it, the output must in the end be, byte for
byte, that of a run which nothing happened to; what is wrong is said in a sentence, and in time.

On an engine of deploy/engines it is a machine, a worker or the launcher that is killed. Where the
engine cannot be had, as without Java or Go, the summary says so in place of its kills.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import logging
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "deploy" / "engines")]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import beam_memo  # noqa: E402
import engines  # noqa: E402
import tiny as t  # noqa: E402
from fetch import Missing  # noqa: E402
from tiny import Tiny, rows  # noqa: E402

STAGES = ("influence", "self_influence")
FLAGS = {"total": True, "index": "scann", "index_rows": 16, "top_k": 5, "recall_queries": 2}
SECONDS = 300  # after which a run hangs

# What a process does between which it may die: a file gets its name, one is removed.
EVENTS = ("_replace", "remove")


@dataclasses.dataclass
class Summary:
    """What happened, and what of it was not right."""

    kills: int = 0
    engine: str = "an engine"
    engine_kills: int = 0
    missing: str = ""
    damages: int = 0
    inputs: int = 0
    whole: int = 0
    together: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    traces: list[str] = dataclasses.field(default_factory=list)
    hangs: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        columns = {
            "kills": self.kills,
            f"kills on {self.engine}": "skipped" if self.missing else self.engine_kills,
            "damaged files": self.damages,
            "mutated inputs": self.inputs,
            "of these in whole runs": self.whole,
            "runs that met": self.together,
            "wrong": len(self.wrong),
            "traces": len(self.traces),
            "hangs": len(self.hangs),
        }
        skipped = [f"\n{self.engine} cannot be had: {self.missing}"] if self.missing else []
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines.append(f"| {' | '.join(map(str, columns.values()))} |")
        return "\n".join([*lines, *skipped, *(what[:2000] for what in self.bad)])

    @property
    def bad(self) -> list[str]:
        return [*self.wrong, *self.traces, *self.hangs]


# Children.


def forked(body: Callable[[], int], said: Path) -> int:
    """Starts a child whose output goes to a file; gives its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def waited(pid: int, seconds: float = SECONDS) -> int | None:
    """The status of a child, negative for a signal; None if it hung, and then it is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def job(tiny: Tiny, stage: str, at_event: Callable[[int], None], **flags: object) -> int:
    """Runs a job in this process, and calls `at_event` with the number of every event."""
    from tracin_beam.jobs.launch import main
    from tracin_beam.storage import files

    count = 0

    def counted(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            at_event(count)
            return function(*args, **kwargs)

        return wrapped

    for name in EVENTS:
        setattr(files, name, counted(getattr(files, name)))
    return main(stage, "", [*tiny.argv(stage, **{**FLAGS, **flags}), "--runner=FnApiRunner"])


def results(out: Path) -> dict:
    """What users see of an output. The rest is read, and made again, where it is needed."""
    return {
        name: content
        for name, content in t.contents(out).items()
        if not name.startswith(("_state/", "index/", "evaluation/"))
        and not (name.startswith("embeddings/") and name.endswith(".json"))
    }


def make(folder: Path, made: Path) -> int:
    """Writes the input of the jobs: in a child, since it computes."""
    folder.mkdir()
    tiny = Tiny(folder).write_all()
    tiny.write("train-1.tfrecord", [*rows("train1.", 8, 1)[:7], b"garbage"])
    made.write_bytes(pickle.dumps(tiny.__dict__))
    return 0


class Chaos:
    """A folder with input, what a run makes of it, and what is done to it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.summary = Summary()
        self.said = folder / "said"
        self.tiny = Tiny.__new__(Tiny)
        made = folder / "tiny.pickle"
        if waited(forked(lambda: make(folder / "job", made), self.said)):
            raise RuntimeError(self.said.read_text())
        self.tiny.__dict__ = pickle.loads(made.read_bytes())
        self.clean("at first")
        self.expected = results(self.tiny.out)
        mark = self.tiny.out / "embeddings/train/10/train-0.tfrecord.json"
        self.mark = mark.read_bytes()
        self.events = {}
        shutil.rmtree(self.tiny.out)
        for stage in STAGES:
            counted = folder / f"{stage}.events"
            self.start(stage, lambda n, counted=counted: counted.write_text(str(n)))
            self.events[stage] = int(counted.read_text())

    def start(
        self,
        stage: str,
        at_event: Callable[[int], None] = lambda n: None,
        what: str = "",
        **flags: object,
    ) -> int:
        """The status of a job in a child; what it hung on or failed with is noted."""
        pid = forked(lambda: job(self.tiny, stage, at_event, **flags), self.said)
        return self.ended(pid, what or stage, self.said)

    def ended(self, pid: int, what: str, said: Path, failed: bool = False) -> int:
        """The status of a child, and a note of what is wrong with how it ended.

        Args:
          pid: of the child.
          what: it was, for the note.
          said: the file with its output.
          failed: whether it may say that it has failed, as an input need not be mended for.
        """
        status = waited(pid)
        text = said.read_text(errors="replace")
        if status is None:
            self.summary.hangs.append(f"{what}: {text[-500:]}")
            return 71
        if "Traceback (most recent" in text or status not in (
            *(0, 2, -signal.SIGKILL),
            *([1] if failed else []),
        ):
            self.summary.traces.append(f"{what}, status {status}: {text[-1500:]}")
        return status

    def clean(self, after: str) -> None:
        """Both jobs, undisturbed, must end well, and their output be that of the first time."""
        for stage in STAGES:
            if self.start(stage):
                said = self.said.read_text(errors="replace")
                self.summary.wrong.append(f"{stage} fails after {after}: {said[-500:]}")
        made = results(self.tiny.out)
        if not hasattr(self, "expected"):
            return
        hidden = [p.name for p in self.tiny.out.rglob(".*") if p.is_file()]
        differs = sorted(
            name
            for name in made.keys() | self.expected.keys()
            if made.get(name) != self.expected.get(name)
        )
        if differs or hidden:
            self.summary.wrong.append(f"after {after}: {differs} differ, {hidden} are left")
            shutil.rmtree(self.tiny.out)

    # What is done.

    def kill(self) -> None:
        """A run from nothing or from an earlier one, killed one to three times on its way."""
        if self.random.random() < 0.5:
            shutil.rmtree(self.tiny.out, ignore_errors=True)
        what = []
        for _ in range(self.random.randint(1, 3)):
            stage = self.random.choice(STAGES)
            when = self.random.randint(1, self.events[stage])
            # Other flags make other tables, which those of the expected run must replace.
            flags = {"top_k": self.random.choice([5, 5, 3])} if stage == "influence" else {}

            def dies(n: int, when: int = when) -> None:
                if n == when:
                    os.kill(os.getpid(), signal.SIGKILL)

            if self.start(stage, dies, **flags) == -signal.SIGKILL:
                self.summary.kills += 1
            what.append(f"{stage} killed at event {when}")
        self.clean(", ".join(what))

    def damage(self) -> None:
        """Some files of a finished output are not what they were."""
        if not (self.tiny.out / "run.json").exists():
            self.clean("a run from nothing")
        files = sorted(p for p in self.tiny.out.rglob("*") if p.is_file() and p.name != "run.json")
        what = []
        for path in self.random.sample(files, self.random.randint(1, 3)):
            harm = self.random.choice(HARMS)
            harm(self.random, path, files)
            what.append(f"{harm.__name__} {path.relative_to(self.tiny.out)}")
            self.summary.damages += 1
        if self.random.random() < 0.5:
            # Other tables, from the same embeddings and index.
            if self.start("influence", top_k=3):
                said = self.said.read_text(errors="replace")
                self.summary.wrong.append(f"fails after {what}: {said[-500:]}")
            what.append("a run with another top_k")
        self.clean(", ".join(what))

    def meet(self) -> None:
        """Two runs on one output: on the same test set, another, or another table."""
        shutil.rmtree(self.tiny.out, ignore_errors=True)
        pairs = [("influence", "test"), ("influence", "other"), ("self_influence", None)]
        chosen = [pairs[0], self.random.choice(pairs)]
        said = [self.said.with_suffix(f".{i}") for i in range(2)]
        pids = []
        for (stage, name), where in zip(chosen, said, strict=True):
            flags = {"test_name": name} if name else {}
            pids.append(
                forked(lambda s=stage, f=flags: job(self.tiny, s, lambda n: None, **f), where)
            )
            time.sleep(self.random.random())
        statuses = [
            self.ended(pid, "two runs", where) for pid, where in zip(pids, said, strict=True)
        ]
        self.summary.together += 1
        refused = [w.read_text() for s, w in zip(statuses, said, strict=True) if s == 2]
        if any("another run is at work" not in text for text in refused) or len(refused) > 1:
            self.summary.wrong.append(f"two runs, {chosen}: {statuses} {refused}")
        shutil.rmtree(self.tiny.out)

    def change(self) -> None:
        """A shard is replaced, and put back, while a run is at work: it fails, or is right."""
        shutil.rmtree(self.tiny.out, ignore_errors=True)
        path = self.tiny.folder / self.random.choice(["train-0.tfrecord", "test-1.tfrecord"])
        content, when = path.read_bytes(), self.random.randint(8, self.events["influence"])
        other = self.random.choice([content[: len(content) // 2], t.framed(rows("other", 8, 9))])

        def replaced(n: int) -> None:
            if n == when:
                path.write_bytes(other)

        status = self.start("influence", replaced)
        text = self.said.read_text(errors="replace")
        path.write_bytes(content)
        self.summary.together += 1
        refused = status == 2 and path.name in text
        # After the last look at it, which is the end of the run for all it knows.
        unseen = status == 0 and when >= self.events["influence"] - 12
        if not (refused or unseen):
            said = f"{path.name} replaced at {when}: {status} {text[-500:]}"
            self.summary.wrong.append(said)
        self.clean(f"{path.name} replaced at event {when}")

    # On an engine, whose workers are other processes.

    def engine_kills(self, name: str, count: int) -> None:
        """Machines, workers and launchers that die while an engine is at work."""
        self.summary.engine = name
        with tempfile.TemporaryDirectory(prefix="chaos-engine-") as folder:
            try:
                with engines.running(name, Path(folder)) as engine:
                    for stage in STAGES:
                        self.ended(self.on_engine(engine, stage), f"{stage} on {name}", self.said)
                    self.clean(f"a run on {name}")
                    while self.summary.engine_kills < count and not self.summary.hangs:
                        self.engine_kill(engine, name)
            except Missing as error:
                self.summary.missing = str(error)

    def on_engine(self, engine: engines.Engine, stage: str) -> int:
        """Starts a job in a child; gives its process id."""
        from tracin_beam.jobs.launch import main

        argv = [*self.tiny.argv(stage, **FLAGS), *engine.flags]
        return forked(lambda: main(stage, "", argv), self.said)

    def engine_kill(self, engine: engines.Engine, name: str) -> None:
        """A run from nothing; what is killed is not missed where a cluster has another for it."""
        shutil.rmtree(self.tiny.out, ignore_errors=True)
        stage = self.random.choice(STAGES)
        victim = self.random.choice(VICTIMS[name])
        # Files of an output, which tell how far a run is; workers are of other processes.
        when = self.random.randrange(len(self.expected) - (stage == "self_influence") * 10)
        pid = self.on_engine(engine, stage)
        end = time.monotonic() + SECONDS
        while len(there := self.finished()) < when and _is_alive(pid) and time.monotonic() < end:
            time.sleep(0.005)
        killed = _is_alive(pid) and victim(engine, pid)
        what = f"{stage} on {name}, {victim.__name__} at {len(there)} files"
        status = self.ended(pid, what, self.said, failed=victim is lose_engine)
        if not killed:
            return
        self.summary.engine_kills += 1
        # A job that is not there yet goes to the engine's next process.
        expected = {lose_launcher: [-signal.SIGKILL], lose_engine: [0, 1]}.get(victim, [0])
        if status not in expected:
            said = self.said.read_text(errors="replace")
            self.summary.wrong.append(f"{what}: status {status}, {said[-500:]}")
        self.clean(what)
        _wait_for_workers(engine)

    def finished(self) -> list[Path]:
        return [p for p in self.tiny.out.rglob("[!.]*") if p.is_file()]


# Deaths on an engine: each takes it and the launcher's process, and says whether it could.


def lose_worker(engine: engines.Engine, pid: int) -> bool:
    """An SDK process dies, as of memory."""
    workers = [w for n in engine.names("task-manager") for w in engines.descendants(engine.pid(n))]
    with contextlib.suppress(ProcessLookupError):
        if workers:
            os.kill(workers[-1], signal.SIGKILL)
    return bool(workers)


def lose_task_manager(engine: engines.Engine, pid: int) -> bool:
    """A machine is switched off, and a new one takes its place, as Kubernetes sees to."""
    engine.kill("task-manager-0")
    engines.start_task_manager(engine, "task-manager-0")
    return True


def lose_launcher(engine: engines.Engine, pid: int) -> bool:
    """The process that waits for the job; a cluster goes on without it for a while."""
    os.kill(pid, signal.SIGKILL)
    return True


def lose_engine(engine: engines.Engine, pid: int) -> bool:
    """An engine of one process."""
    engine.restart("prism")
    return True


VICTIMS = {
    "flink_cluster": (lose_worker, lose_task_manager, lose_launcher),
    "prism": (lose_engine, lose_launcher),
}


def _is_alive(pid: int) -> bool:
    """Whether a child has not ended; its status stays to be asked for."""
    return not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _wait_for_workers(engine: engines.Engine) -> None:
    """Until none is left of a job whose launcher is gone: it would write into the next output."""
    end = time.monotonic() + SECONDS
    names = engine.names("task-manager")
    while any(engines.descendants(engine.pid(n)) for n in names) and time.monotonic() < end:
        time.sleep(0.5)


# Damage: each takes a file, and all files for those that need another.


def zeroed(chance: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(chance: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(max(1, path.stat().st_size))])


def flipped(chance: random.Random, path: Path, files: list[Path]) -> None:
    path.write_bytes(mutated(chance, path.read_bytes()))


def gone(chance: random.Random, path: Path, files: list[Path]) -> None:
    path.unlink()


def exchanged(chance: random.Random, path: Path, files: list[Path]) -> None:
    others = [p for p in files if p.suffix == path.suffix and p.exists() and p != path]
    if others and path.exists():
        other = chance.choice(others)
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)


def of_another_shape(chance: random.Random, path: Path, files: list[Path]) -> None:
    path.write_text(chance.choice(["[]", "{}", "null", '{"files": 1}', '"x"', "7"]))


HARMS = (zeroed, cut, flipped, gone, exchanged, of_another_shape)


# Inputs.


def mutated(chance: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        size = chance.choice([1, 1, 2, 8, 40])
        kind = chance.randrange(4)
        if kind == 0:
            data[at : at + size] = chance.randbytes(size)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = chance.randbytes(size)
    return bytes(data)


def mutated_json(chance: random.Random, content: bytes) -> bytes:
    """A value somewhere in it is another one, of another type or a hostile path."""
    tree = json.loads(content)
    strange = [None, -1, 1e308, "", "../../x", "/etc/passwd", [], {}, True, "x\0y", 1 << 70]

    def change(node: object) -> object:
        if isinstance(node, dict) and node and chance.random() < 0.8:
            key = chance.choice(sorted(node))
            name = chance.choice([key, key, key, "../x"])
            return {**{k: v for k, v in node.items() if k != key}, name: change(node[key])}
        if isinstance(node, list) and node and chance.random() < 0.8:
            at = chance.randrange(len(node))
            return [*node[:at], change(node[at]), *node[at + 1 :]]
        return chance.choice(strange)

    return json.dumps(change(tree)).encode()


def inputs(chaos: Chaos, count: int) -> None:
    """Mutated inputs of every kind, each read by what reads it: right, or refused in a sentence."""
    from tracin_beam.errors import InputError

    chance, summary = chaos.random, chaos.summary
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        kinds = _kinds(chaos, Path(folder))
        for i in range(count):
            kind = sorted(kinds)[i % len(kinds)]
            path, content, mutate, read = kinds[kind]
            given = mutate(chance, content)
            path.write_bytes(given)
            summary.inputs += 1
            start = time.monotonic()
            try:
                with contextlib.redirect_stdout(io.StringIO()), _alarm(60):
                    if not read():
                        summary.wrong.append(f"{kind}: wrong values from {given[:300]!r}")
            except (InputError, OSError, UnicodeError) as error:
                if isinstance(error, UnicodeError) and not isinstance(error, InputError):
                    summary.traces.append(f"{kind}: {error!r} from {given[:300]!r}")
            except TimeoutError:
                summary.hangs.append(f"{kind}: {given[:300]!r}")
            except Exception:
                summary.traces.append(f"{kind}: {traceback.format_exc()[-900:]} {given[:300]!r}")
            if time.monotonic() - start > 60:
                summary.hangs.append(f"{kind}: {given[:300]!r}")
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _alarm(seconds: int):
    def late(number, frame):
        raise TimeoutError

    earlier = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def _kinds(chaos: Chaos, folder: Path) -> dict:
    """Kind → its file, sound content, how it is mutated, and a function that reads it."""
    from tracin_beam.inputs.checkpoints import read_checkpoints
    from tracin_beam.jobs import options
    from tracin_beam.jobs.registry import JOBS
    from tracin_beam.storage import marks, records, runs

    tiny = chaos.tiny
    shard = (tiny.folder / "train-0.tfrecord").read_bytes()
    sound = {row.serialized() for row in tiny.shards["train-0.tfrecord"]}
    shutil.copytree(tiny.folder / "ckpts", folder / "ckpts")
    config = f"train: {tiny.folder}/train-*\ncheckpoints: c\ntask: t.py:task\ntop_k: 5\ndim: 16\n"
    output = runs.Output(str(folder / "out"))
    (folder / "out").mkdir()
    state = dict(chaos.expected["run.json"])
    state["timings"] = {}
    mark = chaos.mark
    fingerprint = json.loads(mark)["fingerprint"]

    def read_shard() -> bool:
        found = records.read_records(str(folder / "x.tfrecord"))
        return {r.data for r in found if isinstance(r, records.Record)} <= sound

    def read_mark() -> bool:
        # The file that it vouches for is not there.
        return marks.read(str(folder / "m.json"), output.root, fingerprint) is None

    def read_run() -> bool:
        found = runs.read_run(output)
        named = [n for s in found.get("sets", {}).values() for n in s["shards"].values()]
        return not [n for n in named if "/" in n or n in ("", ".", "..")]

    def read_listing() -> bool:
        paths = [c.path for c in read_checkpoints(str(folder / "ckpts"))]
        return all(os.path.dirname(os.path.realpath(p)) == str(folder / "ckpts") for p in paths)

    def read_config() -> bool:
        argv = [f"--config={folder / 'c.yaml'}", f"--output={folder / 'out'}"]
        try:
            options.parse(argv, JOBS["embed"])
        except SystemExit as error:
            return error.code == 2
        return True

    return {
        "TFRecord": (folder / "x.tfrecord", shard, mutated, read_shard),
        "config": (folder / "c.yaml", config.encode(), mutated, read_config),
        "checkpoints.json": (
            folder / "ckpts/checkpoints.json",
            (folder / "ckpts/checkpoints.json").read_bytes(),
            mutated_json,
            read_listing,
        ),
        "run.json": (folder / "out/run.json", json.dumps(state).encode(), mutated_json, read_run),
        "mark": (folder / "m.json", mark, mutated_json, read_mark),
    }


def whole_inputs(chaos: Chaos, count: int) -> None:
    """Mutated inputs of every kind go through whole runs, in children.

    What has a checksum, or no number depends on, changes no score: a run is right or is refused.
    What was meant by another task, weights or learning rates nobody knows.
    """
    chance, tiny, summary = chaos.random, chaos.tiny, chaos.summary
    packed = gzip.compress(t.framed(rows("train3.", 8, 3)), mtime=0)
    (tiny.folder / "train-3.tfrecord.gz").write_bytes(packed)
    (tiny.folder / "config.yaml").write_text("batch_size: 8\nreport_examples: 3\n")
    flags = {"top_k": 100, "index": "exact", "config": tiny.folder / "config.yaml"}
    if chaos.start("influence", **flags):
        summary.wrong.append(f"the run before mutations fails: {chaos.said.read_text()[-500:]}")
    made = tiny.folder / "made"
    os.replace(tiny.out, made)
    sound = _scores(made)
    for i in range(count):
        name, mutate, changes_nothing = WHOLE[i % len(WHOLE)]
        shutil.rmtree(tiny.out, ignore_errors=True)
        if name.startswith("out/"):
            shutil.copytree(made, tiny.out)
        path = tiny.folder / name
        content = path.read_bytes()
        given = mutate(chance, content)
        path.write_bytes(given)
        summary.inputs += 1
        summary.whole += 1
        what = f"{name} mutated to {given[:300]!r}"
        status = chaos.start("influence", what=what, **flags)
        path.write_bytes(content)
        if status == 0 and changes_nothing:
            found = _scores(tiny.out)
            complete = name.startswith("out/") or not found
            strange = [k for k, v in found.items() if not _is_close(v, sound.get(k))]
            if strange or (complete and len(found) != len(sound)):
                summary.wrong.append(f"{len(found)} rows, {strange[:3]} are wrong: {what}")
    for folder in (made, tiny.out):
        shutil.rmtree(folder, ignore_errors=True)
    (tiny.folder / "train-3.tfrecord.gz").unlink()


# Path in the job's folder, how it is mutated, and whether every score that is there stays.
_EMBEDDED = "out/embeddings/train/10/train-0.tfrecord"
WHOLE = [
    ("task.py", mutated, False),
    ("train-2.tfrecord", mutated, True),
    ("ckpts/00000010.weights.h5", mutated, False),
    ("test-1.tfrecord", mutated, True),
    ("ckpts/checkpoints.json", mutated_json, False),
    ("train-3.tfrecord.gz", mutated, True),
    ("config.yaml", mutated, False),
    ("out/run.json", mutated_json, True),
    ("out/_state/influence/test.json", mutated_json, True),
    (_EMBEDDED, mutated, True),
    (f"{_EMBEDDED}.json", mutated_json, True),
]


def _scores(out: Path) -> dict[tuple[str, str, str], float]:
    table = t.table(out / "influence" / "test")
    return {(row["test_id"], row["train_id"], row["role"]): row["score"] for row in table}


def _is_close(one: float, other: float | None) -> bool:
    return other is not None and abs(one - other) <= 1e-4 * abs(other) + 1e-6


def run(given: argparse.Namespace) -> Summary:
    """All of it, as the arguments say."""
    import apache_beam  # noqa: F401
    import tensorflow  # noqa: F401

    from tracin_beam.jobs import graphs, launch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        # Of processes that are killed, too.
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        chaos = Chaos(Path(folder), given.seed)
        summary = chaos.summary
        inputs(chaos, max(0, given.inputs - given.whole))
        while summary.kills < given.kills and not summary.hangs:
            chaos.kill()
        while summary.damages < given.damages and not summary.hangs:
            chaos.damage()
        for _ in range(given.meets):
            chaos.meet()
            chaos.change()
        whole_inputs(chaos, min(given.whole, given.inputs))
        if given.engine_kills:
            chaos.engine_kills(given.engine, given.engine_kills)
        return summary


ARGUMENTS = {
    "seed": (0, "of all chances"),
    "kills": (100, "processes to kill on Beam's direct runner"),
    "damages": (60, "files of an output to damage"),
    "inputs": (1000, "mutated inputs"),
    "whole": (200, "of these for whole runs, the others for what reads them"),
    "meets": (6, "runs that meet others, and as many in which a shard changes"),
    "engine_kills": (10, "processes to kill on an engine"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (default, about) in ARGUMENTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (%(default)s)")
    parser.add_argument("--engine", choices=VICTIMS, default="flink_cluster")
    given = parser.parse_args()
    start = time.monotonic()
    beam_memo.install()
    summary = run(given)
    print(f"seed {given.seed}, {time.monotonic() - start:.0f} s\n\n{summary}")
    return 1 if summary.bad else 0


if __name__ == "__main__":
    sys.exit(main())
