import json
import math
import os

import pytest
import tiny as t
from tiny import Tiny

from tracin_beam.errors import InputError
from tracin_beam.jobs import options
from tracin_beam.jobs.registry import JOBS
from tracin_beam.planning import plan
from tracin_beam.planning.plan import Data, Job, Slow, Speed
from tracin_beam.scoring import cost

SPEED = Speed(
    embed_rows=1000.0, score_rows=500.0, batch_size=100, query_bytes=1 << 20, memory=1 << 30
)
JOB = Job(
    checkpoints=2,
    dim=512,
    top_k=10,
    rescore=100,
    recall_queries=10,
    index_rows=50_000,
    choice=None,
    hours=1.0,
    worker_memory=4 << 30,
)


EXACT = cost.choose("exact", 800_000, 1024, 1000, 0, 100)
SCANN = cost.choose("scann", 800_000, 1024, 1000, 0, 100)


def job(**changes):
    return Job(**{**JOB.__dict__, **changes})


def data(records, checkpoints=2):
    units = len(records) * checkpoints
    return Data(tuple(records), True, units, sum(records) * checkpoints, units)


def test_pieces_of_the_index_are_those_of_the_index_stage():
    assert plan.pieces([10, 10, 10], 20) == [20, 10]
    assert plan.pieces([10, 30, 5, 10], 20) == [10, 15, 15, 15]
    assert plan.pieces([0, 0], 20) == []


def test_bytes_of_the_index():
    assert plan.piece_bytes(100, 64) == 100 * (64 + 3)
    # By ScaNN, measured: 798 bytes for each of 30,000 rows of 512 numbers.
    assert plan.piece_bytes(30_000, 512) == pytest.approx(30_000 * 798, rel=0.02)
    assert plan.piece_bytes(100_000, 5120) == plan.piece_bytes(100_000, 512)
    assert plan.index_bytes("scann", [100, 100], 64, 100) == 2 * plan.piece_bytes(100, 64)
    assert plan.index_bytes("exact", [100, 100], 64, 100) == 0


def test_rows_that_fit():
    rows = plan.fitting_rows(3 << 30, 1024)
    assert plan.build_memory(rows, 1024) <= 3 << 30 < plan.build_memory(int(rows * 1.1), 1024)
    assert plan.fitting_rows(100, 1024) == 0
    assert plan.fitting_rows(-5, 1024) == 0


def test_all_pairs_are_scored_where_they_are_few():
    # Whole batches: 150 examples take two, and 250 queries three blocks.
    assert plan.rescored([150, 100], 250, job(index_rows=150), 100) == 2 * 3 * (200 + 100)
    assert plan.rescored([150, 100], 250, JOB, 100) == 2 * 3 * 300
    assert plan.rescored([150], 250, job(rescore=0), 100) == 0
    assert plan.rescored([150], 0, JOB, 100) == 0


def test_candidates_are_scored_where_pairs_are_many():
    train = [1_000_000] * 4
    # A block's 100 queries ask for 2 · 100 each, hardly any twice, of four groups: 50 batches each.
    scored = plan.rescored(train, 1000, JOB, 100)
    assert scored == pytest.approx(2 * 10 * 20_000, rel=0.01)
    # Never more than there are.
    assert plan.rescored([3000], 10_000, JOB, 100) == 2 * 100 * 3000


def test_memory_for_the_candidates():
    chunk = 256 << 20
    assert plan.rescore_memory(1000, JOB, SPEED) == chunk + 10 * 2 * (1 << 20)
    assert plan.rescore_memory(10**6, JOB, SPEED) == chunk + (512 << 20)
    assert plan.rescore_memory(10, job(rescore=0), SPEED) == 0


def test_queries_for_the_recall():
    assert plan.checked([1000, 50], 100, job(index_rows=1000), 100) == 2 * (1000 + 100)
    assert plan.checked([1000, 50], 100, JOB, 100) == 2 * 1100
    assert plan.checked([1000], 100, job(recall_queries=0), 100) == 0
    # However many test examples there are, a block holds a hundred queries.
    assert plan.checked([1000], 100_000, JOB, 100) == 2 * 1000
    assert plan.checked([1000], 100_000, job(recall_queries=150), 100) == 2 * 2 * 1000


