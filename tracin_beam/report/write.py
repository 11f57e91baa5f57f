"""Fetches the examples that a report shows, and writes it."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracin_beam.gradients import nests
from tracin_beam.inputs import formats
from tracin_beam.report import clusters, excerpt, quality, sets, sprites
from tracin_beam.report.explanations import Place, places_shown, reading
from tracin_beam.report.influence import influence_page
from tracin_beam.report.show import Show, Shown, show_example
from tracin_beam.storage import files, records, runs, tables
from tracin_beam.storage.runs import Output

if TYPE_CHECKING:
    from tracin_beam.gradients.batches import Batch
    from tracin_beam.stages.workers import Loaded

_AT_ONCE = 256  # examples parsed together


def write_influence_report(
    output: Output, test_name: str, loaded: "Loaded", state: Mapping[str, Any], max_tests: int
) -> files.Stamp:
    """Writes reports/<test name>.html, and returns what it then holds.

    Args:
      output: where the tables are.
      test_name: of the test set.
      loaded: the task, which parses the examples that are shown.
      state: run.json.
      max_tests: test examples to show.
    """
    names = loaded.task.label_names
    found = excerpt.read(output.influence(test_name), state, names, max_tests)
    rows = found.rows
    places = places_shown(rows, reading(rows, state, names), max_tests=max_tests)
    # A run that did not ask for them keeps those of an earlier one if they hold still.
    groups, slices = (
        tables.read_folder(folder) if files.list_folder(folder) else None
        for folder in (
            output.path("group_influence", test_name),
            output.path("slice_influence", test_name),
        )
    )
    places |= sets.places_shown(slices)
    page = influence_page(
        rows,
        shown_at(loaded.parse, places, loaded.task.show),
        state,
        label_names=names,
        max_tests=max_tests,
        tests_in_table=found.tests,
        groups=groups,
        slices=slices,
    )
    with files.atomic_write(output.report(test_name)) as handle:
        handle.write(page.encode())
    return handle.stamp


def write_quality_report(
    output: Output,
    night: Mapping[str, Any],
    loaded: "Loaded",
    state: Mapping[str, Any],
    earlier: Sequence[Mapping[str, Any]],
) -> files.Stamp:
    """Writes quality/<date>/report.html, and returns what it then holds.

    Args:
      output: where the tables are.
      night: what `metrics.json` holds.
      loaded: the task, which parses the examples that are shown.
      state: run.json.
      earlier: what the `metrics.json` of earlier nights hold, oldest first.
    """
    folder = output.path("quality", night["date"])
    found = quality.read(folder)
    places = found.shown()
    # Many pictures are small on the page anyway, and are held together.
    side = sprites.SIDES[0] if len(places) <= 500 else 128 if len(places) <= 2000 else 64
    page = quality.quality_page(
        found,
        shown_at(loaded.parse, places, loaded.task.show, side),
        night,
        state,
        earlier=earlier,
        label_names=loaded.task.label_names,
        store=runs.digest([output.root]),
    )
    with files.atomic_write(files.join(folder, "report.html")) as handle:
        handle.write(page.encode())
    return handle.stamp


def write_cluster_report(output: Output, loaded: "Loaded", state: Mapping[str, Any]) -> files.Stamp:
    """Writes the page of the clusters, and returns what it then holds.

    Args:
      output: where the tables are.
      loaded: the task, which parses the examples that are shown.
      state: run.json.
    """
    summary = tables.read(output.cluster_summary)
    shown = shown_at(loaded.parse, clusters.places_shown(summary), loaded.task.show, 128)
    names = loaded.task.label_names
    page = clusters.clusters_page(summary, shown, state, label_names=names)
    with files.atomic_write(output.cluster_report) as handle:
        handle.write(page.encode())
    return handle.stamp


def shown_at(
    parse: "Callable[[Sequence[bytes]], Batch]",
    places: Collection[Place],
    show: Show | None,
    side: int | None = None,
) -> dict[Place, Shown]:
    """What to show of examples; those that cannot be read or parsed are left out.

    Args:
      parse: makes a batch of serialised records.
      places: (shard, position) of each example.
      show: `Task.show`, or None.
      side: pixels of a picture at most.
    """
    wanted: dict[str, set[int]] = {}
    for path, position in places:
        wanted.setdefault(path, set()).add(position)
    shown = {}
    for path in sorted(wanted):
        there = (r for r in formats.read_at(path, wanted[path]) if isinstance(r, records.Record))
        while batch := list(itertools.islice(there, _AT_ONCE)):
            for record, features in zip(batch, _features(parse, batch), strict=True):
                if features is not None:
                    one = show_example(features, record.data, show)
                    if side and one.kind == "image":
                        one = dataclasses.replace(one, value=sprites.shrunk(one.value, side))
                    shown[path, record.position] = one
    return shown


def _features(
    parse: "Callable[[Sequence[bytes]], Batch]", batch: "Sequence[records.Record]"
) -> list[Any]:
    """The features of each record in NumPy; None of one that does not parse."""
    try:
        features = nests.map_present(lambda x: x.numpy(), parse([r.data for r in batch]).features)
        return [_one(features, index) for index in range(len(batch))]
    except Exception:
        if len(batch) == 1:
            return [None]
        return [one for record in batch for one in _features(parse, [record])]


def _one(features: Any, index: int) -> Any:
    return nests.map_present(lambda x: x[index], features)
