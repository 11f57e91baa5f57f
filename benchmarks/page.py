"""How large the page of a night is, and how fast in a browser.

    python page.py [--data ../../shared/data] [--suspects 10000]

Makes pages of made-up signals and real contents, and opens each in headless Chromium, several
times: seconds until the list can be used, and milliseconds from a filter's change until the next
frame is drawn. "slow" is the same with the processor slowed down four times, as on a phone.
"""

import argparse
import gzip
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import night_tables  # noqa: E402
from browser import Browser  # noqa: E402

from tracin_beam.report import quality  # noqa: E402
from tracin_beam.report.show import Shown, show_features  # noqa: E402

TIMES = 5
CHECKPOINTS = 10
FILTERS = {
    "class": """const s = document.getElementById('choose-given');
        s.selectedIndex = 1 + arguments[0] % 3; s.dispatchEvent(new Event('change'));""",
    "matrix": """document.querySelectorAll('.matrix td button')[1 + arguments[0]].click();""",
    "histogram": """const s = document.querySelector('svg[aria-label^="loss: filter"]');
        s.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
        s.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));""",
    "search": """const s = document.getElementById('search');
        s.value = String(arguments[0] + 1); s.dispatchEvent(new Event('input'));""",
    "sort": """const s = document.getElementById('sort');
        s.selectedIndex = 4 + arguments[0]; s.dispatchEvent(new Event('change'));""",
}
# Until what is drawn after the change has been drawn: the search waits for more letters by itself.
MEASURED = """
    const done = arguments[arguments.length - 1];
    const text = () => ['count', 'rows'].map((id) => document.getElementById(id).innerText).join();
    const before = text();
    const start = performance.now();
    %s
    const look = () => requestAnimationFrame(() => setTimeout(() => {
        if (text() !== before || performance.now() - start > 2000) done(performance.now() - start);
        else look();
    }));
    look();
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--suspects", type=int, default=10_000)
    args = parser.parse_args()
    found = night(args.suspects)
    print("| contents | made in s | bytes | of pictures | usable after s | slow |", end="")
    print("".join(f" {name} ms | slow |" for name in FILTERS))
    print("|---|---|---|---|---|---|" + "---|---|" * len(FILTERS))
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(pathlib.Path(folder))
        try:
            for name, contents in workloads(args.data).items():
                shown = dict(zip(found.shown(), contents, strict=False))
                start = time.perf_counter()
                page = quality.quality_page(
                    found, shown, night_tables.metrics(args.suspects), night_tables.RUN
                )
                seconds = time.perf_counter() - start
                pictures = sum(map(len, re.findall('class="sheet">([^<]*)', page)))
                cells = [name, f"{seconds:.1f}", f"{len(page.encode()):,}", f"{pictures:,}"]
                fast, slow = measured(browser, page, 1), measured(browser, page, 4)
                for one, other in zip(fast, slow, strict=True):
                    cells += [one, other]
                print(f"| {' | '.join(cells)} |", flush=True)
        finally:
            browser.driver.quit()


def measured(browser: Browser, page: str, slower: int) -> list[str]:
    """Seconds until the page can be used, and milliseconds of each filter: medians."""
    browser._command("Emulation.setCPUThrottlingRate", rate=slower)
    usable = []
    for _ in range(TIMES):
        browser.open(page)
        mark = browser.run("performance.getEntriesByName('usable')[0].startTime")
        usable.append(mark / 1000)
    cells = [f"{statistics.median(usable):.2f}"]
    for change in FILTERS.values():
        taken = []
        for i in range(TIMES):
            taken.append(browser.driver.execute_async_script(MEASURED % change, i))
            browser.click("#clear") if browser.run(
                "!document.getElementById('clear').disabled"
            ) else 0
        cells.append(f"{statistics.median(taken):.0f}")
    browser._command("Emulation.setCPUThrottlingRate", rate=1)
    return cells


def night(count: int) -> quality.Found:
    """Suspects of ten classes in forty shards, with evidence, twelve signals and curves."""
    rng = np.random.default_rng(0)
    rows = [
        night_tables.suspect(
            i,
            label=float(rng.integers(10)),
            suggested_label=float(rng.integers(10)),
            shard=f"gs://bucket/data/train-{i % 40:05d}-of-00040.tfrecord",
            supporting_ids=[f"train-{j}" for j in rng.integers(2 * count, size=5)],
            content_hash=rng.bytes(16),
        )
        for i in range(count)
    ]
    signals = night_tables.signals(count, CHECKPOINTS)
    shards = [f"gs://bucket/data/train-{i % 40:05d}-of-00040.tfrecord" for i in range(2 * count)]
    signals = signals.set_column(1, "shard", pa.array(shards))
    for name in quality.SIGNALS:
        if name not in signals.column_names:
            signals = signals.append_column(name, pa.array(rng.exponential(size=2 * count)))
    return night_tables.found(table=pa.Table.from_pylist(rows, night_tables.SUSPECTS), of=signals)


def workloads(data: pathlib.Path) -> dict[str, Iterator[Shown]]:
    """What examples show: 12,000 pictures, texts or rows of a table each."""

    def fashion() -> Iterator[Shown]:
        with np.load(data / "fashion_mnist.npz") as arrays:
            for picture in arrays["x_train"][: quality.MOST_EXAMPLES]:
                yield show_features(picture, b"")

    def cifar() -> Iterator[Shown]:
        with np.load(data / "cifar10_first4000_lossless.npz") as arrays:
            for turned in (slice(None), slice(None, None, -1)):
                for picture in arrays["x_train"]:
                    yield show_features(picture[:, turned], b"")
            for picture in arrays["x_train"]:
                yield show_features(picture[::-1], b"")

    def news() -> Iterator[Shown]:
        table = pq.read_table(data / "ag_news_partial.parquet", columns=["text"])
        for text in table["text"].to_pylist()[: quality.MOST_EXAMPLES]:
            yield show_features(text, b"")

    def housing() -> Iterator[Shown]:
        with gzip.open(data / "california_housing.csv.gz", "rt") as lines:
            names = next(lines).strip().split(",")
            for _, line in zip(range(quality.MOST_EXAMPLES), lines, strict=False):
                values = line.strip().split(",")
                yield show_features(dict(zip(names, values, strict=True)), b"")

    return {
        "Fashion-MNIST, 28×28": fashion(),
        "CIFAR-10, 32×32 in colour": cifar(),
        "AG News": news(),
        "California housing": housing(),
    }


if __name__ == "__main__":
    main()
