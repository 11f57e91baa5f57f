"""What lies in an output directory, and what of it is still good.

    run.json                                    configuration, versions, fingerprint, counts, …
    embeddings/<set>/<step>/<shard>.tfrecord    with <shard>.tfrecord.json, written after it: its
                                                fingerprint, counts and rejected records
    index/plan.json                             number of each shard's group
    index/part-00000/                           of a group, if there is an index: ScaNN searcher,
                                                rows.parquet, partition.json
    influence/<test name>/                      influence-*.parquet
    total_influence/<test name>/                total_influence-*.parquet, with --total
    group_influence/<test name>/                with --group_by; slice_influence/ with --slice
    reports/<test name>.html
    evaluation/<test name>/group-*.parquet      exact scores of the queries that recall is of
    curvature/<preconditioner>/<step>/          second moments of a checkpoint, and of its groups
    self_influence/                             self_influence-*.parquet
    features/train/<step>/<shard>.parquet       what a model makes of examples, whatever their label
    quality/<date>/                             signals, suspects and metrics of a night
    rejected/<set>=<shard>.jsonl
    _state/influence/<test name>.json           what says that the tables are whole

A set is "train" or the name of a test set. A table's folder holds the table alone, so that any
tool reads it as it is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tracin_beam import config
from tracin_beam.errors import InputError
from tracin_beam.storage import embeddings, files, marks, patterns

TRAIN = "train"
_LONGEST_NAME = 150  # bytes of a shard's name, to which names of files of ours add some
# Of _state, with a file for each shard.
_OF_SHARDS = (
    "self_influence",
    *(f"quality/{of}" for of in ("parts", "neighbours", "around", "evidence")),
)
_FOLDERS = (
    "embeddings",
    "index",
    "influence",
    "total_influence",
    "group_influence",
    "slice_influence",
    "evaluation",
    "curvature",
    "self_influence",
    "clusters",
    "cluster_summary",
    "features",
    "reports",
    "rejected",
    "_state",
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """An input file.

    Attributes:
      path: as matched.
      name: its base name, with a hash of its path where another shard has the same.
      identity: changes whenever the file does.
      signature: the same as long as the file is certainly as it was when it was identified.
    """

    path: str
    name: str
    identity: str
    signature: str = ""

    @property
    def size(self) -> int:
        """Bytes, when it was found."""
        return int(self.identity.partition(":")[0] or 0)


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of a run; its learning rate does not touch the embeddings.

    Attributes:
      path, step, epoch, learning_rate: as of `inputs.checkpoints.Checkpoint`.
      identity, signature: as of a `Shard`.
      training: which of the training runs it is of, from 0.
      trainings: how many there are; scores are averaged over them.
      name: of its folders, where the step alone would be another checkpoint's.
      moments: the optimizer's second moments there, where gradients are divided by them.
    """

    path: str
    step: int
    epoch: int | None
    learning_rate: float
    identity: str
    signature: str = ""
    training: int = 0
    trainings: int = 1
    name: str = ""
    moments: "CheckpointFile | None" = None

    @property
    def folder(self) -> str:
        """Its folder's name, in which what is made from it lies apart from that of others."""
        return self.name or str(self.step)

    @property
    def order(self) -> tuple[int, int]:
        """What checkpoints are in the order of."""
        return self.training, self.step

    @property
    def rate(self) -> float:
        """What a product of gradients counts in the mean over the training runs."""
        return self.learning_rate / self.trainings


