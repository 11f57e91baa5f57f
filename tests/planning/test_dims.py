import numpy as np
import pytest

from tracin_beam.planning import dims


def scores_of(rng, rows, queries, tail):
    """Scores whose two tails are Student's (heavy) or normal, and the errors' sizes."""
    if tail == "normal":
        return rng.normal(size=(rows, queries)), np.ones((rows, queries))
    scores = rng.standard_t(3, size=(rows, queries))
    return scores, 0.3 + np.abs(scores)


def test_sample_recall_counts_columns():
    exact = np.array([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
    assert dims.sample_recall(exact, exact, 2, 2) == 1
    assert dims.sample_recall(exact, -exact, 2, 2) == 0
    assert dims.sample_recall(exact, -exact, 2, 3) == 0.5
    estimate = exact[:, ::-1].copy()
    estimate[:, 0] = exact[:, 0]
    assert dims.sample_recall(exact, estimate, 1, 1) == 0.5
    # Fewer examples than are asked for.
    assert dims.sample_recall(exact, -exact, 10, 100) == 1


def test_examples_with_equal_scores_stand_for_each_other():
    exact = np.array([[1.0], [1.0], [1.0], [0.0]])
    estimate = np.array([[0.0], [3.0], [2.0], [1.0]])
    assert dims.sample_recall(exact, estimate, 1, 1) == 1
    assert dims.sample_recall(exact, estimate, 2, 3) == 1
    assert dims.sample_recall(exact, estimate, 3, 3) == pytest.approx(2 / 3)


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3])
def test_shapes_of_pareto_distributions(shape):
    uniform = np.random.default_rng(0).uniform(size=(20_000, 4))
    excess = -np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape
    np.testing.assert_allclose(dims.pareto_shapes(7 * excess), shape, atol=0.05)
    assert dims.pareto_shapes(np.zeros((10, 1))) == [0]


@pytest.mark.parametrize("tail", ["normal", "heavy"])
@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize("candidates", [25, 100])
def test_expected_recall_is_near_that_of_the_whole_set(tail, error, candidates):
    rng = np.random.default_rng(1)
    rows, n = 40_000, 2000
    exact, spread = scores_of(rng, rows, 24, tail)
    estimate = exact + error * spread * rng.normal(size=exact.shape)
    truth = min(dims.sample_recall(s * exact, s * estimate, 10, candidates) for s in (1, -1))
    pilot = slice(0, n)
    expected = dims.expected_recall(
        exact[pilot], estimate[pilot], spread[pilot], rows, 10, candidates
    )
    # Rather too low than too high.
    assert truth - 0.1 < expected < truth + 0.05


def test_a_light_tail_costs_recall_as_the_set_grows():
    rng = np.random.default_rng(2)
    exact, spread = scores_of(rng, 2000, 24, "normal")
    estimate = exact + 0.3 * rng.normal(size=exact.shape)
    recalls = [
        dims.expected_recall(exact, estimate, spread, rows, 10, 20)
        for rows in (2000, 20_000, 10**6, 10**9)
    ]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] == min(
        dims.sample_recall(sign * exact, sign * estimate, 10, 20) for sign in (1, -1)
    )
    assert recalls[-1] < recalls[0] - 0.1


def test_the_worse_role_counts():
    rng = np.random.default_rng(3)
    exact = rng.exponential(size=(500, 8))  # proponents stand out, opponents do not
    estimate = exact + 0.3 * rng.normal(size=exact.shape)
    spread = np.ones_like(exact)
    both = [dims.sample_recall(sign * exact, sign * estimate, 10, 20) for sign in (1, -1)]
    assert dims.expected_recall(exact, estimate, spread, 500, 10, 20) == min(both)
    assert both[1] < both[0]


@pytest.mark.parametrize("scores", [np.zeros((50, 3)), np.ones((1, 1)), np.full((400, 2), -2.0)])
def test_samples_without_a_tail(scores):
    recall = dims.expected_recall(scores, scores, np.zeros_like(scores), 10**6, 10, 100)
    assert recall == 1


def test_the_smallest_that_is_good_enough():
    table = [dims.Expected(dim, recall, 0, 0) for dim, recall in ((256, 0.9), (512, 0.99))]
    assert dims.smallest(table, 0.99) == table[1]
    assert dims.smallest(table, 0.5) == table[0]
    assert dims.smallest(table, 0.995) is None
