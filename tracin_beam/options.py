"""The flags of all jobs: Beam pipeline options that become one frozen configuration."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam.errors import InputError

# Runners behind a job server, which takes flags that Beam's Python does not know.
_PORTABLE = ("PortableRunner", "FlinkRunner", "SparkRunner", "PrismRunner")


class TracInOptions(PipelineOptions):
    """Flags of the tracin-beam jobs; see `Config` for what they mean."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("tracin-beam")
        add = group.add_argument
        add("--task", help="The task: file.py:name or package.module:name.")
        add(
            "--checkpoints",
            help="Directory that TracInCheckpoint wrote, or a glob of weight files.",
        )
        add(
            "--learning_rate",
            help="For a glob of weight files: the learning rate, one for all or a comma separated "
            "list. Not needed where the files or checkpoints.json state it.",
        )
        add("--train", help="Training shards: glob, or comma separated list of globs.")
        add("--test", help="Test shards, in the same way.")
        add("--output", help="Output directory, on any file system that Beam knows.")
        add("--test_name", default="test", help="Name of this test set and target (%(default)s).")
        add(
            "--target",
            default="loss",
            help="What is explained of a test example: loss, predicted_loss, logit, probability "
            "or margin (%(default)s).",
        )
        add("--top_k", type=int, default=10, help="Rows per test example and role (%(default)s).")
        add(
            "--rescore",
            type=int,
            default=100,
            help="Candidates per test example and role whose scores are computed exactly (all, "
            "where there are few pairs); 0 takes the projection's estimates (%(default)s).",
        )
        add(
            "--layers",
            default="all",
            help="Weights that count: all, last (layer), or a regular expression searched for in "
            "their paths (%(default)s).",
        )
        add("--projection", default="countsketch", help="Kind of projection (%(default)s).")
        add("--dim", type=int, default=1024, help="Length of an embedding (%(default)s).")
        add("--seed", type=int, default=0, help="Seed of the projection (%(default)s).")
        add(
            "--norms",
            default="exact",
            help="Squared gradient norms, and with them self-influence: exact, or sketched, which "
            "is cheaper for convolutions (%(default)s).",
        )
        add(
            "--batch_size",
            type=int,
            default=0,
            help="Examples computed at a time; 0 chooses by the model's size (%(default)s).",
        )
        add(
            "--index_rows",
            type=int,
            default=50_000,
            help="Rows of an index partition, which must fit in a worker's memory (%(default)s).",
        )
        add(
            "--recall_queries",
            type=int,
            default=10,
            help="Test examples for which all exact scores are computed, to state the recall of "
            "the retrieval; costs a pass over new training shards; 0 for none (%(default)s).",
        )
        add(
            "--max_rejected",
            type=float,
            default=0.1,
            help="Share of unusable records above which a run fails (%(default)s).",
        )
        add(
            "--report_examples",
            type=int,
            default=30,
            help="Test examples shown in report.html (%(default)s).",
        )
        add(
            "--overwrite",
            action="store_true",
            default=False,
            help="Replace results in the output directory that another model, loss or projection "
            "made.",
        )


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
    dim: int
    seed: int
    norms: str
    batch_size: int
    index_rows: int
    recall_queries: int
    max_rejected: float
    report_examples: int
    overwrite: bool


def parse(
    argv: Sequence[str], *, needs_test: bool = False, prog: str = ""
) -> tuple[Config, PipelineOptions]:
    """Reads the command line, and the YAML file of `--config` under it.

    Returns:
      Our own flags, and Beam's options for the pipeline.

    Raises:
      InputError: a flag is missing, unknown or out of its range.
    """
    parser = _parser(prog)
    first, _ = parser.parse_known_args(argv)
    merged = [*_from_yaml(first.config), *argv] if first.config else list(argv)
    known, rest = parser.parse_known_args(merged)
    values = {field.name: getattr(known, field.name) for field in dataclasses.fields(Config)}
    values["learning_rate"] = _rates(values["learning_rate"])
    needed = ["task", "checkpoints", "train", "output"] + ["test"] * needs_test
    missing = [f"--{name}" for name in needed if not values[name]]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given, as a flag or in the --config file.")
    config = Config(**values)
    _check(config)
    _check_unknown(rest)
    if not any(flag.split("=")[0] == "--runner" for flag in rest):
        # Local, in this process, on all cores with one copy of the model.
        rest += ["--runner=FnApiRunner"]
        if not any(flag.startswith("--direct_") for flag in rest):
            rest += ["--direct_running_mode=multi_threading", "--direct_num_workers=0"]
    return config, PipelineOptions(rest)


