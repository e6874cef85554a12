# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The numbers of a report as tables of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from custom.reporting.svg import draw_bands
from custom.reporting.wording import escape, format_ml, format_number, hide_paths, lookup, why

__all__ = ["first_numbers", "not_known", "region_table", "volume_table", "zone_tables"]

SIDES = ("right", "left", "outside_lungs", "total")  # the right lung is on the left of every picture
HEADINGS = {
    "right": "Right lung",
    "left": "Left lung",
    "outside_lungs": "Outside",
    "total": "Total",
}
_PLACES = {
    "right": "right lung",
    "left": "left lung",
    "outside_lungs": "outside the lungs",
    "total": "total",
}
BANDS = (25, 50, 75)  # of the zone scores
LISTED = 5

_NORMAL_LUNGS = "4470 ± 1270 in 564 adults with normal lungs¹"

_NOTHING_THERE = "there is no opacity"  # a mean of nothing; it needs no explanation

_ROWS: tuple[tuple[str, str, str, str, str], ...] = (  # field, name, unit, reference, class
    ("opacity_volume_ml", "Opacity (LOV)", "mL", "0 in healthy lungs", "main"),
    ("ground_glass_volume_ml", "Ground-glass", "mL", "0", "part"),
    ("consolidation_volume_ml", "Consolidation", "mL", "0", "part"),
    ("opacity_percent_of_lung", "Opacity", "% of lung", "0; bands at 25, 50, 75²", "main"),
    ("ground_glass_percent_of_lung", "Ground-glass", "% of lung", "0", "part"),
    ("consolidation_percent_of_lung", "Consolidation", "% of lung", "0", "part"),
    ("lung_volume_ml", "Lung volume", "mL", _NORMAL_LUNGS, ""),
    ("lung_mean_hu", "Mean of the lungs", "HU", "air -1000, water 0; deeper breath: lower", ""),
    ("opacity_mean_hu", "Mean of the opacity", "HU", "from -200: consolidation", ""),
)


def first_numbers(report: Mapping[str, Any]) -> str:
    """What is read first: LOV, percent of the lungs and severity score.

    Args:
        report: content of a report.
    """
    if report["status"] != "segmented":
        reason = hide_paths(str(report["reason"]))
        return (
            '<section class="first"><div class="whole"><p class="label">Lung opacity</p>'
            '<p class="big words" data-field="status">No result: this study could not be measured.</p>'
            f'<p class="under"><b>Why:</b> {escape(reason)}</p></div></section>'
        )
    volume, share = report["opacity_volume_ml"], report["opacity_percent_of_lung"]
    parts = [
        f"{name} <b>{format_ml(volume[side])}</b>"
        for side, name in (("right", "right"), ("left", "left"), ("outside_lungs", "outside the lungs"))
        if volume[side] is not None and (side != "outside_lungs" or volume[side])
    ]
    cards = [_card("Lung opacity volume (LOV)", report, "opacity_volume_ml.total", "mL", " · ".join(parts))]
    sides, bands = "", ""
    if share["total"] is not None:
        sides = " · ".join(f"{side} <b>{format_ml(share[side])} %</b>" for side in ("right", "left"))
        label = f"{format_ml(share['total'])} percent, on a scale from 0 to 100"
        bands = draw_bands(share["total"], BANDS, 100, label)
    cards.append(_card("Of the lungs", report, "opacity_percent_of_lung.total", "%", sides, extra=bands))
    score = report["severity"]["score"]
    under = "six zones, 0 to 4 each²" if score is not None else ""
    most = f"of {report['severity']['max_score']}"
    cards.append(_card("Severity score", report, "severity.score", most, under, digits=0))
    return f'<section class="first">{"".join(cards)}</section>'


def _card(
    label: str,
    report: Mapping[str, Any],
    path: str,
    unit: str,
    under: str,
    digits: int = 1,
    extra: str = "",
) -> str:
    value = lookup(report, path)
    if value is None:
        big = f'<p class="big words" data-field="{path}">not known</p>'
        under = escape(why(report, path))
    else:
        big = f'<p class="big" data-field="{path}">{format_ml(value, digits)}<small>{unit}</small></p>'
    return f'<div><p class="label">{label}</p>{big}<p class="under">{under}</p>{extra}</div>'


