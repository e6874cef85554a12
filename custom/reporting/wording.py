# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""How numbers, dates and unknown values are put on a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from html import escape
from typing import Any

__all__ = ["escape", "format_ml", "format_number", "format_percent", "format_signed", "hide_paths"]
__all__ += ["lookup", "parse_date", "say_date", "why"]

MINUS = "\N{MINUS SIGN}"

# Names of folders and files may hold spaces and colons, so as much is taken for a path as may be one.
_NIFTI_FIRST = re.compile(r"^.*[/\\].*\.nii(?:\.gz)?: (?=\S)", re.IGNORECASE)
_NIFTI_LAST = re.compile(r"(?<=: )[^:]*[/\\].*\.nii(?:\.gz)?$", re.IGNORECASE)
_PATH = re.compile(r"\S*[/\\]\S.*")


def lookup(report: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path, None where a parent is None or missing.

    Args:
        report: content of a report.
        path: such as "lung_volume_ml.left".
    """
    value: Any = report
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def why(report: Mapping[str, Any], path: str) -> str:
    """Why the value under a dotted path is not known, "" where the report does not say.

    Args:
        report: content of a report.
        path: of a null.
    """
    reasons: Mapping[str, str] = report.get("reasons") or {}
    parts = path.split(".")
    found = (reasons.get(".".join(parts[:n])) for n in range(len(parts), 0, -1))
    return hide_paths(next((reason for reason in found if reason), ""))


def hide_paths(text: str) -> str:
    """A text without the path of a file in it, which may be named after a patient.

    What is said of the file after its path and a colon is kept.

    Args:
        text: one line.
    """
    text = _NIFTI_LAST.sub("(path left out)", _NIFTI_FIRST.sub("", text))
    return _PATH.sub("(path left out)", text)


def format_number(value: float, digits: int = 1) -> str:
    """A number with a true minus sign and a thin space between thousands.

    Args:
        value: the number.
        digits: after the point.
    """
    text = f"{abs(value):,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    negative = value < 0 and any(letter in "123456789" for letter in text)
    return f"{MINUS}{text}" if negative else text


def format_ml(value: float, digits: int = 1) -> str:
    """A volume or percentage; what would be rounded to 0 and is not 0 is said to be below the last digit."""
    least = 10.0**-digits
    if 0 < value < least / 2:
        return f"< {least:.{digits}f}"
    return format_number(value, digits)


format_percent = format_ml


def format_signed(value: float, digits: int = 1) -> str:
    """A change, with its sign."""
    text = format_number(value, digits)
    return text if text.startswith(MINUS) or value <= 0 else f"+{text}"


def parse_date(text: Any) -> date | None:
    """A DICOM date (YYYYMMDD), None where it is none."""
    if not isinstance(text, str) or not re.fullmatch(r"\d{8}", text):
        return None
    try:
        return date(int(text[:4]), int(text[4:6]), int(text[6:]))
    except ValueError:
        return None


def say_date(text: Any) -> str:
    """A DICOM date as 2020-03-15, "" where it is none."""
    day = parse_date(text)
    return "" if day is None else day.isoformat()
