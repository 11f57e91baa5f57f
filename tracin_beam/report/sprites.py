"""Many small pictures as a few WebP files, which take a third of the bytes of a PNG each."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tracin_beam.storage import files

SIDES = (256, 128, 96, 64, 48, 32, 24, 16)  # pixels, to which pictures may be scaled down
_QUALITIES = (85, 70, 60, 50, 40, 30, 15, 5)
_GRID = 16  # pixels of WebP's blocks: tiles that share none do not bleed into one another
_WIDE = 2048  # pixels of a sprite at most
_TILES = 1024  # of a sprite at most


@dataclass(frozen=True, eq=False)
class Sprites:
    """Pictures in sprites.

    Attributes:
      files: WebP files.
      boxes: int32 [n, 5]: for each picture the file that holds it, left and top edge, width and
        height in pixels.
      side: pixels of a picture's longer side at most.
      quality: of WebP, up to 100.
    """

    files: tuple[bytes, ...]
    boxes: np.ndarray
    side: int
    quality: int

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files))


def fitting(pictures: Sequence[np.ndarray], budget: int) -> Sprites | None:
    """Sprites of as many bytes at most, as good as that allows; None if none is small enough.

    Args:
      pictures: uint8 [H, W], [H, W, 3] or [H, W, 4], at least one.
      budget: in bytes.
    """
    native = max(max(picture.shape[:2]) for picture in pictures)
    sides = [native] if native <= SIDES[0] else []
    sides += [side for side in SIDES if side < native]
    # What a sample takes tells where to begin; the whole tells where to end.
    sample = [pictures[i] for i in np.linspace(0, len(pictures) - 1, 100).astype(int)]
    for side in sides:
        for quality in _QUALITIES:
            # Below half the side it is better to keep the pixels and lose their sharpness.
            if quality < 50 and side > 32:
                continue
            if len(pictures) > 2 * len(sample):
                expected = made(sample, side, quality).size * len(pictures) / len(sample)
                if expected > budget:
                    continue
            found = made(pictures, side, quality)
            if found.size <= budget:
                return found
    return None


def made(pictures: Sequence[np.ndarray], side: int, quality: int) -> Sprites:
    """Sprites of pictures scaled down to a side, at a quality of WebP."""
    tiles = [shrunk(picture, side) for picture in pictures]
    cell = -(-max(max(tile.shape[:2]) for tile in tiles) // _GRID) * _GRID
    columns = max(1, _WIDE // cell)
    at_once = max(columns, min(_TILES, columns * columns) // columns * columns)
    color = any(tile.ndim == 3 for tile in tiles)
    alpha = any(tile.ndim == 3 and tile.shape[2] == 4 for tile in tiles)
    mode = "RGBA" if alpha else "RGB" if color else "L"
    boxes: list[tuple[int, ...]] = []
    sheets: list[Image.Image] = []
    for start in range(0, len(tiles), at_once):
        some = tiles[start : start + at_once]
        wide, high = min(columns, len(some)), -(-len(some) // columns)
        sheet = Image.new(mode, (wide * cell, high * cell))
        for number, tile in enumerate(some):
            left, top = number % columns * cell, number // columns * cell
            # The edge's pixels go on to the end of the cell, so that no block has a seam.
            height, width = tile.shape[:2]
            beyond = [(0, cell - height), (0, cell - width), (0, 0)][: tile.ndim]
            sheet.paste(Image.fromarray(np.pad(tile, beyond, "edge")).convert(mode), (left, top))
            boxes.append((len(sheets), left, top, width, height))
        sheets.append(sheet)
    encoded = files.in_parallel(lambda sheet: _webp(sheet, quality), sheets)
    return Sprites(tuple(encoded), np.array(boxes, np.int32), side, quality)


def _webp(sheet: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    sheet.save(content, "WEBP", quality=quality, method=4)
    return content.getvalue()


def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture whose longer side is as many pixels at most."""
    if max(picture.shape[:2]) <= side:
        return picture
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)
