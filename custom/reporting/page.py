# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""One HTML file for a study: pictures, slices, numbers and how they were made; it opens without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from custom.reporting.figures import AttentionView
from custom.reporting.page_frame import COURSE, NOTICE, assemble_page, describe_software, say_window, section
from custom.reporting.page_numbers import first_numbers, region_table, volume_table, zone_tables
from custom.reporting.page_views import show_attention, show_planes, show_slices
from custom.reporting.pictures import StudyPictures
from custom.reporting.wording import escape, format_number, hide_paths, parse_date, say_date, why

__all__ = ["build_page"]

_CHECKS = {
    "slice_thickness": "Slice thickness",
    "slice_distance": "Slice distance",
    "coverage": "Coverage",
    "field_of_view": "Field of view",
    "lung_mask": "Lung mask",
    "contrast": "Contrast agent",
    "kernel": "Kernel",
    "patient_position": "Patient position",
}
_STATUS = {"ok": "✓ ok", "flagged": "! look", "unknown": "? not known"}


def build_page(
    report: Mapping[str, Any],
    pictures: StudyPictures | None = None,
    attention: AttentionView | None = None,
    settings: Mapping[str, Any] | None = None,
    made_on: date | None = None,
) -> str:
    """Write the page of a study.

    Everything it says of patient and study comes from the report, so it says no more than that does.

    Args:
        report: content of a ``*_report.json``.
        pictures: what it shows, None for a study that failed.
        attention: the slice as the network saw it and its attention maps.
        settings: of the inference, such as the window of the input, to be named on the page.
        made_on: today, if None.
    """
    parts = [_header(report), first_numbers(report), _cautions(report), _course_section(report)]
    if pictures is not None:
        parts += [show_planes(pictures), show_slices(pictures), show_attention(attention)]
    if report["status"] == "segmented":
        regions = region_table(report, linked=pictures is not None and len(pictures.slices) > 1)
        parts += [
            section("numbers", "Numbers", volume_table(report), "By lung; left and right are the patient's."),
            section("zones", "Zones and regions", zone_tables(report) + regions, _ZONES_SAID),
            _acquisition(report),
        ]
    parts.append(_origin(report, pictures, settings, made_on))
    day = say_date((report["source"] or {}).get("study_date"))
    title = " · ".join(part for part in ("Lung opacity", report["study"], day) if part)
    return assemble_page(title, "".join(parts), None if pictures is None else pictures.to_json())


_ZONES_SAID = (
    "How much of each zone is opacity. Zones are thirds of each lung's height, ventral and dorsal its halves "
    "from front to back: geometry, not anatomy."
)


def _header(report: Mapping[str, Any]) -> str:
    source, acquisition = report["source"] or {}, report["acquisition"] or {}
    facts = []
    if report["source"]:
        if day := say_date(source["study_date"]):
            clock = str(source["study_time"] or "")
            facts.append(f"{day}, {clock[:2]}:{clock[2:4]}" if re.match(r"\d{4}", clock) else day)
        else:
            facts.append(f"study date not known ({why(report, 'source.study_date') or 'it is no date'})")
        scanner = " ".join(part for part in (source["manufacturer"], source["model"]) if part)
        facts += [scanner] if scanner else []
    if acquisition:
        many = f"{acquisition['slices']} slice{'s' if acquisition['slices'] != 1 else ''}"
        facts.append(f"{many}, one every {acquisition['slice_distance_mm']:g} mm")
    if source.get("patient_key"):
        facts.append(source["patient_key"])
    return (
        f'<header><p class="kind"><span>Lung opacity on chest CT</span><strong>{escape(NOTICE)}</strong></p>'
        f'<h1>{escape(report["study"])}</h1><p class="facts">{escape(" · ".join(facts))}</p></header>'
    )


