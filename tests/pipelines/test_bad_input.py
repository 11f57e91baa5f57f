"""Whatever is wrong with the input: a clear error, or an entry in rejected/ and right numbers."""

import gzip
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny as t
from tiny import Row, Tiny, framed, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tmp_path, launch):
    return Tiny(tmp_path, launch)


def both(tiny, **changes):
    assert tiny.run("influence", **changes) == 0
    assert tiny.run("self_influence", **changes) == 0


@pytest.fixture
def fails(tiny, capfd):
    """A function that runs a job, which must fail in a sentence with these words."""

    def run(*words, stage="embed", **changes):
        tables = t.snapshot(tiny.out, "*.parquet")
        capfd.readouterr()
        assert tiny.run(stage, **changes) == 2
        said = capfd.readouterr()
        _, ours, message = said.err.rpartition(f"tracin-beam {stage}: ")
        assert ours
        assert "Traceback" not in said.err
        assert len(message) < 1000
        assert not re.search(r"[^ -\U0010ffff\n]", message)
        for word in words:
            assert str(word) in message, message
        assert t.snapshot(tiny.out, "*.parquet") == tables
        return message

    return run


# Records that cannot be used.


def cut(content, at):
    return content[:at]


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


def starts(some):
    return np.cumsum([0] + [16 + len(row.serialized()) for row in some]).tolist()


@pytest.mark.parametrize("side", ["train", "test"])
def test_damaged_shards(tiny, side):
    tiny.write_all()
    more = {"train": "train-0", "test": "test-0"}[side] + ".tfrecord"
    some = rows("more", 40, 7)
    tiny.write(more, some)
    place = starts(some)
    content = framed(some)
    content = flipped(content, place[3] + 30)  # data
    content = flipped(content, place[10] + 1)  # a length
    content = cut(content, place[39] + 20)
    tiny.write(more, content)
    both(tiny)
    tiny.check({(more, 3): "wrong CRC", (more, 10): "damaged length", (more, 39): "is cut short"})