@dataclasses.dataclass(frozen=True)
class Unit:
    """A shard at a checkpoint: what is computed and kept as one.

    Attributes:
      set_name: "train" or the test set's name.
      target: what is differentiated; always "loss" for the training set.
      fingerprint: of everything the embeddings depend on.
    """

    set_name: str
    shard: Shard
    checkpoint: CheckpointFile
    target: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """What became of a unit.

    Attributes:
      read: records in the shard.
      rejected: (position, reason) of those that could not be used.
      stamp: of the embedding file.
    """

    unit: Unit
    read: int
    rejected: tuple[tuple[int, str], ...]
    stamp: files.Stamp


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What became of a shard over all checkpoints.

    Attributes:
      rejected: (position, reason) of records that could not be used at some checkpoint, or whose
        id another record has; in the order of positions.
      stamps: of the embedding files, in the order of the checkpoints.
    """

    set_name: str
    shard: Shard
    read: int
    rejected: tuple[tuple[int, str], ...]
    stamps: tuple[files.Stamp, ...] = ()

    @property
    def used(self) -> int:
        return self.read - len(self.rejected)

    @property
    def excluded(self) -> list[int]:
        return [position for position, _ in self.rejected]


# What run.json holds, as far as anything follows from it.
_RUN: dict[str, Any] = {
    "sets": {str: {"shards": {str: str}}},
    "folders": {str: {"path": str, "identity": str}},
    "fingerprint": {str: str},
    "counts": {str: {str: int}},
    "timings": {str: {"started": str, "seconds": int | float}},
    "config": dict,
    "quality": dict | None,
}

Made = tuple[str, files.Stamp]
"""A finished file of a result: its path and what it holds."""


@dataclasses.dataclass(frozen=True)
class Output:
    """Paths in an output directory."""

    root: str

    def path(self, *parts: str) -> str:
        return files.join(self.root, *parts)

    @property
    def run(self) -> str:
        return self.path("run.json")

    def embeddings(self, set_name: str, checkpoint: CheckpointFile, shard: Shard) -> str:
        suffix = "" if shard.name.endswith(".tfrecord") else ".tfrecord"
        return self.path("embeddings", set_name, checkpoint.folder, shard.name + suffix)

    def unit(self, unit: Unit) -> str:
        return self.embeddings(unit.set_name, unit.checkpoint, unit.shard)

    def features(self, set_name: str, checkpoint: CheckpointFile, shard: Shard) -> str:
        return self.path("features", set_name, checkpoint.folder, shard.name + ".parquet")

    def rejected(self, set_name: str, shard: Shard) -> str:
        return self.path("rejected", f"{set_name}={shard.name}.jsonl")

    def influence(self, test_name: str, *parts: str) -> str:
        return self.path("influence", test_name, *parts)

    def report(self, test_name: str) -> str:
        return self.path("reports", test_name + ".html")

    def done(self, *job: str) -> str:
        """The mark of a job's results: of ("influence", test name), for example."""
        return self.path("_state", *job) + ".json"

    @property
    def leases(self) -> str:
        """The folder of the leases of those who are at work."""
        return self.path("_state", "running")

    def listing(self, name: str) -> str:
        """The file of a long list; see `listings`."""
        return self.path("_state", "listings", name + ".json")

    @property
    def verdicts(self) -> str:
        """The ledger of verdicts."""
        return self.path("quality", "verdicts.parquet")

    def evaluation(self, test_name: str, group: int) -> str:
        return self.path("evaluation", test_name, f"group-{group:05d}.parquet")

    def self_influence(self, *parts: str) -> str:
        return self.path("self_influence", *parts)

    @property
    def cluster_summary(self) -> str:
        """The table with a row for each cluster."""
        return self.path("cluster_summary", "cluster_summary.parquet")

    @property
    def cluster_report(self) -> str:
        return self.path("reports", "clusters", "report.html")

    def total_mark(self, test_name: str, shard: Shard) -> str:
        return self.path("_state", "total_influence", test_name, shard.name + ".json")

    def self_influence_mark(self, shard: Shard) -> str:
        return self.path("_state", "self_influence", shard.name + ".json")


