"""Fetches the examples that a report shows, and writes it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracin_beam import files, nests, records, tables
from tracin_beam.report.influence import influence_page
from tracin_beam.report.show import Shown, show_features
from tracin_beam.report.view import places_shown

if TYPE_CHECKING:
    from tracin_beam.preflight import Run
    from tracin_beam.workers import Loaded


def write_influence_report(run: "Run", state: Mapping[str, Any]) -> None:
    """Writes report.html beside the influence tables.

    Args:
      run: the run.
      state: run.json.
    """
    name, count = run.config.test_name, run.config.report_examples
    rows = tables.read(run.output.influence(name, "influence-*.parquet"))
    loaded = run.source.get()
    names = loaded.task.label_names
    places = places_shown(rows, label_names=names, max_tests=count)
    page = influence_page(rows, _shown(loaded, places), state, label_names=names, max_tests=count)
    with files.atomic_write(run.output.influence(name, "report.html")) as handle:
        handle.write(page.encode())


def _shown(loaded: "Loaded", places: set[tuple[str, int]]) -> dict[tuple[str, int], Shown]:
    shown = {}
    for path in sorted({path for path, _ in places}):
        wanted = {position for other, position in places if other == path}
        for record in records.read_records(path):
            if record.position in wanted and isinstance(record, records.Record):
                features = loaded.parse([record.data]).features
                features = nests.map_present(lambda x: x[0].numpy(), features)
                shown[path, record.position] = show_features(features, record.data)
    return shown
