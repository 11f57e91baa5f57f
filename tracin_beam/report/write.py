"""Fetches the examples that a report shows, and writes it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tracin_beam.gradients import nests
from tracin_beam.inputs import formats
from tracin_beam.report import excerpt
from tracin_beam.report.explanations import Place, places_shown, reading
from tracin_beam.report.influence import influence_page
from tracin_beam.report.show import Shown, show_features
from tracin_beam.storage import files, records
from tracin_beam.storage.runs import Output

if TYPE_CHECKING:
    from tracin_beam.gradients.engine import Batch
    from tracin_beam.stages.workers import Loaded


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
    page = influence_page(
        rows,
        shown_at(loaded.parse, places),
        state,
        label_names=names,
        max_tests=max_tests,
        tests_in_table=found.tests,
    )
    with files.atomic_write(output.report(test_name)) as handle:
        handle.write(page.encode())
    return handle.stamp


def shown_at(parse: "Callable[[Sequence[bytes]], Batch]", places: set[Place]) -> dict[Place, Shown]:
    """What to show of examples.

    Args:
      parse: makes a batch of serialised records.
      places: (shard, position) of each example.
    """
    shown = {}
    for path in sorted({path for path, _ in places}):
        wanted = {position for other, position in places if other == path}
        for record in formats.read_at(path, wanted):
            if isinstance(record, records.Record):
                features = parse([record.data]).features
                features = nests.map_present(lambda x: x[0].numpy(), features)
                shown[path, record.position] = show_features(features, record.data)
    return shown