def test_a_plan_adds_up():
    train, test = data([100_000] * 8), data([1000])
    made = plan.make(train, test, 5_000_000, SPEED, job(choice=SCANN))
    assert made.embedding_bytes == 10_000_000
    assert made.seconds["embed"] == 2 * (800_000 + 1000) / 1000
    assert set(made.seconds) == {"embed", "index and search", "rescore", "recall"}
    assert made.worker_hours == pytest.approx(sum(made.seconds.values()) / 3600)
    assert made.workers == math.ceil(made.worker_hours)
    assert made.parts == 16
    held = max(plan.build_memory(50_000, 1024), plan.rescore_memory(1000, JOB, SPEED))
    assert made.memory == SPEED.memory + held
    assert made.index == SCANN
    cheap = plan.make(train, test, 0, SPEED, job(choice=SCANN, hours=1000.0))
    assert cheap.workers == 1


def test_the_exact_product_needs_no_index():
    train, test = data([100_000] * 8), data([1000])
    made = plan.make(train, test, 5_000_000, SPEED, job(choice=EXACT))
    assert (made.index_bytes, made.parts, made.index) == (0, 0, EXACT)
    assert made.seconds["search"] == cost.exact_seconds(800_000, 1024, 1000)
    assert "index and search" not in made.seconds
    held = max(plan.product_memory(1000, 1024), plan.rescore_memory(1000, JOB, SPEED))
    assert made.memory == SPEED.memory + held


def test_without_a_test_set_there_is_no_search():
    made = plan.make(data([500]), None, 100, SPEED, JOB)
    assert (made.index_bytes, made.parts, set(made.seconds)) == (0, 0, {"embed"})
    assert made.memory == SPEED.memory


def test_what_is_done_costs_nothing():
    done = Data((5000,), True, 2, 0, 0)
    assert plan.make(done, None, 0, SPEED, JOB).seconds["embed"] == 0


class TestAdvice:
    def of(self, train, test=None, **changes):
        return "\n".join(plan.make(train, test, 0, SPEED, job(**changes)).advice)

    def test_nothing_to_say(self):
        assert self.of(data([20_000] * 4), data([10])) == ""

    def test_too_few_shards(self):
        said = self.of(data([1_000_000]), hours=0.1)
        assert "would take 6 workers, but there are only 2 units" in said
        assert "into 3 shards or more" in said

    def test_shards_that_are_too_large_or_too_small(self):
        assert "1,800,000 examples take 30 min" in self.of(data([4_000_000] * 9))
        said = self.of(data([100] * 1000))
        assert "put 10,000 or more examples in a shard" in said

    def test_too_little_memory(self):
        rows = plan.fitting_rows(3 << 30, 1024)
        train, test = data([20_000] * 500), data([10])
        assert f"take --index_rows={rows}" in self.of(train, test, index_rows=10**7, choice=SCANN)
        assert self.of(data([5_000_000] * 2), test, choice=EXACT).count("memory") == 0
        assert "lower --batch_size" in self.of(train, worker_memory=1000)

    def test_index_rows_fit_and_give_every_worker_a_part(self):
        train, test = data([10_000] * 100), data([10])
        rows = plan.make(train, test, 0, SPEED, job(hours=0.1, choice=SCANN)).index_rows
        assert rows == plan.fitting_rows(3 << 30, 1024) or rows < 10**6
        assert plan.build_memory(rows, 1024) <= 3 << 30


def test_sizes_and_durations():
    assert [plan.size(n) for n in (5, 2048, 3 << 30, 5 << 50)] == [
        "5 bytes",
        "2.0 KB",
        "3.0 GB",
        "5,120.0 TB",
    ]
    assert [plan.duration(s) for s in (0.1, 30, 600, 36_000)] == [
        "under a second",
        "30 s",
        "10 min",
        "10.0 h",
    ]


def parsed(*argv):
    needed = ["--task=t.py:task", "--checkpoints=c", "--train=a-*"]
    return options.parse([*needed, *argv], JOBS["plan"])


def test_flags_of_the_plan():
    config, _ = parsed()
    assert (config.output, config.dim) == ("", 1024)
    assert (config.hours, config.worker_memory, config.json) == (1.0, 4 << 30, False)
    config, _ = parsed("--hours=0.5", "--worker_memory=512MB", "--json", "--runner=FlinkRunner")
    assert (config.hours, config.worker_memory, config.json) == (0.5, 512 << 20, True)
    assert parsed("--worker_memory=1.5GiB")[0].worker_memory == 3 << 29
    assert parsed("--worker_memory=1000")[0].worker_memory == 1000


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--hours=0", "--hours=0.0 must be above 0 and finite"),
        ("--hours=nan", "--hours=nan must be above 0 and finite"),
        ("--worker_memory=much", "give a size such as 4GB, not 'much'"),
        ("--worker_memory=0", "give a size such as 4GB, not '0'"),
        ("--hour=1", "Did you mean --hours?"),
        ("--train=", "--train must be given"),
    ],
)
def test_flags_that_are_wrong(flag, says):
    with pytest.raises(InputError) as error:
        parsed(flag)
    assert says in str(error.value)


