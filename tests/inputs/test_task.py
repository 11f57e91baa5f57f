"""Tasks: found by file or package, and taken to processes that have neither."""

import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from remote_files import PREFIX

from tracin_beam.errors import InputError
from tracin_beam.inputs import task as tasks
from tracin_beam.inputs.task import Task, in_keras_thread, load_task
from tracin_beam.inputs.values import is_library

TASK = """
from tracin_beam.inputs.task import Task
import {helper}

def model():
    import {late}
    return {late}.NAME

task = Task(model=model, loss={helper}.LOSS, parse=lambda records: {{"features": records}})
number = 3
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Leaves no trace of a test's modules; TensorFlow cannot be imported twice."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(tasks, "_loaded", {})
    monkeypatch.setattr(tasks, "_roots", set())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None)
        if path and not is_library(path):
            del sys.modules[name]


def write(folder, files):
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))


def task_file(folder, helper="helper_module", late="late_module", loss="mse", name="my_task.py"):
    files = {
        name: TASK.format(helper=helper, late=late),
        f"{helper}.py": f"LOSS = {loss!r}\n",
        f"{late}.py": f"NAME = 'late {loss}'\n",
    }
    write(folder, files)
    return str(folder / name)


def test_file(tmp_path):
    task, source = load_task(task_file(tmp_path) + ":task")
    assert isinstance(task, Task)
    assert task.loss == "mse"
    assert [path for path, _ in source().files] == ["helper_module.py", "my_task.py"]


def test_relative_file(tmp_path, monkeypatch):
    task_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_task("my_task.py:task")[0].loss == "mse"


def test_modules_imported_late_are_known_once_the_task_was_used(tmp_path):
    task, source = load_task(task_file(tmp_path) + ":task")
    first = source()
    assert task.model() == "late mse"
    second = source()
    assert [path for path, _ in second.files] == [
        "helper_module.py",
        "late_module.py",
        "my_task.py",
    ]
    assert first.digest != second.digest


def test_package(tmp_path, monkeypatch):
    write(
        tmp_path,
        {
            "work/__init__.py": "",
            "work/inner/__init__.py": "LOSS = 'mae'",
            "work/inner/mine.py": """
                from tracin_beam.inputs.task import Task
                from . import LOSS
                from ..other import NAME
                task = Task(model=lambda: NAME, loss=LOSS, parse=None)
            """,
            "work/other.py": "NAME = 'other'",
        },
    )
    monkeypatch.chdir(tmp_path)
    task, source = load_task("work.inner.mine:task")
    assert task.loss == "mae"
    assert source().root == str(tmp_path)
    assert [path for path, _ in source().files] == [
        "work/__init__.py",
        "work/inner/__init__.py",
        "work/inner/mine.py",
        "work/other.py",
    ]
    got = elsewhere(source(), tmp_path, "task.model(), task.loss")
    assert got == "('other', 'mae')"


def test_task_in_the_init_file_of_a_package(tmp_path, monkeypatch):
    write(tmp_path, {"whole/__init__.py": "from tracin_beam.inputs.task import Task\n"})
    with open(tmp_path / "whole" / "__init__.py", "a") as file:
        file.write("task = Task(model=None, loss='mae', parse=None)\n")
    monkeypatch.chdir(tmp_path)
    _, source = load_task("whole:task")
    assert elsewhere(source(), tmp_path, "task.loss") == "'mae'"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/my_task.py", "write file.py:name or package.module:name"),
        ("{}/my_task.py:", "write file.py:name"),
        (":task", "write file.py:name"),
        ("{}/my_task.py:a-b", "write file.py:name"),
        ("{}/none.py:task", "there is no file .*none.py"),
        ("{}/my_task.py:other", "my_task.py has no 'other'"),
        ("{}/my_task.py:number", "number is a int, not a tracin_beam.Task"),
        ("no_such_package.module:task", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("{}/broken.py:task", "broken.py:task: importing it failed with ZeroDivisionError"),
        ("{}/typo.py:task", "SyntaxError: .*typo.py"),
        ("{}/exits.py:task", "SystemExit"),
    ],
)
def test_errors(tmp_path, spec, message):
    task_file(tmp_path)
    write(tmp_path, {"broken.py": "1 / 0", "typo.py": "def", "exits.py": "raise SystemExit(3)"})
    with pytest.raises(InputError, match=message):
        load_task(spec.format(tmp_path))


def test_a_file_that_failed_can_be_mended_and_loaded(tmp_path):
    write(tmp_path, {"my_task.py": "1 / 0"})
    with pytest.raises(InputError):
        load_task(f"{tmp_path}/my_task.py:task")
    assert load_task(task_file(tmp_path) + ":task")[0].loss == "mse"


def elsewhere(source, tmp_path, expression, setup=""):
    """The value of an expression in a process in which the task's folder does not exist."""
    path = tmp_path / "source.pickle"
    hidden = tasks.dataclasses.replace(source, root=str(tmp_path / "not_there"))
    path.write_bytes(pickle.dumps(hidden))
    code = f"""
import pickle, sys
from tracin_beam.inputs.task import in_keras_thread
with open({str(path)!r}, "rb") as file:
    source = pickle.load(file)
task = source.load()
assert source.load() is task
{setup}
print(repr(({expression})))
"""
    other = tmp_path / "other"
    other.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(tasks.__file__).parents[2])}
    environment["CUDA_VISIBLE_DEVICES"] = "-1"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=other,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_without_the_files(tmp_path):
    task, source = load_task(task_file(tmp_path) + ":task")
    task.model()
    assert elsewhere(source(), tmp_path, "task.loss, task.model()") == "('mse', 'late mse')"


