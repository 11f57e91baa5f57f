"""Other attributions of a multilayer perceptron, written from their papers.

Each takes a `Network` for every checkpoint, in training order, and gives float64 [tests, trains]:
the greater, the more a training example lowers the test example's loss.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import tensorflow as tf

DIM = 1024

Attribution = Callable[[Sequence["Network"]], np.ndarray]


@dataclasses.dataclass
class Side:
    """Of n examples: inputs [n, m] and output gradients [n, k] of every layer, and outputs."""

    inputs: list[np.ndarray]
    deltas: list[np.ndarray]
    outputs: np.ndarray
    labels: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        """Of the label's class: [n]."""
        z = self.outputs - self.outputs.max(axis=1, keepdims=True)
        p = np.exp(z)
        return (p / p.sum(axis=1, keepdims=True))[np.arange(len(p)), self.labels]


@dataclasses.dataclass
class Network:
    """Weights at a checkpoint, kernels and biases in turn, and what both sets make of them."""

    weights: list[np.ndarray]
    train: Side
    test: Side

    @classmethod
    def of(cls, weights: Sequence[np.ndarray], examples: Sequence[np.ndarray]) -> "Network":
        x, y, x_test, y_test = examples
        flat = [w.reshape(w.shape[-2:]) if w.ndim > 1 else w[None] for w in weights]
        return cls(flat, _backward(flat, x, y), _backward(flat, x_test, y_test))