def _cautions(report: Mapping[str, Any]) -> str:
    """What a reader must know before the numbers are used."""
    if report["status"] != "segmented":
        return ""
    said = []
    if not report["opacity_voxels"]:
        said.append("No opacity is marked in this study: 0 mL is what was measured.")
    lungs = report["lung_volume_ml"]
    absent = [side for side in ("right", "left") if lungs[side] is None]
    if len(absent) == 1:
        said.append(
            f"The {absent[0]} lung was not found: totals of both lungs and the severity score are not known."
        )
    elif absent:
        said.append(
            f"The lungs are not known ({why(report, 'lung_volume_ml')}): percentages, zones and the severity "
            "score are not given."
        )
    # What has been said, or follows from what is said.
    twice = ["lung_mask"] if absent else []
    twice += ["coverage"] if absent or report["acquisition"]["slices"] == 1 else []
    checks = report["acquisition"]["checks"]
    said += [
        f"{check['message'][:1].upper()}{check['message'][1:]}"
        for check in checks
        if check["status"] == "flagged" and check["name"] not in twice
    ]
    said += [f"{note[:1].upper()}{note[1:]}" for note in report["source"]["notes"]]
    if not said:
        return ""
    lines = "".join(f"<li>{escape(hide_paths(line))}{'' if line[-1] in '.?!' else '.'}</li>" for line in said)
    return f'<section class="caution" id="cautions"><h2>To keep in mind</h2><ul>{lines}</ul></section>'


def _course_section(report: Mapping[str, Any]) -> str:
    source = report["source"] or {}
    if source.get("patient_key") is None:
        reason = why(report, "source.patient_key")
        said = f"No course: it is not known which other studies are of this patient ({reason})."
    elif parse_date(source.get("study_date")) is None:
        reason = why(report, "source.study_date") or "it is no date"
        said = f"No course: the date of this study is not known ({reason})."
    else:
        said = "No course: it takes two studies. It appears here when others of this patient are done."
    return section("course", "Course", f'{COURSE[0]}<p class="note">{escape(said)}</p>{COURSE[1]}')


def _acquisition(report: Mapping[str, Any]) -> str:
    rows = []
    for check in report["acquisition"]["checks"]:
        rows.append(
            f"<tr><th>{_CHECKS[check['name']]}</th><td>{escape(check['message'])}</td>"
            f'<td class="status {check["status"]}">{_STATUS[check["status"]]}</td></tr>'
        )
    acquisition = report["acquisition"]
    spacing = " × ".join(f"{mm:g}" for mm in acquisition["pixel_spacing_mm"])
    shape = " × ".join(str(n) for n in report["grid"]["shape"])
    facts = [
        ("Grid", f"{shape} voxels of {' × '.join(f'{mm:g}' for mm in report['grid']['spacing_mm'])} mm"),
        ("Pixels", f"{spacing} mm"),
        ("Extent along the body", f"{acquisition['coverage_mm']:g} mm"),
    ]
    listed = "".join(f"<tr><th>{name}</th><td>{value}</td><td></td></tr>" for name, value in facts)
    return section(
        "acquisition",
        "Acquisition",
        f'<div class="scroll"><table class="scan"><tbody>{"".join(rows)}{listed}</tbody></table></div>',
        "Whether the scan was taken in a way that its numbers can be relied on and compared.",
    )


def _origin(
    report: Mapping[str, Any],
    pictures: StudyPictures | None,
    settings: Mapping[str, Any] | None,
    made_on: date | None,
) -> str:
    source = report["source"] or {}
    rows = describe_software(report["model"])
    rows += [(escape(_plain(name)), escape(_say(value))) for name, value in (settings or {}).items()]
    if pictures is not None:
        rows.append(("Window of the pictures", say_window()))
    rows.append(("Page made on", (made_on or date.today()).isoformat()))
    if source.get("series_choice"):
        rows.append(("Series", escape(hide_paths(source["series_choice"]))))
    beside = [(kind, name) for kind, name in report["files"].items() if name and kind != "page"]
    if beside:
        links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for _, name in beside)
        rows.append(("Files beside this page", links))
    if report["source"]:
        identified = "no name and no ID of the patient is in this page; the pictures show the chest"
        rows.append(("Privacy", identified))
    listed = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return section(
        "origin",
        "How this was made",
        f'<div class="scroll"><table class="scan"><tbody>{listed}</tbody></table></div>',
        f"{escape(report['notice'])} Numbers to all digits, and a reason for each that is missing, are in "
        f'the report <span class="mono">{escape(report["study"])}_report.json</span>.',
    )


def _plain(name: str) -> str:
    known = {"hu_window": "Window of the input (HU)", "image_size": "Size of the input (pixels)"}
    return known.get(name, name.replace("_", " "))


def _say(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_say, value))
    return format_number(value, 0) if isinstance(value, (int, float)) and value == int(value) else str(value)
