"""A column of the self-influence table is a function and its docstring."""

from pathlib import Path

import numpy as np
import pytest
import tiny as t

from tracin_beam.signals import registry
from tracin_beam.signals.registry import Rows

TABLES = Path(__file__).parents[2] / "docs/tables.md"


@pytest.fixture
def empty(monkeypatch):
    """A registry to try things in, with what is registered already."""
    registry.every()
    monkeypatch.setattr(registry, "_signals", dict(registry._signals))
    monkeypatch.setattr(registry, "_statistics", dict(registry._statistics))


def test_the_documents_have_every_column():
    assert registry.documented_rows() in TABLES.read_text()


def test_columns_and_what_they_need():
    rng = np.random.default_rng(0)
    names = ("squared_norm", "norm_error")
    columns = {"loss": rng.normal(size=(5, 3))} | {n: rng.uniform(size=(5, 3)) for n in names}
    rows = Rows(np.array([0.5, 0.25, 0.125]), columns)
    found = {one.name: one.of(rows, {}) for one in registry.every()}
    terms = [
        [rate * norm for rate, norm in zip((0.5, 0.25, 0.125), mine, strict=True)]
        for mine in columns["squared_norm"].tolist()
    ]
    np.testing.assert_allclose(found["self_influence_by_checkpoint"], terms, rtol=1e-14)
    np.testing.assert_allclose(found["self_influence"], [sum(mine) for mine in terms], rtol=1e-14)
    errors = columns["norm_error"] @ rows.learning_rates
    np.testing.assert_allclose(found["self_influence_error"], errors, rtol=1e-14)
    np.testing.assert_array_equal(found["loss_by_checkpoint"], columns["loss"])


def test_only_what_it_says_it_needs(empty):
    @registry.signal("greedy", needs=("loss",))
    def greedy(rows):
        """Takes what it has not asked for."""
        return rows["squared_norm"][:, 0]

    rows = Rows(np.ones(1), {"loss": np.ones((2, 1)), "squared_norm": np.ones((2, 1))})
    with pytest.raises(KeyError, match="squared_norm"):
        registry.every()[-1].of(rows, {})


def test_mistakes_are_said_at_once(empty):
    def undocumented(rows):
        return rows["loss"]

    with pytest.raises(ValueError, match="needs a docstring"):
        registry.signal("undocumented", needs=("loss",))(undocumented)
    undocumented.__doc__ = "Now with one."
    with pytest.raises(ValueError, match="needs colour, which embeddings do not have"):
        registry.signal("colours", needs=("colour",))(undocumented)
    with pytest.raises(ValueError, match="two of the name self_influence"):
        registry.signal("self_influence", needs=("loss",))(undocumented)
    registry.signal("of another shape", needs=("loss",))(undocumented)
    with pytest.raises(ValueError, match=r"gives \(2, 3\), not \(2,\)"):
        registry.every()[-1].of(Rows(np.ones(3), {"loss": np.ones((2, 3))}), {})
    registry.signal("without", needs=("loss",), statistics=("none",))(undocumented)
    with pytest.raises(ValueError, match="there is no statistic none"):
        registry.statistics_of(registry.every())


def test_a_new_signal_is_a_column_of_the_table(empty, tmp_path, launch):
    job = t.Tiny(tmp_path, launch).write_all(train=3, test=0)

    @registry.statistic("loss_sum", needs=("loss",))
    def loss_sum(rows):
        return np.array([rows["loss"].sum(), rows["loss"].size])

    @registry.signal("loss_above_mean", needs=("loss", "label"), statistics=("loss_sum",))
    def loss_above_mean(rows, statistics):
        """Loss over the checkpoints, less that of all examples."""
        total, count = statistics["loss_sum"]
        return rows["loss"].mean(axis=1) - total / count

    assert job.run("self_influence") == 0
    job.check(tables=["self_influence"])
    table = t.table(job.out / "self_influence")
    assert len(table) == 24
    own = [np.mean(row["loss_by_checkpoint"]) for row in table]
    expected = [loss - np.mean(own) for loss in own]
    np.testing.assert_allclose([row["loss_above_mean"] for row in table], expected, atol=1e-12)
    counted = job.run_json()["timings"]["self_influence"]["counters"]["self_influence"]
    assert (counted["statistics_records"], counted["statistics_batches"]) == (24, 3)
