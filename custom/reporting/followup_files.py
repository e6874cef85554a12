# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writing follow-ups of the studies that inference, or the script for existing masks, has reported."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.data.files import atomic_path, write_json
from custom.reporting.followup import compare_studies
from custom.reporting.followup_page import build_followup_page
from custom.reporting.followup_table import draw_course
from custom.reporting.levels import LungLevels
from custom.reporting.page_frame import read_pictures, replace_course

__all__ = ["find_reports", "group_by_patient", "write_followup", "write_text"]

_SUFFIX = "_report.json"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path: file to write.
        text: its content.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def find_reports(paths: Sequence[str | os.PathLike]) -> dict[Path, dict[str, Any]]:
    """Read reports from files and from folders with their sub-folders.

    Args:
        paths: ``*_report.json`` files, and folders that hold some.

    Returns:
        Content by file, each file once.

    Raises:
        FileNotFoundError: When there is no such file, or no report in a folder.
        ValueError: When a file is no report.
    """
    found: dict[Path, dict[str, Any]] = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(path.rglob(f"*{_SUFFIX}"))
            if not files:
                raise FileNotFoundError(f"no report (*{_SUFFIX}) in {path}")
        for file in files:
            found[file.resolve()] = _read_report(file)
    return found


def _read_report(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"report not found: {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, name = str(content["schema_version"]), content["study"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"not a report of this software: {file}") from None
    if version.split(".")[0] != "2" or not isinstance(name, str):
        raise ValueError(f"a report of version {version}, not 2: {file}; make it anew")
    return content


def group_by_patient(reports: Mapping[Path, Mapping[str, Any]]) -> dict[str, dict[Path, Mapping[str, Any]]]:
    """The reports of each patient that has more than one.

    Args:
        reports: content by file.

    Returns:
        Reports by patient key; those that do not say whose they are, are left out.
    """
    groups: dict[str, dict[Path, Mapping[str, Any]]] = {}
    for file, report in reports.items():
        key = (report["source"] or {}).get("patient_key")
        if key is not None:
            groups.setdefault(key, {})[file] = report
    return {key: group for key, group in groups.items() if len(group) > 1}


def write_followup(
    output_dir: str | os.PathLike, reports: Mapping[Path, Mapping[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Write ``followup_<patient>.html`` and ``.json``, and the course into the pages of the studies.

    Pictures and volumes by slice come from the studies' pages, which lie beside the reports. Only pages in or
    below ``output_dir`` are linked and get the course: others are not ours to change.

    Args:
        output_dir: where to write.
        reports: of one patient, content by file.

    Returns:
        The page, and the content of the JSON file.

    Raises:
        ValueError: See :func:`custom.reporting.followup.compare_studies`; or when a page is damaged.
    """
    folder = Path(output_dir).resolve()
    pages: dict[str, Path] = {}
    for file, report in reports.items():
        if name := report["files"].get("page"):
            page = file.parent / Path(name).name
            if page.is_file():
                pages[report["study"]] = page
    pictures = {}
    for study, page in pages.items():
        content = read_pictures(page.read_text(encoding="utf-8"))
        if content is not None:
            pictures[study] = content
    levels = {study: LungLevels.from_json(content["levels"]) for study, content in pictures.items()}
    followup = compare_studies(list(reports.values()), levels)

    stem = f"followup_{followup['patient_key'] or _unnamed(followup)}"
    near = {study: page for study, page in pages.items() if folder in page.resolve().parents}
    target = folder / f"{stem}.html"
    links = {study: _address(page, folder) for study, page in near.items()}
    write_json(folder / f"{stem}.json", followup)
    write_text(target, build_followup_page(followup, list(reports.values()), pictures, links))
    for study, page in near.items():
        others = {other: _address(path, page.parent) for other, path in near.items()}
        back = f'<p><a href="{_address(target, page.parent)}">Follow-up with pictures side by side</a></p>'
        course = back + draw_course(followup, others, study)
        write_text(page, replace_course(page.read_text(encoding="utf-8"), course))
    return target, followup


def _unnamed(followup: Mapping[str, Any]) -> str:
    names = "\n".join(sorted(entry["study"] for entry in followup["studies"]))
    return "studies-" + hashlib.sha256(names.encode()).hexdigest()[:12]


def _address(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