def digest(value: Any) -> str:
    """16 hex digits for a value made of dicts, lists, strings and numbers."""
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What differs, in words."""
    words = []
    for key in new:
        if old.get(key) != new[key]:
            spelt_out = key in config.flags()
            words.append(f"{key} ({old.get(key)} → {new[key]})" if spelt_out else key)
    return words


def numbered(stem: str, number: int, total: int) -> str:
    """`stem-00000-of-0000N.parquet`."""
    return f"{stem}-{number:05d}-of-{total:05d}.parquet"


def identify(path: str, size: int | None = None) -> tuple[str, str]:
    """Identity and signature of an input file, of a size if that is known, as `Shard` has them.

    Raises:
      OSError: it is not there.
    """
    signature = files.signature(path)
    return f"{files.size(path) if size is None else size}:{files.checksum(path)}", signature


def is_unchanged(file: Shard | CheckpointFile) -> bool:
    """Whether an input file is still what it was when it was identified."""
    try:
        if files.is_certainly(file.path, file.signature):
            return True
        return identify(file.path)[0] == file.identity
    except OSError:  # it is gone
        return False


def check_unchanged(some: Iterable[Shard | CheckpointFile]) -> None:
    """What was read once more must be what it was identified as; asked before a result is kept.

    Raises:
      InputError: a file has become another.
    """
    for file in some:
        if not is_unchanged(file):
            raise changed_while_used(file)


def changed_while_used(file: Shard | CheckpointFile) -> InputError:
    """The error of a run whose input became another."""
    return InputError(
        f"{file.path} changed while it was used: nothing was kept of what was made from it. "
        "Run again."
    )


def matched(pattern: str, flag: str) -> list[files.FileInfo]:
    """The files that a pattern names, with their full paths.

    Args:
      pattern: glob, or several with commas.
      flag: for the error message.

    Raises:
      InputError: nothing matches.
    """
    try:
        return [files.FileInfo(files.full(i.path), i.size) for i in patterns.match(pattern)]
    except InputError as error:
        raise InputError(f"--{flag}: {error}") from None


def find_shards(pattern: str, flag: str, known: Mapping[str, str]) -> list[Shard]:
    """The shards that a pattern names, in the order of their paths.

    Args:
      pattern: glob, or several with commas.
      flag: for the error message.
      known: name by path of shards in an earlier run, which keep their names.

    Raises:
      InputError: nothing matches.
    """
    found = matched(pattern, flag)
    # Names that differ by ".tfrecord" alone would have the same embedding file.
    taken = {_stem(known[info.path]) for info in found if info.path in known}
    identities = files.in_parallel(lambda info: identify(info.path, info.size), found)
    shards = []
    for info, (identity, signature) in zip(found, identities, strict=True):
        name = known.get(info.path)
        if name is None:
            name = os.path.basename(info.path)
            if _stem(name) in taken or len(name.encode()) > _LONGEST_NAME:
                stem, extension = os.path.splitext(name)
                stem = stem.encode()[:_LONGEST_NAME].decode(errors="ignore")
                name = f"{stem}-{digest(info.path)[:8]}{extension[-20:]}"
            taken.add(_stem(name))
        shards.append(Shard(info.path, name, identity, signature))
    return shards


def _stem(name: str) -> str:
    return name.removesuffix(".tfrecord")


def read_unit(output: Output, unit: Unit) -> UnitResult | None:
    """The result of a unit that is done already, or None when it has to be computed."""
    path = output.unit(unit)
    stored = marks.read(marks.beside(path), output.root, unit.fingerprint, {path})
    if stored is None:
        return None
    rejected = tuple((position, reason) for position, reason in stored["rejected"])
    return UnitResult(unit, stored["read"], rejected, stored["files"][path])


def write_unit(output: Output, result: UnitResult) -> None:
    """Marks a unit's embedding file as complete."""
    path = output.unit(result.unit)
    marks.write(
        marks.beside(path),
        output.root,
        result.unit.fingerprint,
        {path: result.stamp},
        shard=result.unit.shard.path,
        step=result.unit.checkpoint.step,
        checkpoint=result.unit.checkpoint.path,
        read=result.read,
        embedded=result.read - len(result.rejected),
        rejected=[list(pair) for pair in result.rejected],
    )


