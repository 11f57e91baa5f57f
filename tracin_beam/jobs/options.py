"""The flags of all jobs: Beam pipeline options that become one frozen configuration."""

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import (
    PipelineOptions,
    PortableOptions,
    StandardOptions,
)
from apache_beam.runners.runner import create_runner

from tracin_beam import config as config_flags
from tracin_beam.config import Config, Flag
from tracin_beam.errors import InputError
from tracin_beam.jobs import config_file
from tracin_beam.jobs.registry import Job

_log = logging.getLogger(__name__)

# Runners behind a job server, which takes flags that Beam's Python does not know.
_PORTABLE = ("PortableRunner", "FlinkRunner", "SparkRunner", "PrismRunner")


class TracInOptions(PipelineOptions):
    """Flags of the tracin-beam jobs, as `config.Config` has them."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("tracin-beam")
        for name, flag in config_flags.flags().items():
            if flag.jobs is None:
                add_flag(group, name, flag)


def add_flag(group: Any, name: str, flag: Flag) -> None:
    """Adds a flag to an argparse parser or group of it."""
    about = flag_help(name, flag).replace("%", "%%")
    if flag.read is bool:
        group.add_argument(f"--{name}", action="store_true", default=False, help=about)
        return

    def read(text: str) -> Any:
        try:
            return flag.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    group.add_argument(
        f"--{name}",
        default=config_flags.default(name),
        type=read,
        help=about,
        action=_Joined if flag.repeated else "store",
    )


class _Joined(argparse.Action):
    """Puts the tuples of a flag that is given several times together."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *values))


def flag_help(name: str, flag: Flag) -> str:
    """What a flag means, which values it may have, and its default."""
    about = flag.help
    if choices := flag.known_choices():
        others = f" or {flag.or_else}" if flag.or_else else ""
        about = f"{about.removesuffix('.')}: {', '.join(choices)}{others}."
    if shown := config_flags.shown_default(name):
        about = f"{about.removesuffix('.')} ({shown})."
    return about


def flags_table() -> str:
    """The table of all flags of docs/flags.md, in Markdown."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for name, flag in config_flags.flags().items():
        shown = config_flags.shown_default(name)
        about = flag.help.removesuffix(".")
        if choices := flag.known_choices():
            others = f" or {flag.or_else}" if flag.or_else else ""
            about = f"{about}: {', '.join(f'`{choice}`' for choice in choices)}{others}"
        if flag.jobs:
            about = f"{about} ({', '.join(flag.jobs)} only)"
        about = about.replace("|", r"\|").replace("<", "&lt;")
        rows.append(f"| `--{name}` | {f'`{shown}`' if shown else ''} | {about} |")
    rows.append("| `--config` | | A YAML file with any of these flags; the command line wins |")
    return "\n".join(rows) + "\n"


def parse(argv: Sequence[str], job: Job, prog: str = "") -> tuple[Config, PipelineOptions]:
    """Reads the command line, and the YAML file of `--config` under it.

    Args:
      argv: the words of the command line.
      job: the job that they are for.
      prog: what the command is called.

    Returns:
      Our own flags, and Beam's options for the pipeline.

    Raises:
      InputError: a flag is missing, unknown or out of its range.
    """
    parser = _parser(prog, job.name)
    first, _ = parser.parse_known_args(argv)
    merged = list(argv)
    if first.config:
        written = _from_file(first.config, job.name)
        merged = [*(word for word in written if not _is_replaced(word, first)), *argv]
    known, rest = parser.parse_known_args(merged)
    ours = [name for name, flag in config_flags.flags().items() if flag.takes(job.name)]
    values = {name: getattr(known, name) for name in ours}
    config = Config(**values)
    config_flags.check(config, job.needs)
    _check_unknown(rest, ours)
    if _runner_of(rest) in ("", "DirectRunner", "SwitchingDirectRunner"):
        # Local, in this process, on all cores with one copy of the model. Beam's DirectRunner is
        # this one, unless it can download Prism, which is open to other machines.
        rest += ["--runner=FnApiRunner"]
        if not any(flag.startswith("--direct_") for flag in rest):
            rest += ["--direct_running_mode=multi_threading", "--direct_num_workers=0"]
    _check_runner(rest)
    # Ours go along, so that a runner's console shows them.
    beam_options = PipelineOptions(rest, **values)
    chosen = any(flag.startswith("--environment_cache_millis") for flag in rest)
    if beam_options.view_as(StandardOptions).runner in _PORTABLE and not chosen:
        # Else a worker process, with TensorFlow and the model in it, ends with every stage. Flink
        # gives a dead one out as well, so it must be forgotten before the job is tried again.
        beam_options.view_as(PortableOptions).environment_cache_millis = 5_000
    return config, beam_options


def _is_replaced(word: str, given: argparse.Namespace) -> bool:
    """Whether a word of the --config file is of a repeatable flag that the command line gives."""
    name = word.removeprefix("--").partition("=")[0]
    flag = config_flags.flags().get(name)
    return bool(flag and flag.repeated and getattr(given, name, None))


class _FlagParser(argparse.ArgumentParser):
    """Raises an `InputError` where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _parser(prog: str, job: str) -> argparse.ArgumentParser:
    parser = _FlagParser(
        prog=prog or None,
        allow_abbrev=False,
        epilog="Every other flag is Beam's: --runner=DataflowRunner --project=… and so on.",
    )
    parser.add_argument("--config", help="YAML file of flags; those on the command line win.")
    every = config_flags.flags()
    own = {name: flag for name, flag in every.items() if flag.jobs and flag.takes(job)}
    if own:
        group = parser.add_argument_group("of this command alone")
        for name, flag in own.items():
            add_flag(group, name, flag)
    TracInOptions._add_argparse_args(parser)
    return parser