@pytest.mark.parametrize("side", ["train", "test"])
def test_damaged_gzip_shards(tiny, side):
    tiny.write_all(packed=True)
    some = rows("more", 400, 7)
    content = gzip.compress(framed(some), mtime=0)
    damaged = f"{side}-5.tfrecord.gz"
    # A stream cut short: what can be unpacked counts.
    content = cut(content, len(content) // 2)
    unpacked = zlib.decompressobj(wbits=31).decompress(content)
    whole = sum(end <= len(unpacked) for end in t.starts(some)[1:])
    assert 100 < whole < 300
    tiny.write(damaged, some[: whole + 1])
    tiny.write(damaged, content)
    # A wrong checksum at the end: all records are sound, the file may not be.
    other = f"{side}-1.tfrecord.gz"
    sound = len(tiny.shards[other])
    tiny.write(other, flipped((tiny.folder / other).read_bytes(), -6))
    both(tiny, rescore=1000, top_k=500)
    tiny.check(
        {(damaged, whole): "gzip stream is corrupt", (other, sound): "gzip stream is corrupt"},
        read={side: len(tiny.good(side)) + 1},
    )


UNPARSABLE = [
    b"\xff\x00no example \x1b[31m",
    b"",
    Row(np.zeros(7, np.float32), 1, "of another shape").serialized(),
]


def test_records_that_do_not_parse_or_compute(tiny):
    tiny.write_all()
    nan, inf, big = np.zeros((3, 4), np.float32)
    nan[1], inf[1], big[1] = np.nan, np.inf, 1e25
    good = rows("more", 120, 5)
    for i, bad in enumerate(UNPARSABLE):
        good[10 * i] = bad
    reasons = dict.fromkeys(("train-1.tfrecord", 10 * i) for i in range(len(UNPARSABLE)))
    reasons = dict.fromkeys(reasons, "parse failed: .")
    for position, row, reason in [
        (31, Row(nan, 0, "nan"), "loss is nan at step 10"),
        (32, Row(inf, 0, "inf"), "loss is nan at step 10"),
        (33, Row(big, 0, "big"), "the gradient is not finite at step 10"),
        (34, good[34].but(y=t.CLASSES), "the model or the loss fails: .* at step 10"),
        (35, good[35].but(y=-1), "the model or the loss fails: .* at step 10"),
        (119, good[119].but(id="more118"), "duplicate id 'more118': record 118 of "),
    ]:
        good[position] = row
        reasons["train-1.tfrecord", position] = reason
    tiny.write("train-1.tfrecord", good)
    # The test set has duplicates in different shards, and one that is nothing but bad records.
    tiny.write("test-1.tfrecord", [*rows("test1.", 20, 3), tiny.shards["test-0.tfrecord"][2]])
    tiny.write("test-2.tfrecord", [Row(nan, 0, "nan"), b"garbage"])
    reasons["test-1.tfrecord", 20] = "duplicate id 'test0.2': record 2 of .*test-0.tfrecord"
    reasons["test-2.tfrecord", 0] = "loss is nan"
    reasons["test-2.tfrecord", 1] = "parse failed: ."
    both(tiny, rescore=1000, top_k=500, max_rejected=0.2)
    tiny.check(reasons)


def test_an_empty_shard(tiny):
    tiny.write_all()
    tiny.write("train-1.tfrecord", [])
    tiny.write("test-1.tfrecord", [])
    both(tiny)
    tiny.check()
    assert tiny.run_json()["counts"]["train"]["shards"] == 3


@pytest.mark.parametrize("bad", ["parse", "label", "features"])
def test_only_the_first_records_are_bad(tiny, bad):
    tiny.write_all(train=1)
    good = rows("more", 700, 5)
    for i in range(70):
        good[i] = {
            "parse": b"garbage",
            "label": good[i].but(y=9),
            "features": good[i].but(x=np.full(4, np.nan, np.float32)),
        }[bad]
    tiny.write("train-0.tfrecord", good)
    assert tiny.run("self_influence") == 0
    reason = {"parse": "parse failed", "label": "loss fails", "features": "nan"}[bad]
    rejected = {("train-0.tfrecord", i): reason for i in range(70)}
    tiny.check_counts(rejected)
    t.check_self_influence(tiny, tiny.good("train", rejected))


def test_one_bad_record_of_a_few_is_not_too_many(tiny, fails):
    tiny.write_all()
    tiny.write("test-0.tfrecord", rows("test", 3, 1))
    tiny.write("test-1.tfrecord", [b"garbage"])
    both(tiny)
    tiny.check({("test-1.tfrecord", 0): "parse failed"})
    fails("1 of 4 records of the test set", "test-1.tfrecord", max_rejected=0)


def test_an_example_that_fails_at_one_checkpoint_only(tiny):
    tiny.write_all()
    kernel, bias = t.weights_at(20)
    kernel[3, 0] = 1e25
    tiny.write_checkpoints(weights=[t.weights_at(10), [kernel, bias]])
    some = rows("more", 12, 5)
    some[4].x[3] = 1e15
    # Its namesake, whose turn it is then.
    some[7] = some[7].but(id=some[4].id)
    tiny.write("train-1.tfrecord", some)
    both(tiny)
    tiny.check({("train-1.tfrecord", 4): "nan at step 20"})


def test_too_many_rejected(tiny, fails):
    tiny.write_all()
    some = rows("more", 100, 5)
    some[20:60] = [b"garbage"] * 40
    tiny.write("train-1.tfrecord", some)
    fails(
        "40 of 116 records of the train set", "--max_rejected", "record 20 of", "train-1.tfrecord",
        "parse failed", stage="influence",
    )  # fmt: skip
    assert set(tiny.rejected()) == {("train-1.tfrecord", i) for i in range(20, 60)}
    assert not (tiny.out / "influence").exists()


def test_so_many_rejected_that_the_shard_is_given_up(tiny, fails):
    tiny.write_all()
    tiny.write("train-1.tfrecord", [*rows("more", 100, 5), *[b"garbage"] * 3000])
    message = fails("of the train set", "record 100 of", "train-1.tfrecord")
    assert "3000 of" not in message
    assert len(tiny.rejected()) > 1000
    assert not list(tiny.out.glob("embeddings/train/*/train-1*"))


# Data that cannot be worked with at all.


@pytest.mark.parametrize("side", ["train", "test"])
def test_all_shards_are_empty(tiny, fails, side):
    tiny.write_all()
    for i in range(3):
        tiny.write(f"{side}-{i}.tfrecord", [])
    fails(f"--{side}", f"{side}-0.tfrecord", "empty")


@pytest.mark.parametrize("side", ["train", "test"])
def test_all_records_are_bad(tiny, fails, side):
    tiny.write_all()
    names = [name for name in tiny.shards if name.startswith(side)]
    for bad, words in [
        (lambda row: b"garbage\x07", ["Could not parse example", r"garbage\x07"]),
        (lambda row: row.but(x=np.full(4, np.nan, np.float32)), ["record 0", "loss is nan"]),
        (lambda row: row.but(x=np.full(4, 1e30, np.float32)), ["gradient is not finite"]),
        (lambda row: row.but(y=17), ["record 0", "17"]),
    ]:
        for name in names:
            tiny.write(name, [bad(row) for row in rows("bad", 4, 1)])
        fails(f"--{side}: none of the first", f"{side}-0.tfrecord", *words)


def test_label_out_of_range_in_the_last_shard_only(tiny, fails):
    tiny.write_all(train=6)
    tiny.write("train-6.tfrecord", [row.but(y=3) for row in rows("bad", 8, 1)])
    fails("8 of 56 records of the train set", "record 0 of", "train-6.tfrecord")
    both(tiny, max_rejected=0.2)
    tiny.check({("train-6.tfrecord", i): "loss fails" for i in range(8)})


@pytest.mark.parametrize("target", ["predicted_loss", "margin", "probability"])
def test_label_out_of_range_with_another_target(tiny, target):
    tiny.write_all()
    some = rows("more", 12, 1)
    tiny.write("test-1.tfrecord", [some[0].but(y=3), *some[1:]])
    assert tiny.run("embed", target=target) == 0
    tiny.check_counts({("test-1.tfrecord", 0): "loss fails"})


def test_patterns_and_files(tiny, fails):
    tiny.write_all()
    folder = tiny.folder
    fails("--train", f"No file matches '{folder}/nothing-*'", train=f"{folder}/nothing-*")
    fails("--test", f"No file matches '{folder}/nothing-*'", test=f"{folder}/nothing-*")
    fails("--train", "is a folder", train=folder)
    fails("task.py", "not a TFRecord file", train=folder / "task.py")
    (folder / "train-9.tfrecord").write_text("id,label\n1,2\n" * 50)
    fails("train-9.tfrecord", "not a TFRecord file")
    fails("nowhere://", train="nowhere://bucket/x-*")


def test_the_same_file_twice(tiny, fails, monkeypatch):
    tiny.write_all()
    monkeypatch.chdir(tiny.folder)
    fails("--train and --test both name", "test-0.tfrecord", train="train-*,./test-0*")
    assert tiny.run("embed", train="train-*,./train-0.tfrecord") == 0
    assert tiny.run_json()["counts"]["train"]["read"] == 24


def test_shards_whose_names_differ_by_their_suffix_only(tiny):
    tiny.write_all()
    tiny.write("train-0", rows("bare", 6, 50))
    both(tiny)
    tiny.check()


def test_flags(tiny, fails):
    tiny.write_all()
    fails("--test_name=train", test_name="train")
    fails("--projection=pca", "countsketch", projection="pca")
    fails("--target=gain", "margin", target="gain")
    fails("--layers=encoder", "scores/kernel", layers="encoder")
    fails("--layers=(", "regular expression", layers="(")
    fails("--dim=0", dim=0)
    fails("--checkpoint", "Did you mean --checkpoints", checkpoint="x")
    fails("--test must be given", stage="influence", test=None)
    (tiny.folder / "file").write_text("")
    fails("--output=", "cannot be written to", output=tiny.folder / "file" / "out")


# Checkpoints.


def test_checkpoints(tiny, fails):
    tiny.write_all()
    listing = tiny.folder / "ckpts" / "checkpoints.json"
    whole = listing.read_text()
    files = str(tiny.folder / "ckpts/*.weights.h5")
    fails("learning rate", "--learning_rate", checkpoints=files)
    fails("--learning_rate has 3 values for 2", checkpoints=files, learning_rate="1,2,3")
    fails("checkpoints.json", checkpoints=tiny.folder / "no")
    listing.write_text(whole[:-5])
    fails("checkpoints.json is not valid JSON")
    listing.write_text(json.dumps([{**e, "learning_rate": None} for e in json.loads(whole)]))
    fails("No learning rate", "entry 0")
    listing.write_text(whole)
    last = tiny.folder / "ckpts" / "00000020.weights.h5"
    content = last.read_bytes()
    last.write_bytes(content[:3000])
    fails(last, "cut short or damaged")
    last.unlink()
    fails(last, "is missing")
    last.write_bytes(content)
    assert tiny.run("embed") == 0


def test_checkpoints_of_another_model(tiny, fails):
    tiny.write_all()
    task = (tiny.folder / "task.py").read_text()
    (tiny.folder / "task.py").write_text(task.replace("Dense(3,", "Dense(5,"))
    fails("00000010.weights.h5", "the model has (4, 5), the file (4, 3)")


def test_a_checkpoint_of_nan(tiny, fails):
    tiny.write_all()
    kernel, bias = t.weights_at(10)
    tiny.write_checkpoints(weights=[[kernel * np.nan, bias], t.weights_at(20)])
    fails("scores/kernel", "00000010.weights.h5", "are not finite")


# The task.


def parse(body):
    return t.TASK.replace("    return {", f"    {body}\n    return {{")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (t.TASK + "\ntask = 3", ["task is a int, not a tracin_beam.Task"]),
        (t.TASK.replace("task = ", "tusk = "), ["has no 'task'"]),
        ("def broken(:\n", ["importing it failed with SyntaxError"]),
        ("import not_a_module\n", ["ModuleNotFoundError", "not_a_module"]),
        (parse("raise ValueError('no luck')"), ["cannot be traced", "no luck", "task.py"]),
        (parse("return example['x']"), ["must return a dict"]),
        (parse("return {'label': example['y']}"), ['must return a dict with "features"']),
        (parse("return {'features': example['x'], 'labels': example['y']}"), ["'labels'"]),
        (
            parse("tf.debugging.assert_equal(example['y'], tf.constant(-5, tf.int64), 'hm')"),
            ["none of the first 24 records can be parsed", "hm"],
        ),
        (parse("example['x'] = example['x'][:0]"), ["none of the first 24", "first axis"]),
        (parse("example['x'] = example['x'][:1]"), ["none of the first 24", "(1, 4) for 8"]),
        (
            parse("example['id'] = tf.tile(example['id'], [2])"),
            ["none of the first 24", "2", "1"],
        ),
        (t.TASK.replace('"label": example["y"],', ""), ["parse gives no label"]),
        (
            parse("example['x'] = example['x'][:, :3]"),
            ["does not take what parse gives|the model fails on what parse gives"],
        ),
        (t.TASK.replace("(build_model, loss", "(build_model, 'no_such_loss'"), ["no_such_loss"]),
        (t.TASK.replace("name=", "trainable=False, name="), ["no trainable weight"]),
        (t.TASK.replace("return keras.Sequential(", "return str("), ["str", "not a model"]),
        (t.TASK.replace("return keras.", "return keros."), ["name 'keros' is not defined"]),
    ],
)  # fmt: skip
def test_task_errors(tiny, fails, task, words):
    tiny.write_all()
    (tiny.folder / "task.py").write_text(task)
    message = fails()
    for word in words:
        assert any(choice in message for choice in word.split("|")), message