def read_run(output: Output) -> dict[str, Any]:
    """run.json, or an empty dict for a new directory.

    Raises:
      InputError: it is not what this program writes, or names files that it does not.
    """
    if not files.exists(output.run):
        return {}
    state = files.read_json(output.run)
    if not isinstance(state, dict):
        raise _not_ours(output, f"it is a {type(state).__name__}")
    for key, shape in _RUN.items():
        if key in state and not files.fits(state[key], shape):
            raise _not_ours(output, f"{key!r} has another form")
    fingerprint = state.get("fingerprint", {})
    if not fingerprint.get("dim", "1").isdecimal():
        raise _not_ours(output, f"the dim is {fingerprint['dim']!r}")
    if fingerprint.get("embedding_dtype", embeddings.SMALLEST) not in embeddings.DTYPES:
        raise _not_ours(output, f"the dtype of embeddings is {fingerprint['embedding_dtype']!r}")
    for name, described in state.get("sets", {}).items():
        if not _is_plain(name):
            raise _not_ours(output, f"a set is called {name!r}")
        for path, shard in described["shards"].items():
            # Names of files follow from them.
            own = shard == os.path.basename(path) or digest(path)[:8] in shard
            if not (own and _is_plain(shard)):
                raise _not_ours(output, f"the shard {path!r} is called {shard!r}")
    for name in state.get("folders", {}):
        if not _is_plain(name):
            raise _not_ours(output, f"a checkpoint's folder is called {name!r}")
    return state


def in_folders(
    checkpoints: Sequence[CheckpointFile], known: Mapping[str, Mapping[str, str]]
) -> tuple[CheckpointFile, ...]:
    """Gives each checkpoint a folder's name: its step, unless that is another checkpoint's.

    Args:
      checkpoints: of all training runs.
      known: path and identity of the checkpoint that has a folder, by its name. Others may have the
        folder once that file is gone, and a copy of it has it too.
    """
    by_path = {one["path"]: name for name, one in known.items()}
    kept = {c.path: by_path[c.path] for c in checkpoints if c.path in by_path}
    named = []
    taken = set(kept.values())
    for c in checkpoints:
        name = kept.get(c.path, "")
        if not name:
            name = str(c.step)
            holder = known.get(name)
            if name in taken or (
                holder and holder["identity"] != c.identity and files.exists(holder["path"])
            ):
                name = f"{c.step}-{digest(c.path)[:8]}"
            taken.add(name)
        named.append(dataclasses.replace(c, name=name))
    return tuple(named)


def _not_ours(output: Output, what: str) -> InputError:
    return InputError(
        f"{output.run} is not as this program writes it ({what}): mend it, or remove it, which "
        "costs no embeddings."
    )


def _is_plain(name: str) -> bool:
    return marks.is_inside(name) and "/" not in name


