"""The jobs as functions, and what they made, for a notebook or a program."""

import contextlib
import dataclasses
import difflib
import html
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tracin_beam import config
from tracin_beam.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from apache_beam.options.pipeline_options import PipelineOptions

    from tracin_beam.inputs.task import Task
    from tracin_beam.jobs.plan import Planned
    from tracin_beam.storage.runs import Output

# How paths, numbers and the like may be given; lists of them are joined with commas.
Value = str | os.PathLike[str] | int | float | bool | None
Options: TypeAlias = "PipelineOptions | Mapping[str, Any] | Sequence[str] | None"

_SHOWN = 5  # rows of a table in a notebook


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What lies in an output directory. Nothing is read before it is asked for.

    Attributes:
      output: the directory, on any file system that Beam knows.
      task: the task, which parses the examples that are to be shown, and names the classes; without
        it ids and labels are shown alone.

    Example:

      >>> import tracin_beam
      >>> run = tracin_beam.open(example_output)
      >>> run.self_influence().table("arrow").num_rows
      24
      >>> run.explain("test0.0").table("arrow")["role"].unique().to_pylist()
      ['proponent', 'opponent']
    """

    output: str
    task: "Task | None" = None

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says: configuration, versions, counts, timings, retrieval."""
        from tracin_beam.storage import runs

        return runs.read_run(self._paths())

    def influence(self, test_name: str = "test") -> "Result":
        """The influence table of a test set: its examples' strongest proponents and opponents."""
        paths = self._paths()
        return Result(self, paths.influence(test_name), paths.report(test_name))

    def total_influence(self, test_name: str = "test") -> "Result":
        """Every training example's influence on a whole test set, if `total=True` was given."""
        return Result(self, self._paths().path("total_influence", test_name))

    def self_influence(self) -> "Result":
        """The self-influence table: a row for each training example."""
        return Result(self, self._paths().self_influence())

    def groups(self, test_name: str = "test") -> "Result":
        """The influence of groups on groups, if `group_by` was given."""
        return Result(self, self._paths().path("group_influence", test_name))

    def slices(self, test_name: str = "test") -> "Result":
        """The proponents and opponents of slices of a test set, if `slice` was given."""
        return Result(self, self._paths().path("slice_influence", test_name))

    def clusters(self) -> "Result":
        """The table of `cluster`: a row for each training example, and its page."""
        paths = self._paths()
        return Result(self, paths.path("clusters"), paths.cluster_report)

    def cluster_summary(self) -> "Result":
        """A row for each cluster: its size, its labels, and the examples nearest to its centre."""
        paths = self._paths()
        return Result(self, paths.cluster_summary, paths.cluster_report)

    def suspects(self, date: str | None = None) -> "Result":
        """What a night found to look at, the worst of each kind first; by default the last night.

        Raises:
          InputError: there was no such night.
        """
        return self._of_night("suspects.parquet", date)

    def signals(self, date: str | None = None) -> "Result":
        """A row for each training example, with all its signals, of a night as for `suspects`."""
        return self._of_night("signals.parquet", date)

    def explain(self, test_id: str | int, test_name: str = "test") -> "Explanation":
        """The rows of one test example, which a notebook shows with its images.

        Raises:
          InputError: the table has no such example.
        """
        import pyarrow.compute as pc

        wanted = str(test_id)
        table = self.influence(test_name)
        rows = table._read(filters=pc.field("test_id") == wanted)
        if not rows.num_rows:
            ids = table._read(columns=["test_id"])["test_id"].unique().to_pylist()
            near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.0)
            raise InputError(
                f"No example {wanted!r} is in {table.folder}; some that are: {', '.join(near)}."
            )
        return Explanation(self, rows)

    def _of_night(self, table: str, date: str | None) -> "Result":
        from tracin_beam.storage import files

        nights = self._paths().path("quality")
        found = sorted(path for path in files.under(nights) if os.path.basename(path) == table)
        if date is not None:
            wanted = files.join(nights, date, table)
            found = [path for path in found if path == wanted]
        if not found:
            when = "no night yet" if date is None else f"no night of {date}"
            raise InputError(f"There is {when} in {nights}: run quality.")
        page = files.join(os.path.dirname(found[-1]), "report.html")
        return Result(self, found[-1], page if files.exists(page) else None)

    def _paths(self) -> "Output":
        from tracin_beam.storage import files
        from tracin_beam.storage.runs import Output

        return Output(files.full(self.output))

    def _page(self, rows: "pa.Table") -> str:
        """The report of some rows' first test example, as a whole page."""
        from tracin_beam.report import write
        from tracin_beam.report.explanations import places_shown, reading
        from tracin_beam.report.influence import influence_page

        names, shown, state = None, {}, self.info
        if self.task is not None:
            from tracin_beam.gradients.batches import BatchParser

            names = self.task.label_names
            places = places_shown(rows, reading(rows, state, names), max_tests=1)
            shown = write.shown_at(BatchParser(self.task), places, self.task.show)
        return influence_page(rows, shown, state, label_names=names, max_tests=1)

    def _repr_html_(self) -> str:
        from tracin_beam.report.facts import run_facts

        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in [("Output", self.output), *run_facts(self.info)]
        )
        return f"<table>{rows}</table>"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a job has made; the table is read when it is asked for.

    Attributes:
      run: all that is in the output directory.
      folder: of the table's Parquet files, or the one file; empty for a job that makes none.
      report: path of the page that shows the table, if there is one.
      note: what to say of a job that was not waited for.
    """

    run: FinishedRun
    folder: str = ""
    report: str | None = None
    note: str | None = None

    def table(
        self, kind: Literal["pandas", "arrow"] = "pandas", columns: Sequence[str] | None = None
    ) -> "pd.DataFrame | pa.Table":
        """Reads the table, whose columns docs/tables.md describes.

        Args:
          kind: a pandas.DataFrame, or a pyarrow.Table.
          columns: the only ones to read, by name.

        Raises:
          InputError: there is no table, or pandas is not installed.
        """
        if kind not in ("pandas", "arrow"):
            raise InputError(f"table({kind!r}): take 'pandas' or 'arrow'.")
        rows = self._read(columns=columns)
        if kind == "arrow":
            return rows
        try:
            return rows.to_pandas()
        except ImportError:
            raise InputError(
                "pandas is not installed: pip install 'tracin-beam[dataframe]', or take "
                "table('arrow')."
            ) from None

    def _read(self, columns: Sequence[str] | None = None, filters: Any = None) -> "pa.Table":
        if not self.folder:
            raise InputError("This job makes no table.")
        from tracin_beam.storage import tables

        read = tables.read if self.folder.endswith(".parquet") else tables.read_folder
        return read(self.folder, columns=columns, filters=filters)

    def __repr__(self) -> str:
        lines = [self.note] if self.note else []
        lines += [f"Table: {self.folder}"] if self.folder else [f"Output: {self.run.output}"]
        lines += [f"Report: {self.report}"] if self.report else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from tracin_beam.storage import files

        said = html.escape(repr(self)).replace("\n", "<br>")
        if not self.folder or self.note:
            return f"<p>{said}</p>"
        if self.report == self.run._paths().cluster_report:
            with files.open_read(self.report) as handle:
                return f"<p>{said}</p>{_framed(handle.read().decode())}"
        if self.report and not self.folder.endswith(".parquet"):
            return f"<p>{said}</p>{_framed(self.run._page(self._read()))}"
        first = self._read().slice(0, _SHOWN)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in first.column_names)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(str(v)[:200])}</td>' for v in row.values())}</tr>"
            for row in first.to_pylist()
        )
        return f"<p>{said}</p><table><tr>{head}</tr>{body}</table>"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A test example with the training examples that influenced it most.

    Attributes:
      run: what it is of.
      rows: of the influence table, those of this test example.
    """

    run: FinishedRun
    rows: "pa.Table"

    def table(self, kind: Literal["pandas", "arrow"] = "pandas") -> "pd.DataFrame | pa.Table":
        """The rows, as `Result.table` gives them."""
        return self.rows if kind == "arrow" else self.rows.to_pandas()

    def __repr__(self) -> str:
        from tracin_beam.report.text import influence_summary

        names = self.run.task.label_names if self.run.task else None
        kind = {"kind": self.run.info.get("kind")}
        return influence_summary(self.rows, kind, label_names=names).rstrip()

    def _repr_html_(self) -> str:
        return _framed(self.run._page(self.rows))


