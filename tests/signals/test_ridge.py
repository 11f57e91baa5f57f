"""Ridge regression with each example left out: against fits without it, in float64."""

import numpy as np
import pytest

from tracin_beam.signals import mislabel, ridge

RNG = np.random.default_rng(5)
N, D, K = 40, 6, 3
PHI = (RNG.normal(size=(N, D)) * [1, 2, 0.1, 1, 5, 1] + 3).astype(np.float32)
LABEL = RNG.integers(K, size=N)
Y = np.eye(K)[LABEL]


def refitted(phi, y, lam, at):
    """b + Wᵀφ at one place, by least squares with rows for the penalty."""
    d = phi.shape[1]
    rows = np.vstack([np.hstack([phi, np.ones((len(phi), 1))]), np.sqrt(lam) * np.eye(d, d + 1)])
    solution = np.linalg.lstsq(rows, np.vstack([y, np.zeros((d, y.shape[1]))]), rcond=None)[0]
    return np.append(at, 1) @ solution


@pytest.fixture(scope="module")
def fitted():
    return ridge.fit(ridge.sums(PHI, Y))


@pytest.mark.parametrize("choice", [0, 3, 6])
def test_what_the_others_say_is_a_fit_without_the_example(fitted, choice):
    lam = fitted.lambdas[choice]
    phi = PHI.astype(np.float64)
    centred = phi - phi.mean(0)
    mean_eigenvalue = np.trace(centred.T @ centred) / D
    assert lam == pytest.approx(mean_eigenvalue * ridge.LAMBDAS[choice])
    found = ridge.leave_one_out(fitted, choice, PHI, Y)
    others = [np.delete(np.arange(N), i) for i in range(N)]
    expected = [refitted(phi[o], Y[o], lam, phi[i]) for i, o in enumerate(others)]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)
    new = RNG.normal(size=(2, D))
    found = ridge.leave_one_out(fitted, choice, new, None)
    np.testing.assert_allclose(found, [refitted(phi, Y, lam, at) for at in new], rtol=1e-7)


def test_another_label_of_its_own_changes_nothing(fitted):
    other = Y.copy()
    other[7] = np.roll(Y[7], 1)
    changed = ridge.fit(ridge.sums(PHI, other), [1.0])
    same = ridge.fit(ridge.sums(PHI, Y), [1.0])
    one = ridge.leave_one_out(same, 0, PHI[7:8], Y[7:8])
    two = ridge.leave_one_out(changed, 0, PHI[7:8], other[7:8])
    np.testing.assert_allclose(one, two, rtol=1e-8)


def test_parts_add_up_and_can_be_taken_away(fitted):
    parts = [ridge.sums(PHI[a : a + 10], Y[a : a + 10]) for a in range(0, N, 10)]
    whole = parts[0] + parts[1] + parts[2] + parts[3]
    np.testing.assert_allclose(whole.phi_phi, ridge.sums(PHI, Y).phi_phi)
    less = ridge.fit(whole - parts[1])
    kept = np.r_[0:10, 20:N]
    expected = ridge.fit(ridge.sums(PHI[kept], Y[kept]))
    for place in range(len(less.lambdas)):
        one = ridge.leave_one_out(less, place, PHI[kept], Y[kept])
        two = ridge.leave_one_out(expected, place, PHI[kept], Y[kept])
        np.testing.assert_allclose(one, two, rtol=1e-8)
    halves = [ridge.errors(fitted, PHI[:25], Y[:25]), ridge.errors(fitted, PHI[25:], Y[25:])]
    found = [ridge.leave_one_out(fitted, i, PHI, Y) for i in range(len(fitted.lambdas))]
    np.testing.assert_allclose(sum(halves), [((o - Y) ** 2).sum() for o in found])


def test_temperature():
    output = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1]])
    target = np.eye(3)[[0, 1]]
    expected = []
    for t in ridge.TEMPERATURES:
        grown = np.exp(output / t)
        expected.append(sum(np.log(grown[i, i] / grown[i].sum()) for i in range(2)))
    np.testing.assert_allclose(ridge.tempered(output, target)[0], expected, rtol=1e-9, atol=1e-11)
    separate = ridge.probabilities(output, 0.5, separate=True)
    np.testing.assert_allclose(separate, 1 / (1 + np.exp(-(output - 0.5) / 0.5)))
    likely = ridge.tempered(output, target, separate=True)[0]
    q = ridge.probabilities(output, ridge.TEMPERATURES[3], separate=True)
    assert likely[3] == pytest.approx(np.log(np.where(target, q, 1 - q)).sum())


def test_degenerate_features():
    fitted = ridge.fit(ridge.sums(np.ones((4, 2)), np.eye(2)[[0, 0, 1, 1]]))
    found = ridge.leave_one_out(fitted, 0, np.ones((4, 2)), np.eye(2)[[0, 0, 1, 1]])
    np.testing.assert_allclose(found, [[1 / 3, 2 / 3]] * 2 + [[2 / 3, 1 / 3]] * 2)
    with pytest.raises(ValueError, match="at least two"):
        ridge.fit(ridge.sums(np.ones((1, 2)), np.ones((1, 1))))


def test_planted_labels_come_first():
    rng = np.random.default_rng(0)
    label = rng.integers(K, size=600)
    phi = np.eye(K)[label] + 0.3 * rng.normal(size=(600, K))
    given = label.copy()
    given[:60] = (label[:60] + 1) % K
    y = np.eye(K)[given]
    fitted = ridge.fit(ridge.sums(phi, y))
    choice = int(ridge.errors(fitted, phi, y).argmin())
    output = ridge.leave_one_out(fitted, choice, phi, y)
    warmth = ridge.TEMPERATURES[int(ridge.tempered(output, y)[0].argmax())]
    q = ridge.probabilities(output, warmth)[:, None]
    m = mislabel.mixed(q, q)
    worst = np.argsort(-mislabel.scores(m, given))[:60]
    assert (worst < 60).mean() > 0.9
    assert (mislabel.suggestions(m)[:60] == label[:60]).mean() > 0.9


def test_other_targets_of_the_same_examples(fitted):
    other = np.abs(Y[:, :1] - 0.3) + PHI[:, :1]
    again = ridge.refitted(fitted, other.sum(axis=0), PHI.T @ other)
    expected = ridge.fit(ridge.sums(PHI, other))
    np.testing.assert_allclose(
        ridge.leave_one_out(again, 2, PHI, other), ridge.leave_one_out(expected, 2, PHI, other)
    )