def sweep(output: Output, there: Iterable[str], units: Sequence[Unit]) -> None:
    """Removes what dead runs left unfinished, and what belonged to inputs that are gone.

    In the sets of this run, embeddings go whose shard or checkpoint is no file any more. Those of
    inputs that are there, and that this run only does not name, are kept.

    Args:
      output: the output directory, in which no other run is at work.
      there: its files, listed before that was certain.
      units: of this run.
    """
    folders = [*(output.path(name) + "/" for name in _FOLDERS), output.path(".run.json.")]
    mine = [path for path in there if path.startswith(tuple(folders))]
    unfinished = {p for p in mine if os.path.basename(p).startswith(".") and p.endswith(".tmp")}
    wanted = {output.unit(unit) for unit in units}
    roots = {output.path("embeddings", unit.set_name) + "/" for unit in units}
    unnamed = {
        path.removesuffix(".json")
        for path in set(mine) - unfinished
        if path.startswith(tuple(roots))
    } - wanted
    asked = sorted(unnamed)
    gone = [
        path
        for path, is_gone in zip(asked, files.in_parallel(_is_gone, asked), strict=True)
        if is_gone
    ]
    names = {_stem(os.path.basename(path)) for path in gone}
    names -= {_stem(os.path.basename(path)) for path in wanted}
    of_shards = tuple(output.path("_state", folder) + "/" for folder in _OF_SHARDS)
    of_gone = [
        path
        for path in mine
        if path.startswith(of_shards)
        and _stem(re.sub(r"(\.npz|\.parquet)?(\.json)?$", "", os.path.basename(path))) in names
    ]
    left = set(mine) - set(gone) | wanted
    features = output.path("features") + "/"
    of_gone += [
        path
        for path in mine
        if path.startswith(features) and not _described(output, path, features) & left
    ]
    listings = output.path("_state", "listings") + "/"
    of_dead = {path for path in mine if path.startswith(listings)}
    orphans = [*_orphans(output, set(mine) - unfinished), *(of_dead - unfinished)]
    with_marks = [file for path in gone for file in (marks.beside(path), path)]
    doomed = [*unfinished, *with_marks, *of_gone, *orphans]
    files.in_parallel(lambda path: files.remove([path]), doomed)
    if doomed and files.is_local(output.root):
        for folder in sorted({os.path.dirname(path) for path in doomed}, reverse=True):
            with contextlib.suppress(OSError):  # not empty
                os.removedirs(folder)


def _described(output: Output, path: str, features: str) -> set[str]:
    """Where the embeddings lie of what a file in the folder of features describes."""
    stem = path.removeprefix(features).removesuffix(".json").removesuffix(".parquet")
    embedded = output.path("embeddings", *stem.split("/"))
    return {embedded, embedded + ".tfrecord"}


def _orphans(output: Output, there: Collection[str]) -> list[str]:
    """Files of the index, and of what is judged by it, that no mark or plan names."""
    try:
        plan = files.read_json(output.path("index", "plan.json"))
    except (OSError, InputError):
        plan = None
    groups = set(plan.values()) if files.fits(plan, {str: int}) else set()
    orphans = []
    named: dict[str, set[str]] = {}
    folders = (output.path("index") + "/", output.path("evaluation") + "/")
    for path in sorted(path for path in there if path.startswith(folders)):
        index = re.fullmatch(r"(.*/index/part-(\d+)[.\d]*)/.*", path)
        judged = re.fullmatch(r".*/evaluation/[^/]+/group-(\d+)\..*", path)
        if index and path.startswith(folders[0]):
            mark = index[1] + "/partition.json"
            if mark not in named:
                named[mark] = marks.named(mark, output.root) | {mark}
            if int(index[2]) not in groups or path not in named[mark]:
                orphans.append(path)
        elif judged and path.startswith(folders[1]) and int(judged[1]) not in groups:
            orphans.append(path)
    return orphans


def _is_gone(path: str) -> bool:
    """Whether an embedding file can be of no more use."""
    try:
        mark = files.read_json(marks.beside(path))
    except (OSError, InputError):
        return True
    if not files.fits(mark, {"shard": str, "checkpoint": str}):
        return True
    return not (files.exists(mark["shard"]) and files.exists(mark["checkpoint"]))


def clear(output: Output) -> None:
    """Removes all results."""
    for folder in _FOLDERS:
        there = files.under(output.path(folder))
        files.remove(path for path in there if not path.startswith(output.leases))


def merge_results(results: Sequence[UnitResult]) -> ShardResult:
    """A shard's result from those of its units, one for each checkpoint."""
    rejected: dict[int, str] = {}
    results = sorted(results, key=lambda r: r.unit.checkpoint.order)
    for result in results:
        for position, reason in result.rejected:
            rejected.setdefault(position, reason)
    first = results[0]
    reads = {result.read for result in results}
    if len(reads) != 1:
        raise InputError(f"{first.unit.shard.path} changed while it was read: run again.")
    return ShardResult(
        first.unit.set_name,
        first.unit.shard,
        first.read,
        tuple(sorted(rejected.items())),
        tuple(result.stamp for result in results),
    )
