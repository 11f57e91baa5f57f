"""Gates: what is a condition, what fires, and what small counts do not."""

import numpy as np
import pytest

from tracin_beam.errors import InputError
from tracin_beam.signals import gates


def night(date="", **metrics):
    return {"date": date, "metrics": {k.replace("__", "."): v for k, v in metrics.items()}}


def fires(text, tonight, history=(), level="warn"):
    (found,) = gates.evaluate([gates.parse(text, level)], tonight, history)
    return found


METRICS = night(new_suspects=150, suspects=200, suspects_rate=0.02, examples=10_000, none=None)
METRICS["metrics"]["new_suspects.conflicting duplicate"] = 7
METRICS["by_shard"] = {"a": {"suspects": 3}, "b": {"suspects": 9, "mean_loss": None}}


@pytest.mark.parametrize(
    ("text", "fired"),
    [
        ("new_suspects > 100", True),
        ("new_suspects > 150", False),
        ("100 < new_suspects <= 150", True),
        ("new_suspects / examples >= 0.015", True),
        ("not new_suspects > 100", False),
        ("new_suspects > 1000 or suspects == 2 * 100", True),
        ("new_suspects.conflicting_duplicate >= 7 and suspects != 3", True),
        ("max(by_shard.suspects) > 8", True),
        ("min(by_shard.suspects) > -3 + 8", False),
        ("none > 0", False),
        ("none > 0 or suspects > 0", True),
        ("not none > 0", False),
        ("suspects / (suspects - 200) > 1", False),
        ("max(by_class.suspects) > 8", False),
    ],
)
def test_conditions(text, fired):
    assert fires(text, METRICS)["fired"] is fired


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("new_suspects >", "is no condition"),
        ("", "is no condition"),
        ("new_suspects", "compares nothing"),
        ("3 + suspects", "compares nothing"),
        ("__import__('os').system('x') > 0", "the call of __import__"),
        ("().__class__ > 0", "is not allowed"),
        ("[1][0] > 0", "is not allowed"),
        ("(lambda: 1)() > 0", "the call of"),
        ("suspects > 'a'", "is not a number"),
        ("suspects > True", "is not a number"),
        ("suspects > 1e999", "too large"),
        ("suspects > 9**9**9", "is not allowed"),
        ("suspects % 2 > 0", "is not allowed"),
        ("suspects in examples", "in and is are not allowed"),
        ("(a > b) > 0", "a condition stands where a number must"),
        ("1 + (not a) > 0", "a condition stands where a number must"),
        ("a > 0 and 3", "compares nothing"),
        ("suspects - examples > baseline", "exactly one metric"),
        ("3 > baseline", "exactly one metric"),
        ('suspects > baseline("yesterday")', "baseline takes a date"),
        ("max(suspects) > 3", "max takes by_shard.NAME"),
        ("x\x00 > 1", "null character"),
        ("-" * 100 + "1 > a", "nested too deeply"),
        ("(" * 300 + "1" + ")" * 300 + " > a", "is no condition"),
        ("a > 1\nimport os", "is no condition"),
        ("a > 0 and " * 200 + "a > 0", "longer than"),
    ],
)
def test_what_is_no_condition_is_said(text, said):
    with pytest.raises(InputError, match=said) as raised:
        gates.parse(text, "error")
    assert "--error_if=" in str(raised.value)


def test_an_unknown_metric_is_said_with_those_there_are():
    with pytest.raises(InputError, match=r"no metric 'new_suspect'. Did you mean new_suspects\?"):
        fires("new_suspect > 3", METRICS)
    assert gates.evaluate(gates.parse_all(None, ()), night(examples=3), []) == []


def test_a_baseline_is_the_median_of_recent_nights():
    history = [night("2026-11-01", suspects=100_000)]
    history += [night(f"2026-11-{n:02}", suspects=100 + n) for n in range(10, 17)]
    found = fires("suspects > 1.5 * baseline", night(suspects=300), history)
    assert (found["value"], found["baseline"], found["fired"]) == (300, 113, True)
    assert "(baseline 113)" in found["reason"]
    assert fires("suspects > 1.5 * last", night(suspects=300), history)["baseline"] == 116
    dated = 'suspects < 0.5 * baseline("2026-11-01")'
    assert fires(dated, night(suspects=300), history)["baseline"] == 100_000
    unknown = fires('suspects < baseline("2026-10-01")', night(suspects=300), history)
    assert not unknown["fired"]
    assert "not known" in unknown["reason"]
    first = fires("suspects > 2 * baseline", night(suspects=300), [])
    assert not first["fired"]
    assert first["reason"] == "no earlier night has suspects"


def test_small_counts_do_not_alarm():
    assert not fires("new > 2 * baseline", night(new=4), [night("1", new=1)])["fired"]
    assert fires("new > 2 * baseline", night(new=400), [night("1", new=100)])["fired"]
    few = night(suspects_rate=0.03, examples=100)
    many = night(suspects_rate=0.03, examples=10_000)
    history = [night("1", suspects_rate=0.01, examples=100)]
    assert not fires("suspects_rate > 2 * baseline", few, history)["fired"]
    assert fires("suspects_rate > 2 * baseline", many, history)["fired"]


def test_what_is_counted_by_chance_fires_on_no_night_in_a_hundred():
    rng = np.random.default_rng(0)
    counts = [int(n) for n in rng.poisson(20, 100)]
    history = [night(str(i), new=n) for i, n in enumerate(counts)]
    alarms = [
        fires("new > baseline", history[i], history[:i])["fired"] for i in range(3, len(counts))
    ]
    assert sum(alarms) == 0


def test_the_status_and_the_last_line():
    given = gates.parse_all(["suspects > 1"], ["new_suspects > 100", "suspects > 1000"])
    results = gates.evaluate(given, METRICS, [])
    assert gates.status(results) == 3
    last = gates.lines(results)[-1]
    assert last == "error: new_suspects > 100: new_suspects > 100 is 150 > 100"
    assert gates.status(results[:1]) == 0
    assert gates.lines(results[:1])[-1].startswith("warning: suspects > 1: ")
    assert gates.lines([]) == ["no gate fired (0 looked at)"]