def _framed(page: str) -> str:
    """A page within a notebook's, neither of which can change how the other looks."""
    return (
        f'<iframe srcdoc="{html.escape(page, quote=True)}" sandbox style="width: 100%; '
        'height: 40rem; border: 0"></iframe>'
    )


def open(output: str | os.PathLike[str], task: "Task | str | None" = None) -> FinishedRun:
    """Opens what runs have left in an output directory.

    Args:
      output: the directory.
      task: a task or its name, `file.py:name` or `package.module:name`: with it examples are shown
        as images or text, and classes by their names. A task is code, so the one that run.json
        names is not taken by itself.

    Raises:
      InputError: there is no run in the directory, or no such task.

    Example:

      >>> import tracin_beam
      >>> tracin_beam.open(example_output).info["counts"]["train"]["read"]
      24
    """
    from tracin_beam.inputs.task import load_task
    from tracin_beam.storage import files

    loaded = load_task(files.home(task))[0] if isinstance(task, str) else task
    run = FinishedRun(os.fspath(output), loaded)
    if not run.info:
        raise InputError(f"There is no run.json in {run.output}: no run has written there.")
    return run


def influence(
    task: "Task | str",
    *,
    checkpoints: Value | Sequence[Value],
    train: Value | Sequence[Value],
    test: Value | Sequence[Value],
    output: Value,
    options: Options = None,
    progress: bool = True,
    **flags: Value | Sequence[Value],
) -> Result:
    """Finds the training examples that influenced each test example most.

    What is there already is not made again.

    Args:
      task: a `Task`, or its name, `file.py:name` or `package.module:name`.
      checkpoints: a directory that `TracInCheckpoint` wrote, or a glob of weight files; a list of
        them, of as many training runs, averages over these.
      train: training shards: paths or globs.
      test: test shards, likewise.
      output: the output directory.
      options: Beam's options for the pipeline: an object of them, a dict or a list of flags.
        Without a runner it runs in this process.
      progress: whether to show a progress bar.
      **flags: any other flag of the command, such as `top_k=20`, or of Beam's, such as
        `runner="FlinkRunner"`.

    Returns:
      The influence table and its report.

    Raises:
      InputError: an input has to be mended; the message says which.

    Example:

      >>> import tracin_beam
      >>> result = tracin_beam.influence(**example_inputs, test=example_test, progress=False)
      >>> result.table("arrow", columns=["test_id", "role"]).num_rows
      160
    """
    inputs = {"checkpoints": checkpoints, "train": train, "test": test, "output": output}
    run, note = _run("influence", task, {**inputs, **flags}, options, progress)
    found = run.influence(str(flags.get("test_name") or "test"))
    return dataclasses.replace(found, note=note)