def volume_table(report: Mapping[str, Any]) -> str:
    """Volumes, percentages and attenuation by lung.

    Args:
        report: content of a report.
    """
    head = "".join(f'<th class="number">{HEADINGS[side]}</th>' for side in SIDES)
    rows = []
    for field, name, unit, reference, kind in _ROWS:
        cells = "".join(_cell(report, field, side, unit) for side in SIDES)
        reference = reference.replace("-", "\N{MINUS SIGN}") if "HU" in unit else reference
        if field == "lung_volume_ml" and not _is_whole(report):
            reference = "none: the lungs are not whole in the scan"
        rows.append(
            f'<tr class="{kind}"><th>{name} <span class="unit">{unit}</span></th>{cells}'
            f'<td class="reference">{reference}</td></tr>'
        )
    paths = [f"{field}.{side}" for field, *_ in _ROWS for side in SIDES if side in report[field]]
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{head}<th>Reference</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{not_known(report, paths)}"
        '<p class="note">¹ Mean ± standard deviation, Cheng T et al., Int J COPD 2019;14:1657, '
        "doi:10.2147/COPD.S187596; it depends on height, sex and breath. ² Bands of the zone score after Ooi "
        "GC et al., Radiology 2004;230:836, doi:10.1148/radiol.2303030853; zones are thirds of each lung's "
        "height here. Ground-glass is opacity below "
        f"{format_number(report['consolidation_from_hu'], 0)} HU, consolidation the rest.</p>"
    )


def _is_whole(report: Mapping[str, Any]) -> bool:
    """Zones are told only where the lungs are not cut off."""
    return all(
        lookup(report, f"zones.{side}.{end}.lung_volume_ml") is not None
        for side in ("left", "right")
        for end in ("upper", "lower")
    )


def _cell(report: Mapping[str, Any], field: str, side: str, unit: str) -> str:
    if side not in report[field]:
        return '<td class="number group"></td>'
    value = report[field][side]
    if value is None:
        return f'<td class="number none">{_absent(report, f"{field}.{side}")}</td>'
    text = format_number(value, 0) if unit == "HU" else format_ml(value)
    return f'<td class="number" data-field="{field}.{side}">{text}</td>'


def _absent(report: Mapping[str, Any], path: str) -> str:
    return "none" if why(report, path) == _NOTHING_THERE else "not known"


def not_known(report: Mapping[str, Any], paths: Sequence[str]) -> str:
    """Why some of the values are not known, each reason once.

    Args:
        report: content of a report.
        paths: dotted paths of the values that are shown.
    """
    named: dict[str, list[str]] = {}
    for path in paths:
        if lookup(report, path) is None and _absent(report, path) != "none":
            field, _, side = path.rpartition(".")
            place = _PLACES.get(side, side)
            named.setdefault(why(report, path) or "no reason is given", []).append(place)
    lines = [
        f"{escape(', '.join(dict.fromkeys(places)))}: {escape(reason)}" for reason, places in named.items()
    ]
    return f'<p class="note"><b>Not known.</b> {"; ".join(lines)}.</p>' if lines else ""


def zone_tables(report: Mapping[str, Any]) -> str:
    """Percentages and scores of the zones, laid out as in the pictures.

    Args:
        report: content of a report.
    """

    def table(caption: str, names: Sequence[str], score: Callable[[str, str], int | None]) -> str:
        rows = []
        for name in names:
            cells = "".join(_zone(report, side, name, score(side, name)) for side in ("right", "left"))
            rows.append(f"<tr><th>{name}</th>{cells}</tr>")
        head = f"<thead><tr><th>{caption}</th><th>Right lung</th><th>Left lung</th></tr></thead>"
        return f"<div><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"

    scores = report["severity"]["zones"]
    thirds = table("third", ("upper", "middle", "lower"), lambda side, name: lookup(scores, f"{side}.{name}"))
    halves = table("half", ("ventral", "dorsal"), lambda side, name: None)
    paths = [
        f"zones.{side}.{name}.opacity_percent_of_zone"
        for side in ("right", "left")
        for name in ("upper", "middle", "lower", "ventral", "dorsal")
    ]
    reasons = {why(report, path) for path in paths if lookup(report, path) is None}
    note = f'<p class="note"><b>Not known.</b> {escape("; ".join(sorted(reasons)))}.</p>' if reasons else ""
    return f'<div class="zones">{thirds}{halves}</div>{note}{_lobes(report)}'