class _Parser(argparse.ArgumentParser):
    """Raises an `InputError` where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog or None,
        allow_abbrev=False,
        epilog="Every other flag is Beam's: --runner=DataflowRunner --project=… and so on.",
    )
    parser.add_argument("--config", help="YAML file of flags; those on the command line win.")
    TracInOptions._add_argparse_args(parser)
    return parser


def _from_yaml(path: str) -> list[str]:
    from tracin_beam import files

    try:
        with files.open_read(path) as handle:
            content = yaml.safe_load(handle.read())
    except OSError as error:
        raise InputError(f"--config={path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config={path} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"--config={path} must be a mapping of flag names to values.")
    flags = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise InputError(f"--config={path}: {key} must be a value or a list, not a mapping.")
        if isinstance(value, bool):
            flags += [f"--{key}"] if value else []
        elif isinstance(value, list):
            flags.append(f"--{key}={','.join(map(str, value))}")
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _rates(given: str | None) -> tuple[float, ...] | None:
    if given is None:
        return None
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise InputError(f"--learning_rate={given}: give a number, or some with commas.") from None


def _check(config: Config) -> None:
    at_least: dict[str, float] = {
        "top_k": 1,
        "rescore": 0,
        "dim": 1,
        "batch_size": 0,
        "index_rows": 1,
        "recall_queries": 0,
        "max_rejected": 0,
        "report_examples": 0,
    }
    for name, least in at_least.items():
        if not getattr(config, name) >= least:  # nor NaN
            raise InputError(f"--{name}={getattr(config, name)} must be at least {least}.")
    if 0 < config.rescore < config.top_k:
        raise InputError(
            f"--rescore={config.rescore} candidates cannot give --top_k={config.top_k} rows; "
            "raise it, or turn rescoring off with 0."
        )
    name = config.test_name
    if name in ("train", "", ".", "..") or any(c in name for c in "=/\\*?[]"):
        raise InputError(f"--test_name={name}: take a plain name, other than 'train'.")
    if any(c in config.output for c in "*?[]"):
        raise InputError(f"--output={config.output}: take a path without any of * ? [ ].")
    if config.norms not in ("exact", "sketched"):
        raise InputError(f"--norms={config.norms} is not known; take exact or sketched.")
    targets = ("loss", "predicted_loss", "logit", "probability", "margin")
    if config.target not in targets:
        raise InputError(
            f"--target={config.target} is not known; take one of {', '.join(targets)}."
        )


def _check_unknown(rest: Sequence[str]) -> None:
    """A misspelt flag must not be ignored, as Beam would, nor what a shell made of a glob."""
    beams = _Parser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in _all_options(PipelineOptions):
        if options is not TracInOptions:
            options._add_argparse_args(beams)
    known, unknown = beams.parse_known_args(rest)
    ours = ["--" + field.name for field in dataclasses.fields(Config)] + ["--config"]
    before = ""
    for word in unknown:
        name = word.split("=")[0]
        if not word.startswith("-"):
            # Of a flag that Beam does not know nobody can tell whether a value follows.
            if not before.startswith("-") or "=" in before:
                raise InputError(f"{word} belongs to no flag: write globs and lists in quotes.")
        elif near := difflib.get_close_matches(name, ours, n=1, cutoff=0.8):
            raise InputError(f"There is no flag {name}. Did you mean {near[0]}?")
        elif known.runner not in _PORTABLE:
            raise InputError(f"There is no flag {name}, neither ours nor Beam's.")
        before = word


def _all_options(cls: type[PipelineOptions]) -> list[Any]:
    found = []
    for sub in cls.__subclasses__():
        found += [sub, *_all_options(sub)]
    return found


def wants_help(argv: Sequence[str], prog: str, about: str) -> bool:
    """Prints the help when it is asked for."""
    if not {"-h", "--help"} & set(argv):
        return False
    parser = _parser(prog)
    parser.description = about
    parser.print_help(sys.stdout)
    return True
