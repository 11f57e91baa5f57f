"""What is computed of a batch of examples: the bodies of an engine's traced functions.

Each takes a target, the values of the model's variables and a batch, flat and of a static size,
and what else its function takes.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from tracin_beam.errors import InputError
from tracin_beam.gradients import (
    added,
    capture,
    forms,
    kinds,
    layouts,
    nests,
    projections,
    quantities,
    recording,
    rules,
)
from tracin_beam.gradients.forms import Form
from tracin_beam.gradients.recording import Forward, Model, Weight
from tracin_beam.inputs.task import Task

_DESCRIBING = 3  # of the last layers, whose inputs are an example's features


@dataclasses.dataclass(frozen=True)
class Subject:
    """A task's model and what of it is differentiated.

    Attributes:
      task: the task.
      model: its model, built.
      kind: the task's kind.
      added: what layers add to the loss.
    """

    task: Task
    model: keras.Model
    kind: kinds.Kind
    added: Sequence[added.Added]

    def forward(self, target: str) -> Forward:
        """Runs the model: the target of each example, and its loss, label and prediction."""
        kind = self.kind
        quantity = quantities.target_quantity(target, self.task.loss, kind, self.task.targets)
        loss = quantities.loss_if_labelled(self.task.loss, kind)

        def forward(features: Any, label: Any, sample_weight: Any) -> tuple[tf.Tensor, Any]:
            with contextlib.ExitStack() as stack:
                extra = stack.enter_context(added.collecting(self.model)) if self.added else []
                output = self.model(features, training=False)
            value = quantity(label, output, sample_weight)
            if target == quantities.OUTPUTS:
                return value, (quantities.log_probabilities(output, kind),)
            plain = value if target == "loss" else loss(label, output, sample_weight)
            if self.added and target == "loss":
                value += added.shares(extra, self.added, nests.present(features)[0].shape[0])
            if self.task.predict is not None:
                prediction = tf.cast(self.task.predict(output), tf.float32)
            else:
                prediction = kinds.predictions(output, kind)
            return value, (plain, kinds.labels(label, output, kind), prediction, extra)

        return forward


@dataclasses.dataclass(frozen=True)
class Bodies:
    """The bodies of the traced functions.

    Attributes:
      subject: the task's model.
      found: the model as gradients are taken of it, and what a trace of it showed.
      structure: features, label and sample_weight, as for `nests.repack`.
      weights: those that are wanted.
      specs: of them.
      projection: of their gradients.
      layers, norms_way, scaling: `layers`, `norms` and `gradient` of the `EngineConfig`; where
        gradients are scaled, the scales of every weight follow the values of the variables.
    """

    subject: Subject
    found: tuple[Model, capture.Survey]
    structure: Any
    weights: Sequence[Weight]
    specs: Sequence[projections.WeightSpec]
    projection: projections.Projection
    layers: str
    norms_way: str
    scaling: str

    @property
    def general(self) -> tuple[int, ...]:
        """Indices of the weights that no rule is for: they take a product for each example."""
        return tuple(sorted(self.found[1].general))

    def of(self, kind: str) -> Callable[..., Any]:
        """The body of the function of a kind: by its name, but for these."""
        if kind.startswith("moments"):
            return functools.partial(self.moments, int(kind.split()[1]))
        others = {
            "few scores": self.scores,
            "scores of written out": self.scores_of_written_out,
            "scores of sums": self.scores_of_written_out,
        }
        return others.get(kind) or getattr(self, kind)

    def more(self, kind: str, rows: int, queries: int) -> list[Any]:
        """The specs of what a function of a kind takes besides values and batch.

        Args:
          kind: the kind; what "quadratic" takes is its caller's to say.
          rows: how many examples.
          queries: how many queries there is room for.
        """
        if kind in ("scores", "few scores"):
            return [self.query_specs(queries)]
        if kind == "scores of written out":

            def written(i: int) -> Any:
                if i in self.outer:
                    return tf.nest.map_structure(
                        lambda x: tf.TensorSpec([None, None, x.shape[-1]]), self.outer[i]
                    )
                return tf.TensorSpec([None, self.specs[i].size])

            return [[written(i) for i in range(len(self.specs))]]
        if kind == "scores of sums":
            return [[tf.TensorSpec([None, spec.size], tf.float32) for spec in self.specs]]
        if kind.startswith("moments") or kind == "summed":
            return [tf.TensorSpec([rows], tf.float32)]
        if kind == "products":
            return [tf.TensorSpec([sum(spec.size for spec in self.specs)], tf.float32)]
        return []

    @functools.cached_property
    def biases(self) -> dict[int, int]:
        """By index of a kernel whose gradient is in factors, the index of its bias."""
        number = {id(weight.variable): i for i, weight in enumerate(self.weights)}
        found = {}
        for layer in {id(weight.layer): weight.layer for weight in self.weights}.values():
            kernel, bias = (number.get(id(v), -1) for v in rules.kernel_and_bias(layer))
            form = self.found[1].forms.get(kernel) if bias >= 0 else None
            if isinstance(form, forms.Outer | forms.Windowed) and (
                form.right.shape[-1] == self.specs[bias].size
            ):
                found[kernel] = bias
        return found

    def gradients(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> capture.Captured:
        """Each example's gradients.

        Raises:
          InputError: there are none.
        """
        of_model = self._of_model(values)
        captured = capture.per_example_gradients(
            *self.found, self.subject.forward(target), of_model, flat, self.structure
        )
        if not captured.gradients:
            raise InputError(
                f"the {target} does not depend on any weight of --layers={self.layers}, "
                "or not in a way that TensorFlow differentiates"
            )
        if self.scaling == "plain":
            return captured
        scales = values[len(of_model) :]
        found = {
            i: forms.scaled(form, scales[i], self.specs[i].shape)
            for i, form in captured.gradients.items()
        }
        return dataclasses.replace(captured, gradients=found)

    def as_scaled(self, i: int, form: Form) -> Form:
        """The form, of `tf.TensorSpec`s, in which a weight's gradient leaves `gradients`."""
        if self.scaling == "plain" or forms.keeps_its_form(form):
            return form
        return forms.Full(tf.TensorSpec([None, self.specs[i].size], tf.float32))

    def _of_model(self, values: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """The model's variables, of what values gives."""
        return values[: len(self.subject.model.variables)]

    def _scope(self, values: Sequence[tf.Tensor]) -> keras.StatelessScope:
        variables = self.subject.model.variables
        return keras.StatelessScope(list(zip(variables, self._of_model(values), strict=True)))

    def embed(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, ...]:
        """Embeddings, squared norms and their errors, losses, labels and predictions."""
        captured = self.gradients(target, values, flat)
        found = [(self.specs[i], form) for i, form in captured.gradients.items()]
        parts = self.projection.prepare(found)
        embedding = self.projection(parts)
        if self.norms_way == "sketched":
            norm = tf.reduce_sum(tf.square(embedding), axis=1)
            error = norm * math.sqrt(2 / self.projection.dim)
        elif self.norms_way == "estimated":
            norm, error = forms.estimated_norm([part for _, part in parts])
        else:
            norm = forms.summed_norm([form for _, form in found])
            error = tf.zeros_like(norm)
        loss, label, prediction, extra = captured.auxiliary
        if self.subject.added:
            loss += self.added_losses(extra, values, flat)
        return embedding, norm, error, loss, label, prediction

    def added_losses(
        self,
        extra: Sequence[tuple[Any, tf.Tensor, bool]],
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        """What layers add to each example's loss: float32 [B]."""
        shapes = self.found[1].shapes

        def leads(x: tf.Tensor) -> bool:
            shape = shapes.get(x.name)
            return shape is not None and shape[:1] == [capture.EXAMPLES]

        found = added.values(
            extra, self.subject.added, int(flat[0].shape[0]), leads, layouts.data_dependent(flat)
        )
        if found is not None:
            return found
        features, *_ = nests.repack(self.structure, flat)
        with self._scope(values):
            return added.values_alone(self.subject.model, self.subject.added, features)

    def features(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, ...]:
        """Log-probabilities and the projected gradients of the sum of the outputs."""
        captured = self.gradients(target, values, flat)
        forms = [(self.specs[i], form) for i, form in captured.gradients.items()]
        return *captured.auxiliary, self.projection(forms)

    def outputs(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, ...]:
        """What the forward pass says besides the target."""
        with self._scope(values):
            _, outputs = self.subject.forward(target)(*nests.repack(self.structure, flat))
        return tuple(outputs)

    def inputs(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> tuple[tf.Tensor, ...]:
        """What `outputs` gives, and the pooled inputs of the last layers side by side."""
        outputs: list[tf.Tensor] = []
        found = recording.pooled_inputs(
            list(self.subject.model._flatten_layers()),
            lambda: outputs.extend(self.outputs(target, values, flat)),
            int(flat[0].shape[0]),
            _DESCRIBING,
        )
        if not found:
            raise InputError(
                "--features=inputs: no layer of the model with a matrix of weights shows its "
                "inputs, one row for each example: use --features=gradient."
            )
        return *outputs, tf.concat(found, axis=1)

    def norms(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        """Exact ‖∇ℓ‖²: float32 [B]."""
        return forms.summed_norm(list(self.gradients(target, values, flat).gradients.values()))

    def fast(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """What embedding would take without the weights that no rule is for."""
        found = self.gradients(target, values, flat)
        kept = [(self.specs[i], x) for i, x in found.gradients.items() if i not in found.general]
        if not kept:
            return [found.quantity]
        return [self.projection(kept) + tf.add_n([forms.squared_norm(x) for _, x in kept])[:, None]]

    def whole(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Gradients written out: float32 [B, N] of every weight."""
        found = self.gradients(target, values, flat).gradients
        return [
            forms.materialise(found[i], spec.shape)
            if i in found
            else tf.zeros([flat[0].shape[0], spec.size])
            for i, spec in enumerate(self.specs)
        ]

    @property
    def outer(self) -> dict[int, forms.Outer]:
        """By index of a weight whose gradients are outer products of one position, their specs."""
        return {
            i: form
            for i, form in self.dots.items()
            if isinstance(form, forms.Outer) and form.left.shape[1] == 1 and i not in self.general
        }

    def transformable(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> list[Any]:
        """The same, but outer products of one position as they are."""
        found = self.gradients(target, values, flat).gradients
        count = flat[0].shape[0]

        def one(i: int, spec: projections.WeightSpec) -> Any:
            if i in self.outer:
                zeros = tf.nest.map_structure(
                    lambda x: tf.zeros([count, 1, x.shape[-1]]), self.outer[i]
                )
                return found.get(i, zeros)
            if i in found:
                return forms.materialise(found[i], spec.shape)
            return tf.zeros([count, spec.size])

        return [one(i, spec) for i, spec in enumerate(self.specs)]

    def query_specs(self, rows: int) -> list[tf.TensorSpec]:
        """Of the flat tensors of `Queries`: every weight has its place, whatever the target."""
        return [
            tf.TensorSpec([rows, *spec.shape[1:]], spec.dtype)
            for spec in tf.nest.flatten(self.dots)
        ]

    @functools.cached_property
    def dots(self) -> dict[int, Form]:
        """By index of the weight, the form in which its inner products are taken."""

        def whole(i: int) -> Form:
            return forms.Full(tf.TensorSpec([None, self.weights[i].size], tf.float32))

        general = {i: whole(i) for i in self.general}
        found = self.found[1]
        kept = {
            i: form if self.as_scaled(i, found.forms[i]) is found.forms[i] else whole(i)
            for i, form in found.dots.items()
        }
        return dict(sorted({**kept, **general}.items()))

    def _ready(self, captured: capture.Captured) -> dict[int, Form]:
        return {
            i: forms.for_dot(form, self.specs[i].shape) for i, form in captured.gradients.items()
        }

    def queries(
        self, target: str, values: Sequence[tf.Tensor], flat: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """The flat tensors of `Queries`."""
        ready = self._ready(self.gradients(target, values, flat))

        def absent(spec: tf.TensorSpec) -> tf.Tensor:
            return tf.zeros([flat[0].shape[0], *(n or 1 for n in spec.shape[1:])], spec.dtype)

        return [
            x
            for i, form in self.dots.items()
            for x in tf.nest.flatten(ready.get(i, tf.nest.map_structure(absent, form)))
        ]

    def summed(
        self,
        target: str,
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
        weights: tf.Tensor,
    ) -> tf.Tensor:
        """Σ of the gradients times these weights, [B]: float32 [N]."""
        found = self.gradients(target, values, flat).gradients
        parts = [
            forms.total(found[i], weights, spec.shape) if i in found else tf.zeros([spec.size])
            for i, spec in enumerate(self.specs)
        ]
        return tf.concat(parts, axis=0)

    def products(
        self,
        target: str,
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
        vector: tf.Tensor,
    ) -> tf.Tensor:
        """Inner products with one vector, [N]: float32 [B]."""
        found = self.gradients(target, values, flat).gradients
        vectors = tf.split(vector, [spec.size for spec in self.specs])
        return tf.add_n(
            [forms.dot_vector(form, vectors[i], self.specs[i].shape) for i, form in found.items()]
        )

    def scores(
        self,
        target: str,
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
        queries: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        """Inner products with every query: float32 [B, Q]."""
        del target
        others = tf.nest.pack_sequence_as(self.dots, list(queries))
        own = self._ready(self.gradients("loss", values, flat))
        return tf.add_n([forms.dot(form, others[i]) for i, form in own.items()])

    def scores_of_written_out(
        self,
        target: str,
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
        queries: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        """The same with queries that are written out."""
        own = self.gradients(target, values, flat).gradients
        return tf.add_n(
            [forms.dot_written(x, queries[i], self.specs[i].shape) for i, x in own.items()]
        )

    def quadratic(
        self,
        target: str,
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
        parts: Mapping[str, Mapping[str, tf.Tensor]],
    ) -> tf.Tensor:
        """See `Engine.quadratic`."""
        own = self.gradients(target, values, flat).gradients
        found = []
        for name, part in parts.items():
            i, *bias = map(int, name.split("+"))
            if i in own:
                left, right = part.get("left"), part.get("right")
                shape = self.specs[i].shape
                found.append(forms.quadratic(own[i], shape, part["by"], left, right, bool(bias)))
        return tf.add_n(found)

    def moments(
        self,
        widest: int,
        target: str,
        values: Sequence[tf.Tensor],
        flat: Sequence[tf.Tensor],
        counted: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """See `Engine.moments`."""
        own = self.gradients(target, values, flat).gradients
        joined = {i: j for i, j in self.biases.items() if i in own}
        found: dict[str, tf.Tensor] = {}
        for i, form in own.items():
            if i not in joined.values():
                name = f"{i}+{joined[i]}" if i in joined else f"{i}"
                parts = forms.moments(form, counted, self.specs[i].shape, widest, i in joined)
                found |= {f"{name}/{part}": x for part, x in parts.items()}
        return found
