"""What all pages share: templates, and what run.json says of the run.

A page is a function from tables to the context of a template in `templates/`, of which `render`
makes a document. It is written by the function `page` of its job's parts.
"""

from collections.abc import Mapping
from typing import Any

import jinja2

from tracin_beam.report import words
from tracin_beam.report.facts import run_facts

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("tracin_beam.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, context: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Makes a page.

    Args:
      template: name of a file in `templates/`.
      context: what the page shows.
      run: what run.json holds. Whatever is missing or null is left out of the page.

    Returns:
      A whole HTML document that refers to nothing outside itself.
    """
    return _TEMPLATES.get_template(template).render(**_of_run(run), **context)


def _of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """What every page may say of a run: its facts, flags and versions."""
    config = run.get("config") or {}
    versions = run.get("versions") or {}
    return {
        "facts": run_facts(run),
        "config": {
            words.printable(k): words.printable(v) for k, v in config.items() if v is not None
        },
        "versions": ", ".join(
            f"{words.printable(k)} {words.printable(v)}" for k, v in versions.items()
        ),
        "number": words.number,
    }
