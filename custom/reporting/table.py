# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The reports of a cohort as one table."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from custom.data.files import atomic_path

__all__ = ["flatten_report", "write_table"]

_LEFT_OUT = ("schema_version", "notice", "model", "files", "dicom", "grid", "consolidation_from_hu")


def flatten_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table: the report's values under their dotted paths.

    Lists become text: ``acquisition.flagged`` names the checks that were not passed, ``reasons`` says why
    values are missing, ``regions.largest_ml`` is the volume of the largest region.

    Args:
        report: content of a ``*_report.json``.
    """
    row: dict[str, Any] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{path}.{key}" if path else key, inner)
        else:
            row[path] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    kept = {key: value for key, value in report.items() if key not in (*_LEFT_OUT, "reasons")}
    acquisition, regions = dict(kept.get("acquisition") or {}), dict(kept.get("regions") or {})
    checks, largest = acquisition.pop("checks", []), regions.pop("largest", None) or []
    acquisition["flagged"] = " ".join(c["name"] for c in checks if c["status"] == "flagged") or None
    regions["largest_ml"] = largest[0]["volume_ml"] if largest else None
    source = dict(kept.get("source") or {})
    source["notes"] = "; ".join(source.get("notes") or []) or None
    kept |= {"source": source, "acquisition": acquisition, "regions": regions}
    reasons = "; ".join(f"{path}: {reason}" for path, reason in report["reasons"].items())
    add("", {**kept, "reasons": reasons or None})
    return row


def write_table(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file with one row a study, whole or not at all; an empty cell is an unknown value.

    Args:
        path: file to write.
        rows: from :func:`flatten_report`, at least one.
    """
    longest = max(rows, key=len)  # a failed study has fewer columns, in the same order
    columns = list(dict.fromkeys([*longest, *(key for row in rows for key in row)]))
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
