import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tracin_beam import config
from tracin_beam.errors import InputError
from tracin_beam.gradients.engine import EngineConfig
from tracin_beam.jobs import options
from tracin_beam.jobs.registry import JOBS

NEEDED = ["--task=t.py:task", "--checkpoints=c", "--train=a-*", "--output=out"]


def parse(*argv, job="embed"):
    return options.parse([*NEEDED, *argv], JOBS[job])


def test_defaults():
    config, beam_options = parse()
    assert (config.task, config.checkpoints, config.train, config.output) == (
        "t.py:task",
        ("c",),
        "a-*",
        "out",
    )
    assert config.test is None
    assert config.learning_rate is None
    assert (config.test_name, config.target, config.top_k, config.rescore) == (
        "test",
        "loss",
        10,
        100,
    )
    assert (config.layers, config.projection, config.dim) == ("all", "countsketch", 1024)
    given = beam_options.get_all_options()
    assert given["runner"] == "FnApiRunner"
    assert given["direct_running_mode"] == "multi_threading"


def test_several_training_runs(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("checkpoints:\n  - gs://b/{x,y}.keras\n  - two\n")
    assert parse("--checkpoints=d")[0].checkpoints == ("c", "d")
    argv = [f"--config={path}", *(word for word in NEEDED if "checkpoints" not in word)]
    config, _ = options.parse(argv, JOBS["embed"])
    assert config.checkpoints == ("gs://b/{x,y}.keras", "two")
    assert options.parse([*argv, "--checkpoints=c"], JOBS["embed"])[0].checkpoints == ("c",)


@pytest.mark.parametrize("written", ["--top_k=3", "--top_k 3"])
def test_flags_are_written_in_either_way(written):
    config, _ = parse(*written.split())
    assert config.top_k == 3


def test_a_dim_to_be_chosen():
    config, _ = parse("--dim=auto", "--recall=0.9")
    assert (config.dim, config.recall) == ("auto", 0.9)
    assert parse("--dim=64")[0].dim == 64


def test_beams_flags_are_handed_on():
    _, beam_options = parse("--runner=DataflowRunner", "--project=p", "--region", "r")
    given = beam_options.get_all_options()
    assert (given["runner"], given["project"], given["region"]) == ("DataflowRunner", "p", "r")
    assert given["direct_running_mode"] == "in_memory"
    _, beam_options = parse("--runner", "FnApiRunner")
    assert beam_options.get_all_options()["runner"] == "FnApiRunner"
    _, beam_options = parse("--direct_num_workers=3")
    assert beam_options.get_all_options()["direct_num_workers"] == 3


def test_learning_rates():
    assert parse("--learning_rate=0.1")[0].learning_rate == (0.1,)
    assert parse("--learning_rate=0.1,1e-3")[0].learning_rate == (0.1, 0.001)
    with pytest.raises(
        InputError, match="--learning_rate: give a number, or some with commas, not 'fast'"
    ):
        parse("--learning_rate=fast")


def test_missing_flags_are_all_named():
    with pytest.raises(
        InputError, match=r"^--task, --checkpoints, --train, --output must be given"
    ):
        options.parse([], JOBS["embed"])
    with pytest.raises(InputError, match=r"^--test must be given"):
        options.parse(NEEDED, JOBS["influence"])
    with pytest.raises(InputError, match=r"^--task must be given"):
        options.parse([*NEEDED[1:], "--task="], JOBS["embed"])


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--topk=5", "There is no flag --topk. Did you mean --top_k?"),
        ("--top-k=5", "There is no flag --top-k. Did you mean --top_k?"),
        ("--outptu=x", "There is no flag --outptu. Did you mean --output?"),
        ("--frobnicate", "There is no flag --frobnicate, neither of this job nor of Beam."),
        ("--top_k=many", "--top_k: give a whole number, not 'many'"),
        ("--top_k", "--top_k: expected one argument"),
        ("--direct_num_workers=few", "--direct_num_workers: invalid int value"),
        ("--top_k=0", "--top_k=0 must be at least 1."),
        ("--dim=0", "--dim=0 must be at least 1."),
        ("--dim=small", "--dim: give a number or auto, not 'small'"),
        ("--recall=1", "--recall=1.0 must lie between 0 and 1."),
        ("--recall=nan", "--recall=nan must lie between 0 and 1."),
        ("--rescore=-1", "--rescore=-1 must be at least 0."),
        ("--rescore=5", "--rescore=5 candidates cannot give --top_k=10 rows"),
        ("--dim=1000000000", "--dim=1000000000 must be at most 1048576."),
        ("--seed=-1", "--seed=-1 must be at least 0."),
        ("--learning_rate=nan", "--learning_rate: give a number"),
        ("--index_rows=0", "--index_rows=0 must be at least 1."),
        ("--batch_size=-4", "--batch_size=-4 must be at least 0."),
        ("--recall_queries=-1", "--recall_queries=-1 must be at least 0."),
        ("--max_rejected=-0.1", "--max_rejected=-0.1 must be at least 0."),
        ("--max_rejected=nan", "--max_rejected=nan"),
        ("--test_name=train", "--test_name=train: take a plain name"),
        ("--test_name=a/b", "--test_name=a/b: take a plain name"),
        ("--test_name=", "--test_name=: take a plain name"),
    ],
)
def test_flags_that_are_wrong(flag, says, capsys):
    with pytest.raises(InputError) as error:
        parse(flag)
    assert says in str(error.value)
    assert capsys.readouterr().err == ""


