"""`tracin-beam quality apply`: cleaned shards from the ledger of verdicts, never in place."""

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from tracin_beam.config import Config
from tracin_beam.errors import InputError
from tracin_beam.inputs import formats
from tracin_beam.inputs.task import check_keras, load_task
from tracin_beam.jobs import dataflow, launch, options
from tracin_beam.jobs.registry import COMMANDS, Job
from tracin_beam.storage import files, leases, runs, tables, verdicts
from tracin_beam.storage.runs import Output, Shard

if TYPE_CHECKING:
    from tracin_beam.gradients.batches import BatchParser
    from tracin_beam.stages.clean import Cleaning

_log = logging.getLogger(__name__)

_SAMPLE = 256  # records by whose labels the feature of the label is found


def main(name: str, prog: str = "", argv: Sequence[str] | None = None) -> int:
    """Cleans shards. Arguments and result are those of `launch.main`."""
    return launch.command(COMMANDS[name], prog, argv, _run)


def _run(job: Job, prog: str, argv: Sequence[str]) -> int:
    FileSystems.set_options(PipelineOptions(argv))
    config, beam_options = options.parse(argv, job, prog)
    launch.set_up_logging()
    print(apply(config, beam_options))
    return 0


def apply(config: Config, beam_options: PipelineOptions) -> str:
    """Writes the cleaned shards that are not there yet.

    Returns:
      What to say of them.

    Raises:
      InputError: an input has to be mended.
    """
    if dataflow.is_chosen(beam_options):
        dataflow.check(config, beam_options)
        dataflow.set_defaults(beam_options)
    FileSystems.set_options(beam_options)
    check_keras()
    output, folder = Output(files.full(config.output)), files.full(config.to)
    ledger = verdicts.read(output)
    if not len(ledger):
        raise InputError(
            f"There are no verdicts in {output.verdicts}: add some with tracin-beam quality "
            "verdicts --add FILE."
        )
    shards = _shards(config, output, folder)
    if any(c in folder for c in "*?[]") and not files.is_local(folder):
        raise InputError(f"--to={config.to}: take a path without any of * ? [ ].")
    state = files.join(folder, "_state")
    with leases.held(files.join(state, "running"), "quality apply", ("apply",)):
        cleaning = _cleaning(config, folder, ledger.to_pylist(), shards)
        if not files.exists(cleaning.ledger):
            tables.write(cleaning.ledger, ledger)
        _sweep(cleaning, shards)
        todo = [shard for shard in shards if cleaning.kept(shard) is None]
        if todo:
            _log.info("cleaning %d of %d shards", len(todo), len(shards))

            def graph(pipeline: beam.Pipeline) -> None:
                from tracin_beam.stages.clean import Clean

                _ = pipeline | "Shards" >> beam.Create(todo) | "Clean" >> Clean(cleaning)

            launch.execute_graph(graph, beam_options)
        return _said(cleaning, shards)


def _shards(config: Config, output: Output, folder: str) -> list[Shard]:
    """The training shards, none of which is test data or would be overwritten."""
    sets = runs.read_run(output).get("sets", {}) if files.exists(output.run) else {}
    shards = runs.find_shards(config.train, "train", sets.get(runs.TRAIN, {}).get("shards", {}))
    formats.check("train", [shard.path for shard in shards])
    inside = [s.path for s in shards if files.absolute(s.path).startswith(_folder(folder))]
    if inside:
        raise InputError(
            f"--to={config.to}: {inside[0]}, one of the shards of --train, lies there, and shards "
            "are never cleaned in place: give another folder."
        )
    if _folder(output.root) == _folder(folder):
        raise InputError(f"--to={config.to} is the --output of the runs: give another folder.")
    test = {path for name in sets if name != runs.TRAIN for path in sets[name]["shards"]}
    if config.test:
        test |= {shard.path for shard in runs.find_shards(config.test, "test", {})}
    both = [shard.path for shard in shards if shard.path in test]
    if both and not config.test_data:
        raise InputError(
            f"--train: {both[0]} is test data, which is not cleaned, as results on it could no "
            "longer be compared: take it out of --train, or say --test_data."
        )
    return shards