def _zone(report: Mapping[str, Any], side: str, name: str, score: int | None) -> str:
    values = report["zones"][side][name]
    percent = values["opacity_percent_of_zone"]
    if percent is None:
        return '<td class="none">not known</td>'
    said = f"{format_ml(values['opacity_volume_ml'])} mL"
    said += "" if score is None else f" · score {score}"
    return f'<td class="score{score or 0}"><b>{format_ml(percent)} %</b><small>{said}</small></td>'


def _lobes(report: Mapping[str, Any]) -> str:
    severity = report["severity"]
    if severity["lobar_score"] is None:
        reason = escape(why(report, "severity.lobar_score"))
        return f'<p class="note">Lobar score (0 to 25): not known, {reason}.</p>'
    parts = ", ".join(f"{lobe.replace('_', ' ')} {value}" for lobe, value in severity["lobes"].items())
    return (
        f'<p class="note">Lobar score: <b>{severity["lobar_score"]}</b> of '
        f"{severity['lobar_max_score']} ({parts}).</p>"
    )


def region_table(report: Mapping[str, Any], linked: bool = True) -> str:
    """The largest regions of opacity.

    Args:
        report: content of a report.
        linked: whether the page has a scroll through slices to link to.
    """
    regions = report["regions"]
    if not regions["count"]:
        return ""
    affine = np.array(report["grid"]["affine"], dtype=float)
    axis = int(np.flatnonzero(nib.orientations.io_orientation(affine)[:, 0] == 2)[0])
    upward = nib.orientations.io_orientation(affine)[axis, 1] > 0
    total = report["grid"]["shape"][axis]

    def row(number: int, region: Mapping[str, Any]) -> str:
        place = ""
        if region["centroid_mm"] is not None:
            at = round(float((np.linalg.inv(affine) @ [*region["centroid_mm"], 1.0])[axis]))
            slice_number = (at if upward else total - 1 - at) + 1
            place = f"slice {slice_number}"
            place = f'<a href="#slice={slice_number}">{place}</a>' if linked else place
        cut = "cut off: at least this" if region["truncated"] else ""
        mean = "" if region["mean_hu"] is None else format_number(region["mean_hu"], 0)
        side = _PLACES.get(region["side"], "not known")
        volume = "not known" if region["volume_ml"] is None else format_ml(region["volume_ml"])
        return (
            f'<tr><th>{number}</th><td class="number">{volume}</td><td class="number">{mean}</td>'
            f"<td>{side}</td><td>{place}</td><td>{cut}</td></tr>"
        )

    rows = [row(number, region) for number, region in enumerate(regions["largest"], start=1)]
    head = (
        '<thead><tr><th></th><th class="number">Volume (mL)</th><th class="number">Mean (HU)</th>'
        "<th>Where</th><th>Centre</th><th></th></tr></thead>"
    )
    count = regions["count"]
    said = f"{count} separate region{'s' if count != 1 else ''}"
    if regions["truncated_count"]:
        said += f", {regions['truncated_count']} cut off by the scan's edge"
    table = f"<table>{head}<tbody>{''.join(rows[:LISTED])}</tbody></table>"
    shown = f'<h3>{said}</h3><div class="scroll">{table}</div>'
    if len(rows) > LISTED:
        more = f"<table>{head}<tbody>{''.join(rows[LISTED:])}</tbody></table>"
        more_ = len(rows) - LISTED
        said = f"{more_} smaller one{'s' if more_ != 1 else ''}" + (
            " (the rest is not listed)" if count > len(rows) else ""
        )
        shown += f'<details><summary>{said}</summary><div class="scroll">{more}</div></details>'
    return f'<div class="regions">{shown}</div>'
