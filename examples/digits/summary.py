"""What the quickstart found: some explained predictions, and how many wrong labels came up."""

import argparse
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from tracin_beam.report.text import influence_summary

TOP = 10


def read(folder: Path) -> pa.Table:
    return ds.dataset(sorted(map(str, folder.glob("*.parquet"))), format="parquet").to_table()


def flipped_summary(self_influence: pa.Table, flipped: dict[str, tuple[int, int]]) -> str:
    """Says how many flipped labels stand at the top of the self-influence list.

    Args:
        self_influence: the self-influence table.
        flipped: (true label, given label) by the id of each example labelled wrongly on purpose.
    """
    ranked = self_influence.sort_by([("self_influence", "descending")])
    ids = ranked["id"].to_pylist()
    found = len(flipped.keys() & set(ids[: len(flipped)]))
    by_chance = len(flipped) ** 2 / len(ids)
    lines = [
        "Self-influence, highest first: what the model could only learn by heart",
        "  id          label  predicted  self-influence",
    ]
    for row in ranked.slice(0, TOP).to_pylist():
        note = f"  wrong on purpose: is a {flipped[row['id']][0]}" if row["id"] in flipped else ""
        lines.append(
            f"  {row['id']}  {row['label']:5.0f}  {row['prediction']:9.0f}"
            f"  {row['self_influence']:14.4g}{note}"
        )
    lines += [
        "",
        f"{len(flipped)} of the {len(ids)} training labels were flipped on purpose. The "
        f"{len(flipped)} examples of highest",
        f"self-influence hold {found} of them ({found / len(flipped):.0%}); "
        f"by chance it would be {by_chance:.1f} ({by_chance / len(flipped):.0%}).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("quickstart"))
    output = parser.parse_args().output
    out = output / "out"
    record = json.loads((output / "flipped.json").read_text(encoding="utf-8"))
    flipped = {f["id"]: (f["true_label"], f["given_label"]) for f in record["flipped"]}

    print()
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    print(influence_summary(read(out / "influence" / "test"), run))
    print(flipped_summary(read(out / "self_influence"), flipped))
    print()
    print(f"The page with all images: {(out / 'reports/test.html').resolve()}")


if __name__ == "__main__":
    main()