def test_task_names(tiny, fails):
    tiny.write_all()
    fails("file.py:name", task="task.py")
    fails("there is no file", task=f"{tiny.folder}/nothing.py:task")
    fails("ModuleNotFoundError", task="no.such.module:task")


def test_ids_as_numbers(tiny):
    tiny.write_all()
    (tiny.folder / "task.py").write_text(
        parse('example["id"] = tf.cast(1e6 * example["x"][:, 0], tf.int64)')
    )
    for name, some in list(tiny.shards.items()):
        tiny.write(name, [r.but(id=str(int(np.float32(1e6) * r.x[0]))) for r in some])
    ids = [row.id for row in tiny.good("train")]
    assert len(set(ids)) == len(ids)
    both(tiny)
    tiny.check()


def test_records_that_go_only_by_themselves(tiny):
    """Records whose shapes differ from the others' cannot share a batch."""
    tiny.write_all()
    task = t.TASK.replace(
        '"x": tf.io.FixedLenFeature([4], tf.float32)',
        '"x": tf.io.VarLenFeature(tf.float32)',
    ).replace(
        '"features": example["x"]',
        '"features": tf.ensure_shape('
        'tf.reshape(example["x"].values, [tf.shape(serialized)[0], -1])[:, :4], [None, 4])',
    )
    (tiny.folder / "task.py").write_text(task)
    some = rows("more", 40, 5)
    some[0] = some[0].but(x=np.ones(5, np.float32))
    some[17] = some[17].but(x=np.ones(6, np.float32))
    tiny.write("train-1.tfrecord", some)
    both(tiny)
    rejected = {("train-1.tfrecord", i): "does not go with the others" for i in (0, 17)}
    tiny.check(rejected)


