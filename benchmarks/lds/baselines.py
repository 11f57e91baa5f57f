"""Other attributions of a network, written from their papers.

Each takes a `Network` for every checkpoint, in training order, and gives float64 [tests, trains]:
the greater, the more a training example lowers the test example's loss.
"""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np
import scipy.optimize
import scipy.sparse
import tensorflow as tf
from problems import Examples

DIM = 1024

Attribution = Callable[[Sequence["Network"]], np.ndarray]


@dataclasses.dataclass
class Side:
    """What a network makes of n examples: outputs [n, k] and the last layer's inputs [n, m]."""

    x: np.ndarray
    labels: np.ndarray
    outputs: np.ndarray
    features: np.ndarray

    @property
    def regression(self) -> bool:
        return self.outputs.shape[1] == 1

    def probabilities(self) -> np.ndarray:
        """Of the classes: float64 [n, k]."""
        z = np.exp(self.outputs - self.outputs.max(axis=1, keepdims=True))
        return z / z.sum(axis=1, keepdims=True)

    def of_loss(self, labels: np.ndarray | None = None) -> np.ndarray:
        """The loss's derivative by the outputs, with other labels if given: [n, k]."""
        labels = self.labels if labels is None else labels
        if self.regression:
            return 2 * (self.outputs - labels)
        return self.probabilities() - np.eye(self.outputs.shape[1])[labels]

    def of_margin(self) -> np.ndarray:
        """That of TRAK's output function, log p/(1 − p), or of the output of a regression."""
        if self.regression:
            return np.ones_like(self.outputs)
        own = np.eye(self.outputs.shape[1])[self.labels]
        others = self.probabilities() * (1 - own)
        return own - others / others.sum(axis=1, keepdims=True)

    def of_weight(self) -> np.ndarray:
        """TRAK's weight, the loss's derivative by the output function: [n]."""
        if self.regression:
            return self.of_loss()[:, 0]
        own = np.eye(self.outputs.shape[1])[self.labels]
        return -(self.probabilities() * (1 - own)).sum(axis=1)


@dataclasses.dataclass
class Network:
    """A checkpoint and what is taken of whole gradients there, which are too large to be kept.

    Attributes:
      train, test: both sets.
      dots: inner products of test and training examples' gradients, [tests, trains].
      norms: of both sets' gradients.
      margins: both sets' sketched gradients of the margin, [n, DIM].
      fisher: at the last checkpoint, see `Fisher`.
    """

    train: Side
    test: Side
    dots: np.ndarray
    norms: tuple[np.ndarray, np.ndarray]
    margins: tuple[np.ndarray, np.ndarray]
    fisher: "Fisher | None"

    @classmethod
    def of(cls, model: keras.Model, examples: Examples, last: bool) -> "Network":
        """With the model's weights as they are now.

        Args:
          model: whose last layer is dense.
          examples: both sets.
          last: whether it is the last checkpoint.
        """
        x, y, x_test, y_test = examples
        parts = keras.Model(model.inputs, [model.layers[-1].input, model.outputs[0]])
        sides = []
        for inputs, labels in ((x, y), (x_test, y_test)):
            features, outputs = (a.numpy().astype(np.float64) for a in parts(inputs))
            sides.append(Side(inputs, labels, outputs, features))
        train, test = sides
        gradients = Gradients(model)
        size = gradients.size
        rng = np.random.default_rng(0)
        # A column of a count sketch for every weight, and its sign.
        signs, columns = rng.choice([-1.0, 1.0], size), rng.integers(0, DIM, size)
        sketch = scipy.sparse.csr_matrix(
            (signs.astype(np.float32), (columns, np.arange(size))), (DIM, size)
        )
        margins = tuple((sketch @ gradients(s.x, s.of_margin()).T).T for s in sides)
        own, asked = (gradients(s.x, s.of_loss()) for s in sides)
        norms = tuple(np.linalg.norm(g, axis=1) for g in (own, asked))
        fisher = None
        if last:
            drawn = train.of_loss(_drawn(train)) if not train.regression else train.of_margin()
            root = gradients(train.x, drawn) * np.float32(np.sqrt(2 if train.regression else 1))
            fisher = Fisher(*(np.float64(root @ g.T) for g in (root, asked, own)))
        return cls(train, test, np.float64(asked @ own.T), norms, margins, fisher)


