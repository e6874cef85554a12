# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What all pages have in common: the file they are, its sections, switches and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from custom.reporting.figures import LUNG_WINDOW
from custom.reporting.wording import escape, format_number

__all__ = ["COURSE", "NOTICE", "assemble_page", "colour_key", "describe_software", "layer_tools"]
__all__ += ["read_pictures", "replace_course", "say_window", "section"]

NOTICE = "Research use only. Not a medical device."

COURSE = ("<!--course-->", "<!--/course-->")
"""Between these marks lies what a study's page says of the course; a follow-up replaces it."""

_PICTURES = re.compile(r'<script type="application/json" id="pictures">(.*?)</script>', re.DOTALL)


def assemble_page(title: str, body: str, pictures: Mapping[str, Any] | None = None) -> str:
    """Put a page's parts into one file.

    Args:
        title: of the page, plain text.
        body: HTML.
        pictures: content for the scroll through slices.
    """
    folder = files("custom.reporting") / "templates"
    text = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "viewer.js")
    }
    # "<" would end the element early, were it ever in the content.
    content = json.dumps(pictures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(text["page.html"]).substitute(
        title=escape(title),
        style=text["style.css"],
        script=text["viewer.js"],
        body=body,
        pictures=content,
        footer=escape(NOTICE),
    )


def read_pictures(page: str) -> dict[str, Any] | None:
    """Take the pictures out of a page, as :meth:`StudyPictures.to_json` gave them; None where it has none.

    Args:
        page: what :func:`build_page` wrote.

    Raises:
        ValueError: When it is no such page.
    """
    found = _PICTURES.search(page)
    if found is None:
        raise ValueError("not a page of this software: it holds no pictures")
    return json.loads(found.group(1))


def replace_course(page: str, course: str) -> str:
    """Put the course of several studies into the page of one of them.

    Args:
        page: what :func:`build_page` wrote.
        course: HTML of the section's content.

    Raises:
        ValueError: When the page has no place for it.
    """
    before, start, rest = page.partition(COURSE[0])
    _, end, after = rest.partition(COURSE[1])
    if not start or not end:
        raise ValueError("not a page of this software: it has no place for the course")
    return f"{before}{start}{course}{end}{after}"


def say_window() -> str:
    """The window of all pictures."""
    return f"{format_number(LUNG_WINDOW[0], 0)} to {format_number(LUNG_WINDOW[1], 0)} HU"


def section(name: str, title: str, content: str, lead: str = "") -> str:
    """A part of a page with a heading; nothing where there is no content."""
    said = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{name}"><h2>{title}</h2>{said}{content}</section>' if content else ""


def layer_tools(extra: str = "") -> str:
    """The switches of the masks, and what their colours mean.

    Args:
        extra: HTML of more switches.
    """
    return (
        '<div class="tools">'
        '<button type="button" data-layer="mask" aria-pressed="true">Opacity<kbd>M</kbd></button>'
        '<button type="button" data-layer="lungs" aria-pressed="true">Lungs<kbd>L</kbd></button>'
        f"{extra}</div>"
    )


def colour_key() -> str:
    """What the colours of the masks mean."""
    return (
        '<ul class="key"><li><i class="ground_glass"></i>ground-glass</li>'
        '<li><i class="consolidation"></i>consolidation</li><li><i class="outline"></i>lungs</li></ul>'
    )


def describe_software(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What made the masks, as rows of (name, HTML).

    Args:
        model: ``bundle``, ``software_version`` and ``weights_sha256``.
    """
    weights = model["weights_sha256"]
    return [
        (
            "Mask",
            f"network of the bundle {escape(model['bundle'])}" if model["bundle"] else "given, not made here",
        ),
        ("Weights (SHA-256)", f'<span class="mono">{escape(weights)}</span>' if weights else "none"),
        ("Software", f"covid-ct-bundles {escape(model['software_version'])}"),
    ]
