"""What a task is made of: every kind of change is seen, and nothing else is."""

import json
import linecache
import os
import subprocess
import sys
import textwrap
import types

import pytest

from tracin_beam.config import Config
from tracin_beam.inputs import task as tasks
from tracin_beam.inputs.values import Values
from tracin_beam.jobs import fingerprints

FILES = {
    "my_task.py": '''
        """What is explained."""
        import datetime
        import functools
        import logging
        import random
        import uuid

        import keras
        import numpy as np
        import tensorflow as tf

        import shapes
        from helpers import scaled as rescaled
        from pack import inner
        from tracin_beam import Task

        logging.basicConfig(level=logging.INFO)
        log = logging.getLogger("mine")
        STARTED = datetime.datetime.now()
        NOISE = np.random.normal(size=3)
        PICKED = random.choice(range(10**9))
        RUN = uuid.uuid4()
        SEEN = {}
        WEIGHTS = [1.0, 2.0, 4.0]
        TABLE = {"a": 1, "b": {"c": 2}}
        MEANS = np.array([0.5, 0.25])
        NAMES = ["cat", "dog"]
        VOCABULARY = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(["x", "y"], [0, 1]), -1)
        LOOKUP = keras.layers.StringLookup(vocabulary=["p", "q"])
        FACTORS = {3, 5, 7}
        HALF = functools.partial(tf.multiply, 0.5)
        double = lambda x: x * 2.0
        by_name = {"rescaled": rescaled}
        for i in range(3):
            WEIGHTS[i] += 1

        class Settings:
            floor = 0.125

            def ceiling(self):
                return 9.0

        class Weighted(keras.losses.Loss):
            def __init__(self, class_weights):
                super().__init__()
                self.class_weights = class_weights

            def call(self, y_true, y_pred):
                return keras.ops.mean(y_pred, axis=-1) * self.class_weights[0]

        def made_loss(exponent, offset=0.0):
            def loss(y_true, y_pred):
                return keras.ops.mean((y_pred + offset) ** exponent, axis=-1)
            return loss

        def build_model():
            """Docstring."""
            print("building", STARTED, NOISE, PICKED, RUN)
            SEEN["built"] = SEEN.get("built", 0) + 1
            return keras.Sequential([keras.Input((4,)), keras.layers.Dense(shapes.UNITS)])

        def unused():
            return 1

        def parse(serialized):
            log.info("parsing")
            x = rescaled(tf.io.decode_raw(serialized, tf.float32)) * WEIGHTS[0] + MEANS[0]
            x = double(HALF(x)) + TABLE["b"]["c"] + Settings.floor + inner.shift(x)
            x = x + float(sum(FACTORS)) + by_name["rescaled"](x)
            y = VOCABULARY.lookup(x) + LOOKUP(x)
            return {"features": x, "label": y}

        weighted = Weighted([1.0, 2.0])
        task = Task(build_model, made_loss(2), parse, label_names=NAMES)

        if __name__ == "__main__":
            unused()
    ''',
    "helpers.py": """
        FACTOR = {"x": 3.0}

        def scaled(x):
            return x * FACTOR["x"]

        def other(x):
            return x
    """,
    "shapes.py": "UNITS = 3\n",
    "pack/__init__.py": "",
    "pack/inner.py": """
        from .deep import SHIFT

        def shift(x):
            from . import late

            return x + SHIFT + late.MORE
    """,
    "pack/deep.py": "SHIFT = (1.0, [2.0])\n",
    "pack/late.py": "MORE = 1.5\n",
}


_known = {}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Leaves no trace of a test's modules."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(tasks, "_loaded", {})
    monkeypatch.setattr(tasks, "_roots", set())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("helpers", "shapes", "pack") or name.startswith("_tracin_task"):
            del sys.modules[name]


def fingerprint(folder):
    task, source = tasks.load_task(f"{folder}/my_task.py:task")
    engine = types.SimpleNamespace(
        model=tasks.in_keras_thread(task.model), dim=16, described_kind=lambda: "kind"
    )
    import pack.late  # as tracing does

    assert pack.late.MORE
    return fingerprints.of_task(task, engine, Config(), source())


