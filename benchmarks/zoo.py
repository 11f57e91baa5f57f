"""Every kind of model at its price: exactness, cost, memory and time to the first result.

    python benchmarks/zoo.py [--model NAME ...] [--repeats N] [--list]

A row for each model, built in place with random weights and measured in a process of its own:

    weights     millions of trainable numbers
    slow        share of them without a fast way, which take a product for each example
    error       of whole gradients, against one `tf.GradientTape` per example, relative
    batch       what the engine chooses
    ratio       embedding a batch with the default flags to a bare forward and backward pass over
                all weights, medians of interleaved runs
    GB          peak resident memory while embedding, over what was there before the engine
    first, s    from a model to the first embeddings: tracing and all

KerasHub's backbones are measured where `keras-hub` is installed: pip install 'tracin-beam[zoo]'.
"""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ZOO: dict[str, "Entry"] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
      build: makes it.
      features: makes n examples' features.
      labels: makes n examples' labels.
      hub: whether it needs KerasHub.
    """

    build: Callable[[], Any]
    features: Callable[[int], np.ndarray]
    labels: Callable[[int], np.ndarray]
    hub: bool = False


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def vectors(width: int = 784) -> Callable[[int], np.ndarray]:
    return lambda n: _rng().normal(size=(n, width)).astype("float32")


def images(side: int = 32, channels: int = 3) -> Callable[[int], np.ndarray]:
    return lambda n: _rng().random((n, side, side, channels), dtype="float32")


def sequences(steps: int, width: int) -> Callable[[int], np.ndarray]:
    return lambda n: _rng().normal(size=(n, steps, width)).astype("float32")


def tokens(length: int = 128, vocabulary: int = 8000) -> Callable[[int], np.ndarray]:
    return lambda n: _rng().integers(1, vocabulary, (n, length)).astype("int32")


def classes(n: int) -> np.ndarray:
    return _rng().integers(0, 4, n)


def entry(
    features: Callable[[int], np.ndarray],
    labels: Callable[[int], np.ndarray] = classes,
    hub: bool = False,
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a function that builds a model under its name."""

    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        ZOO[build.__name__] = Entry(build, features, labels, hub)
        return build

    return register


# --- dense ------------------------------------------------------------------------------------


@entry(vectors())
def mlp() -> Any:
    from models import mlp as build

    return build(classes=4)


@entry(vectors())
def own_dense() -> Any:
    import keras

    class Linear(keras.layers.Layer):
        def __init__(self, units: int) -> None:
            super().__init__()
            self.units = units

        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(shape[-1], self.units), initializer="glorot_uniform")
            self.b = self.add_weight(shape=(self.units,), initializer="zeros")

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, self.w) + self.b

    layers = [Linear(512), keras.layers.ReLU(), Linear(256), keras.layers.ReLU(), Linear(4)]
    return keras.Sequential([keras.Input((784,)), *layers])


@entry(vectors())
def scaled_dense() -> Any:
    import keras

    class Scaled(keras.layers.Dense):
        def call(self, inputs: Any, training: Any = None) -> Any:
            return 2 * super().call(inputs)

    layers = [Scaled(512, "relu"), Scaled(256, "relu"), Scaled(4)]
    return keras.Sequential([keras.Input((784,)), *layers])


@entry(vectors())
def lora() -> Any:
    from models import mlp as build

    model = build(classes=4)
    for layer in model.layers:
        layer.enable_lora(8)
    return model


@entry(vectors(64))
def cross_network() -> Any:
    """Deep and cross (Wang et al., 2017, arXiv 1708.05123)."""
    import keras

    class Cross(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(64, 1))
            self.b = self.add_weight(shape=(64,), initializer="zeros")

        def call(self, pair: Any) -> Any:
            first, x = pair
            return first * keras.ops.matmul(x, self.w) + self.b + x

    x = inputs = keras.Input((64,))
    for _ in range(3):
        x = Cross()([inputs, x])
    deep = keras.layers.Dense(128, "relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Concatenate()([x, deep])))


# --- images -----------------------------------------------------------------------------------


@entry(images())
def cnn() -> Any:
    import keras

    layers = keras.layers
    stack = [layers.Conv2D(n, 3, strides=2, activation="relu") for n in (32, 64, 64)]
    return keras.Sequential([keras.Input((32, 32, 3)), *stack, layers.Flatten(), layers.Dense(4)])


@entry(images())
def wide_cnn() -> Any:
    """Wide windows and few channels, then wide layers."""
    import keras

    layers = keras.layers
    sizes = ((32, 7, 1), (64, 5, 2), (128, 3, 2))
    stack = [layers.Conv2D(n, k, s, "same", activation="relu") for n, k, s in sizes]
    top = [layers.GlobalAveragePooling2D(), layers.Dense(4)]
    return keras.Sequential([keras.Input((32, 32, 3)), *stack, *top])


@entry(images())
def resnet20() -> Any:
    from models import resnet20 as build

    return build(classes=4)


@entry(images())
def prelu_cnn() -> Any:
    import keras

    layers = keras.layers
    x = inputs = keras.Input((32, 32, 3))
    for n in (16, 32):
        x = layers.Conv2D(n, 3, strides=2, padding="same")(x)
        x = layers.PReLU()(x)
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(x)))


