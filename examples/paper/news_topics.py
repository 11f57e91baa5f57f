"""Why a text was filed under the wrong topic, the experiment of section 4.3 of the TracIn paper.

A small network with an embedding of words learns the topics of short texts. For the test texts that
it files wrongly, their strongest proponents and opponents among the training texts are shown.
"""

import argparse
import tempfile
import textwrap

import keras
import numpy as np
import pandas as pd
import sklearn.datasets
import tensorflow as tf

import tracin_beam

WORDS, LENGTH = 5000, 64
SHOWN = 3

_parse = tracin_beam.Parser(features=((), "string"), label=((), "int64"), id=((), "string"))


def tokenize(text: tf.Tensor) -> tf.Tensor:
    """tf.string [B] to int64 [B, LENGTH]: hashed words; 0 is no word."""
    words = tf.strings.split(tf.strings.regex_replace(tf.strings.lower(text), r"[^a-z]+", " "))
    numbers = tf.strings.to_hash_bucket_fast(words, WORDS - 1) + 1
    return numbers.to_tensor(shape=[None, LENGTH])


def parse(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    columns = _parse(serialized)
    return {**columns, "features": tokenize(columns["features"])}


def build_model(topics: int = 4) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int64"),
            layers.Embedding(WORDS, 32),
            layers.Conv1D(64, 3, activation="relu"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(topics),
        ]
    )


task = tracin_beam.Task(
    build_model, keras.losses.SparseCategoricalCrossentropy(from_logits=True), parse
)


def texts(path: str | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Texts [N], topics [N] and the topics' names."""
    if path:
        rows = pd.read_parquet(path)
        return (
            rows["text"].to_numpy(),
            rows["label"].to_numpy(),
            ["World", "Sports", "Business", "Sci/Tech"],
        )
    topics = ["talk.politics.mideast", "rec.sport.hockey", "misc.forsale", "sci.space"]
    groups = sklearn.datasets.fetch_20newsgroups(
        subset="all", categories=topics, remove=("headers", "footers", "quotes")
    )
    return np.array(groups.data, object), groups.target, list(groups.target_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data",
        help="Parquet with text and label of AG News; by default 20 newsgroups, downloaded",
    )
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    content, labels, names = texts(args.data)
    order = np.random.default_rng(args.seed).permutation(len(labels))
    content, labels = content[order], labels[order].astype("int64")
    cut = min(args.examples, len(labels) - 200)
    train, test = slice(0, cut), slice(cut, cut + 200)

    keras.utils.set_random_seed(args.seed)
    model = build_model()
    model.compile(keras.optimizers.SGD(0.2, momentum=0.9), task.loss, metrics=["accuracy"])
    with tempfile.TemporaryDirectory() as folder:
        model.fit(
            tokenize(tf.constant(content[train])),
            labels[train],
            batch_size=64,
            epochs=8,
            verbose=0,
            callbacks=[tracin_beam.TracInCheckpoint(f"{folder}/ckpts", save_freq=cut // 64 * 2)],
        )
        for name, part in ("train", train), ("test", test):
            ids = np.arange(len(labels))[part].astype(str)
            tracin_beam.write_shards(
                {"features": content[part], "label": labels[part], "id": ids},
                f"{folder}/{name}-*.tfrecord",
            )
        rows = tracin_beam.influence(
            task,
            checkpoints=f"{folder}/ckpts",
            train=f"{folder}/train-*.tfrecord",
            test=f"{folder}/test-*.tfrecord",
            output=f"{folder}/out",
            preconditioner="kfac",
        ).table()

    def line(number: int) -> str:
        return textwrap.shorten(str(content[number]), 80, placeholder="…")

    wrong = rows[rows["test_label"] != rows["test_prediction"]]
    print(
        f"\n{1 - wrong['test_id'].nunique() / rows['test_id'].nunique():.1%} of the test texts "
        "are filed rightly. Some that are not:"
    )
    for test_id in wrong["test_id"].unique()[:SHOWN]:
        its = wrong[wrong["test_id"] == test_id]
        given, predicted = its["test_label"].iloc[0], its["test_prediction"].iloc[0]
        print(f"\n{line(int(test_id))}")
        print(f"  is {names[int(given)]}, was filed under {names[int(predicted)]}")
        for _, row in its[its["rank"] <= SHOWN].iterrows():
            print(
                f"  {row['role']:9} {row['score']:+10.4g}  {names[int(row['train_label'])]:10} "
                f"{line(int(row['train_id']))}"
            )
    same = (rows["train_label"] == rows["test_label"]).groupby(rows["role"]).mean()
    print(
        f"\nOf the test text's own topic: {same['proponent']:.0%} of the proponents, "
        f"{same['opponent']:.0%} of the opponents."
    )


if __name__ == "__main__":
    main()
