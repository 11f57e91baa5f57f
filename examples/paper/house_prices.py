"""Why a regression misjudges a house, the experiment of section 4.4 of the TracIn paper.

A small network learns the median house value of California's districts. For the test districts that
it misjudges most, the training districts that pushed it there and those that held against it are
shown with where they are and what they cost.
"""

import argparse
import tempfile
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import sklearn.datasets

import tracin_beam

SHOWN = 3
DEGREE = 111.2  # kilometres

parse = tracin_beam.Parser(features=((8,), "float32"), label=((), "float32"), id=((), "string"))


def build_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(64, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(1),
        ]
    )


task = tracin_beam.Task(build_model, "mean_squared_error", parse)


def districts(path: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 8], the last two latitude and longitude, and values [N] in 100,000 dollars."""
    if path is None:
        return sklearn.datasets.fetch_california_housing(return_X_y=True)
    raw = pd.read_csv(path).dropna()
    homes = raw["households"]
    columns = [
        raw["median_income"],
        raw["housing_median_age"],
        raw["total_rooms"] / homes,
        raw["total_bedrooms"] / homes,
        raw["population"],
        raw["population"] / homes,
        raw["latitude"],
        raw["longitude"],
    ]
    return np.stack(columns, 1), raw["median_house_value"].to_numpy() / 1e5


def kilometres(places: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Distances of places [..., 2] (latitude, longitude in degrees) from another."""
    scale = np.array([1, np.cos(np.deg2rad(place[0]))]) * DEGREE
    return np.linalg.norm((places - place) * scale, axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="the original housing.csv; by default scikit-learn's copy")
    parser.add_argument("--examples", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    features, values = districts(args.data)
    order = np.random.default_rng(args.seed).permutation(len(values))
    features, values = features[order], values[order].astype("float32")
    known = features.copy()
    known[:, 2:6] = np.log1p(known[:, 2:6])
    inputs = ((known - known.mean(0)) / known.std(0)).astype("float32")
    train, test = slice(0, args.examples), slice(args.examples, args.examples + 100)

    keras.utils.set_random_seed(args.seed)
    model = build_model()
    model.compile(keras.optimizers.SGD(0.01), task.loss)
    with tempfile.TemporaryDirectory() as folder:
        model.fit(
            inputs[train],
            values[train],
            epochs=15,
            verbose=0,
            callbacks=[
                tracin_beam.TracInCheckpoint(
                    f"{folder}/ckpts", save_freq=3 * -(-args.examples // 32)
                )
            ],
        )
        for name, part in ("train", train), ("test", test):
            ids = np.arange(len(values))[part].astype(str)
            tracin_beam.write_shards(
                {"features": inputs[part], "label": values[part], "id": ids},
                f"{folder}/{name}-*.tfrecord",
            )
        result = tracin_beam.influence(
            task,
            checkpoints=f"{folder}/ckpts",
            train=f"{folder}/train-*.tfrecord",
            test=f"{folder}/test-*.tfrecord",
            output=str(Path(folder, "out")),
            preconditioner="kfac",
        )
        rows = result.table()

    places = features[:, 6:]
    rows["distance"] = [
        kilometres(places[int(a)], places[int(b)])
        for a, b in zip(rows["train_id"], rows["test_id"], strict=True)
    ]
    tests = rows.groupby("test_id", sort=False).first()
    error = (tests["test_prediction"] - tests["test_label"]).abs()
    print("\nThe most misjudged districts, values in units of 100,000 dollars:")
    for test_id in error.nlargest(SHOWN).index:
        seen = tests.loc[test_id]
        at = places[int(test_id)]
        print(
            f"\ndistrict {test_id} at {at[0]:.2f}, {at[1]:.2f}: "
            f"predicted {seen['test_prediction']:.2f}, is {seen['test_label']:.2f}"
        )
        for _, row in rows[(rows["test_id"] == test_id) & (rows["rank"] <= SHOWN)].iterrows():
            print(
                f"  {row['role']:9} {row['score']:+10.4g}  is {row['train_label']:.2f}, "
                f"predicted {row['train_prediction']:.2f}, {row['distance']:4.0f} km away"
            )
    random = np.random.default_rng(args.seed).integers(0, args.examples, len(rows))
    typical = [
        kilometres(places[a], places[int(b)]) for a, b in zip(random, rows["test_id"], strict=True)
    ]
    distances = rows.groupby("role")["distance"].median()
    print(
        f"\nMedian distance from the test district: proponents {distances['proponent']:.0f} km, "
        f"opponents {distances['opponent']:.0f} km, any district {np.median(typical):.0f} km."
    )


if __name__ == "__main__":
    main()