# An output directory of another run.


def test_output_of_another_run(tiny, fails):
    tiny.write_all()
    both(tiny)
    assert tiny.run("influence", test_name="other") == 0
    before = t.snapshot(tiny.out)

    def refused(*words, **flags):
        fails("holds results of another run", *words, "--overwrite", stage="influence", **flags)
        assert t.snapshot(tiny.out) == before

    task = (tiny.folder / "task.py").read_text()
    for flags, words in [
        ({"dim": 32}, ["dim (16 → 32)"]),
        ({"seed": 1}, ["seed (0 → 1)"]),
        ({"projection": "gaussian"}, ["projection (countsketch → gaussian)"]),
        ({"embedding_dtype": "float32"}, ["embedding_dtype (int8 → float32)"]),
        ({"layers": "kernel"}, ["layers (all → kernel)"]),
        ({"layers": "kernel", "seed": 1}, ["layers (all → kernel)", "seed (0 → 1)"]),
        ({"target": "margin"}, ["target of the test set 'test' (loss → margin"]),
    ]:
        refused(*words, **flags)
    for changed, word in [
        (task.replace("Dense(3, ", "Dense(3, activation='tanh', "), "model"),
        (task.replace("from_logits=True", "from_logits=True, ignore_class=2"), "loss"),
        (task.replace('example["x"],', '2.0 * example["x"],'), "parse"),
    ]:
        (tiny.folder / "task.py").write_text(changed)
        refused(f"what changed: {word}.")
    (tiny.folder / "task.py").write_text(task.replace("def parse", "# A comment.\n\ndef parse"))
    assert tiny.run("influence") == 0


