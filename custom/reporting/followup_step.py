# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Two studies of one patient: what changed, of what both show, and how the scans differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from custom.reporting.levels import LungLevels, match_levels
from custom.reporting.wording import lookup, say_date, why

__all__ = ["RULE", "TOLERANCE_ML", "TOLERANCE_PERCENT", "compare_two", "judge_course"]

TOLERANCE_PERCENT = 25.0
"""A smaller change of the LOV, relative to the prior one, is taken for stable. It is borrowed from lung
nodules, where the British Thoracic Society's guideline takes 25 % of volume for growth (Callister MEJ et al.,
Thorax 2015;70 Suppl 2:ii1-ii54); for opacity it has not been tested."""

TOLERANCE_ML = 10.0
"""A smaller change of the LOV is taken for stable, too: a quarter of next to nothing is noise."""

RULE = (
    f"increasing: the lung opacity volume (LOV) is more than {TOLERANCE_PERCENT:g} % and more than "
    f"{TOLERANCE_ML:g} mL above that of the prior study; resolving: as much below it; stable: neither. It is "
    "not stated where the two scans do not show the same, or where the LOV and the percentage of the lungs "
    "change in opposite directions. This is a rule of thumb of this software and no clinical classification"
)
_VOLUMES = ("left", "right", "outside_lungs", "total")
_LUNGS = ("left", "right", "total")
_OTHER_BREATH = 0.2  # of the prior lung volume
_COMPARED = (
    ("slice thickness (mm)", "acquisition.slice_thickness_mm"),
    ("slice distance (mm)", "acquisition.slice_distance_mm"),
    ("pixel spacing (mm)", "acquisition.pixel_spacing_mm"),
    ("extent along the body (mm)", "acquisition.coverage_mm"),
    ("kernel", "acquisition.kernel"),
    ("contrast agent", "acquisition.contrast_agent"),
    ("patient position", "acquisition.patient_position"),
    ("manufacturer", "source.manufacturer"),
    ("scanner", "source.model"),
)


def judge_course(
    before_ml: float, after_ml: float, before_percent: float | None, after_percent: float | None
) -> tuple[str | None, str]:
    """Apply :data:`RULE` to two studies.

    Args:
        before_ml: LOV of the prior study.
        after_ml: LOV of this one.
        before_percent: of the lungs, None where unknown.
        after_percent: of the lungs, None where unknown.

    Returns:
        "increasing", "stable" or "resolving", or None and why.
    """
    change = after_ml - before_ml
    if abs(change) <= TOLERANCE_ML or abs(change) <= TOLERANCE_PERCENT / 100 * before_ml:
        return "stable", ""
    if before_percent is not None and after_percent is not None:
        share = after_percent - before_percent
        if change * share < 0:
            up, down = (
                ("LOV", "percentage of the lungs") if change > 0 else ("percentage of the lungs", "LOV")
            )
            return None, f"the {up} went up and the {down} down: the lungs hold more or less air than before"
    return ("increasing" if change > 0 else "resolving"), ""


