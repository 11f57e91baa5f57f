"""What all pages share: templates, and what run.json says of the run.

A page is a function from tables to the context of a template in `templates/`, of which `render`
makes a document. It is written by the function `page` of its job's parts.
"""

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from tracin_beam.report import words
from tracin_beam.report.facts import run_facts

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("tracin_beam.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(
    template: str,
    context: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    styles: Sequence[str],
    scripts: Sequence[str],
) -> str:
    """Makes a page.

    Args:
      template: name of a file in `templates/`.
      context: what the page shows.
      run: what run.json holds. Whatever is missing or null is left out of the page.
      styles: files in `templates/` that are put into the page as its style.
      scripts: those that are put into it as its script. Nothing else runs: the page's policy names
        style and script by their digests.

    Returns:
      A whole HTML document that refers to nothing outside itself.
    """
    style, script = _together(tuple(styles)), _together(tuple(scripts))
    policy = {
        "default-src": "'none'",
        "script-src": _digest(script) if script else "'none'",
        "style-src": _digest(style),
        "img-src": "data:",
        "media-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        # No text becomes markup: the browser refuses whatever would make some.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return _TEMPLATES.get_template(template).render(
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=Markup(style),
        script=Markup(script),
        **_of_run(run),
        **context,
    )


@functools.cache
def _together(names: tuple[str, ...]) -> str:
    folder = resources.files("tracin_beam.report") / "templates"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _digest(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


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
        "printable": words.printable,
    }
