import itertools

import pytest

from tracin_beam.storage import tables


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (b"", ""),
        (b"plain", "plain"),
        ("Größe ☃".encode(), "Größe ☃"),
        (b"C:\\new\\xyz", "C:\\new\\xyz"),
        (b"\xff", r"\xff"),
        (b"\\xff", r"\\xff"),
        (b"\\\xff", r"\\\xff"),
        (b"a\nb", "a\nb"),
    ],
)
def test_an_id_as_text(identity, text):
    assert tables.text(identity) == text


def test_no_two_ids_have_the_same_text():
    pieces = [b"\\", b"x", b"f", b"\xff", b"f0", "é".encode(), b"\xc3"]
    ids = {b"".join(some) for n in range(5) for some in itertools.product(pieces, repeat=n)}
    texts = {tables.text(identity).encode() for identity in ids}  # valid UTF-8
    assert len(texts) == len(ids)