@entry(images())
def separable() -> Any:
    import keras

    layers = keras.layers
    x = inputs = keras.Input((32, 32, 3))
    for n in (16, 32, 64):
        x = layers.SeparableConv2D(n, 3, strides=2, padding="same")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def _patches(side: int, patch: int, width: int) -> tuple[Any, Any]:
    import keras

    inputs = keras.Input((side, side, 3))
    x = keras.layers.Conv2D(width, patch, strides=patch)(inputs)
    return inputs, keras.layers.Reshape((-1, width))(x)


@entry(images())
def vision_transformer() -> Any:
    """As in the Keras tutorials, with a class token and a raw weight of positions."""
    import keras

    layers = keras.layers

    class Tokens(layers.Layer):
        def build(self, shape: Any) -> None:
            self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="random_normal")
            self.positions = self.add_weight(shape=(1, shape[1] + 1, shape[-1]))

        def call(self, x: Any) -> Any:
            token = keras.ops.broadcast_to(self.token, (keras.ops.shape(x)[0], 1, x.shape[-1]))
            return keras.ops.concatenate([token, x], axis=1) + self.positions

    inputs, x = _patches(32, 4, 64)
    x = Tokens()(x)
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 16)(y, y)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(64)(layers.Dense(128, "gelu")(y))
    return keras.Model(inputs, layers.Dense(4)(layers.LayerNormalization()(x)[:, 0]))


@entry(images())
def layer_scale() -> Any:
    """ConvNeXt's block (Liu et al., 2022, arXiv 2201.03545)."""
    import keras

    layers = keras.layers

    class Scale(layers.Layer):
        def build(self, shape: Any) -> None:
            self.gamma = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x: Any) -> Any:
            return x * self.gamma

    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(48, 4, strides=4)(inputs)
    for _ in range(3):
        y = layers.DepthwiseConv2D(7, padding="same")(x)
        y = layers.Dense(192, "gelu")(layers.LayerNormalization()(y))
        x = x + Scale()(layers.Dense(48)(y))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def _application(name: str) -> None:
    def build() -> Any:
        import keras

        model = getattr(keras.applications, name)
        return model(weights=None, input_shape=(96, 96, 3), classes=4, classifier_activation=None)

    build.__name__ = name
    entry(images(96))(build)


for _name in ("MobileNetV2", "EfficientNetB0", "ResNet50", "DenseNet121", "ConvNeXtTiny"):
    _application(_name)


# --- sequences --------------------------------------------------------------------------------


def _recurrent(name: str, layer: Callable[[Any], Any], steps: int = 28, width: int = 28) -> None:
    def build() -> Any:
        import keras

        stack = [keras.Input((steps, width)), layer(keras.layers), keras.layers.Dense(4)]
        return keras.Sequential(stack)

    build.__name__ = name
    entry(sequences(steps, width))(build)


_recurrent("simple_rnn", lambda layers: layers.SimpleRNN(64))
_recurrent("lstm", lambda layers: layers.LSTM(64))
_recurrent("gru", lambda layers: layers.GRU(64))
_recurrent("gru_reset_before", lambda layers: layers.GRU(64, reset_after=False))
_recurrent("bidirectional_gru", lambda layers: layers.Bidirectional(layers.GRU(64)))
_recurrent("bidirectional_lstm_200", lambda layers: layers.Bidirectional(layers.LSTM(64)), 200, 32)
_recurrent("stacked_cells", lambda layers: layers.RNN([layers.LSTMCell(64), layers.GRUCell(32)]))


@entry(lambda n: _rng().random((n, 8, 16, 16, 2), dtype="float32"))
def conv_lstm() -> Any:
    import keras

    layers = keras.layers
    stack = [layers.ConvLSTM2D(8, 3), layers.Flatten(), layers.Dense(4)]
    return keras.Sequential([keras.Input((8, 16, 16, 2)), *stack])