def test_job_servers_keep_their_workers_between_stages():
    def kept(*flags):
        return int(parse(*flags)[1].get_all_options()["environment_cache_millis"])

    assert kept("--runner=PortableRunner", "--job_endpoint=x") == 5000
    assert kept("--runner", "FlinkRunner") == 5000
    assert kept("--runner=FlinkRunner", "--environment_cache_millis=0") == 0
    assert kept("--runner=DataflowRunner") == 0


def test_unknown_flags_of_runners_with_a_job_server_are_theirs():
    parse("--runner=FlinkRunner", "--flink_conf_dir=x", "--some_new_flink_option=1")
    parse("--runner", "FlinkRunner", "--some_new_flink_option", "1")
    with pytest.raises(InputError, match="Did you mean --rescore"):
        parse("--runner=FlinkRunner", "--rescor=1")


def test_words_that_belong_to_no_flag_are_an_error():
    # An unquoted glob: the shell has made several words of it.
    with pytest.raises(InputError, match=r"^a-2 belongs to no flag: write globs"):
        parse("--train", "a-1", "a-2", "a-3")
    with pytest.raises(InputError, match=r"^stray belongs"):
        parse("--runner=FlinkRunner", "stray")


# Nine levels of ten aliases each: a billion strings, if it were expanded.
BOMB = "a0: &a0 [x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)
)


class TestYaml:
    @pytest.fixture
    def config(self, tmp_path):
        def write(text):
            path = tmp_path / "flags.yaml"
            path.write_text(text)
            return f"--config={path}"

        return write

    def test_flags_of_every_type(self, config):
        text = """
            task: t.py:task
            checkpoints: c
            train: [a-*, b-*]
            output: out
            top_k: 4
            max_rejected: 0.5
            learning_rate: [0.1, 0.2]
            overwrite: true
            test:
            project: mine
        """
        parsed, beam_options = options.parse([config(text)], JOBS["embed"])
        assert parsed.train == "a-*,b-*"
        assert (parsed.top_k, parsed.max_rejected, parsed.overwrite) == (4, 0.5, True)
        assert parsed.learning_rate == (0.1, 0.2)
        assert parsed.test is None
        assert beam_options.get_all_options()["project"] == "mine"

    def test_the_command_line_wins(self, config):
        flag = config("task: other.py:task\ntop_k: 4\nrescore: 50")
        assert parse(flag, "--top_k=7")[0].top_k == 7
        assert parse("--top_k=7", flag)[0].top_k == 7
        assert parse(flag)[0].task == "t.py:task"
        assert parse(flag)[0].rescore == 50

    def test_switches(self, config):
        for word in ("false", "no", "off", "False", "'no'"):
            assert parse(config(f"overwrite: {word}"))[0].overwrite is False
        for word in ("true", "yes", "on", "TRUE"):
            assert parse(config(f"overwrite: {word}"))[0].overwrite is True

    def test_values_count_as_they_are_written(self, config):
        """What YAML 1.1 makes of them is another number, a date or a boolean."""
        assert parse(config("dim: 010"))[0].dim == 10
        assert parse(config("top_k: 1_000\nrescore: 0"))[0].top_k == 1000
        assert parse(config("max_rejected: 1e-3"))[0].max_rejected == 0.001
        assert parse(config("learning_rate: [1e-3, 010]"))[0].learning_rate == (0.001, 10.0)
        for name in ("on", "1:30", "2026-11-22", "0o17", "1.10", "~x", "'null'"):
            assert parse(config(f"test_name: {name}"))[0].test_name == name.strip("'")
        assert parse(config("test_name: null"))[0].test_name == "test"
        assert parse(config("test_name: &name a\nlayers: *name"))[0].layers == "a"

    def test_beams_flags(self, config):
        _, given = parse(
            config("runner: DataflowRunner\nno_auth: true\ndry_run: true\nproject: 010")
        )
        found = given.get_all_options()
        assert (found["no_auth"], found["dry_run"], found["project"]) == (True, "True", "010")

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("top_k: [", "is not valid YAML"),
            ("- top_k", "must be a mapping of flag names to values"),
            ("", "must be a mapping of flag names to values"),
            ("1: 2", "must be a mapping of flag names to values"),
            ("topk: 3", "There is no flag --topk. Did you mean --top_k?"),
            ("top_k: 0", "--top_k=0 must be at least 1."),
            ("a: !!python/object/apply:os.getcwd []", "line 1: a must be a plain value"),
            ("a: !!python/name:os.system ''", "line 1: a must be a plain value"),
            ("train: {a: b}", "train must be a value or a list of values, not a mapping"),
            ("train: [a, [b]]", "train must be a value or a list of values, not a list in a list"),
            ("top_k: 3\nseed: 1\ntop_k: 4", "line 3: top_k is given twice, first on line 1"),
            ("x: &x {top_k: 3}\n<<: *x", "line 1: x must be a value or a list"),
            ("<<: {top_k: 3}", "line 1: must be a mapping of flag names to values"),
            ("dim: 0x10", "--dim: give a number or auto, not '0x10'"),
            ("top_k: 1:30", "--top_k: give a whole number, not '1:30'"),
            ("top_k: true", "--top_k: give a whole number, not 'true'"),
            ("overwrite: 1", "overwrite must be true or false, not '1'"),
            ("overwrite: [true]", "overwrite must be true or false, not a list"),
            (BOMB, "must be a value or a list of values, not a list in a list"),
            ("[" * 5000, "is not valid YAML"),
            ("train: " + "a" * (1 << 20), "is larger than 1,048,576 bytes"),
        ],
    )
    def test_files_that_are_wrong(self, config, text, says):
        with pytest.raises(InputError) as error:
            parse(config(text))
        assert says in str(error.value)

    def test_a_file_that_is_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"none.yaml cannot be read"):
            parse(f"--config={tmp_path}/none.yaml")


