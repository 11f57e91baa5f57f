"""Writes what is made from the flags: docs/flags.md's table, the Flex Template's parameters.

python deploy/documents.py
"""

import re
import runpy
from pathlib import Path

from tracin_beam.jobs import options

ROOT = Path(__file__).resolve().parents[1]
_TABLE = re.compile(r"^\| flag \| default \| \|\n(?:\|.*\n)+", re.MULTILINE)


def main() -> None:
    flags = ROOT / "docs/flags.md"
    written = _TABLE.sub(lambda _: options.flags_table(), flags.read_text("utf-8"), count=1)
    flags.write_text(written, "utf-8")
    runpy.run_path(str(ROOT / "deploy/dataflow/metadata.py"), run_name="__main__")


if __name__ == "__main__":
    main()