def _folder(path: str) -> str:
    return files.absolute(path).rstrip("/") + "/"


def _cleaning(
    config: Config, folder: str, ledger: list[dict[str, object]], shards: Sequence[Shard]
) -> "Cleaning":
    task, task_source = load_task(files.home(config.task))

    from tracin_beam.gradients.batches import BatchParser
    from tracin_beam.stages.clean import Cleaning

    parser, feature = BatchParser(task), ""
    if task.relabel is not None and config.label_feature:
        raise InputError("--label_feature and Task(relabel=…) both say how: give one of them.")
    if task.relabel is None and any(row["verdict"] == "relabel" for row in ledger):
        feature = _label_feature(config, parser, shards)
    source = task_source()
    digest = runs.digest([ledger, source.digest, feature])
    copy = files.join(folder, "_state", f"verdicts-{digest}.parquet")
    return Cleaning(source, folder, copy, feature, digest)


def _label_feature(config: Config, parser: "BatchParser", shards: Sequence[Shard]) -> str:
    """The feature that holds the label, tried out on some records."""
    from tracin_beam.stages import clean

    records, labels = [], []
    found = itertools.chain.from_iterable(formats.read(shard.path) for shard in shards)
    for record in itertools.islice(found, _SAMPLE):
        if isinstance(record, formats.Record):
            try:
                label = clean.label_of(parser([record.data]))
            except Exception:  # a record that does not parse is left as it is
                continue
            if label is not None:
                records.append(record.data)
                labels.append(label)
    if not records:
        raise InputError(
            "--train: none of the first records has a label that is a number or one class, so "
            "that no label can be rewritten without Task(relabel=…)."
        )
    if not config.label_feature:
        return clean.find_label_feature(records, labels)
    try:
        clean.with_label(records[0], config.label_feature, labels[0])
    except ValueError as error:
        raise InputError(f"--label_feature={config.label_feature}: {error}.") from None
    return config.label_feature


def _sweep(cleaning: "Cleaning", shards: Sequence[Shard]) -> None:
    """Removes cleaned shards whose shard is gone, copies of earlier ledgers, unfinished files."""
    names = {shard.name for shard in shards}
    state = files.join(cleaning.folder, "_state")
    gone = []
    for info in files.list_folder(state):
        name = info.path.rpartition("/")[2]
        if name.startswith("verdicts-") and info.path != cleaning.ledger:
            gone.append(info.path)
        elif name.endswith(".json") and name.removesuffix(".json") not in names:
            old = Shard("", name.removesuffix(".json"), "")
            gone += [info.path, cleaning.shard(old), cleaning.provenance(old)]
    for folder in (cleaning.folder, state, files.join(cleaning.folder, "provenance")):
        for info in files.list_folder(folder):
            name = info.path.rpartition("/")[2]
            if name.startswith(".") and name.endswith(".tmp"):
                gone.append(info.path)
    files.remove(gone)


def _said(cleaning: "Cleaning", shards: Sequence[Shard]) -> str:
    from tracin_beam.stages import clean

    kept = [cleaning.kept(shard) for shard in shards]
    counts = [mark["counts"] for mark in kept if mark]
    if len(counts) < len(shards):
        return f"The job goes on; cleaned shards appear in {cleaning.folder}"
    total = {name: sum(c[name] for c in counts) for name in ("read", *clean.ACTIONS)}
    words = ", ".join(f"{number} {name}" for name, number in total.items())
    lines = [f"{len(shards)} shards: {words}"]
    provenance = files.join(cleaning.folder, "provenance")
    if total["not applied"] or total["unreadable"]:
        lines.append(f"Why some were not applied or are unreadable stands in {provenance}")
    lines.append(f"Cleaned shards are in {cleaning.folder}, every change in {provenance}")
    return "\n".join(lines)