@pytest.fixture
def of(request, tmp_path):
    """The fingerprint of the files with some text replaced, each time in a folder of its own."""
    made = iter(range(1000))

    def of(*edits):
        if edits not in _known:
            _known[edits] = made_of(*edits)
        return _known[edits]

    def made_of(*edits):
        folder = tmp_path / f"copy {next(made)}"
        for name, text in FILES.items():
            for path, old, new in edits:
                if path == name:
                    assert textwrap.dedent(old) in textwrap.dedent(text)
                    text = textwrap.dedent(text).replace(textwrap.dedent(old), new)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(text))
        return fingerprint(folder)

    return of if request.node.get_closest_marker("parametrize") else made_of


CHANGES = {
    "list": ("my_task.py", "[1.0, 2.0, 4.0]", "[1.0, 2.0, 5.0]"),
    "dict": ("my_task.py", '{"c": 2}', '{"c": 3}'),
    "array": ("my_task.py", "[0.5, 0.25]", "[0.5, 0.75]"),
    "set": ("my_task.py", "{3, 5, 7}", "{3, 5, 9}"),
    "class constant": ("my_task.py", "floor = 0.125", "floor = 0.25"),
    "method": ("my_task.py", "return 9.0", "return 8.0"),
    "lookup table": ("my_task.py", '["x", "y"]', '["y", "x"]'),
    "vocabulary": ("my_task.py", '["p", "q"]', '["q", "p"]'),
    "partial": ("my_task.py", "(tf.multiply, 0.5)", "(tf.multiply, 0.75)"),
    "lambda": ("my_task.py", "x * 2.0", "x * 3.0"),
    "loop at the top": ("my_task.py", "WEIGHTS[i] += 1", "WEIGHTS[i] += 2"),
    "closure": ("my_task.py", "made_loss(2)", "made_loss(3)"),
    "default": ("my_task.py", "offset=0.0", "offset=1.0"),
    "weights in a loss": ("my_task.py", "made_loss(2)", "Weighted([1.0, 2.0])"),
    "model": ("my_task.py", "keras.layers.Dense(", "keras.layers.Dense(activation='relu', units="),
    "parse": ("my_task.py", "+ MEANS[0]", "- MEANS[0]"),
    "helper": ("helpers.py", "x * FACTOR", "x / FACTOR"),
    "helper's dict": ("helpers.py", '{"x": 3.0}', '{"x": 4.0}'),
    "constant by attribute": ("shapes.py", "3", "4"),
    "function in a package": ("pack/inner.py", "return x + SHIFT", "return x - SHIFT"),
    "constant by relative import": ("pack/deep.py", "[2.0]", "[3.0]"),
    "module imported late": ("pack/late.py", "1.5", "2.5"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_seen(of, kind):
    assert fingerprints.changes(of(), of(CHANGES[kind]))


def test_class_weights_in_a_loss(of):
    weighted = ("my_task.py", "made_loss(2)", "weighted")
    before = of(weighted)
    other = of(weighted, ("my_task.py", "Weighted([1.0, 2.0])", "Weighted([1.0, 3.0])"))
    assert fingerprints.changes(before, other) == ["loss"]


NOTHING = {
    "nothing, in another folder": (),
    "comments": ("helpers.py", "def scaled", "# Why.\n\n\ndef scaled"),
    "docstrings": ("my_task.py", '"""Docstring."""', '"""Another."""'),
    "no docstring": ("my_task.py", '"""What is explained."""', ""),
    "formatting": ("my_task.py", '["cat", "dog"]', '[\n  "cat",\n  "dog",\n]'),
    "order of a dict": ("my_task.py", '"a": 1, "b": {"c": 2}', '"b": {"c": 2}, "a": 1'),
    "order of a set": ("my_task.py", "{3, 5, 7}", "{7, 5, 3}"),
    "logging": ("my_task.py", "level=logging.INFO", "level=logging.DEBUG"),
    "what is logged": ("my_task.py", 'log.info("parsing")', "pass"),
    "what is printed": ("my_task.py", '"building", ', '"still building", '),
    "names for display": ("my_task.py", '["cat", "dog"]', '["cat", "hound"]'),
    "a function nobody needs": ("my_task.py", "return 1", "return 2"),
    "a new function": ("helpers.py", "def other", "def new(): pass\ndef other"),
    "the main program": ("my_task.py", "    unused()\n", "    print(unused())\n"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_what_changes_nothing_is_not_seen(of, kind):
    edits = [NOTHING[kind]] if NOTHING[kind] else []
    assert fingerprints.changes(of(), of(*edits)) == []


def test_what_differs_is_named(of):
    before = of()
    assert fingerprints.changes(before, of(CHANGES["helper's dict"])) == ["code of helpers.py"]
    assert fingerprints.changes(before, of(CHANGES["list"])) == ["code of the task"]
    assert fingerprints.changes(before, of(CHANGES["closure"])) == ["loss"]
    assert fingerprints.changes(before, of(CHANGES["parse"])) == ["parse"]
    assert "model" in fingerprints.changes(before, of(CHANGES["model"]))


def test_values_that_come_from_outside(of, monkeypatch):
    edit = (
        "my_task.py",
        "WEIGHTS = [1.0, 2.0, 4.0]",
        "import os\nWEIGHTS = [float(os.environ['W'])] * 3",
    )
    monkeypatch.setenv("W", "1")
    before = of(edit)
    assert of(edit) == before
    monkeypatch.setenv("W", "2")
    assert fingerprints.changes(before, of(edit)) == ["code of the task"]


NOTEBOOK = """
import numpy as np, tensorflow as tf
import shapes
FACTORS = [1.0, 2.0]
def scaled(x):
    return x * FACTORS[0] * shapes.UNITS
def parse(x):
    '''Says what.'''
    return {"features": scaled(x), "label": (lambda y: y + 1)(x)}
"""


def test_what_is_defined_in_no_file(tmp_path, monkeypatch):
    (tmp_path / "shapes.py").write_text("UNITS = 3\n")
    monkeypatch.syspath_prepend(tmp_path)

    def digest(text, has_source=True):
        name = f"<cell {len(linecache.cache)}>"
        if has_source:
            linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        scope = {"__name__": "__main__"}
        exec(compile(text, name, "exec"), scope)
        values = Values("", lambda module: False)
        return json.dumps(values.plain(scope["parse"]), sort_keys=True)

    for has_source in (True, False):
        before = digest(NOTEBOOK, has_source)
        assert digest(NOTEBOOK + "# A comment.", has_source) == before
        for old, new in (("1.0, 2.0", "1.0, 3.0"), ("x * F", "x / F"), ("y + 1", "y + 2")):
            assert digest(NOTEBOOK.replace(old, new), has_source) != before
        sys.modules["shapes"].UNITS = 4
        assert digest(NOTEBOOK, has_source) != before
        sys.modules["shapes"].UNITS = 3
    assert digest(NOTEBOOK.replace("Says what", "Does")) == digest(NOTEBOOK)


def test_names_that_are_made_up(of):
    edit = ("my_task.py", "shapes.UNITS)", "getattr(shapes, 'UN' + 'ITS'))")
    assert fingerprints.changes(of(edit), of(edit, CHANGES["constant by attribute"]))


def test_another_process_gives_the_same(tmp_path):
    for name, text in FILES.items():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text))
    here = fingerprint(tmp_path)
    code = f"""
import json, sys
sys.path[:0] = {[os.path.dirname(__file__)]!r}
import keras
keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(2)])
import test_fingerprints
print(json.dumps(test_fingerprints.fingerprint({str(tmp_path)!r})))
"""
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout.splitlines()[-1]) == here


def test_values_that_cannot_be_compared_are_named_once(of, caplog):
    edit = ("my_task.py", "MEANS = ", "import threading\nGUARD = threading.Lock()\nMEANS = ")
    use = ("my_task.py", "x = rescaled(", "GUARD.locked()\n    x = rescaled(")
    with caplog.at_level("INFO"):
        of(edit, use)
    said = [r.message for r in caplog.records if "lock" in r.message]
    assert len(said) == 1
    assert "a change there is not noticed" in said[0]
    assert any("SEEN of my_task.py" in r.message for r in caplog.records)