def self_influence(
    task: "Task | str",
    *,
    checkpoints: Value | Sequence[Value],
    train: Value | Sequence[Value],
    output: Value,
    options: Options = None,
    progress: bool = True,
    **flags: Value | Sequence[Value],
) -> Result:
    """Computes how much each training example lowers its own loss.

    Args and errors are those of `influence`, without a test set.

    Returns:
      The self-influence table.

    Example:

      >>> import tracin_beam
      >>> result = tracin_beam.self_influence(**example_inputs, progress=False)
      >>> result.table("arrow").column_names[:2]
      ['id', 'label']
    """
    inputs = {"checkpoints": checkpoints, "train": train, "output": output}
    run, note = _run("self_influence", task, {**inputs, **flags}, options, progress)
    return dataclasses.replace(run.self_influence(), note=note)


def cluster(
    task: "Task | str",
    *,
    checkpoints: Value | Sequence[Value],
    train: Value | Sequence[Value],
    output: Value,
    options: Options = None,
    progress: bool = True,
    **flags: Value | Sequence[Value],
) -> Result:
    """Clusters the training examples by k-means, such that those of a cluster influence alike.

    Rows are what scores are products of, so that ‖x − x'‖² is score(z, z) + score(z', z') −
    2 score(z, z'): the paper's sum of similarities over checkpoints, of embeddings.

    Args:
      task, checkpoints, train, output, options, progress: as of `influence`.
      **flags: any other flag of the command, such as `clusters=20`, or of Beam's.

    Returns:
      The table, a row for each training example with its cluster and the distance to its centre;
      and its page. `run.cluster_summary()` has a row for each cluster.

    Raises:
      InputError: an input has to be mended; the message says which.

    Example:

      >>> import tracin_beam
      >>> result = tracin_beam.cluster(**example_inputs, clusters=3, progress=False)
      >>> result.table("arrow", columns=["id", "cluster"]).num_rows
      24
      >>> sum(result.run.cluster_summary().table("arrow")["examples"].to_pylist())
      24
    """
    inputs = {"checkpoints": checkpoints, "train": train, "output": output}
    run, note = _run("cluster", task, {**inputs, **flags}, options, progress)
    return dataclasses.replace(run.clusters(), note=note)