def test_overwriting_gives_what_a_new_directory_would(tiny):
    tiny.write_all()
    both(tiny)
    assert tiny.run("influence", test_name="other") == 0
    assert tiny.run("influence", seed=5, overwrite=True) == 0
    again = t.contents(tiny.out)
    os.rename(tiny.out, tiny.folder / "before")
    assert tiny.run("influence", seed=5, overwrite=True) == 0
    assert t.contents(tiny.out) == again


# What ids and labels may hold.

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e'\"&\r\n\0"


def test_hostile_ids_and_labels(tiny, capfd):
    tiny.write_all()
    for name, some in list(tiny.shards.items()):
        tiny.write(name, [row.but(id=row.id + HOSTILE) for row in some])
    in_a_line = HOSTILE.replace("\r\n", "")  # a name of more than one line is refused
    names = repr([f"{i}{in_a_line}" for i in range(3)])
    task = t.TASK.replace("loss, parse)", f"loss, parse, label_names={names})")
    (tiny.folder / "task.py").write_text(task)
    both(tiny)
    tiny.check()
    said = capfd.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "<script>alert(1)</script>\\x1b[31m\\u202e" in said
    page = (tiny.out / "reports/test.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not {"\x1b", "\u202e", "\0"} & set(page)


# The launchers, as a user sees them.


def launched(stage, argv, folder):
    env = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", f"pipelines.{stage}", *argv],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("where", ["flags", "before the run", "in a worker"])
def test_stderr_of_a_launcher(tiny, where):
    tiny.write_all()
    argv = tiny.argv("influence")
    if where == "flags":
        argv, words = [*argv, "--topk=3"], ["There is no flag --topk. Did you mean --top_k?"]
    elif where == "before the run":
        argv, words = [*argv, f"--train={tiny.folder}/no-*"], ["--train", "No file matches"]
    else:
        tiny.write("train-2.tfrecord", [b"\x1b[31mgarbage\xff"] * 30)
        words = ["30 of 46 records of the train set", "record 0 of", "train-2.tfrecord"]
    done = launched("influence", argv, tiny.folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert '  File "' not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("python -m pipelines.influence: ")
    assert all(word in last for word in words)
    assert not list(tiny.out.glob("*/*/*.parquet"))