def compare_two(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    days: int,
    levels: Mapping[str, LungLevels],
    path: str,
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Compare a study with the one before.

    Args:
        before: its report.
        after: the later one.
        days: between them.
        levels: volumes by slice of the studies, by name, where they are known.
        path: dotted path that the result will have.
        reasons: takes up why values are None.
    """
    basis, said, shared = _common_ground(before, after, levels)
    old, new = (before, after) if shared is None else (shared["before"], shared["after"])
    change_ml, change_percent, points = {}, {}, {}
    for side in _VOLUMES:
        was, now = old["opacity_volume_ml"][side], new["opacity_volume_ml"][side]
        change_ml[side] = None if was is None or now is None else round(now - was, 3)
        change_percent[side] = (
            round(100 * (now - was) / was, 2) if change_ml[side] is not None and was else None
        )
        if change_ml[side] is None:
            reasons[f"{path}.change_ml.{side}"] = (
                f"the volume is not known on {_unknown_on(before, after, side)}"
            )
        if change_percent[side] is None:
            reasons[f"{path}.change_percent.{side}"] = reasons.get(
                f"{path}.change_ml.{side}", "the prior volume is 0: there is no percentage of it"
            )
    for side in _LUNGS:
        was, now = old["opacity_percent_of_lung"][side], new["opacity_percent_of_lung"][side]
        points[side] = None if was is None or now is None else round(now - was, 3)
        if points[side] is None:
            unknown = _unknown_on(before, after, side, "opacity_percent_of_lung")
            reasons[f"{path}.change_percentage_points.{side}"] = f"the percentage is not known on {unknown}"
    if basis == "as_scanned":
        course, why_not = None, f"the scans do not show the same: {said}"
    else:
        course, why_not = judge_course(
            old["opacity_volume_ml"]["total"],
            new["opacity_volume_ml"]["total"],
            old["opacity_percent_of_lung"]["total"],
            new["opacity_percent_of_lung"]["total"],
        )
    if course is None:
        reasons[f"{path}.course"] = why_not
    if shared is None:
        reasons[f"{path}.shared_part"] = (
            "both scans show the lungs from end to end: the whole is compared"
            if basis == "whole_lungs"
            else said
        )
    else:
        for when, report in (("before", before), ("after", after)):
            absent = [side for side in ("left", "right") if report["lung_volume_ml"][side] is None]
            for side in absent:
                reasons[f"{path}.shared_part.{when}"] = f"the {side} lung was not found"
    return {
        "study": before["study"],
        "study_date": lookup(before, "source.study_date"),
        "days": days,
        "basis": basis,
        "basis_said": said,
        "shared_part": shared,
        "change_ml": change_ml,
        "change_percent": change_percent,
        "change_percentage_points": points,
        "course": course,
        "differences": _differences(before, after),
    }


def _unknown_on(
    before: Mapping[str, Any], after: Mapping[str, Any], side: str, field: str = "opacity_volume_ml"
) -> str:
    days = [
        say_date(lookup(report, "source.study_date"))
        for report in (before, after)
        if report[field][side] is None
    ]
    return " and ".join(days) or "the part that is compared"


def _common_ground(
    before: Mapping[str, Any], after: Mapping[str, Any], levels: Mapping[str, LungLevels]
) -> tuple[str, str, dict[str, Any] | None]:
    """What of two scans can be compared: "whole_lungs", "shared_part" or "as_scanned"; why; its numbers."""
    found = [
        {side for side in ("left", "right") if r["lung_volume_ml"][side] is not None} for r in (before, after)
    ]
    for report, sides in zip((before, after), found, strict=True):
        if not sides:
            day = say_date(lookup(report, "source.study_date"))
            return "as_scanned", f"the lungs are not known on {day} ({why(report, 'lung_volume_ml')})", None
    if found[0] != found[1]:
        (side,) = found[0] ^ found[1]
        day = say_date(lookup((before, after)[side in found[0]], "source.study_date"))
        return "as_scanned", f"the {side} lung was not found on {day}", None
    scans = [levels[report["study"]] for report in (before, after) if report["study"] in levels]
    if len(scans) < 2:
        return "as_scanned", "how far each scan reaches is not known: a page with its slices is missing", None
    frame = match_levels(scans)
    if frame.kind == "relative":
        return "whole_lungs", "both scans show the lungs from end to end", None
    if frame.kind == "none":
        return "as_scanned", frame.said.removeprefix("levels are not matched: "), None
    parts = [scan.within(frame.place(scan, 0), frame.place(scan, 1)) for scan in scans]
    end = frame.kind.removeprefix("from_")
    said = (
        f"not both scans show the lungs from end to end: compared is what both show, "
        f"{frame.length_mm:.0f} mm from the {end} of the lungs"
    )
    return (
        "shared_part",
        said,
        {
            "from": end,
            "length_mm": round(float(frame.length_mm or 0), 2),
            "before": parts[0],
            "after": parts[1],
        },
    )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In what the two scans were taken differently."""
    found = []
    for name, path in _COMPARED:
        was, now = lookup(before, path), lookup(after, path)
        same = was == now
        if isinstance(was, (int, float)) and isinstance(now, (int, float)):
            same = abs(now - was) <= 0.05 * max(abs(was), abs(now))
        if isinstance(was, list) and isinstance(now, list):
            same = all(abs(b - a) <= 0.05 * max(a, b) for a, b in zip(was, now, strict=True))
        if not same:
            found.append({"name": name, "before": _said(was), "after": _said(now)})
    was, now = (report["lung_volume_ml"]["total"] for report in (before, after))
    if was and now and abs(now - was) > _OTHER_BREATH * was:
        found.append({"name": "lung volume (mL)", "before": was, "after": now})
    return found


def _said(value: Any) -> Any:
    return "not known" if value is None else value
