"""Numbers and ids in words."""

import pytest

from tracin_beam.report import words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.0, "1.000"),
        (-12.3456, "-12.35"),
        (123456.7, "123,457"),
        (1.5e9, "1.500e+09"),
        (0.0123456, "0.01235"),
        (-1.5e-7, "-1.500e-07"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_number(value, expected):
    assert words.number(value) == expected


def test_long_ids_are_cut_and_stay_on_one_line():
    assert words.shown("a\nb\u2028c") == r"a\nb\u2028c"
    assert words.shown(b"\xff") != words.shown(b"\\xff")
    assert words.shown("x" * words.LONGEST_NAME) == "x" * words.LONGEST_NAME
    text = words.shown("a" * 500_000 + "b" * 500_000)
    assert len(text) < 200
    assert text.startswith("aaa")
    assert text.endswith("bbb (1,000,000 characters)")