@pytest.fixture(scope="module")
def problem(tmp_path_factory, launch):
    return Tiny(tmp_path_factory.mktemp("plan"), launch).write_all()


def planned(tiny, capsys, **changes):
    flags = tiny.flags("embed", **changes)
    argv = [f"--{name}={value}" for name, value in flags.items()]
    capsys.readouterr()
    assert JOBS["plan"].main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_predicted_bytes_and_examples_are_those_written(problem, capsys):
    nothing = {"output": None}
    before = planned(problem, capsys, **nothing)
    assert not os.path.exists(problem.out)
    assert planned(problem, capsys)["sets"] == before["sets"]
    assert not os.path.exists(problem.out)
    assert problem.run("influence") == 0
    counts = problem.run_json()["counts"]
    for name in ("train", "test"):
        assert before["sets"][name]["examples"] == counts[name]["read"]
        assert before["sets"][name]["exact"]
        assert before["sets"][name]["units_todo"] == before["sets"][name]["units"]
    written = sum(path.stat().st_size for path in problem.out.glob("embeddings/**/*.tfrecord"))
    assert before["embedding_bytes"] == pytest.approx(written, rel=0.02)
    assert before["index"]["index"] == "exact"
    assert before["index_bytes"] == 0
    built = planned(problem, capsys, index="scann")
    assert problem.run("influence", index="scann") == 0
    (matrix,) = problem.out.glob("index/part-*/scann-*/int8_dataset.npy")
    assert built["index_bytes"] == pytest.approx(matrix.stat().st_size, rel=0.1)
    assert before["suggested_dim"]["dim"] == 256
    assert before["memory"] > 50 << 20
    # What is done is not to be done again, and the plan leaves it as it is.
    files = t.contents(problem.out)
    problem.write("train-9.tfrecord", t.rows("train9.", 8, 9))
    after = planned(problem, capsys)
    assert {name: s["units_todo"] for name, s in after["sets"].items()} == {"train": 2, "test": 0}
    assert t.contents(problem.out) == files


def test_the_plan_as_text(problem, capsys, monkeypatch):
    monkeypatch.chdir(problem.folder)  # with paths as a user types them
    shards = {"train": "train-*.tfrecord", "test": "test-*.tfrecord"}
    assert JOBS["plan"].main(problem.argv("embed", output=None, **shards)) == 0
    said = capsys.readouterr().out
    for words in ("test: 8 examples in 2 shards", "256 is the smallest with 0.99", "1 worker(s)"):
        assert words in said


LOOP = """
class Dense(keras.layers.Dense):
    def call(self, x):
        def step(i, y):
            return i + 1, y + keras.ops.matmul(x, self.kernel) + self.bias

        def goes_on(i, y):  # for how long is not known before
            return (i < 1) & tf.reduce_all(y < 1e30)

        return tf.while_loop(goes_on, step, (0, tf.zeros([tf.shape(x)[0], 3])))[1]

def build_model"""


def test_weights_without_a_rule_are_named(tmp_path, launch, capsys):
    tiny = Tiny(tmp_path, launch).write_all(1, 1)
    task = t.TASK.replace("def build_model", LOOP.strip("\n"))
    task = task.replace("keras.layers.Dense(3", "Dense(3")
    (tiny.folder / "task.py").write_text(task)
    found = planned(tiny, capsys, output=None, test=None)["speed"]["slow"]
    assert found["weights"] == ["scores/kernel", "scores/bias"]
    assert (found["total"], found["layers"]) == (2, ["scores"])
    said = str(Slow(("scores/kernel", "scores/bias"), 2, ("scores",), found["factor"]))
    assert f"{found['factor']:.1f} times as long" in said


def test_what_the_run_would_trip_over_the_plan_says(problem, capsys):
    assert JOBS["plan"].main(problem.argv("embed", train="nowhere-*", output=None)) == 2
    said = capsys.readouterr().err
    assert said.startswith("tracin-beam plan: --train: No file matches 'nowhere-*'")
    assert "Traceback" not in said


def test_each_pass_over_the_gradients_is_counted():
    train, test = data([600, 400]), data([100])
    asked = job(choice=EXACT, passes=("total", "groups and slices"))
    seconds = plan.make(train, test, 0, SPEED, asked).seconds
    assert seconds["total"] == seconds["groups and slices"] == 2 * 1100 / 500
    assert "total" not in plan.make(train, test, 0, SPEED, job(choice=EXACT)).seconds