@dataclasses.dataclass
class Fisher:
    """Fisher's matrix (1/n) JᵀJ, which for these losses is Gauss-Newton's, by products with J.

    A row of J is the gradient of a training example's loss with a label drawn from the network's
    own prediction, for a regression that of the output. All that is asked of inverses stays among
    the rows of J and the queries b, so that inner products are all that is needed.

    Attributes:
      gram: J Jᵀ, [n, n].
      asked: J b, [n, tests].
      own: J g of training examples' gradients, [n, trains].
    """

    gram: np.ndarray
    asked: np.ndarray
    own: np.ndarray


class Gradients:
    """Gradients of single examples' outputs by all of a model's trainable weights."""

    def __init__(self, model: keras.Model) -> None:
        weights = [w.value for w in model.trainable_variables]
        self.size = sum(int(np.prod(w.shape)) for w in weights)

        def of_one(pair: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            with tf.GradientTape() as tape:
                outputs = model(pair[0][None], training=False)
            found = tape.gradient(outputs, weights, pair[1][None])
            return tf.concat([tf.reshape(tf.convert_to_tensor(g), [-1]) for g in found], axis=0)

        self._of_all = tf.function(
            lambda *pair: tf.map_fn(of_one, pair, fn_output_signature=tf.float32)
        )

    def __call__(self, x: np.ndarray, by_outputs: np.ndarray) -> np.ndarray:
        """float32 [n, size] of Σ_k by_outputs[i, k] outputs[i, k]."""
        found = np.empty((len(x), self.size), np.float32)
        for start in range(0, len(x), 500):
            some = slice(start, start + 500)
            found[some] = self._of_all(x[some], by_outputs[some].astype(np.float32))
        return found


def _drawn(side: Side) -> np.ndarray:
    """A label for each example, drawn from the network's prediction."""
    total = side.probabilities().cumsum(axis=1)
    drawn = np.random.default_rng(0).uniform(size=(len(total), 1))
    return np.minimum((drawn > total).sum(axis=1), total.shape[1] - 1)


def gradient_cosine(networks: Sequence[Network]) -> np.ndarray:
    """Cosine of whole gradients, the mean over checkpoints."""
    return np.mean([n.dots / (np.outer(*n.norms[::-1]) + 1e-12) for n in networks], axis=0)


def embedding_cosine(networks: Sequence[Network]) -> np.ndarray:
    """Cosine of the last layer's inputs at the last checkpoint."""
    one, other = (
        x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
        for x in (networks[-1].test.features, networks[-1].train.features)
    )
    return one @ other.T


def trak(networks: Sequence[Network], ridge: float = 0.0) -> np.ndarray:
    """Park et al. 2023, equation 18: means over checkpoints of both factors.

    Args:
      networks: at the checkpoints.
      ridge: on the features' second moments, by their mean eigenvalue; none in the paper.
    """
    kernels = []
    for network in networks:
        phi, asked = (m.astype(np.float64) for m in network.margins)
        gram = phi.T @ phi
        # A sketch may be longer than the rank of the features is.
        gram += (ridge + 1e-9) * np.trace(gram) / DIM * np.eye(DIM)
        kernels.append(asked @ np.linalg.solve(gram, phi.T))
    train = np.mean([n.train.of_weight() for n in networks], axis=0)
    found = -np.mean(kernels, axis=0) * train
    if networks[-1].test.regression:
        # The output is not the loss, whose derivative by it has a sign.
        found *= -np.mean([n.test.of_weight() for n in networks], axis=0)[:, None]
    return found


def damped_trak(networks: Sequence[Network]) -> np.ndarray:
    """TRAK with this project's damping, which its paper has not."""
    return trak(networks, ridge=1.0)


def representer_points(networks: Sequence[Network], decay: float = 0.003) -> np.ndarray:
    """Yeh et al. 2018, theorem 3.1: α_i f_i · f', once the last layer is at its optimum with decay.

    The value is of the label's logit, of a regression of the loss's derivative times the output.
    """
    train, test = networks[-1].train, networks[-1].test
    features, asked = (
        np.concatenate([s.features, np.ones((len(s.labels), 1))], axis=1) for s in (train, test)
    )
    k = train.outputs.shape[1]

    def delta_of(outputs: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
        if k == 1:
            return float(((outputs - labels) ** 2).mean()), 2 * (outputs - labels)
        top = outputs.max(axis=1, keepdims=True)
        delta = np.exp(outputs - top)
        total = delta.sum(axis=1, keepdims=True)
        delta /= total
        rows = np.arange(len(labels))
        loss = float((np.log(total[:, 0]) + top[:, 0] - outputs[rows, labels]).mean())
        delta[rows, labels] -= 1
        return loss, delta

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel = flat.reshape(-1, k)
        loss, delta = delta_of(features @ kernel, train.labels)
        gradient = features.T @ delta / len(delta) + 2 * decay * kernel
        return loss + decay * float((kernel**2).sum()), gradient.ravel()

    start = np.zeros(features.shape[1] * k)
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B")
    kernel = found.x.reshape(-1, k)
    _, delta = delta_of(features @ kernel, train.labels)
    alpha = -delta / (2 * decay * len(delta))
    near = asked @ features.T
    if k == 1:
        _, own = delta_of(asked @ kernel, test.labels)
        return near * alpha[:, 0] * -own
    return near * alpha[:, test.labels].T


DAMPING = 0.01


def influence_by_cg(networks: Sequence[Network], steps: int = 20) -> np.ndarray:
    """Koh and Liang 2017, equation 2, by conjugate gradients.

    A vector is b times its first part and Jᵀ times its second.
    """
    network = networks[-1]
    fisher = network.fisher
    assert fisher is not None
    n = len(fisher.gram)
    squares = np.square(network.norms[1]).astype(np.float64)
    Vector = tuple[np.ndarray, np.ndarray]

    def times_j(v: Vector) -> np.ndarray:
        return v[0] * fisher.asked + fisher.gram @ v[1]

    def inner(v: Vector, w: Vector) -> np.ndarray:
        both = (v[1] * times_j(w)).sum(axis=0)
        return both + v[0] * (w[0] * squares + (w[1] * fisher.asked).sum(axis=0))

    def plus(v: Vector, factor: np.ndarray, w: Vector) -> Vector:
        return v[0] + factor * w[0], v[1] + factor * w[1]

    tests = len(network.test.labels)
    x: Vector = np.zeros(tests), np.zeros((n, tests))
    residual: Vector = np.ones(tests), np.zeros((n, tests))
    direction, norm = residual, inner(residual, residual)
    for _ in range(steps):
        image = DAMPING * direction[0], times_j(direction) / n + DAMPING * direction[1]
        step = norm / (inner(direction, image) + 1e-20)
        x, residual = plus(x, step, direction), plus(residual, -step, image)
        after = inner(residual, residual)
        direction, norm = plus(residual, after / (norm + 1e-20), direction), after
    return x[0][:, None] * network.dots + x[1].T @ fisher.own


def influence_by_lissa(
    networks: Sequence[Network], steps: int = 300, batch: int = 64, scale: float = 50.0
) -> np.ndarray:
    """Koh and Liang 2017, section 3: the inverse by a series over batches (Agarwal et al. 2017)."""
    network = networks[-1]
    fisher = network.fisher
    assert fisher is not None
    rng = np.random.default_rng(0)
    # b times a number, and Jᵀ times a matrix.
    one, rows = 1.0, np.zeros_like(fisher.asked)
    for _ in range(steps):
        some = rng.choice(len(rows), batch, replace=False)
        product = one * fisher.asked[some] + fisher.gram[some] @ rows
        one, rows = 1 + one * (1 - DAMPING / scale), rows * (1 - DAMPING / scale)
        rows[some] -= product / batch / scale
    return one * network.dots + rows.T @ fisher.own


BASELINES: dict[str, Attribution] = {
    "embedding cosine": embedding_cosine,
    "gradient cosine": gradient_cosine,
    "representer points": representer_points,
    "influence function, CG": influence_by_cg,
    "influence function, LiSSA": influence_by_lissa,
    "TRAK": trak,
    "TRAK, damped as here": damped_trak,
}
