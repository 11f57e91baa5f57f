"""A task's model made ready to give projected per-example gradients, batch by batch."""

import collections
import contextlib
import dataclasses
import functools
import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python.eager import context as eager_context

from tracin_beam.errors import InputError, reason
from tracin_beam.gradients import (
    added,
    capture,
    independence,
    kinds,
    nests,
    padding,
    projections,
    quantities,
    recording,
    recurrent,
    traceable,
    traced,
)
from tracin_beam.gradients.batches import Batch, BatchParser
from tracin_beam.gradients.selection import select_weights
from tracin_beam.inputs import moments, state
from tracin_beam.inputs.checkpoints import first_ten, moments_of, read_notes
from tracin_beam.inputs.task import Task, in_keras_thread
from tracin_beam.inputs.weights import WeightsLoader

# Checkpoints' weights kept in memory for each process.
_VALUES_BYTES = 2 << 30
# What a batch may take: outputs, their gradients, and what of the weights' is written out.
_BATCH_BYTES = 1 << 30
# Examples of one length that are computed together where they must not be padded.
_OF_ONE_LENGTH = 8
# Positions of unknown number are counted as so many.
_POSITIONS = 128
# So many queries, or fewer, have a function of their own: products with a whole batch of them would
# be half of what it takes.
_FEW = 16
# Examples whose gradients are compared with the tape's before any work.
_VERIFIED = 4
# By how much ‖∇ℓ‖² may differ between batch sizes, by the dtype that a layer computes in.
_TOLERANCES = {"bfloat16": 0.1, "float16": 0.02}


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What determines an embedding, besides task and checkpoint.

    Attributes:
      layers: "all", "last", or a regular expression searched for in the weights' paths.
      projection: name of a registered projection.
      dim: length of an embedding; projection "none" ignores it.
      seed: of the projection.
      batch_size: examples computed at a time; 0 chooses by the model's size.
      norms: "exact" ‖∇ℓ‖²; "estimated", exact but for convolutions whose gradient is compressed,
        of which their `forms.Split` gives an estimate; or "sketched", ‖S∇ℓ‖².
      ways: "REGEX=WAY,…", which weights take which way to their sketch; see `ways.parse`.
      rules: whether layers take their rules; without, every weight goes the general, slow way.
      gradient: "plain", or "adam": scaled number by number as the optimizer's steps are, by its
        second moments at the checkpoint; see `inputs.moments`.
      padding: whether examples of different lengths are padded and go together; without, those
        of one length do.
    """

    layers: str = "all"
    projection: str = "countsketch"
    dim: int = 1024
    seed: int = 0
    batch_size: int = 0
    norms: str = "estimated"
    ways: str = ""
    rules: bool = True
    padding: bool = True
    gradient: str = "plain"


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What is computed of n examples at a checkpoint; NaN or infinite where it is not a number.

    Attributes:
      embedding: float32 [n, dim], S ∇ℓ.
      squared_norm: float32 [n], ‖∇ℓ‖², or its estimate, as the engine's `norms` say.
      norm_error: float32 [n], the standard error of squared_norm; 0 where that is exact.
      loss, label, prediction: float32 [n]; label and prediction are NaN where they are no number.
    """

    embedding: np.ndarray
    squared_norm: np.ndarray
    norm_error: np.ndarray
    loss: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


@dataclasses.dataclass(frozen=True)
class Queries:
    """Gradients of up to batch_size examples, ready for exact inner products.

    Attributes:
      size: how many there are.
      gradients: flat list of the tensors of their forms; or where they are written out, of every
        weight float32 [size, N], or an `Outer` where it has one position.
      written_out: whether they are.
      summed: whether each is a sum over examples, which is whole for every weight.
      groups: instead of these, where queries of one length go together: places, and their queries.
    """

    size: int
    gradients: list[Any]
    written_out: bool = False
    summed: bool = False
    groups: "tuple[tuple[np.ndarray, Queries], ...]" = ()


