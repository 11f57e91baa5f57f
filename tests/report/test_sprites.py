"""Pictures in sprites: each in its box, and all within the bytes that are left."""

import io

import numpy as np
import pytest
from night_tables import pictures
from PIL import Image

from tracin_beam.report import sprites


def cut(found, number):
    index, left, top, width, height = found.boxes[number]
    with Image.open(io.BytesIO(found.files[index])) as sheet:
        return np.asarray(sheet.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("shape", [(28, 20), (20, 33, 3), (8, 8, 4)])
def test_each_is_in_its_box(shape):
    rng = np.random.default_rng(0)
    given = [np.full(shape, rng.integers(256), np.uint8) for _ in range(150)]
    found = sprites.made(given, 64, 90)
    for number in (0, 77, 149):
        there = cut(found, number)
        assert there.shape[:2] == shape[:2]
        assert np.abs(there[..., 0].astype(int) - given[number].flat[0]).max() < 12


def test_several_files():
    given = [np.full((256, 256), i, np.uint8) for i in range(70)]
    found = sprites.made(given, 256, 90)
    assert len(found.files) == 2
    assert abs(int(cut(found, 69).mean()) - 69) < 6


def test_of_several_shapes():
    given = [np.full((16, 32), 9, np.uint8), np.full((32, 16, 3), 200, np.uint8)]
    found = sprites.made(given, 16, 90)
    assert found.boxes[:, 3:].tolist() == [[16, 8], [8, 16]]


def test_gets_smaller_until_it_fits():
    given = [one.value for one in pictures(30, 48)]
    sizes = []
    for budget in (60_000, 8_000, 2_000):
        found = sprites.fitting(given, budget)
        assert found.size <= budget
        sizes.append((found.side, found.quality))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert sprites.fitting(given, 100) is None
