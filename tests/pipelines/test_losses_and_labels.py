"""What losses, labels and models a run takes and refuses, and what it says of them."""

import numpy as np
import pytest
import tiny as t
from tiny import Tiny


@pytest.fixture
def tiny(tmp_path, launch):
    return Tiny(tmp_path, launch).write_all()


@pytest.fixture
def said(tiny, capfd):
    """A function that runs a job with a changed task, and gives its exit status and its words."""

    def run(*changes, stage="self_influence", **flags):
        task = t.TASK
        for old, new in changes:
            assert old in task
            task = task.replace(old, new)
        (tiny.folder / "task.py").write_text(task)
        capfd.readouterr()
        status = tiny.run(stage, **flags)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.err + captured.out

    return run


LOSS = "loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"


def loss(body):
    return LOSS, f"def loss(y, p):\n    {body}\n"


def test_a_loss_that_mixes_the_batch(said):
    softmax = "tf.nn.sparse_softmax_cross_entropy_with_logits"
    body = f"return {softmax}(tf.range(tf.shape(p)[0]), tf.matmul(p, p, transpose_b=True))"
    status, words = said(loss(body))
    assert status == 2
    assert "the loss mixes the examples of a batch" in words


def test_a_loss_that_an_example_alone_does_not_have(said):
    body = "return tf.reduce_mean(tf.square(p / tf.math.reduce_std(p, axis=0)))"
    status, words = said(loss(body))
    assert status == 2
    assert "the loss mixes the examples of a batch" in words


def test_a_loss_that_depends_on_no_weight_that_counts(said):
    status, words = said(loss("return tf.reduce_sum(0.0 * p, axis=1)"))
    assert status == 2
    assert "the gradient of the loss is zero for each of the first 8 examples" in words


def test_what_of_the_training_is_left_out_is_said_once(said):
    status, words = said(
        ("Dense(3, ", "Dense(3, kernel_regularizer='l2', activity_regularizer='l2', "),
    )
    assert status == 0
    assert words.count("are left out of the loss") == 1
    assert "kernel" in words


def output(layer):
    """The scores, and then what a layer makes of them."""
    scores = 'keras.layers.Dense(3, name="scores")'
    return scores, f"{scores}, {layer}"


def first_rows(tiny):
    """The first row of every test example."""
    found = {}
    for row in t.table(tiny.out / "influence" / "test"):
        found.setdefault(row["test_id"], row)
    return list(found.values())


def test_one_output_for_two_classes(tiny, said):
    status, words = said(
        output('keras.layers.Lambda(lambda x: tf.sigmoid(x[:, :1]))'),
        ("example = tf.io.parse_example(serialized, columns)\n",
         "example = tf.io.parse_example(serialized, columns)\n"
         "    example['y'] = example['y'] % 2\n"),
        (LOSS, "loss = 'binary_crossentropy'\n"),
        ("loss, parse)", "loss, parse, label_names=['neg', 'pos'])"),
        stage="influence",
    )  # fmt: skip
    assert status == 0
    assert tiny.run_json()["kind"]["threshold"] == 0.5
    wrong = sum(
        (row["test_prediction"] > 0.5) != (row["test_label"] == 1) for row in first_rows(tiny)
    )
    shown = [line for line in words.splitlines() if line.startswith("test") and "predicted" in line]
    assert sum("(wrong)" in line for line in shown) == min(wrong, len(shown))
    assert all("predicted pos (0." in x or "predicted neg (0." in x for x in shown)


SEVERAL = (
    output('keras.layers.Activation("sigmoid")'),
    (LOSS, "loss = 'binary_crossentropy'\n"),
    ('"label": example["y"]', '"label": tf.cast(tf.stack([example["y"] > 0, example["y"] > 1, '
     'example["x"][:, 0] > 0], 1), tf.float32)'),
)  # fmt: skip