def _from_file(path: str, job: str) -> list[str]:
    """The flags of a `--config` file as words of a command line."""
    known = {}
    for action in _beams_parser()._actions:
        word = f"--{action.dest}"
        switch = word if action.nargs == 0 else f"{word}=True" if action.default is False else ""
        known[action.dest] = switch
    for name, flag in config_flags.flags().items():
        if flag.takes(job):
            known[name] = f"--{name}" if flag.read is bool else ""
    repeated = [name for name, flag in config_flags.flags().items() if flag.repeated]
    return config_file.read(path, known, repeated)


def _check_unknown(rest: Sequence[str], names: Sequence[str]) -> None:
    """A misspelt flag must not be ignored, as Beam would, nor what a shell made of a glob."""
    known, unknown = _beams_parser().parse_known_args(rest)
    ours = ["--" + name for name in names] + ["--config"]
    before = ""
    for word in unknown:
        name = word.split("=")[0]
        if not word.startswith("-"):
            # Whether a value follows a flag that Beam does not know, nobody can tell.
            if not before.startswith("-") or "=" in before:
                raise InputError(f"{word} belongs to no flag: write globs and lists in quotes.")
        elif near := difflib.get_close_matches(name, ours, n=1, cutoff=0.8):
            raise InputError(f"There is no flag {name}. Did you mean {near[0]}?")
        elif known.template_location:  # which Dataflow's launcher gives, with flags of its own
            _log.warning("%s is neither a flag of this job nor of Beam: it is passed on", word)
        elif known.runner not in _PORTABLE:
            raise InputError(f"There is no flag {name}, neither of this job nor of Beam.")
        before = word


def _runner_of(rest: Sequence[str]) -> str:
    """The runner that is asked for; empty if none is."""
    known, _ = _beams_parser().parse_known_args(rest)
    return known.runner or ""


def _check_runner(rest: Sequence[str]) -> None:
    runner = _runner_of(rest)
    if "dataflow" in runner.lower():
        return  # which may not be installed, and is checked with its other needs
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        # Those that are for running jobs; the others are for Beam's own tests and notebooks.
        shown = "FnApiRunner, PrismRunner, FlinkRunner, SparkRunner, PortableRunner, DataflowRunner"
        raise InputError(
            f"--runner={runner} is not known: take one of {shown}, or leave it out to run on "
            "this machine."
        ) from error


def _beams_parser() -> argparse.ArgumentParser:
    """A parser of every flag of Beam's, and of none of this package's."""
    beams = _FlagParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in _all_options(PipelineOptions):
        if options is not TracInOptions:
            options._add_argparse_args(beams)
    return beams


def _all_options(cls: type[PipelineOptions]) -> list[Any]:
    found = []
    for sub in cls.__subclasses__():
        found += [sub, *_all_options(sub)]
    return found


def wants_help(argv: Sequence[str], prog: str, job: Job) -> bool:
    """Prints the help when it is asked for."""
    if not {"-h", "--help"} & set(argv):
        return False
    parser = _parser(prog, job.name)
    parser.description = job.about
    parser.print_help(sys.stdout)
    return True
