"""What losses, labels and models a run takes and refuses, and what it says of them."""

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
