"""The flags of all jobs: Beam pipeline options that become one frozen configuration."""

import argparse
import dataclasses
import difflib
import logging
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from apache_beam.options.pipeline_options import (
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)

from tracin_beam.config import Config, PlanFlags
from tracin_beam.errors import InputError

_log = logging.getLogger(__name__)

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
        add(
            "--dim",
            type=_dim,
            default=1024,
            help="Length of an embedding, or auto: the smallest with which a pilot sample reaches "
            "--recall; a later run into the same output keeps it (%(default)s).",
        )
        add(
            "--recall",
            type=float,
            default=0.99,
            help="For --dim=auto: the wanted share of the exact top_k among the candidates, for "
            "the worse of the two roles (%(default)s).",
        )
        add("--seed", type=int, default=0, help="Seed of the projection (%(default)s).")
        add(
            "--norms",
            default="exact",
            help="Squared gradient norms, and with them self-influence: exact, or sketched, which "
            "is cheaper for convolutions (%(default)s).",
        )
        add(
            "--ways",
            default="",
            help="Which way weights take to their sketch, whatever it costs: REGEX=WAY,… with "
            "tensorsketch, blocks, rows, materialise or compress; others take the cheapest.",
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
            help="Test examples shown in the report (%(default)s).",
        )
        add(
            "--overwrite",
            action="store_true",
            default=False,
            help="Replace results in the output directory that another model, loss or projection "
            "made.",
        )


def _dim(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"give a number or auto, not {text!r}") from None


def parse(
    argv: Sequence[str], *, needs_test: bool = False, prog: str = ""
) -> tuple[Config, PipelineOptions]:
    """Reads the command line, and the YAML file of `--config` under it.

    Returns:
      Our own flags, and Beam's options for the pipeline.

    Raises:
      InputError: a flag is missing, unknown or out of its range.
    """
    needed = ["task", "checkpoints", "train", "output"] + ["test"] * needs_test
    config, beam_options, _ = _parse(_parser(prog), argv, needed)
    return config, beam_options


def parse_plan(argv: Sequence[str], *, prog: str = "") -> tuple[Config, PlanFlags, PipelineOptions]:
    """The same for `pipelines.plan`, which needs no output and has some flags of its own.

    Raises:
      InputError: as above.
    """
    config, beam_options, known = _parse(
        _parser(prog, plan=True), argv, ["task", "checkpoints", "train"], PlanFlags
    )
    if not 0 < known.hours < math.inf:
        raise InputError(f"--hours={known.hours} must be above 0.")
    return config, PlanFlags(known.hours, known.worker_memory, known.json), beam_options


def _parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    needed: Sequence[str],
    more: type | None = None,
) -> tuple[Config, PipelineOptions, argparse.Namespace]:
    first, _ = parser.parse_known_args(argv)
    merged = [*_from_yaml(first.config), *argv] if first.config else list(argv)
    known, rest = parser.parse_known_args(merged)
    values = {field.name: getattr(known, field.name) for field in dataclasses.fields(Config)}
    values["learning_rate"] = _rates(values["learning_rate"])
    values["output"] = values["output"] or ""
    missing = [f"--{name}" for name in needed if not values[name]]
    if missing:
        raise InputError(f"{', '.join(missing)} must be given, as a flag or in the --config file.")
    config = Config(**values)
    _check(config)
    ours = [field.name for cls in (Config, more) if cls for field in dataclasses.fields(cls)]
    _check_unknown(rest, ours)
    if not any(flag.split("=")[0] == "--runner" for flag in rest):
        # Local, in this process, on all cores with one copy of the model.
        rest += ["--runner=FnApiRunner"]
        if not any(flag.startswith("--direct_") for flag in rest):
            rest += ["--direct_running_mode=multi_threading", "--direct_num_workers=0"]
    # Ours go along, so that a runner's console shows them.
    shown = {name: getattr(known, name) for name in values}
    beam_options = PipelineOptions(rest, **shown)
    chosen = any(flag.startswith("--environment_cache_millis") for flag in rest)
    if beam_options.view_as(StandardOptions).runner in _PORTABLE and not chosen:
        # Else a worker process, with TensorFlow and the model in it, ends with every stage. Flink
        # gives a dead one out as well, so it must be forgotten before the job is tried again.
        beam_options.view_as(PortableOptions).environment_cache_millis = 5_000
    return config, beam_options, known


