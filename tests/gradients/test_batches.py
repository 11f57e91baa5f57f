"""Parsing: what may come of records."""

import pytest
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients.batches import BatchParser
from tracin_beam.inputs.task import Task


def test_what_parse_may_not_return():
    def parser_of(result):
        return BatchParser(
            Task(lambda: None, "mse", lambda records: result(tf.strings.length(records)))
        )

    with pytest.raises(InputError, match='a dict with "features"'):
        parser_of(lambda x: x)
    with pytest.raises(InputError, match='a dict with "features"'):
        parser_of(lambda x: {"label": x})
    with pytest.raises(InputError, match=r"'weight'.*nothing takes"):
        parser_of(lambda x: {"features": x, "weight": x})
    with pytest.raises(InputError, match="cannot be traced"):
        parser_of(lambda x: {"features": x + "a"})
    with pytest.raises(ValueError, match="first axis must be the record"):
        parser_of(lambda x: {"features": tf.zeros([3, 2])})([b"a", b"b"])
    batch = parser_of(lambda x: {"features": x, "id": x})([b"a", b"bc"])
    assert batch.ids.tolist() == [b"1", b"2"]