def test_a_process_whose_files_are_others(tmp_path):
    task, source = load_task(task_file(tmp_path) + ":task")
    task.model()
    shipped = source()
    task_file(tmp_path, loss="mae")
    tasks._loaded.clear()
    for name in ("helper_module", "late_module"):
        sys.modules.pop(name, None)
    assert shipped.load().loss == "mse"
    assert shipped.load().model() == "late mse"


def test_the_loaded_task_is_not_imported_again(tmp_path):
    task, source = load_task(task_file(tmp_path) + ":task")
    assert source().load() is task


def test_two_files_of_the_same_name(tmp_path):
    loaded = []
    for loss in ("mse", "mae"):
        folder = tmp_path / loss
        task, source = load_task(task_file(folder, f"{loss}_helper", loss=loss) + ":task")
        loaded.append((task, source()))
    assert [task.loss for task, _ in loaded] == ["mse", "mae"]
    tasks._loaded.clear()
    assert [source.load().loss for _, source in loaded] == ["mse", "mae"]


def test_two_files_with_siblings_of_the_same_name(tmp_path):
    first, _ = load_task(task_file(tmp_path / "a", loss="mse") + ":task")
    second, source = load_task(task_file(tmp_path / "b", loss="mae") + ":task")
    assert (first.loss, second.loss) == ("mse", "mae")
    assert second.model() == "late mae"
    assert dict(source().files)["helper_module.py"] == b"LOSS = 'mae'\n"


def test_sources_leave_out_libraries_and_other_folders(tmp_path):
    write(tmp_path / "elsewhere", {"unrelated.py": ""})
    write(
        tmp_path / "mine",
        {
            "my_task.py": f"""
                import json, sys
                import numpy
                sys.path.append({str(tmp_path / "elsewhere")!r})
                import unrelated
                from tracin_beam.inputs.task import Task
                task = Task(model=None, loss="mse", parse=None)
            """
        },
    )
    _, source = load_task(f"{tmp_path}/mine/my_task.py:task")
    assert [path for path, _ in source().files] == ["my_task.py"]


POLICY = """
import keras
from tracin_beam.inputs.task import Task
keras.config.set_dtype_policy("mixed_bfloat16")

def model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])

task = Task(model=model, loss="mse", parse=None)
"""


def test_a_dtype_policy_set_by_the_task_file_holds_where_models_are_built(tmp_path):
    import keras

    write(tmp_path, {"my_task.py": POLICY})
    task, source = load_task(f"{tmp_path}/my_task.py:task")
    try:
        built = in_keras_thread(task.model)
        assert built.layers[-1].dtype_policy.name == "mixed_bfloat16"
        assert keras.config.dtype_policy().name == "float32"
    finally:
        in_keras_thread(lambda: keras.config.set_dtype_policy("float32"))
    policy = "in_keras_thread(task.model).layers[-1].dtype_policy.name"
    assert elsewhere(source(), tmp_path, policy) == "'mixed_bfloat16'"