@entry(lambda n: _rng().random((n, 8, 32, 32, 3), dtype="float32"))
def time_distributed() -> Any:
    import keras

    layers = keras.layers
    frame = keras.Sequential(
        [layers.Conv2D(16, 3, strides=2, activation="relu"), layers.GlobalAveragePooling2D()]
    )
    stack = [layers.TimeDistributed(frame), layers.LSTM(32), layers.Dense(4)]
    return keras.Sequential([keras.Input((8, 32, 32, 3)), *stack])


@entry(tokens(128, 8192))
def transformer() -> Any:
    from models import transformer as build

    return build()


@entry(tokens(64, 8000), tokens(64, 8000))
def tied_language_model() -> Any:
    """A small GPT whose embedding matrix gives the logits, too."""
    import keras

    layers = keras.layers

    class Decoder(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = layers.Embedding(8000, 128)
            self.positions = layers.Embedding(64, 128)
            self.blocks = [
                (
                    layers.LayerNormalization(),
                    layers.MultiHeadAttention(4, 32),
                    layers.LayerNormalization(),
                    layers.Dense(512, "gelu"),
                    layers.Dense(128),
                )
                for _ in range(2)
            ]

        def call(self, ids: Any) -> Any:
            x = self.embedding(ids) + self.positions(keras.ops.arange(ids.shape[1]))
            for norm, attention, other, wide, narrow in self.blocks:
                y = norm(x)
                x = x + attention(y, y, use_causal_mask=True)
                x = x + narrow(wide(other(x)))
            return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))

    return Decoder()


@entry(lambda n: np.array([f"word{i % 7} some more word{i % 5} words" for i in range(n)]))
def text_vectorization() -> Any:
    import keras

    layers = keras.layers
    vectorize = layers.TextVectorization(output_sequence_length=16)
    vectorize.adapt([f"word{i} some more words" for i in range(9)])

    class Classifier(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.vectorize = vectorize
            self.embedding = layers.Embedding(100, 32, mask_zero=True)
            self.pool = layers.GlobalAveragePooling1D()
            self.top = layers.Dense(4)

        def call(self, text: Any) -> Any:
            return self.top(self.pool(self.embedding(self.vectorize(text))))

    return Classifier()


# --- KerasHub ---------------------------------------------------------------------------------


def _hub(name: str, make: Callable[[Any], Any], causal: bool = False) -> None:
    def build() -> Any:
        import keras
        import keras_hub

        backbone = make(keras_hub.models)
        ids = keras.Input((64,), dtype="int32")
        given = {
            "token_ids": ids,
            "padding_mask": keras.ops.ones_like(ids),
            "segment_ids": keras.ops.zeros_like(ids),
        }
        names = [x.name for x in backbone.inputs]
        x = backbone({key: value for key, value in given.items() if key in names})
        if isinstance(x, dict):
            x = x["sequence_output"]
        if causal:
            return keras.Model(ids, backbone.token_embedding(x, reverse=True))
        return keras.Model(ids, keras.layers.Dense(4)(x[:, 0]))

    build.__name__ = name
    entry(tokens(64, 8000), tokens(64, 8000) if causal else classes, hub=True)(build)


_SIZES = {"num_layers": 4, "num_heads": 4, "hidden_dim": 256, "intermediate_dim": 1024}
_GROUPED = {
    "vocabulary_size": 8000,
    "num_layers": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 256,
    "intermediate_dim": 1024,
}
_hub("hub_bert", lambda m: m.BertBackbone(8000, **_SIZES, max_sequence_length=64))
_hub("hub_distilbert", lambda m: m.DistilBertBackbone(8000, **_SIZES, max_sequence_length=64))
_hub("hub_roberta", lambda m: m.RobertaBackbone(8000, **_SIZES, max_sequence_length=64))
_hub("hub_gpt2", lambda m: m.GPT2Backbone(8000, **_SIZES, max_sequence_length=64), causal=True)
_hub("hub_llama", lambda m: m.LlamaBackbone(**_GROUPED), causal=True)
_hub("hub_mistral", lambda m: m.MistralBackbone(**_GROUPED), causal=True)
_hub("hub_gemma", lambda m: m.GemmaBackbone(**_GROUPED, head_dim=64), causal=True)


@entry(images(32), hub=True)
def hub_vit() -> Any:
    import keras
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
    )
    return keras.Model(backbone.input, keras.layers.Dense(4)(backbone.output[:, 0]))


# --- measuring --------------------------------------------------------------------------------


