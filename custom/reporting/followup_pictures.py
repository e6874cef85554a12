# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The same levels of several studies side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from custom.reporting.levels import LevelFrame, LungLevels, match_levels
from custom.reporting.page_frame import colour_key, layer_tools, say_window, section
from custom.reporting.pictures import Plane, StudyPictures
from custom.reporting.svg import draw_picture
from custom.reporting.wording import escape, format_ml, hide_paths, say_date

__all__ = ["show_side_by_side"]

AXIAL_LEVELS = (0.85, 0.65, 0.45, 0.25)
"""Heights that are shown, from the lower to the upper end of what the scans share."""

CORONAL_LEVELS = (0.4, 0.65)
"""Depths that are shown, from the front to the back of the lungs."""

_CLOSE = 0.07  # a level this near to the one with most opacity would show the same
_BINS = 50


def show_side_by_side(followup: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of pictures of one level each, a column a date.

    Args:
        followup: from :func:`custom.reporting.followup.compare_studies`.
        pictures: of the studies, by name, as :meth:`StudyPictures.to_json` gives them; one study's are
            unpacked at a time.
    """
    shown = [entry for entry in followup["studies"] if entry["days_since_first"] is not None]
    have = [pictures[entry["study"]] for entry in shown if entry["study"] in pictures]
    if not have:
        return ""
    scans = [LungLevels.from_json(content["levels"]) for content in have]
    frame = match_levels(scans)
    thick = [len(content["slices"]) > 1 for content in have]
    matched = frame.kind != "none" and all(thick)
    heights = _axial_levels(scans, frame) if matched else []
    depths = CORONAL_LEVELS if matched and frame.kind == "relative" else (0.5,) if any(thick) else ()
    said = [f"axial, {_height_said(frame, height)}" for height in heights]
    said = said or [f"axial, the {'slice with most opacity' if any(thick) else 'only slice'} of each date"]
    said += [
        f"coronal, {100 * depth:.0f} % of the way from the front to the back of the lungs" for depth in depths
    ]
    planes = [_planes(StudyPictures.from_json(content), frame, heights, depths) for content in have]
    columns = f"grid-template-columns: repeat({len(shown)}, minmax({250 if len(shown) > 2 else 300}px, 1fr))"
    rows = (
        _row(words, [of_study[number] for of_study in planes], shown, pictures)
        for number, words in enumerate(said)
    )
    lead = (
        f"{frame.said[:1].upper()}{frame.said[1:]}. All pictures of a row have one scale. "
        f"Date and LOV are printed on each. Lung window, {say_window()}."
    )
    body = f'{layer_tools(colour_key())}<div class="levels" style="{columns}">{"".join(rows)}</div>'
    return section("levels", "Side by side", body, lead)


def _planes(
    study: StudyPictures, frame: LevelFrame, heights: Sequence[float], depths: Sequence[float]
) -> list[Plane]:
    axial = [study.axial(study.nearest(frame.place(study.levels, height))) for height in heights]
    return [*(axial or [_busiest(study)]), *(_coronal(study, depth) for depth in depths)]


def _row(
    said: str, planes: Sequence[Plane], shown: Sequence[Mapping[str, Any]], pictures: Mapping[str, Any]
) -> str:
    frame = (max(p.width_mm for p in planes), max(p.height_mm for p in planes))
    left = iter(planes)
    cells = []
    for entry in shown:
        day = say_date(entry["study_date"])
        if entry["study"] not in pictures:
            reason = hide_paths(str(entry["reason"] or "there is no page with its slices"))
            cells.append(f'<div class="missing"><span>{day}<br>no picture: {escape(reason)}</span></div>')
            continue
        volume = entry["opacity_volume_ml"]["total"]
        stamp = [day, "LOV not known" if volume is None else f"LOV {format_ml(volume)} mL"]
        picture = draw_picture(next(left), f"{said}, {', '.join(stamp)}", stamp, frame)
        cells.append(f"<figure>{picture}</figure>")
    return f'<p class="row">{escape(said)}</p>{"".join(cells)}'


def _height_said(frame: LevelFrame, level: float) -> str:
    if frame.length_mm is None:
        return f"{100 * level:.0f} % of the lungs' height from below"
    if frame.kind == "from_top":
        return f"{(1 - level) * frame.length_mm:.0f} mm below the top of the lungs"
    return f"{level * frame.length_mm:.0f} mm above the bottom of the lungs"


def _axial_levels(scans: Sequence[LungLevels], frame: LevelFrame) -> list[float]:
    """The level with most opacity over all dates and evenly spaced ones, from the head down."""
    centres = (np.arange(_BINS) + 0.5) / _BINS
    found = np.zeros(_BINS)
    for scan in scans:
        for n, centre in enumerate(centres):
            low, high = (frame.place(scan, centre + half / _BINS) for half in (-0.5, 0.5))
            volumes = scan.within(low, high)["opacity_volume_ml"]
            found[n] += sum(volumes[side] or 0.0 for side in ("left", "right"))
    chosen = list(AXIAL_LEVELS)
    if found.any():
        most = float(centres[int(found.argmax())])
        chosen = [most, *(level for level in AXIAL_LEVELS if abs(level - most) > _CLOSE)]
    return sorted(chosen, reverse=True)


def _coronal(study: StudyPictures, depth: float) -> Plane:
    shown = study.lungs if study.lungs.any() else np.ones_like(study.lungs)
    rows = np.flatnonzero(shown.any(axis=(1, 2)))
    return study.coronal(round(float(rows[0] + depth * (rows[-1] - rows[0]))))


def _busiest(study: StudyPictures) -> Plane:
    return study.axial(study.slices.index(study.busiest))