class _Parser(argparse.ArgumentParser):
    """Raises an `InputError` where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _parser(prog: str, plan: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog or None,
        allow_abbrev=False,
        epilog="Every other flag is Beam's: --runner=DataflowRunner --project=… and so on.",
    )
    parser.add_argument("--config", help="YAML file of flags; those on the command line win.")
    if plan:
        _add_plan_flags(parser)
    TracInOptions._add_argparse_args(parser)
    return parser


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("of this command alone")
    group.add_argument(
        "--hours", type=float, default=1.0, help="Wanted wall time of the run (%(default)s)."
    )
    group.add_argument(
        "--worker_memory",
        type=_size,
        default="4GB",
        help="What a worker may take: 4GB, 512MB, or a number of bytes (%(default)s).",
    )
    group.add_argument("--json", action="store_true", help="Print the plan as JSON.")


def _size(text: str) -> int:
    """Bytes, of a number with or without a unit."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not match or not (
        size := int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    ):
        raise argparse.ArgumentTypeError(f"give a size such as 4GB, not {text!r}")
    return int(size)


def _from_yaml(path: str) -> list[str]:
    from tracin_beam.storage import files

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
        if getattr(config, name) == "auto":
            continue
        if not getattr(config, name) >= least:  # nor NaN
            raise InputError(f"--{name}={getattr(config, name)} must be at least {least}.")
    if 0 < config.rescore < config.top_k:
        raise InputError(
            f"--rescore={config.rescore} candidates cannot give --top_k={config.top_k} rows; "
            "raise it, or turn rescoring off with 0."
        )
    if not 0 < config.recall < 1:
        raise InputError(f"--recall={config.recall} must lie between 0 and 1.")
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


def _check_unknown(rest: Sequence[str], names: Sequence[str]) -> None:
    """A misspelt flag must not be ignored, as Beam would, nor what a shell made of a glob."""
    beams = _Parser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in _all_options(PipelineOptions):
        if options is not TracInOptions:
            options._add_argparse_args(beams)
    known, unknown = beams.parse_known_args(rest)
    ours = ["--" + name for name in names] + ["--config"]
    before = ""
    for word in unknown:
        name = word.split("=")[0]
        if not word.startswith("-"):
            # Of a flag that Beam does not know nobody can tell whether a value follows.
            if not before.startswith("-") or "=" in before:
                raise InputError(f"{word} belongs to no flag: write globs and lists in quotes.")
        elif near := difflib.get_close_matches(name, ours, n=1, cutoff=0.8):
            raise InputError(f"There is no flag {name}. Did you mean {near[0]}?")
        elif known.template_location:  # which Dataflow's launcher gives, with flags of its own
            _log.warning("%s is neither a flag of ours nor of Beam's: it is passed on", word)
        elif known.runner not in _PORTABLE:
            raise InputError(f"There is no flag {name}, neither ours nor Beam's.")
        before = word


def _all_options(cls: type[PipelineOptions]) -> list[Any]:
    found = []
    for sub in cls.__subclasses__():
        found += [sub, *_all_options(sub)]
    return found


def wants_help(argv: Sequence[str], prog: str, about: str, *, plan: bool = False) -> bool:
    """Prints the help when it is asked for."""
    if not {"-h", "--help"} & set(argv):
        return False
    parser = _parser(prog, plan)
    parser.description = about
    parser.print_help(sys.stdout)
    return True