def quality(
    task: "Task | str",
    *,
    checkpoints: Value | Sequence[Value],
    train: Value | Sequence[Value],
    output: Value,
    options: Options = None,
    progress: bool = True,
    **flags: Value | Sequence[Value],
) -> Result:
    """Looks for what is wrong with the training data, and writes `<output>/quality/<date>/`.

    Args and errors are those of `influence`, without a test set; and `date`, such as "2026-11-22",
    by default today's. Gates are told in `metrics.json`, and raise nothing.

    Returns:
      The suspects; `run.signals()` of it has a row for every training example.

    Example:

      >>> import tracin_beam
      >>> night = tracin_beam.quality(**example_inputs, date="2026-11-22", progress=False)
      >>> night.run.signals().table("arrow").num_rows
      24
    """
    inputs = {"checkpoints": checkpoints, "train": train, "output": output}
    run, note = _run("quality", task, {**inputs, **flags}, options, progress)
    if note:
        return Result(run, note=note)
    return run.suspects(str(flags["date"]) if flags.get("date") else None)


def embed(
    task: "Task | str",
    *,
    checkpoints: Value | Sequence[Value],
    train: Value | Sequence[Value],
    output: Value,
    options: Options = None,
    progress: bool = True,
    **flags: Value | Sequence[Value],
) -> Result:
    """Computes the embeddings alone, on which the other jobs build.

    Args and errors are those of `influence`; `test` may be given or not.

    Example:

      >>> import tracin_beam
      >>> result = tracin_beam.embed(**example_inputs, progress=False)
      >>> sorted(result.run.info["counts"]["train"])
      ['embedded', 'read', 'rejected', 'shards']
    """
    inputs = {"checkpoints": checkpoints, "train": train, "output": output}
    run, note = _run("embed", task, {**inputs, **flags}, options, progress)
    return Result(run, note=note)


def plan(
    task: "Task | str",
    *,
    checkpoints: Value | Sequence[Value],
    train: Value | Sequence[Value],
    options: Options = None,
    **flags: Value | Sequence[Value],
) -> "Planned":
    """Says what a run will take, and writes nothing.

    Args and errors are those of `influence`; `test` and `output` may be given or not.

    Returns:
      The plan, which prints as text; `jobs.plan.as_json` makes a dict of it.

    Example:

      >>> import tracin_beam
      >>> inputs = {k: v for k, v in example_inputs.items() if k != "output"}
      >>> tracin_beam.plan(**inputs).checkpoints
      2
    """
    from tracin_beam.jobs import plan as plan_job

    inputs = {"checkpoints": checkpoints, "train": train, **flags}
    config, _ = _parsed("plan", task, inputs, options)
    with _errors_of_ours():
        return plan_job.make(config)