def test_each_flag_is_said_once_and_everywhere():
    """A field of `Config` is enough for the parser, the help and the table of docs/flags.md."""
    table = options.flags_table()
    shown = (Path(__file__).parents[2] / "docs/flags.md").read_text()
    assert table in shown, "run make documents"
    for name, flag in config.flags().items():
        text = options.flag_help(name, flag)
        assert flag.help.removesuffix(".") in text
        assert f"| `--{name}` |" in table


def test_a_new_flag_that_touches_embeddings_is_in_the_fingerprint(monkeypatch):
    marked = dataclasses.replace(config.flags()["top_k"], embeddings=True)
    assert "top_k" not in config.Config().embedding_flags()
    monkeypatch.setitem(config._FLAGS, "top_k", marked)
    assert config.Config(top_k=3).embedding_flags()["top_k"] == 3


def test_marked_flags_are_what_the_engine_takes():
    engine = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    marked = config.Config().embedding_flags()
    assert marked.pop("embedding_dtype") == "auto"  # of what is written
    assert marked == {name: engine[name] for name in marked}
    assert list(marked) == ["layers", "projection", "gradient", "dim", "seed", "norms", "ways"]


def test_help(capsys):
    job = JOBS["embed"]
    assert not options.wants_help(NEEDED, "x", job)
    for flag in ("-h", "--help"):
        assert options.wants_help([*NEEDED, flag], "tracin-beam x", job)
        said = capsys.readouterr().out
        assert said.startswith("usage: tracin-beam x")
        for word in ("Embeddings alone", "--top_k", "--config", "--runner=DataflowRunner"):
            assert word in said


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["--help"], 0, "--checkpoints"),
        ([], 2, "--task, --checkpoints, --train"),
        ([*NEEDED, "--test=x", "--topk=3"], 2, "Did you mean --top_k?"),
        ([*NEEDED, "--test=x", "--top_k=x"], 2, "--top_k"),
    ],
)
def test_help_and_flag_errors_do_not_wait_for_tensorflow(job, argv, status, says):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['tracin-beam', {job!r}, *{argv!r}]\n"
        "try:\n"
        "    runpy.run_module('tracin_beam', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert 'tensorflow' not in sys.modules, 'TensorFlow was imported'\n"
        "    assert 'keras' not in sys.modules, 'Keras was imported'\n"
        "    raise\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_conditions_may_be_given_several_times_and_the_command_line_wins(tmp_path):
    job = dataclasses.replace(JOBS["embed"], name="quality", needs=())
    file = tmp_path / "night.yaml"
    file.write_text("warn_if:\n  - suspects > 1\n  - accuracy < 0.5\nerror_if: new_suspects > 3\n")
    parsed, _ = options.parse([f"--config={file}"], job)
    assert parsed.warn_if == ("suspects > 1", "accuracy < 0.5")
    assert parsed.error_if == ("new_suspects > 3",)
    given = ["--warn_if=a > 1", "--warn_if", "b > 2, c > 3"]
    parsed, _ = options.parse([f"--config={file}", *given], job)
    assert parsed.warn_if == ("a > 1", "b > 2", "c > 3")
    assert parsed.error_if == ("new_suspects > 3",)
    assert options.parse([], job)[0].warn_if is None
    with pytest.raises(InputError, match="--error_if: give a condition"):
        options.parse(["--error_if= ,"], job)
