"""The configuration of a run: every flag, with its default and what can be said of it.

To add a flag, add a field to `Config`. The parser, `--help`, the table of docs/flags.md and the
parameters of the Flex Template are made from the fields.
"""

import dataclasses
import importlib
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tracin_beam.errors import InputError

_UNITS = " KMGT"


@dataclasses.dataclass(frozen=True)
class Flag:
    """What is known of a flag besides its name and default.

    Attributes:
      help: what it means, for `--help` and docs/flags.md.
      read: its value from text; raises a ValueError that says what to give instead.
      choices: the values that it may have, if they are few; or "module:function" that gives them,
        a module that does not import TensorFlow.
      at_least, at_most: its range, ends included.
      between: its range without the ends.
      embeddings: whether embeddings depend on it, so that it is part of their fingerprint.
      jobs: the only jobs that take it; None for every job.
      remote: regular expression of the values that make sense on Dataflow.
      repeated: whether it may be given several times, each adding to a tuple of values.
      or_else: what may be given beside the choices, in words; then others are checked later.
    """

    help: str
    read: Callable[[str], Any]
    choices: tuple[str, ...] | str = ()
    at_least: float | None = None
    at_most: float | None = None
    between: tuple[float, float] | None = None
    embeddings: bool = False
    jobs: tuple[str, ...] | None = None
    remote: str = ""
    repeated: bool = False
    or_else: str = ""

    def known_choices(self) -> tuple[str, ...]:
        """The values that the flag may have; empty where there is no such list."""
        if isinstance(self.choices, tuple):
            return self.choices
        module, _, name = self.choices.partition(":")
        return tuple(getattr(importlib.import_module(module), name)())

    def takes(self, job: str) -> bool:
        """Whether a job has this flag; a command `quality apply` has those of `quality` too.

        So that one --config file serves all of them.
        """
        return self.jobs is None or job in self.jobs or job.partition(" ")[0] in self.jobs

    def problem(self, value: Any) -> str:
        """What is wrong with a value, to be read after `--name=value`; empty if nothing is."""
        if value is None or (isinstance(value, str) and (not self.choices or self.or_else)):
            return ""
        known = self.known_choices()
        if known and value not in known:
            return f" is not known; take one of {', '.join(known)}."
        if isinstance(value, str | bool):
            return ""
        values = value if isinstance(value, tuple) else (value,)
        for number in values:
            if self.between and not self.between[0] < number < self.between[1]:  # nor NaN
                low, high = self.between
                if math.isinf(high):
                    return f" must be above {low:g} and finite."
                return f" must lie between {low:g} and {high:g}."
            if self.at_least is not None and not number >= self.at_least:
                return f" must be at least {self.at_least}."
            if self.at_most is not None and not number <= self.at_most:
                return f" must be at most {self.at_most}."
        return ""


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"give a whole number, not {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"give a number, not {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"give a number, or some with commas, not {text!r}")
    return numbers


def _conditions(text: str) -> tuple[str, ...]:
    """Conditions with commas between them, as no condition has one in it."""
    conditions = tuple(part.strip() for part in text.split(",") if part.strip())
    if not conditions:
        raise ValueError("give a condition such as new_suspects > 100")
    return conditions


def _or_auto(number: Callable[[str], float]) -> Callable[[str], float | str]:
    """Reads what a function reads, or "auto"."""

    def read(text: str) -> float | str:
        try:
            return text if text == "auto" else number(text)
        except ValueError:
            raise ValueError(f"give a number or auto, not {text!r}") from None

    return read


def _one(text: str) -> tuple[str, ...]:
    """A value of a flag that may be given several times."""
    return (text,) if text else ()


