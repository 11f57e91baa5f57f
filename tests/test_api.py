"""The jobs as functions, as a notebook uses them."""

import html
import logging
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny as t
from apache_beam.options.pipeline_options import PipelineOptions
from tiny import Tiny

import tracin_beam
from tracin_beam.errors import InputError

ROOT = Path(__file__).parents[1]
LOCAL = {"options": {"runner": "FnApiRunner"}, "progress": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, launch):
    return Tiny(tmp_path_factory.mktemp("api"), launch).write_all()


def inputs(tiny, stage, **changes):
    flags = tiny.flags(stage, **changes)
    return {"task": flags.pop("task"), **flags}


@pytest.fixture(scope="module")
def made(tiny):
    """A run of influence and of self-influence."""
    result = tracin_beam.influence(**inputs(tiny, "influence"), **LOCAL)
    own = tracin_beam.self_influence(**inputs(tiny, "self_influence"), **LOCAL)
    return result, own


def test_the_tables_are_those_of_the_command(tiny, made):
    tiny.check()
    result, own = made
    rows = result.table("arrow")
    assert rows.to_pylist() == t.table(tiny.out / "influence/test")
    assert own.table("arrow").to_pylist() == t.table(tiny.out / "self_influence")
    assert result.table().to_dict("list").keys() == rows.to_pydict().keys()
    assert own.table("arrow", columns=["id"]).column_names == ["id"]
    assert Path(result.report).read_text().startswith("<!doctype html>")
    assert own.report is None
    assert result.run.info["counts"]["train"]["rejected"] == 0
    with pytest.raises(InputError, match="take 'pandas' or 'arrow'"):
        result.table("polars")


def test_a_finished_run_is_opened(tiny, made):
    run = tracin_beam.open(tiny.out)
    assert run.influence("test").table("arrow") == made[0].table("arrow")
    assert run.self_influence().table("arrow") == made[1].table("arrow")
    assert run.info == tiny.run_json()
    with pytest.raises(InputError, match=r"no run has written there"):
        tracin_beam.open(tiny.folder / "nowhere")
    with pytest.raises(InputError, match=r"There is no table in .*/influence/other"):
        run.influence("other").table()


def test_a_night_that_was_not(made):
    run = made[0].run
    for find in (run.suspects, run.signals):
        with pytest.raises(InputError, match=r"no night of 1999-01-01 .*: run quality"):
            find("1999-01-01")


def test_one_example_is_explained(tiny, made):
    run = tracin_beam.open(tiny.out, task=f"{tiny.folder}/task.py:task")
    some = tiny.good("test")[0].id
    found = run.explain(some)
    everything = made[0].table("arrow").to_pylist()
    assert found.table("arrow").to_pylist() == [r for r in everything if r["test_id"] == some]
    page = html.unescape(found._repr_html_())
    assert page.startswith("<iframe srcdoc=")
    assert "sandbox" in page.split(">")[0] or " sandbox " in page
    assert "0.0" in page or "<img" in page  # the features, which the task parses
    assert some in repr(found)
    assert "proponent" in repr(found)
    # Without a task there is the same page, but for what only the task can show.
    assert "<iframe" in tracin_beam.open(tiny.out).explain(some)._repr_html_()
    with pytest.raises(InputError, match=r"No example 'nobody' is in .*; some that are: \S+"):
        run.explain("nobody")


def test_what_a_notebook_shows_is_escaped(made):
    for result in (*made, made[0].run):
        shown = result._repr_html_()
        assert shown.startswith(("<p>", "<table>"))
    evil = tracin_beam.api.FinishedRun("<script>alert(1)</script>")
    assert "<script>" not in evil._repr_html_()
    bad = tracin_beam.api.Result(evil, note="<b>&")
    assert "<b>" not in bad._repr_html_()


def test_errors_are_ours_and_short(tiny):
    with pytest.raises(InputError, match=r"no flag --topk. Did you mean --top_k\?"):
        tracin_beam.influence(**inputs(tiny, "influence"), topk=3)
    with pytest.raises(InputError, match="--top_k=0 must be at least 1"):
        tracin_beam.influence(**inputs(tiny, "influence", top_k=0), **LOCAL)
    with pytest.raises(InputError, match="No file matches"):
        tracin_beam.influence(**inputs(tiny, "influence", train="nowhere-*"), **LOCAL)


def test_the_callers_logging_is_left_alone(tiny, made):
    before = [(x.level, list(x.handlers), list(x.filters), x.propagate) for x in loggers()]
    tracin_beam.embed(**inputs(tiny, "embed"), **LOCAL)
    after = [(x.level, list(x.handlers), list(x.filters), x.propagate) for x in loggers()]
    assert after == before


def loggers():
    return [logging.getLogger(), logging.getLogger("tracin_beam")]