def task_and_batch(chosen: Entry, size: int) -> tuple[Any, Any, Any]:
    """The task, its parser and a batch of `size` examples."""
    import keras
    import tensorflow as tf

    from tracin_beam import Task
    from tracin_beam.gradients.batches import BatchParser

    x, y = tf.constant(chosen.features(size)), tf.constant(chosen.labels(size))

    def parse(serialised: Any) -> dict[str, Any]:
        row = tf.strings.to_number(serialised, tf.int32)
        return {"features": tf.gather(x, row), "label": tf.gather(y, row)}

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    task = Task(chosen.build, loss, parse)
    parser = BatchParser(task)
    return task, parser, parser([str(i).encode() for i in range(size)])


def relative_error(chosen: Entry) -> tuple[float, float, int]:
    """The greatest error of a gradient, share of weights without a fast way, and weights."""
    import tensorflow as tf

    from tracin_beam.gradients.engine import Engine, EngineConfig

    task, parser, batch = task_and_batch(chosen, 3)
    engine = Engine(task, EngineConfig(projection="none", batch_size=3), parser, batch)
    rng = _rng()
    for variable in engine.model.trainable_variables:
        noise = 0.02 * rng.normal(size=variable.shape)
        variable.assign(variable + tf.cast(noise, variable.dtype))
    values = [tf.identity(v.value) for v in engine.model.variables]
    got = engine.embed(values, batch).embedding
    worst = 0.0
    for i in range(batch.size):
        expected = engine._plain(values, batch.take([i]))
        flat = np.concatenate([np.asarray(g, np.float32).ravel() for g in expected])
        worst = max(worst, float(np.linalg.norm(flat - got[i]) / np.linalg.norm(flat)))
    total = sum(spec.size for spec in engine.specs)
    slow = sum(engine.specs[i].size for i in engine.general)
    return worst, slow / total, total


def cost(chosen: Entry, repeats: int) -> tuple[int, float, float, float]:
    """Batch size, ratio to the bare pass, GB, and seconds to the first result."""
    import engine as engine_benchmark
    import tensorflow as tf
    from memory import memory

    from tracin_beam.gradients.engine import Engine, EngineConfig

    task, parser, example = task_and_batch(chosen, 1)
    before = memory("VmRSS")
    start = time.perf_counter()
    engine = Engine(task, EngineConfig(), parser, example)
    size = engine.batch_size
    _, parser, batch = task_and_batch(chosen, size)
    values = [tf.identity(v.value) for v in engine.model.variables]
    engine.embed(values, batch)
    first = time.perf_counter() - start
    engine.embed(values, batch)
    grown = (memory("VmHWM") - before) / 2**20
    ways = {
        "embed": lambda: engine.embed(values, batch),
        "bare": engine_benchmark.bare_pass(engine, batch),
    }
    taken = engine_benchmark.medians(ways, repeats)
    return size, taken["embed"] / taken["bare"], grown, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=sorted(ZOO), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--part", choices=["error", "cost"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(ZOO))
        return
    if arguments.part:
        chosen = ZOO[arguments.model[0]]
        found = (
            relative_error(chosen) if arguments.part == "error" else cost(chosen, arguments.repeats)
        )
        print(json.dumps(found))
        return
    hub = importlib.util.find_spec("keras_hub") is not None
    names = arguments.model or [n for n, one in ZOO.items() if hub or not one.hub]
    print("| model | weights, M | slow | error | batch | ratio | GB | first, s |")
    print("|---|---|---|---|---|---|---|---|")
    ratios = []
    for name in names:
        parts = []
        for part in ("error", "cost"):
            command = [sys.executable, __file__, "--model", name, "--part", part]
            command += ["--repeats", str(arguments.repeats)]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            if found.returncode:
                lines = found.stderr.strip().splitlines() or [f"exit {found.returncode}"]
                print(f"| {name} | {part} failed: {lines[-1][:300]} |", flush=True)
                break
            parts.append(json.loads(found.stdout.splitlines()[-1]))
        if len(parts) < 2:
            continue
        (error, slow, total), (size, ratio, grown, first) = parts
        ratios.append(ratio)
        row = f"{total / 1e6:.2f} | {slow:.1%} | {error:.0e} | {size} | {ratio:.2f}"
        print(f"| {name} | {row} | {grown:.2f} | {first:.1f} |", flush=True)
    if ratios:
        print(f"\nMedian ratio {np.median(ratios):.2f}, greatest {max(ratios):.2f}.")


if __name__ == "__main__":
    main()