def test_keras_thread_may_be_asked_from_itself_and_passes_errors_on():
    assert in_keras_thread(lambda: in_keras_thread(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        in_keras_thread(lambda: 1 / 0)


def test_a_task_may_be_loaded_in_the_keras_thread_while_another_thread_waits(tmp_path):
    _, source = load_task(task_file(tmp_path) + ":task")
    source = source()
    tasks._loaded.clear()
    started, done = threading.Event(), []

    def inside():
        started.wait(5)
        return source.load()

    threads = [
        threading.Thread(target=lambda: done.append(in_keras_thread(inside)), daemon=True),
        threading.Thread(target=lambda: done.append(source.load()), daemon=True),
    ]
    threads[0].start()
    threads[1].start()
    started.set()
    for thread in threads:
        thread.join(10)
    assert len(done) == 2
    assert done[0] is done[1]


READS = """
import os
from tracin_beam import Task

HERE = os.path.dirname(__file__)
with open(os.path.join(HERE, "words.txt")) as file:
    WORDS = file.read().split()

def model():
    with open(os.path.join(HERE, "data", "late.bin"), "rb") as file:
        return WORDS, file.read()

task = Task(model, "mse", len, files=["data/late.bin"])
"""


def reading_task(folder):
    write(folder, {"my_task.py": READS, "words.txt": "a b", "data/note.txt": ""})
    (folder / "data" / "late.bin").write_bytes(b"\xff\x00")
    return f"{folder}/my_task.py:task"


def test_files_that_a_task_reads_travel_with_it(tmp_path):
    _, source = load_task(reading_task(tmp_path / "here"))
    sent = source()
    assert [path for path, _ in sent.files] == ["data/late.bin", "my_task.py", "words.txt"]
    assert elsewhere(sent, tmp_path, "task.model()") == "(['a', 'b'], b'\\xff\\x00')"


def test_the_files_of_a_task_in_a_bucket_are_fetched(tmp_path):
    text = READS.replace('files=["', 'files=["words.txt", "helper.py", "').replace(
        "import os", "import os, helper"
    )
    spec = reading_task(tmp_path / "here")
    write(tmp_path / "here", {"my_task.py": text, "helper.py": "A = 1"})
    _, source = load_task(PREFIX + spec)
    sent = source()
    assert [path for path, _ in sent.files] == [
        *("data/late.bin", "helper.py", "my_task.py", "words.txt")
    ]
    assert elsewhere(sent, tmp_path, "task.model()") == "(['a', 'b'], b'\\xff\\x00')"
    # Names that the source does not spell out are known once it has been imported.
    made_up = READS.replace('"data/late.bin"]', '"data/" + n for n in ("late.bin",)]')
    write(tmp_path / "here", {"my_task.py": made_up.replace('"words.txt"', '"my_task.py"')})
    assert [path for path, _ in load_task(PREFIX + spec)[1]().files] == [
        *("data/late.bin", "my_task.py")
    ]
    os.remove(tmp_path / "here/data/late.bin")
    with pytest.raises(InputError, match=f"files=….: {PREFIX}.*/data/late.bin cannot be read"):
        load_task(PREFIX + spec)


def test_the_content_of_named_files_counts(tmp_path):
    _, source = load_task(reading_task(tmp_path))
    before = source()
    (tmp_path / "data" / "late.bin").write_bytes(b"\xff\x01")
    assert [path for path, _ in before.read] == ["data/late.bin"]
    assert source().read != before.read


@pytest.mark.parametrize(
    ("named", "message"),
    [("none.txt", "there is no file .*none.txt"), ("../beside.txt", "does not lie below")],
)
def test_named_files_must_be_there(tmp_path, named, message):
    write(tmp_path, {"beside.txt": "", "in/my_task.py": READS.replace("data/late.bin", named)})
    write(tmp_path / "in", {"words.txt": ""})
    _, source = load_task(f"{tmp_path}/in/my_task.py:task")
    with pytest.raises(InputError, match=message):
        source()


def test_files_too_large_or_opened_from_the_current_folder_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    text = READS.replace('os.path.join(HERE, "words.txt")', '"words.txt"')
    write(tmp_path, {"my_task.py": text, "words.txt": "a", "data/late.bin": "x" * 3_000_000})
    _, source = load_task("my_task.py:task")
    assert [path for path, _ in source().files] == ["my_task.py", "words.txt"]
    assert "opens words.txt from the current folder" in caplog.text
    assert "late.bin, which is too large to travel" in caplog.text


def test_a_relative_import_says_how_to_name_the_task(tmp_path):
    write(
        tmp_path,
        {"pack/__init__.py": "", "pack/other.py": "", "pack/job.py": "from . import other"},
    )
    with pytest.raises(InputError, match=r"Write the task as package\.module:name"):
        load_task(f"{tmp_path}/pack/job.py:task")


def test_another_keras_is_named(tmp_path, monkeypatch):
    spec = task_file(tmp_path) + ":task"
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    write(tmp_path, {"keras.json": '{"backend": "tensorflow"}'})
    load_task(spec)
    write(tmp_path, {"keras.json": '{"backend": "torch"}'})
    with pytest.raises(InputError, match=r'"backend" in .*keras.json chooses .torch'):
        load_task(spec)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    load_task(spec)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(InputError, match="KERAS_BACKEND chooses 'jax'"):
        load_task(spec)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    with pytest.raises(InputError, match="TF_USE_LEGACY_KERAS chooses Keras 2"):
        load_task(spec)


def test_names_of_labels_are_lines():
    assert Task(len, "mse", len, label_names=["cat", "dog"]).label_names == ["cat", "dog"]
    with pytest.raises(InputError, match=r"'a\\nb' is more than one line"):
        Task(len, "mse", len, label_names=["cat", "a\nb"])


def test_files_of_a_task_of_a_cell_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "_given", {})
    task = Task(len, "mse", len, files=["words.txt"])
    with pytest.raises(InputError, match=r"there is no file .*words\.txt"):
        load_task(tasks.spec_of(task))[1]()
    read = []
    for words in ("a", "b"):
        (tmp_path / "words.txt").write_text(words)
        read.append(load_task(tasks.spec_of(task))[1]().read)
    assert read[0] != read[1]