def _size(text: str) -> int:
    """Bytes, from a number with or without a unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not match or not (
        size := int(float(match[1]) * 1024 ** _UNITS.index(match[2].upper() or " "))
    ):
        raise ValueError(f"give a size such as 4GB, not {text!r}")
    return size


def _flag(default: Any, help: str, read: Callable[[str], Any] = str, **known: Any) -> Any:
    return dataclasses.field(default=default, metadata={"flag": Flag(help, read, **known)})


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run.

    Each field is a flag; `help` says what it means. `flags` gives the rest of what is known of
    them, and `check` raises an error where a value is out of its range.
    """

    task: str = _flag(
        "",
        "The task: file.py:name or package.module:name.",
        remote=r"(gs://.+\.py|[\w.]+):\w+",
    )
    checkpoints: tuple[str, ...] = _flag(
        (),
        "A directory that TracInCheckpoint wrote, or a glob of weight files; given several times, "
        "of as many training runs, over which scores are averaged.",
        _one,
        remote=r"gs://.+",
        repeated=True,
    )
    learning_rate: tuple[float, ...] | None = _flag(
        None,
        "For a glob of weight files that do not state it: the learning rate, one for all or a "
        "comma separated list.",
        _numbers,
    )
    checkpoints_select: int = _flag(
        0,
        "Checkpoints to take of each training run, with the mean learning rate of the checkpoints "
        "since the one taken before; 0 for all.",
        _whole,
        at_least=0,
    )
    checkpoints_select_by: str = _flag(
        "evenly",
        "Which checkpoints to take: evenly spread ones, or those before which the loss of a sample "
        "of the training set fell most.",
        choices=("evenly", "loss"),
    )
    train: str = _flag(
        "", "Training shards: a glob, or a comma separated list of globs.", remote=r"gs://.+"
    )
    test: str | None = _flag(None, "Test shards, in the same way.", remote=r"gs://.+")
    output: str = _flag(
        "",
        "The output directory, on any file system that Beam knows.",
        remote=r"gs://[^*?\[\]]+",
    )
    test_name: str = _flag("test", "Name of this test set and target in the output directory.")
    target: str = _flag(
        "loss",
        "What is explained of a test example.",
        choices="tracin_beam.gradients.targets:names",
        or_else="a name of Task(targets=…)",
    )
    top_k: int = _flag(10, "Proponents, and opponents, of each test example.", _whole, at_least=1)
    rescore: int = _flag(
        100,
        "Candidates per test example and role whose scores are computed exactly (all, where there "
        "are few pairs); 0 takes the projection's estimates.",
        _whole,
        at_least=0,
    )
    preconditioner: str = _flag(
        "none",
        "What the query is multiplied by: none is TracInCP; projected, the inverse second moments "
        "of the training embeddings; kfac, K-FAC's inverse of whole gradients, for predicting what "
        "retraining would do.",
        choices="tracin_beam.scoring.methods:preconditioners",
    )
    damping: float | Literal["auto"] = _flag(
        1.0,
        "For --preconditioner: what is added to the second moments, in multiples of their mean "
        "eigenvalue; auto takes the least with which halves of the training set agree on scores.",
        _or_auto(float),
        between=(0, math.inf),
    )
    layers: str = _flag(
        "all",
        "Weights that count: all, last (layer), or a regular expression searched for in their "
        "paths.",
        embeddings=True,
    )
    projection: str = _flag(
        "countsketch",
        "Kind of projection: countsketch, kronecker, gaussian, or none for the full gradients of "
        "small models.",
        embeddings=True,
    )
    gradient: str = _flag(
        "plain",
        "What is taken of an example: plain, its gradient; adam, its gradient divided by √v + ε as "
        "in Adam's steps, with the moments v that TracInCheckpoint(optimizer_state=True) keeps.",
        choices=("plain", "adam"),
        embeddings=True,
    )
    dim: int | Literal["auto"] = _flag(
        1024,
        "Length of an embedding, or auto: the smallest with which a pilot sample reaches "
        "--recall; a later run into the same output keeps it.",
        _or_auto(int),
        at_least=1,
        at_most=1 << 20,
        embeddings=True,
        remote=r"\d+|auto",
    )
    recall: float = _flag(
        0.99,
        "For --dim=auto: the wanted share of the exact top_k among the candidates, for the worse "
        "of the two roles.",
        _number,
        between=(0, 1),
    )
    seed: int = _flag(0, "Seed of the projection.", _whole, at_least=0, embeddings=True)
    norms: str = _flag(
        "estimated",
        "How squared gradient norms, and with them self-influence, are computed; estimated is "
        "exact but for convolutions with many positions, and the tables state its error; sketched "
        "is the norm of the embedding.",
        choices=("exact", "estimated", "sketched"),
        embeddings=True,
    )
    embedding_dtype: str = _flag(
        "auto",
        "Numbers of an embedding on disk; float16 and int8 are scaled by row. auto is int8, a "
        "quarter of float32's bytes for no measurable recall, and float32 for --projection=none; a "
        "later run into the same output keeps what is there.",
        choices=("auto", "float32", "float16", "int8"),
        embeddings=True,
    )
    ways: str = _flag(
        "",
        "Which way weights take to their sketch, whatever it costs: REGEX=WAY,… with "
        "tensorsketch, blocks, rows, materialise or compress; others take the cheapest.",
        embeddings=True,
    )
    batch_size: int = _flag(
        0,
        "Examples computed at a time; 0 chooses by the model's size.",
        _whole,
        at_least=0,
        at_most=1 << 20,
    )
    total: bool = _flag(
        False,
        "Also give every training example's influence on the whole test set, the sum and the mean "
        "of its exact scores.",
        bool,
    )
    group_by: str = _flag(
        "",
        "Also give the influence of groups of training examples on groups of test examples: group "
        "(which parse gives), label, prediction, shard or all, for both sets, or TRAIN,TEST.",
    )
    slice: tuple[str, ...] = _flag(
        (),
        "Also give the proponents and opponents of the mean of some test examples: wrong, right, "
        "label=…, prediction=…, group=… or shard=…, or several with &; may be given several times.",
        _one,
        repeated=True,
    )
    index: str = _flag(
        "auto",
        "How candidates are found: by the exact product with all embeddings, by a scann index, or "
        "by whichever costs less.",
        choices=("auto", "exact", "scann"),
    )
    queries_expected: int = _flag(
        0,
        "Test examples of this run and of those to come on the same training set, which may repay "
        "an index; 0 for those of this run.",
        _whole,
        at_least=0,
    )
    index_rows: int = _flag(
        50_000,
        "Training examples that are gone through together; a part of a scann index has no more, "
        "and must fit in a worker's memory.",
        _whole,
        at_least=1,
    )
    recall_queries: int = _flag(
        10,
        "Test examples for which all exact scores are computed, to state the recall of the "
        "retrieval; costs a pass over new training shards; 0 for none.",
        _whole,
        at_least=0,
    )
    max_rejected: float = _flag(
        0.1, "Share of unusable records above which a run fails.", _number, at_least=0
    )
    report_examples: int = _flag(30, "Test examples shown in the report.", _whole, at_least=0)
    overwrite: bool = _flag(
        False,
        "Replace results in the output directory that another model, loss or projection made.",
        bool,
    )
    hours: float = _flag(
        1.0,
        "Wanted wall time of the run that is planned.",
        _number,
        between=(0, math.inf),
        jobs=("plan",),
    )
    worker_memory: int = _flag(
        4 << 30,
        "What a worker may take: 4GB, 512MB, or a number of bytes.",
        _size,
        at_least=1,
        jobs=("plan",),
    )
    json: bool = _flag(False, "Print the plan as JSON.", bool, jobs=("plan",))

    date: str = _flag(
        "", "Date of the night, such as 2026-11-22; by default today's, UTC.", jobs=("quality",)
    )
    trained: str = _flag(
        "",
        "The shards that the model was trained on, in the same way as --train, whose others are "
        "new to it; by default what TracInCheckpoint(train=…) has listed with the checkpoints.",
        jobs=("quality",),
        remote=r"gs://.+",
    )
    warn_if: tuple[str, ...] | None = _flag(
        None,
        "Condition on the night's metrics that is a warning, instead of the usual ones; may be "
        "given several times.",
        _conditions,
        jobs=("quality",),
        repeated=True,
    )
    error_if: tuple[str, ...] | None = _flag(
        None,
        "Condition that ends the command with exit status 3, once all is written; may be given "
        "several times.",
        _conditions,
        jobs=("quality",),
        repeated=True,
    )
    trusted: str = _flag(
        "",
        "Shards of --train or --test that are trusted to be right, in the same way: others are "
        "compared with these.",
        jobs=("quality",),
    )
    clusters: int = _flag(
        10, "Clusters of training examples to make.", _whole, at_least=1, jobs=("cluster",)
    )
    rounds: int = _flag(
        10,
        "Times that the clusters' centres are moved, at most; each is a pass over the embeddings, "
        "or over 100,000 of them.",
        _whole,
        at_least=0,
        at_most=1000,
        jobs=("cluster",),
    )
    cluster_by: str = _flag(
        "distance",
        "What is near: rows at a small distance, or, whatever their length, of much the same "
        "direction.",
        choices=("distance", "direction"),
        jobs=("cluster",),
    )
    features: str = _flag(
        "gradient",
        "What labels are judged by: the projected gradient of the sum of the outputs, or the "
        "pooled inputs of the last layers, at the price of a forward pass.",
        choices=("gradient", "inputs"),
        jobs=("quality",),
    )
    to: str = _flag(
        "",
        "Folder for the cleaned shards, which --train never names.",
        jobs=("quality apply",),
    )
    label_feature: str = _flag(
        "",
        "Feature of the tf.train.Examples that holds the label, where it is not the only one that "
        "equals the parsed label.",
        jobs=("quality apply",),
    )
    test_data: bool = _flag(
        False,
        "Clean shards of --train also where they are test data, which are refused otherwise.",
        bool,
        jobs=("quality apply",),
    )
    add: str = _flag(
        "",
        "Files of verdicts to add to the ledger: a glob, or a comma separated list of globs.",
        jobs=("quality verdicts",),
    )

    def embedding_flags(self) -> dict[str, Any]:
        """The flags that embeddings depend on, by name."""
        return {name: getattr(self, name) for name, flag in flags().items() if flag.embeddings}

    def recorded(self) -> dict[str, Any]:
        """What run.json tells of the flags: those that a run takes, not what only planning does."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name, flag in flags().items() if flag.jobs is None}


_FLAGS: dict[str, Flag] = {f.name: f.metadata["flag"] for f in dataclasses.fields(Config)}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Config)}


def flags() -> Mapping[str, Flag]:
    """Every flag by name, in the order in which they are shown."""
    return _FLAGS


def default(name: str) -> Any:
    """The default of a flag; None or an empty string where there is none."""
    return _DEFAULTS[name]


def shown_default(name: str) -> str:
    """The default of a flag as a user would write it; empty where there is none."""
    value = default(name)
    if value is None or value == () or isinstance(value, bool):
        return ""
    if flags()[name].read is _size:
        power = max(p for p in range(len(_UNITS)) if value % 1024**p == 0)
        return f"{value // 1024**power}{_UNITS[power].strip()}B"
    return str(value)


def check(config: Config, needs: Sequence[str] = ()) -> None:
    """Checks every flag by itself and against others.

    Args:
      config: the flags.
      needs: names of the flags that must be given.

    Raises:
      InputError: a flag is missing or out of its range.
    """
    missing = [f"--{name}" for name in needs if not getattr(config, name)]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given, as a flag or in the --config file.")
    for name, flag in flags().items():
        value = getattr(config, name)
        if problem := flag.problem(value):
            raise InputError(f"--{name}={value}{problem}")
    if 0 < config.rescore < config.top_k:
        raise InputError(
            f"--rescore={config.rescore} candidates cannot give --top_k={config.top_k} rows; "
            "raise it, or turn rescoring off with 0."
        )
    name = config.test_name
    if name in ("train", "", ".", "..") or any(c in name for c in "=/\\*?[]") or len(name) > 100:
        raise InputError(
            f"--test_name={name}: take a plain name, other than 'train', of at most 100 characters."
        )
    for path in ("task", "output", "test_name"):
        check_name(f"--{path}", getattr(config, path))
    for path in config.checkpoints:
        check_name("--checkpoints", path)
    if "://" in config.output and any(c in config.output for c in "*?[]"):
        # Remote file systems take the paths they list and delete for patterns.
        raise InputError(f"--output={config.output}: take a path without any of * ? [ ].")


def check_name(what: str, name: str) -> None:
    """Refuses names of files that cannot be written down in a line of text.

    Args:
      what: what has the name, for the message.
      name: the name, or a path or pattern.

    Raises:
      InputError: there are control characters in it, or bytes that are not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} {name!r} has a name that is not UTF-8: rename it.") from None
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name):
        raise InputError(
            f"{what} {name!r} has a line break or another control character in its name: rename it."
        )