def test_flags_and_options_in_every_form(tiny, made, tmp_path):
    paths = sorted(tiny.folder.glob("train-*"))
    for options in (
        PipelineOptions(["--runner=FnApiRunner", "--direct_num_workers=1"]),
        ["--runner=FnApiRunner"],
        None,
    ):
        result = tracin_beam.embed(
            **inputs(tiny, "embed", train=paths, output=tmp_path, test=None),
            options=options,
            progress=False,
        )
        assert result.run.info["counts"]["train"]["shards"] == len(paths)
    with pytest.raises(InputError, match="makes no table"):
        result.table()


def test_progress_is_shown(tiny, tmp_path, capfd):
    given = inputs(tiny, "embed", output=tmp_path / "out")
    tracin_beam.embed(**given, options={"runner": "FnApiRunner"})
    assert "starting: " in capfd.readouterr().err


def test_a_plan(tiny):
    flags = inputs(tiny, "embed", output=None)
    flags.pop("output", None)
    planned = tracin_beam.plan(**flags)
    assert planned.sets["train"].total == len(tiny.good("train"))
    assert "worker hours" in repr(planned)


# A task that no file holds.

FEATURES, CLASSES = 4, 3


def cell_task(scale=1.0):
    parser = tracin_beam.Parser(features=((FEATURES,), "float32"), label=((), "int64"))

    def build_model():
        return keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(CLASSES)])

    def loss(y, z):
        return scale * keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)

    return tracin_beam.Task(build_model, loss, parser)


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell")
    x = np.random.default_rng(0).normal(size=(20, FEATURES)).astype("float32")
    tracin_beam.write_shards((x, np.arange(20) % CLASSES), f"{folder}/train-*", shards=2)
    model = cell_task().model()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.save_weights(folder / "a.weights.h5")
    checkpoints = {"checkpoints": folder / "*.weights.h5", "learning_rate": 0.1}
    return {"train": f"{folder}/train-*", "output": folder / "out", **checkpoints}


def test_a_task_of_a_cell(cell):
    task = cell_task()
    result = tracin_beam.self_influence(task, **cell, **LOCAL)
    table = result.table()
    assert len(table) == 20
    assert (table["self_influence"] > 0).all()
    assert result.run.task is task
    # The same again finds everything made, another loss is another.
    tracin_beam.self_influence(cell_task(), **cell, **LOCAL)
    with pytest.raises(InputError, match="what changed: loss"):
        tracin_beam.self_influence(cell_task(scale=2.0), **cell, **LOCAL)


@pytest.mark.parametrize(
    "options",
    [
        {"runner": "PortableRunner", "job_endpoint": "localhost:1"},
        {"runner": "FnApiRunner", "direct_running_mode": "multi_processing"},
    ],
)
def test_a_task_of_a_cell_goes_to_no_other_process(cell, options):
    with pytest.raises(InputError, match=r"put it, with what it needs, into a file"):
        tracin_beam.self_influence(cell_task(), **cell, options=options, progress=False)


def test_a_task_of_a_module_travels(tiny, tmp_path, monkeypatch):
    import importlib

    (tmp_path / "some_task.py").write_text((tiny.folder / "task.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("some_task")
    from tracin_beam.inputs.task import load_task, spec_of

    spec = spec_of(module.task)
    assert spec == f"{tmp_path}/some_task.py:task"
    assert load_task(spec)[0] is module.task


NOTEBOOK = """
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in (
    "import tracin_beam, keras",
    "def build_model():\\n"
    "    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])\\n"
    "loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\\n"
    "parse = tracin_beam.Parser(features=((4,), 'float32'), label=((), 'int64'))\\n"
    "task = tracin_beam.Task(build_model, loss, parse)",
    "result = tracin_beam.influence(task, checkpoints='*.weights.h5', learning_rate=0.1,\\n"
    "    train='train-*', test='train-00000*', output='made', top_k=3)",
    "print(len(result.table()), len(result._repr_html_()) > 1000)",
):
    done = shell.run_cell(cell)
    done.raise_error()
"""


def test_a_notebook_in_a_fresh_interpreter(cell, tmp_path):
    pytest.importorskip("IPython")
    folder = Path(cell["train"]).parent
    (folder / "other").mkdir()
    for path in [*folder.glob("train-*"), folder / "a.weights.h5"]:
        os.link(path, folder / "other" / path.name)
    os.remove(folder / "other/train-00001-of-00002")
    for name in ("train-00000-of-00002",):
        os.link(folder / name, folder / "other" / "train-10000")
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK.replace("train='train-*'", "train='train-1*'")],
        cwd=folder / "other",
        env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{10 * 2 * 3} True" in done.stdout
    assert "starting: " in done.stderr