def test_labels_of_several_classes(tiny, said):
    status, words = said(*SEVERAL, stage="influence")
    assert status == 0, words
    assert tiny.run_json()["kind"]["name"] == "multilabel"
    for row in first_rows(tiny):
        assert row["test_label"] is None
        assert row["test_prediction"] is None
    status, words = said(*SEVERAL, stage="influence", target="logit", test_name="logit")
    assert status == 2
    assert "--target=logit needs a classifier" in words
    one = ("loss, parse)", "loss, parse, kind='classification')")
    status, words = said(*SEVERAL, one, stage="influence")
    assert status == 2
    assert "kind" in words  # another kind than that of the output's embeddings


def test_an_embedding_with_class_numbers_is_no_classifier(tiny, said):
    status, words = said(loss("return tf.reduce_sum(p ** 2, 1)"), stage="influence")
    assert status == 0
    assert tiny.run_json()["kind"]["name"] == "other"
    assert "(wrong)" not in words
    assert np.all([row["test_prediction"] is None for row in first_rows(tiny)])
    assert sorted({row["test_label"] for row in first_rows(tiny)}) == [0, 1, 2]


def test_a_kind_that_there_is_not(said):
    status, words = said(("loss, parse)", "loss, parse, kind='classes')"))
    assert status == 2
    assert "take one of classification, multilabel, regression, other" in words


@pytest.mark.parametrize("feature", ["tf.io.RaggedFeature", "tf.io.VarLenFeature"])
def test_features_of_varying_length(tiny, said, feature):
    # Without its zeros each vector is shorter; the mean over it then depends on padding.
    status, words = said(
        ('"x": tf.io.FixedLenFeature([4], tf.float32)', f'"x": {feature}(tf.float32)'),
        ('keras.Input((4,)), ', 'keras.Input((None,)), keras.layers.Reshape((-1, 1)), '
         'keras.layers.GlobalAveragePooling1D(), keras.layers.Lambda(lambda x: x ** '
         'tf.constant([[1.0, 2.0, 3.0, 4.0]])), '),
        stage="influence",
    )  # fmt: skip
    assert status == 0, words
    assert "depends on the padding of a batch" in words
    trains = {row.id: row for row in tiny.good("train")}
    means = np.float32([row.x.mean() for row in trains.values()])
    weights = tiny.weights[-1]
    logits = means[:, None] ** np.arange(1, 5) @ weights[0] + weights[1]
    predicted = dict(zip(trains, logits.argmax(axis=1), strict=True))
    for row in t.table(tiny.out / "influence" / "test"):
        assert row["train_prediction"] == predicted[row["train_id"]]


def test_padding_that_parse_makes_and_the_model_does_not_mask(tiny, said):
    for i, row in enumerate(tiny.shards["train-0.tfrecord"]):
        tiny.shards["train-0.tfrecord"][i] = row.but(x=row.x[: 1 + i % 4])
    tiny.write("train-0.tfrecord", tiny.shards["train-0.tfrecord"])
    status, words = said(
        ('"x": tf.io.FixedLenFeature([4], tf.float32)', '"x": tf.io.RaggedFeature(tf.float32)'),
        ('"features": example["x"]', '"features": example["x"].to_tensor()'),
        ('keras.Input((4,)), ', 'keras.Input((None,)), keras.layers.Reshape((-1, 1)), '
         'keras.layers.GlobalAveragePooling1D(), keras.layers.Lambda(lambda x: x ** '
         'tf.constant([[1.0, 2.0, 3.0, 4.0]])), '),
    )  # fmt: skip
    assert status == 2
    assert "parse pads the records of a batch to one length" in words


@pytest.mark.parametrize(
    "changed",
    [
        'example["x"] + tf.random.normal(tf.shape(example["x"]))',
        'example["x"] - tf.reduce_mean(example["x"], axis=0)',
    ],
)
def test_what_parse_gives_for_a_record_is_its_own(said, changed):
    status, words = said(('"features": example["x"]', f'"features": {changed}'))
    assert status == 2
    assert "parse gives other values for a record among others than alone" in words