def _run(
    name: str, task: "Task | str", flags: Mapping[str, Any], options: Any, progress: bool
) -> tuple[FinishedRun, str | None]:
    """Runs a job, and gives what it has made and what to say if it was not waited for."""
    from tracin_beam.jobs import launch
    from tracin_beam.jobs.registry import JOBS

    config, beam_options = _parsed(name, task, flags, options)
    _check_reach(config.task, beam_options)
    with _errors_of_ours(), _progress(progress):
        run, note = launch.carry_out(JOBS[name], config, beam_options)
    return FinishedRun(config.output, run.source.get().task), note


def _parsed(name: str, task: "Task | str", flags: Mapping[str, Any], options: Any) -> Any:
    from tracin_beam.inputs.task import spec_of
    from tracin_beam.jobs import options as job_options
    from tracin_beam.jobs.registry import JOBS

    spec = task if isinstance(task, str) else spec_of(task)
    words = [*_words(_as_dict(options)), *_words({"task": spec, **flags})]
    if not isinstance(options, Mapping) and isinstance(options, Sequence):
        words = [*options, *words]
    return job_options.parse(words, JOBS[name])


def _as_dict(options: Any) -> Mapping[str, Any]:
    from apache_beam.options.pipeline_options import PipelineOptions

    if isinstance(options, PipelineOptions):
        given: dict[str, Any] = options.get_all_options(drop_default=True)
        return given
    return options if isinstance(options, Mapping) else {}


def _words(flags: Mapping[str, Any]) -> Iterator[str]:
    """Flags as words of a command line, so that both are checked in one way."""
    for name, value in flags.items():
        if value is True:
            yield f"--{name}"
        elif isinstance(value, list | tuple):
            items = [os.fspath(v) if _is_path(v) else str(v) for v in value]
            flag = config.flags().get(name)
            yield from (
                [f"--{name}={v}" for v in items]
                if flag and flag.repeated
                else [f"--{name}={','.join(items)}"]
            )
        elif value is not None and value is not False:
            yield f"--{name}={os.fspath(value) if _is_path(value) else value}"


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike)


def _check_reach(spec: str, options: "PipelineOptions") -> None:
    """Refuses a task that is in no file where workers are other processes."""
    from apache_beam.options.pipeline_options import (
        DirectOptions,
        PortableOptions,
        StandardOptions,
    )

    from tracin_beam.inputs.task import is_local

    runner = (options.view_as(StandardOptions).runner or "").rpartition(".")[2]
    in_process = runner in ("FnApiRunner", "DirectRunner", "SwitchingDirectRunner")
    direct = options.view_as(DirectOptions).direct_running_mode != "multi_processing"
    loopback = options.view_as(PortableOptions).environment_type == "LOOPBACK"
    if is_local(spec) and not (loopback or (in_process and direct)):
        raise InputError(
            f"The task is in no file, and the workers of --runner={runner} are other processes: "
            "put it, with what it needs, into a file such as my_task.py, and give "
            "task='my_task.py:task'."
        )


@contextlib.contextmanager
def _errors_of_ours() -> Iterator[None]:
    """Makes one sentence of an error that came out of a pipeline, without Beam's traces."""
    from tracin_beam.jobs import worker_errors

    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if worker_errors.shows_traces():
            raise
        raise worker_errors.of(error) from None


@contextlib.contextmanager
def _progress(wanted: bool) -> Iterator[None]:
    """In this block a bar shows how far the work in this process is."""
    from tqdm.auto import tqdm

    from tracin_beam.stages import progress

    with tqdm(total=100, desc="starting", unit="%", leave=False, disable=not wanted) as bar:

        def show(parts: Sequence[progress.Progress], seconds: float) -> None:
            for part in parts[:1]:
                bar.set_description(part.part, refresh=False)
                bar.set_postfix_str(f"{part.rate:,.0f} examples a second", refresh=False)
                bar.n = round(100 * (part.share or 0))
            if not parts:
                bar.set_description("at work", refresh=False)
            bar.refresh()

        with progress.reported(show, seconds=0.5):
            yield