class Engine:
    """Per-example gradients of a task's model, for any of its checkpoints.

    Safe to use from several threads at once: weights are arguments of the traced functions, of
    which there is one of each kind whatever the batches' sizes.

    Args:
      task: the task.
      config: what to compute.
      parser: the task's parser; its spec fixes the shapes that functions are traced for.
      example: a batch of at least one example, to build the model with.
    """

    def __init__(
        self, task: Task, config: EngineConfig, parser: BatchParser, example: Batch
    ) -> None:
        self.task = task
        self.config = config
        self._lock = threading.Lock()
        self._functions: dict[tuple[str, str], Any] = {}
        self._cache: collections.OrderedDict[str, list[tf.Tensor]] = collections.OrderedDict()
        self._structure = (example.features, example.label, example.sample_weight)
        self._example = example.take([0])
        in_keras_thread(self._build)
        self.weights = select_weights(self.model, config.layers)
        self.specs = [projections.WeightSpec(w.path, w.shape) for w in self.weights]
        self.projection = projections.make(
            config.projection, config.dim, config.seed, self.specs, config.ways
        )
        self.dim = self.projection.dim
        flat = zip(nests.present(parser.spec), nests.present(self._structure), strict=True)
        self._open_spec = [
            _open_spec(spec, x, parser.open_axes.get(place, 0))
            for place, (spec, x) in enumerate(flat)
        ]
        self._values_spec = [tf.TensorSpec(v.shape, v.dtype) for v in self.model.variables]
        if config.gradient == "adam":
            self._values_spec += [tf.TensorSpec(w.shape, tf.float32) for w in self.weights]

    def _build(self) -> None:
        self.model = self.task.model()
        if not isinstance(self.model, keras.Model):
            raise InputError(f"Task.model returned a {type(self.model).__name__}, not a model.")
        recurrent.refuse_stateful(self.model)
        one = self._example
        with self._explained():
            output = self.model(one.features, training=False)
        self.kind = kinds.infer(self.task.loss, one.label, output, self.task.kind)
        traceable.make_traceable(self.model)
        self.added = added.survey(self.model, one.features)
        self.subject = traced.Subject(self.task, self.model, self.kind, self.added)

    @functools.cached_property
    def _found(self) -> tuple[recording.Model, capture.Survey]:
        """The model as gradients are taken of it, and what a trace of it showed."""
        return in_keras_thread(self._surveyed)

    def _surveyed(self) -> tuple[recording.Model, capture.Survey]:
        # What a layer adds to the loss in its call is not seen in the gradient of its output.
        adding = frozenset(id(one.layer) for one in self.added if one.inside)
        model = recording.Model.of(self.model, self.weights, self.config.rules, adding)
        labelled = self._example.label is not None
        forward = self.subject.forward("loss" if labelled else "predicted_loss")
        with self._explained():
            found = capture.survey(model, forward, self._open_spec, self._structure)
            if found.assumed:
                some = self._example.take(np.zeros(3, np.int64))
                others = recording.not_first(
                    found.assumed, lambda: self.model(some.features, training=False), some.size
                )
                if others:
                    model = dataclasses.replace(model, not_first=others)
                    found = capture.survey(model, forward, self._open_spec, self._structure)
            if found.general and found.loops:
                stepwise = dataclasses.replace(model, loops=False)
                again = capture.survey(stepwise, forward, self._open_spec, self._structure)
                if len(again.general) < len(found.general):
                    return stepwise, again
        return model, found

    @functools.cached_property
    def batch_size(self) -> int:
        """Examples computed at a time."""
        return self.config.batch_size or self._fitting()

    @property
    def _width(self) -> int:
        """Rows of the traced functions."""
        return self.batch_size if self.config.padding else min(self.batch_size, _OF_ONE_LENGTH)

    @functools.cached_property
    def _bodies(self) -> traced.Bodies:
        return traced.Bodies(
            self.subject,
            self._found,
            self._structure,
            self.weights,
            self.specs,
            self.projection,
            self.config.layers,
            self.config.norms,
            self.config.gradient,
        )

    @property
    def general(self) -> tuple[int, ...]:
        """Indices of the weights that no rule is for: they take a product for each example."""
        return tuple(sorted(self._found[1].general))

    def slow_weights(self) -> dict[str, str | None]:
        """By path of a weight that no rule is for, the layer that is run for each example.

        None stands for the whole model.
        """
        owners = self._found[1].general
        return {
            self.weights[i].path: None if layer is None or layer is self.model else layer.name
            for i, layer in sorted(owners.items())
        }

    def slowdown(self, values: list[tf.Tensor], batch: Batch) -> float:
        """How many times as long embedding takes as without the weights that no rule is for."""
        flat = self._padded(next(self._parts(batch)))
        seconds = []
        for kind in ("embed", "fast"):
            function = self._function(kind, "loss")
            taken = []
            for _ in range(3):
                start = time.perf_counter()
                np.asarray(_run(function, values, flat)[0])
                taken.append(time.perf_counter() - start)
            seconds.append(min(taken))
        return seconds[0] / seconds[1]

    def _fitting(self) -> int:
        """A batch size at which a batch's numbers fit into _BATCH_BYTES."""
        _, found = self._found
        bodies = self._bodies
        written = [self.weights[i].size for i in found.general]
        projected = 2 * sum(written) + sum(
            self.projection.numbers(self.specs[i], bodies.as_scaled(i, form))
            for i, form in found.forms.items()
        )
        kept = sum(written) + sum(
            sum(math.prod(n or _POSITIONS for n in x.shape[1:]) for x in tf.nest.flatten(form))
            for form in bodies.dots.values()
        )
        # Outputs are kept for the backward pass, which has as many gradients on the way.
        numbers = 2 * found.outputs + max(projected, kept)
        fitting = _BATCH_BYTES // (4 * numbers)
        return min(256 if written else 512, max(1, 1 << fitting.bit_length() >> 1))

    def values(self, path: str) -> list[tf.Tensor]:
        """The weights in a checkpoint file, in the order of `model.variables`.

        Raises:
          InputError: the file is missing, broken, or of another architecture.
        """
        with self._lock:
            if path not in self._cache:
                self._cache[path] = in_keras_thread(lambda: self._load(path))
                size = sum(x.shape.num_elements() * x.dtype.size for x in self._cache[path])
                while len(self._cache) > 1 and len(self._cache) * size > _VALUES_BYTES:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(path)
            return self._cache[path]

    @functools.cached_property
    def _loader(self) -> WeightsLoader:
        return WeightsLoader(self.model)

    def _load(self, path: str) -> list[tf.Tensor]:
        self._loader.load(path)
        found = [tf.identity(tf.convert_to_tensor(v.value)) for v in self.model.variables]
        return found + (self._scales(path) if self.config.gradient == "adam" else [])

    @functools.cached_property
    def _moments_loader(self) -> WeightsLoader:
        return WeightsLoader(self.model)

    def _scales(self, path: str) -> list[tf.Tensor]:
        """What the optimizer multiplies gradients of every weight by at a checkpoint."""
        beside = moments_of(path)
        notes = read_notes(beside)
        of_weights = read_notes(path).get("weights")
        if of_weights is not None and of_weights != notes.get("weights"):
            raise InputError(f"{beside} has the second moments of other weights than {path} has.")
        self._moments_loader.load(beside)
        found = []
        for weight in self.weights:
            scale = moments.scale(np.asarray(weight.variable.value), notes)
            if scale is None:
                raise InputError(
                    f"{beside} has no second moments of {weight.path}, which the optimizer did not "
                    "train: freeze it in the task as well, or choose others with --layers."
                )
            found.append(tf.constant(scale, tf.float32))
        return found

    def embed(self, values: list[tf.Tensor], batch: Batch, target: str = "loss") -> Embedded:
        """Embeds the examples of a batch of any size.

        Raises:
          tf.errors.OpError: an example that the model or the loss cannot take.
        """
        if groups := self._groups(batch):
            return _in_order([(i, self.embed(values, part, target)) for i, part in groups])
        function = self._function("embed", target)
        # np.asarray shares the tensor's memory, where .numpy() copies it.
        parts = [
            [np.asarray(x)[: part.size] for x in _run(function, values, self._padded(part))]
            for part in self._parts(batch)
        ]
        if len(parts) == 1:
            return Embedded(*parts[0])
        return Embedded(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def describe(
        self, values: list[tf.Tensor], batch: Batch, features: bool, of: str = "gradient"
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What a checkpoint makes of the examples of a batch of any size, whatever their labels.

        Args:
          values: of the checkpoint.
          batch: the examples.
          features: whether to compute them.
          of: "gradient", or "inputs", which takes a forward pass alone.

        Returns:
          Log-probabilities by class, float32 [n, K] (see `quantities.log_probabilities`); and the
          features φ, float32 [n, D]: the projected gradient of the sum of the outputs, or the
          inputs of the last layers (see `recording.pooled_inputs`).

        Raises:
          InputError: no layer of the model shows its inputs.
          tf.errors.OpError: an example that the model cannot take.
        """
        if groups := self._groups(batch):
            parts = [(i, self.describe(values, part, features, of)) for i, part in groups]
            outputs = _in_places([(i, found[0]) for i, found in parts], batch.size)
            some = [(i, found[1]) for i, found in parts if found[1] is not None]
            return outputs, _in_places(some, batch.size) if features else None
        kind = {"gradient": "features", "inputs": "inputs"}[of] if features else "outputs"
        function = self._function(kind, quantities.OUTPUTS)
        found = [
            [np.asarray(x)[: part.size] for x in _run(function, values, self._padded(part))]
            for part in self._parts(batch)
        ]
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        return columns[0], columns[1] if features else None

    def queries(
        self,
        values: list[tf.Tensor],
        batch: Batch,
        target: str = "loss",
        written_out: bool = False,
    ) -> Queries:
        """Gradients of at most batch_size examples, for `scores`.

        Args:
          values: a checkpoint's.
          batch: examples.
          target: what is differentiated.
          written_out: whether to write them out, so that they can be transformed; takes the memory
            of as many gradients as there are examples, but where a weight's are outer products.
        """
        if written_out:
            parts = list(self._whole_gradients(values, batch, target, "transformable"))
            order = np.argsort(np.concatenate([places for places, _ in parts]))
            whole = tf.nest.map_structure(
                lambda *column: np.concatenate(column)[order], *(rows for _, rows in parts)
            )
            return Queries(batch.size, whole, written_out=True)
        if batch.size > self.batch_size:
            raise ValueError(f"{batch.size} queries; at most {self.batch_size} at a time")
        if groups := self._groups(batch):
            found = [(i, self.queries(values, part, target)) for i, part in groups]
            return Queries(batch.size, [], groups=tuple(found))
        function = self._function("queries", target)
        gradients = list(_run(function, values, self._padded(batch)))
        if batch.size <= _FEW < self._width:
            gradients = [x[:_FEW] for x in gradients]
        return Queries(batch.size, gradients)

    def scores(
        self, values: list[tf.Tensor], batch: Batch, queries: Queries, target: str = "loss"
    ) -> np.ndarray:
        """Exact ⟨∇ℓ(w, z), ∇t(w, z')⟩ of every example z of the batch and query z'.

        Args:
          values: the same checkpoint's as the queries'.
          batch: examples, any number.
          queries: from `queries`.
          target: what the queries differentiated.

        Returns:
          float32 [n, queries.size].
        """
        if groups := self._groups(batch):
            by_row = [(i, self.scores(values, part, queries, target)) for i, part in groups]
            return _in_places(by_row, batch.size)
        if queries.groups:
            columns = [(i, self.scores(values, batch, q, target).T) for i, q in queries.groups]
            return _in_places(columns, queries.size).T
        if queries.written_out:
            kind = "scores of sums" if queries.summed else "scores of written out"
            function = self._function(kind, "loss")
            gradients = tf.nest.map_structure(
                lambda x: tf.convert_to_tensor(x, tf.float32), list(queries.gradients)
            )
        else:
            few = queries.size <= _FEW < self._width
            function = self._function("few scores" if few else "scores", target)
            gradients = queries.gradients
        parts = [
            _run(function, values, self._padded(part), gradients).numpy()[
                : part.size, : queries.size
            ]
            for part in self._parts(batch)
        ]
        return np.concatenate(parts)

    def moments(self, values: list[tf.Tensor], batch: Batch, widest: int) -> dict[str, np.ndarray]:
        """Sums over a batch of any size of the second moments that K-FAC takes of every weight.

        Args:
          values: a checkpoint's.
          batch: examples.
          widest: the widest side of a weight that has all second moments; others have squares.

        Returns:
          float64 arrays by "<i>/A" and "<i>/B", or "<i>/diagonal", for the i-th weight, and by
          "<i>+<j>/A" and "<i>+<j>/B" for the i-th with the j-th as its bias; see `forms.moments`.
        """
        together = [part for _, part in self._groups(batch)] or [batch]
        function = self._function(f"moments {widest}", "loss")
        found: dict[str, np.ndarray] = {}
        for part in (some for group in together for some in self._parts(group)):
            counted = tf.constant(np.arange(self._width) < part.size, tf.float32)
            for name, value in _run(function, values, self._padded(part), counted).items():
                found[name] = found.get(name, 0.0) + value.numpy().astype(np.float64)
        return found

    def quadratic(
        self,
        values: list[tf.Tensor],
        batch: Batch,
        parts: Mapping[str, Mapping[str, np.ndarray]],
    ) -> np.ndarray:
        """⟨∇ℓ, T ∇ℓ⟩ of every example of a batch of any size: float32 [n].

        Args:
          values: a checkpoint's.
          batch: examples.
          parts: T, as `scoring.curvature.Curvature.parts` gives it.
        """
        if groups := self._groups(batch):
            found = [(i, self.quadratic(values, some, parts)) for i, some in groups]
            return _in_places(found, batch.size)
        given = tf.nest.map_structure(lambda x: tf.constant(x, tf.float32), dict(parts))
        specs = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), given)
        function = self._function("quadratic", "loss", (specs,))
        return np.concatenate(
            [
                _run(function, values, self._padded(part), given).numpy()[: part.size]
                for part in self._parts(batch)
            ]
        )

    def summed(self, values: list[tf.Tensor], batch: Batch, target: str = "loss") -> np.ndarray:
        """Σ ∇t(w, z') over a batch of any size: float64 [N], the weights one after the other."""
        if groups := self._groups(batch):
            return np.sum([self.summed(values, part, target) for _, part in groups], axis=0)
        function = self._function("summed", target)
        total = np.zeros(sum(spec.size for spec in self.specs))
        for part in self._parts(batch):
            weights = tf.constant(np.arange(self._width) < part.size, tf.float32)
            total += _run(function, values, self._padded(part), weights).numpy()
        return total

    def products(self, values: list[tf.Tensor], batch: Batch, vector: np.ndarray) -> np.ndarray:
        """⟨∇ℓ(w, z), vector⟩ of every example of a batch of any size: float32 [n].

        Args:
          values: a checkpoint's.
          batch: examples.
          vector: float [N], such as `summed` gives at the same checkpoint.
        """
        if groups := self._groups(batch):
            return _in_places(
                [(i, self.products(values, p, vector)) for i, p in groups], batch.size
            )
        function = self._function("products", "loss")
        given = tf.constant(vector, tf.float32)
        parts = [
            _run(function, values, self._padded(part), given).numpy()[: part.size]
            for part in self._parts(batch)
        ]
        return np.concatenate(parts)

    def trace_counts(self) -> dict[tuple[str, str], int]:
        """How often each traced function was traced, by (kind, target)."""
        return {key: f.experimental_get_tracing_count() for key, f in self._functions.items()}

    def query_bytes(self) -> int:
        """Memory that one `Queries` takes, in bytes, positions of unknown number counted as 128."""
        return sum(
            math.prod(n or _POSITIONS for n in spec.shape) * 4
            for spec in self._bodies.query_specs(self._width)
        )

    def described_kind(self) -> dict[str, Any]:
        """The task's kind for run.json, and how its predictions become classes."""
        own = self.task.predict is not None  # then they are what the task says
        return {**dataclasses.asdict(self.kind), "threshold": None if own else self.kind.threshold}

    def notes(self) -> list[str]:
        """Sentences on how an example's loss is not all that was trained."""
        return added.notes(self.model, self.added)

    def verify(self, values: list[tf.Tensor], batch: Batch) -> None:
        """Checks this engine's gradients against plain `tf.GradientTape`, one example at a time.

        The whole gradients of a few examples are compared, and their norms as they are computed
        in a batch of the usual size.

        Raises:
          InputError: they differ: the model does something that its rules do not know of.
        """
        batch = batch.take(range(min(batch.size, _VERIFIED)))
        norms = self._exact_norms(values, batch)
        tolerance = self._tolerance()
        for part, rows in self._whole_gradients(values, batch):
            for i, place in enumerate(part):
                plain = functools.partial(self._plain, values, batch.take([place]))
                expected = in_keras_thread(plain)
                self._compare(int(place), norms[place], [x[i] for x in rows], expected, tolerance)

    def _compare(
        self,
        place: int,
        squared_norm: float,
        gradients: Sequence[np.ndarray],
        expected: Sequence[np.ndarray],
        tolerance: float,
    ) -> None:
        norm = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in expected)
        if not (math.isfinite(norm) and math.isfinite(squared_norm)):
            return
        if not math.isclose(squared_norm, norm, rel_tol=tolerance, abs_tol=1e-12):
            raise InputError(
                f"example {place}: ‖∇ℓ‖² is {squared_norm:.6g} by the layers' rules and "
                f"{norm:.6g} by tf.GradientTape. Does the model mix the examples of a batch?"
            )
        for weight, got, plain in zip(self.weights, gradients, expected, strict=True):
            error = np.linalg.norm((got - plain.ravel()).astype(np.float64))
            if error > tolerance * math.sqrt(norm) + 1e-9:
                raise InputError(
                    f"example {place}: the gradient of {weight.path} is another by the layers' "
                    f"rules than by tf.GradientTape, by {error:.3g} of {math.sqrt(norm):.3g}. "
                    "Does the model mix the examples of a batch?"
                )

    def check_repeatable(self) -> None:
        """Checks that what is no variable of the model is the same whenever it is built.

        Raises:
          InputError: the model uses variables that are not its own, or other tensors and tables,
            and a second build has others.
        """
        in_keras_thread(self._check_repeatable)

    def _check_repeatable(self) -> None:
        again = self.task.model()
        outside = [self._outside_variables(model) for model in (self.model, again)]
        digests = [sorted(zlib.crc32(v.numpy().tobytes()) for v in found) for found in outside]
        differing = state.differences(*(state.outside(m, False) for m in (self.model, again)))
        if digests[0] != digests[1]:
            differing += [f"{v.name} {tuple(v.shape)}" for v in outside[0]]
        if differing:
            raise InputError(
                "the model uses what is not among its own variables, so no checkpoint holds it, "
                f"and each process that builds it makes another: {first_ten(differing)}. Make it a "
                "weight of a layer, with add_weight; make layers attributes of the model or of one "
                "of its layers"
            )

    def _outside_variables(self, model: keras.Model) -> list[tf.Variable]:
        """The variables that a model uses and does not list."""
        features = self._structure[0]
        model(features, training=False)  # builds it
        traced = tf.function(lambda: model(features, training=False)).get_concrete_function()
        own = {id(v.value) for v in model.variables}
        return [v for v in traced.graph.variables if id(v) not in own]

    def _whole_gradients(
        self, values: list[tf.Tensor], batch: Batch, target: str = "loss", kind: str = "whole"
    ) -> Iterator[tuple[np.ndarray, list[Any]]]:
        """Places in the batch, and their gradients of every weight: float32 [n, N] each."""
        together = self._groups(batch) or [(np.arange(batch.size), batch)]
        function = self._function(kind, target)
        for places, part in together:
            for start in range(0, part.size, self._checked):
                some = part.take(range(start, min(start + self._checked, part.size)))
                found = _run(function, values, self._padded(some, self._checked))
                size = some.size
                yield (
                    places[start : start + self._checked],
                    tf.nest.map_structure(lambda x, size=size: x.numpy()[:size], list(found)),
                )

    @property
    def _checked(self) -> int:
        """Examples whose whole gradients are written out at a time."""
        size = sum(spec.size for spec in self.specs)
        return max(1, min(self._width, _VERIFIED, _BATCH_BYTES // (8 * max(size, 1))))

    def check_target(self, target: str, values: list[tf.Tensor], batch: Batch) -> None:
        """Checks that what a target is for an example is that example's alone.

        Args:
          target: its name.
          values: of a checkpoint.
          batch: examples.

        Raises:
          InputError: it is not.
        """
        together = self.quantities(target, values, batch)
        for i in {0, batch.size - 1}:
            alone = self.quantities(target, values, batch.take([i]))[0]
            if not np.isclose(alone, together[i], rtol=1e-3, atol=1e-5, equal_nan=True):
                raise InputError(
                    f"the target {target} of an example depends on the others of its batch "
                    f"({alone:.6g} alone, {together[i]:.6g} among {batch.size}): let it give each "
                    "example a number of its own."
                )

    def quantities(self, target: str, values: list[tf.Tensor], batch: Batch) -> np.ndarray:
        """A target of each of at most some hundred examples, without its gradient: float32 [n]."""

        def compute() -> np.ndarray:
            self._assign(values)
            return np.asarray(
                self.subject.forward(target)(batch.features, batch.label, batch.sample_weight)[0]
            )

        with self._explained():
            return in_keras_thread(compute)

    def check_independence(self, values: list[tf.Tensor], batch: Batch) -> None:
        """Checks that what the model and the loss give for an example is that example's alone.

        Args:
          values: of a checkpoint.
          batch: examples; some from all over it are taken.

        Raises:
          InputError: the model is random, or the model or the loss mixes the examples of a batch.
        """
        spread = np.linspace(0, batch.size - 1, min(batch.size, independence.COUNT))
        some = batch.take(spread.astype(np.int64))

        def check() -> None:
            self._assign(values)
            output = independence.check_model(self.model, some.features)
            added.check(self.model, self.added, some.features)
            if some.label is not None:
                independence.check_loss(self.task.loss, some.label, output)

        in_keras_thread(check)

    def _exact_norms(self, values: list[tf.Tensor], batch: Batch) -> np.ndarray:
        """‖∇ℓ‖² of at most as many examples as the traced functions have rows, float32 [n]."""
        embedded = self.embed(values, batch)
        if not embedded.norm_error.any():
            return embedded.squared_norm
        if groups := self._groups(batch):
            found = [(i, self._exact_norms(values, part)) for i, part in groups]
            return _in_places(found, batch.size)
        function = self._function("norms", "loss")
        return _run(function, values, self._padded(batch)).numpy()[: batch.size]

    def depends_on_padding(
        self, values: list[tf.Tensor], batch: Batch, alone: Sequence[Batch]
    ) -> bool:
        """Whether examples that were padded to one length have another loss or gradient alone.

        Args:
          values: of a checkpoint.
          batch: examples that were parsed together.
          alone: the same, each parsed by itself.
        """
        structure = (batch.features, batch.label, batch.sample_weight)
        own = [padding.widths((x.features, x.label, x.sample_weight)) for x in alone]
        if not batch.extents and all(widths == padding.widths(structure) for widths in own):
            return False
        try:
            # Lengths that happen to be equal here need not be so elsewhere.
            features, label, weight = padding.extend(structure, batch.extents, 3)
            padded = self.embed(values, Batch(features, label, weight, None))
        except tf.errors.OpError:  # there is a greatest length
            padded = self.embed(values, dataclasses.replace(batch, extents={}))
        single = [self.embed(values, dataclasses.replace(x, extents={})) for x in alone]
        tolerance = 10 * self._tolerance()
        for i, one in enumerate(single):
            error = np.linalg.norm(padded.embedding[i] - one.embedding[0])
            near = np.isclose(padded.loss[i], one.loss[0], tolerance, 1e-6, equal_nan=True)
            if not near or error > tolerance * np.linalg.norm(one.embedding[0]):
                return True
        return False

    def _tolerance(self) -> float:
        dtypes = {layer.compute_dtype for layer in self.model._flatten_layers()}
        return max(_TOLERANCES.get(dtype, 1e-3) for dtype in dtypes)

    def _assign(self, values: list[tf.Tensor]) -> None:
        of_model = values[: len(self.model.variables)]
        for variable, value in zip(self.model.variables, of_model, strict=True):
            variable.assign(value)

    def _plain(self, values: list[tf.Tensor], example: Batch) -> list[np.ndarray]:
        # By the model's own variables, as in training: nothing that the fast way relies on.
        self._assign(values)
        if not self.config.padding:
            example = example.trimmed()
        sources = [w.variable.value for w in self.weights]
        with tf.GradientTape() as tape:
            quantity, _ = self.subject.forward("loss")(
                example.features, example.label, example.sample_weight
            )
            total = tf.reduce_sum(quantity)
        gradients = tape.gradient(total, sources, unconnected_gradients="zero")
        found = [tf.convert_to_tensor(g).numpy() for g in gradients]
        scales = [scale.numpy() for scale in values[len(self.model.variables) :]]
        return [g * scale for g, scale in zip(found, scales, strict=True)] if scales else found

    def _groups(self, batch: Batch) -> list[tuple[np.ndarray, Batch]]:
        """Examples of one length, where they must not be padded; empty where nothing is."""
        if self.config.padding or not batch.extents:
            return []
        together = padding.groups(batch.extents, self._width)
        return [(indices, batch.take(indices).trimmed()) for indices in together]

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        if batch.size <= self._width:
            yield batch
            return
        for start in range(0, batch.size, self._width):
            yield batch.take(range(start, min(start + self._width, batch.size)))

    def _padded(self, batch: Batch, width: int = 0) -> list[tf.Tensor]:
        width = width or self._width
        index = np.minimum(np.arange(width), batch.size - 1)
        flat = nests.present((batch.features, batch.label, batch.sample_weight))
        if batch.size == width:
            return flat
        return [tf.gather(x, index) for x in flat]

    def _function(self, kind: str, target: str, more: Sequence[Any] = ()) -> Callable[..., Any]:
        key = (kind, target)
        # Not within the lock's and the other thread's work, which would wait for one another.
        _ = self._found
        with self._lock:
            if key not in self._functions:
                self._functions[key] = in_keras_thread(lambda: self._trace(kind, target, more))
            return self._functions[key]

    def _trace(self, kind: str, target: str, more: Sequence[Any]) -> Callable[..., Any]:
        width = self._checked if kind in ("whole", "transformable") else self._width
        flat_spec = [
            tf.TensorSpec([width, *spec.shape[1:]], spec.dtype) for spec in self._open_spec
        ]
        signature = [self._values_spec, flat_spec, *more]
        bodies = self._bodies
        body = bodies.of(kind)
        signature += bodies.more(kind, self._width, _FEW if kind == "few scores" else self._width)
        function = tf.function(
            lambda *args: body(target, *args), input_signature=signature, autograph=False
        )
        with self._explained():
            function.get_concrete_function()
        return function

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the model or the loss does not take what parse gives: {reason(error)}"
            ) from error


def _in_places(parts: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    """Puts rows in their places: [size, ...]."""
    found = np.empty((size, *parts[0][1].shape[1:]), parts[0][1].dtype)
    for places, rows in parts:
        found[places] = rows
    return found


def _in_order(parts: Sequence[tuple[np.ndarray, Embedded]]) -> Embedded:
    size = sum(len(places) for places, _ in parts)
    names = [field.name for field in dataclasses.fields(Embedded)]
    columns = [[(places, getattr(part, name)) for places, part in parts] for name in names]
    return Embedded(*(_in_places(column, size) for column in columns))


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a traced function such that other threads may call it at the same time.

    TensorFlow's memory optimiser keeps large sums in temporary variables whose names are those of
    the operations: two runs of one function at a time clash (AlreadyExistsError).
    """
    context = eager_context.context()
    before = context.function_call_options
    config = config_pb2.ConfigProto.FromString(before.config_proto_serialized)
    rewrite = config.graph_options.rewrite_options
    rewrite.memory_optimization = rewriter_config_pb2.RewriterConfig.NO_MEM_OPT
    context.function_call_options = eager_context.FunctionCallOptions(config_proto=config)
    try:
        return function(*arguments)
    finally:
        context.function_call_options = before


def _open_spec(spec: tf.TensorSpec, example: tf.Tensor, open_axes: int) -> tf.TensorSpec:
    """The shape that parse states; axes that it leaves open stay so, but for the last one."""
    known = spec.shape.as_list() if spec.shape.rank is not None else [None] * example.shape.rank
    shape = [None, *known[1:]]
    if len(shape) > max(2, open_axes + 1) and shape[-1] is None:
        shape[-1] = example.shape[-1]
    return tf.TensorSpec(shape, example.dtype)