def _backward(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> Side:
    inputs, outputs = [x], x
    for i in range(0, len(weights), 2):
        outputs = inputs[-1] @ weights[i] + weights[i + 1]
        inputs.append(np.maximum(outputs, 0))
    if outputs.shape[1] == 1:
        delta = 2 * (outputs - y)
    else:
        delta = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        delta /= delta.sum(axis=1, keepdims=True)
        delta[np.arange(len(y)), y] -= 1
    deltas = [delta]
    for i in range(len(weights) - 2, 0, -2):
        delta = (delta @ weights[i].T) * (inputs[i // 2] > 0)
        deltas.insert(0, delta)
    return Side(inputs[:-1], deltas, outputs, y)


def _dots(one: Side, other: Side) -> np.ndarray:
    """Inner products of whole gradients: [n, n']."""
    return sum(
        (a @ b.T + 1) * (d @ e.T)
        for a, b, d, e in zip(one.inputs, other.inputs, one.deltas, other.deltas, strict=True)
    )


def _norms(side: Side) -> np.ndarray:
    return np.sqrt(
        sum(
            ((a**2).sum(1) + 1) * (d**2).sum(1)
            for a, d in zip(side.inputs, side.deltas, strict=True)
        )
    )


def _sketch(side: Side, factor: np.ndarray) -> np.ndarray:
    """A Gaussian projection, layer by layer Khatri-Rao, of gradients times a number: [n, DIM]."""
    rng = np.random.default_rng(0)
    total = 0.0
    for a, d in zip(side.inputs, side.deltas, strict=True):
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        left, right = (rng.normal(size=(v.shape[1], DIM)) for v in (a, d))
        total = total + (a @ left) * (d @ right) / np.sqrt(DIM)
    return total * factor[:, None]


def gradient_cosine(networks: Sequence[Network]) -> np.ndarray:
    """Cosine of whole gradients, the mean over checkpoints."""
    return np.mean(
        [
            _dots(n.test, n.train) / np.outer(_norms(n.test), _norms(n.train) + 1e-12)
            for n in networks
        ],
        axis=0,
    )


def embedding_cosine(networks: Sequence[Network]) -> np.ndarray:
    """Cosine of the last layer's inputs at the last checkpoint."""
    one, other = (
        x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12)
        for x in (networks[-1].test.inputs[-1], networks[-1].train.inputs[-1])
    )
    return one @ other.T


def trak(networks: Sequence[Network]) -> np.ndarray:
    """Park et al. 2023, equation 18: means over checkpoints of both factors.

    The model's output is the log-odds of the label, for a regression the output itself.
    """
    kernels, rests = [], []
    for network in networks:
        sides = []
        for side in (network.train, network.test):
            if side.outputs.shape[1] == 1:
                residual = 2 * (side.outputs - side.labels)[:, 0]
                sides.append(_sketch(side, 1 / np.where(residual == 0, 1, residual)))
                rest = residual
            else:
                p = np.minimum(side.probability, 1 - 1e-6)
                sides.append(_sketch(side, -1 / (1 - p)))
                rest = 1 - p
            rests.append(rest)
        phi, asked = sides
        gram = phi.T @ phi
        gram += 1e-6 * np.trace(gram) / DIM * np.eye(DIM)
        kernels.append(asked @ np.linalg.solve(gram, phi.T))
    train, test = np.mean(rests[::2], axis=0), np.mean(rests[1::2], axis=0)
    found = np.mean(kernels, axis=0) * train
    return found * test[:, None] if networks[-1].test.outputs.shape[1] == 1 else found


def representer_points(networks: Sequence[Network], decay: float = 0.003) -> np.ndarray:
    """Yeh et al. 2018, theorem 3.1: α_i f_i · f', once the last layer is at its optimum with decay.

    The value is of the label's logit, of a regression of the loss's derivative times the output.
    """
    train, test = networks[-1].train, networks[-1].test
    features, asked = (
        np.concatenate([s.inputs[-1], np.ones((len(s.labels), 1))], axis=1) for s in (train, test)
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


def _products(network: Network, rows: np.ndarray) -> Callable[[list[tf.Tensor]], list[tf.Tensor]]:
    """Gauss-Newton products of many vectors at once: lists of [q, m, n] and [q, 1, n]."""
    weights = [tf.constant(w, tf.float32) for w in network.weights]
    side = network.train
    inputs = [tf.constant(a[rows], tf.float32) for a in side.inputs]
    outputs = tf.constant(side.outputs[rows], tf.float32)
    probability = tf.nn.softmax(outputs)

    def product(vectors: list[tf.Tensor]) -> list[tf.Tensor]:
        tangent = None
        for i in range(0, len(weights), 2):
            own = tf.matmul(inputs[i // 2][None], vectors[i]) + vectors[i + 1]
            own = own if tangent is None else own + tf.matmul(tangent, weights[i][None])
            later = i + 2 < len(weights)
            tangent = own * tf.cast(inputs[i // 2 + 1] > 0, tf.float32) if later else own
        if outputs.shape[1] == 1:
            delta = 2 * tangent
        else:
            mean = tf.reduce_sum(probability * tangent, axis=2, keepdims=True)
            delta = probability * (tangent - mean)
        delta /= float(len(rows))
        found = []
        for i in range(len(weights) - 2, -1, -2):
            kernel = tf.matmul(inputs[i // 2][None], delta, transpose_a=True)
            found = [kernel, tf.reduce_sum(delta, axis=1, keepdims=True), *found]
            if i:
                delta = tf.matmul(delta, weights[i][None], transpose_b=True)
                delta *= tf.cast(inputs[i // 2] > 0, tf.float32)
        return found

    return product


def _gradients(side: Side) -> list[tf.Tensor]:
    found = []
    for a, d in zip(side.inputs, side.deltas, strict=True):
        found += [tf.constant(a[:, :, None] * d[:, None], tf.float32)]
        found += [tf.constant(d[:, None], tf.float32)]
    return found


def _with_train(network: Network, vectors: list[tf.Tensor]) -> np.ndarray:
    found = 0.0
    for i, (a, d) in enumerate(zip(network.train.inputs, network.train.deltas, strict=True)):
        rows = np.einsum("nm,qmk->qnk", a, vectors[2 * i].numpy(), optimize=True)
        found = found + np.einsum("qnk,nk->qn", rows + vectors[2 * i + 1].numpy(), d)
    return found


DAMPING = 0.01


def influence_by_cg(networks: Sequence[Network], steps: int = 20) -> np.ndarray:
    """Koh and Liang 2017, equation 2, by conjugate gradients, with Gauss-Newton's matrix."""
    network = networks[-1]
    product = tf.function(_products(network, np.arange(len(network.train.labels))))
    b = _gradients(network.test)
    x = [tf.zeros_like(v) for v in b]
    residual, direction = list(b), list(b)

    def inner(one: list[tf.Tensor], other: list[tf.Tensor]) -> tf.Tensor:
        both = zip(one, other, strict=True)
        return tf.add_n([tf.reduce_sum(u * v, axis=[1, 2], keepdims=True) for u, v in both])

    norm = inner(residual, residual)
    for _ in range(steps):
        image = [p + DAMPING * v for p, v in zip(product(direction), direction, strict=True)]
        step = norm / (inner(direction, image) + 1e-20)
        x = [u + step * v for u, v in zip(x, direction, strict=True)]
        residual = [u - step * v for u, v in zip(residual, image, strict=True)]
        after = inner(residual, residual)
        direction = [
            u + after / (norm + 1e-20) * v for u, v in zip(residual, direction, strict=True)
        ]
        norm = after
    return _with_train(network, x)


def influence_by_lissa(
    networks: Sequence[Network], steps: int = 300, batch: int = 64, scale: float = 50.0
) -> np.ndarray:
    """Koh and Liang 2017, section 3: the inverse by a series over batches (Agarwal et al. 2017)."""
    network = networks[-1]
    rng = np.random.default_rng(0)
    b = _gradients(network.test)
    x = list(b)
    count = len(network.train.labels)
    for _ in range(steps):
        product = _products(network, rng.choice(count, batch, replace=False))
        x = [g + v - (p + DAMPING * v) / scale for g, v, p in zip(b, x, product(x), strict=True)]
    return _with_train(network, x)


BASELINES: dict[str, Attribution] = {
    "embedding cosine": embedding_cosine,
    "gradient cosine": gradient_cosine,
    "representer points": representer_points,
    "influence function, CG": influence_by_cg,
    "influence function, LiSSA": influence_by_lissa,
    "TRAK": trak,
}
