# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The course of a patient: curves, table, rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from custom.reporting.svg import CurvePoint, draw_curve
from custom.reporting.wording import escape, format_ml, format_signed, hide_paths, say_date, why

__all__ = ["draw_course"]

_SIDES = ("total", "right", "left")
_SERIES = re.compile(r"^series [\d.]+: ")  # 60 digits in a narrow table; the study's own page has them


def draw_course(followup: Mapping[str, Any], links: Mapping[str, str], here: str = "") -> str:
    """Curves, table and rule, for this page and for those of the studies.

    Args:
        followup: from :func:`custom.reporting.followup.compare_studies`.
        links: addresses of other pages by study.
        here: study whose page this is for; its row is marked.
    """
    dated = [entry for entry in followup["studies"] if entry["days_since_first"] is not None]
    curves = ""
    if len(dated) > 1 and any(entry["status"] == "segmented" for entry in dated):
        drawn = [
            draw_curve([_point(entry, field) for entry in dated], unit, label)
            for field, unit, label in (
                ("opacity_volume_ml", "mL", "Lung opacity volume"),
                ("opacity_percent_of_lung", "%", "Of the lungs"),
            )
        ]
        curves = f'<div class="curves">{"".join(drawn)}</div>'
    rule = f'<p class="note"><b>Rule.</b> {escape(followup["rule"])}.</p>'
    stages = f'<p class="note"><b>Not inferred.</b> {escape(why(followup, "clinical_stages"))}.</p>'
    loose = any((e["since_prior"] or {}).get("basis") not in (None, "whole_lungs") for e in dated)
    dotted = (
        '<p class="note">Dotted: the two scans do not show the same part of the lungs.</p>' if loose else ""
    )
    return f"{curves}{dotted}{_table(followup, links, here)}{rule}{stages}"


def _point(entry: Mapping[str, Any], field: str) -> CurvePoint:
    basis = (entry["since_prior"] or {}).get("basis")
    values = {side: entry[field].get(side) for side in _SIDES}
    return CurvePoint(
        entry["days_since_first"], say_date(entry["study_date"]), values, basis in (None, "whole_lungs")
    )


def _table(followup: Mapping[str, Any], links: Mapping[str, str], here: str) -> str:
    head = (
        '<thead><tr><th>Study</th><th class="number">LOV (mL)</th><th class="number">right</th>'
        '<th class="number">left</th><th class="number">% of lungs</th><th class="number">right</th>'
        '<th class="number">left</th><th class="number">Change (mL)</th><th class="number">right</th>'
        '<th class="number">left</th><th class="number">in %</th><th>Course</th></tr></thead>'
    )
    rows, notes = [], []
    for number, entry in enumerate(followup["studies"]):
        day = say_date(entry["study_date"]) or "no date"
        address = links.get(entry["study"])
        name = f'<a href="{escape(address)}">{day}</a>' if address and entry["study"] != here else day
        name = f"<b>{name}</b>" if entry["study"] == here else name
        if entry["status"] != "segmented":
            reason = escape(_SERIES.sub("", hide_paths(str(entry["reason"]))))
            rows.append(f'<tr><th>{name}</th><td class="none" colspan="11">no numbers: {reason}</td></tr>')
            continue
        cells = [_value(entry["opacity_volume_ml"][side]) for side in ("total", "right", "left")]
        cells += [_value(entry["opacity_percent_of_lung"][side]) for side in ("total", "right", "left")]
        step = entry["since_prior"]
        path = f"studies.{number}.since_prior"
        if step is None:
            reason = why(followup, path)
            last = f'<td class="none" colspan="5">{escape(reason.removeprefix("it is the "))}</td>'
        else:
            changes = [_signed(step["change_ml"][side]) for side in ("total", "right", "left")]
            changes.append(_signed(step["change_percent"]["total"]))
            course = step["course"] or "not stated"
            last = "".join(changes) + f"<td><b>{course}</b></td>"
            said = [step["basis_said"]] if step["basis"] == "shared_part" else []
            said += (
                [f"course not stated: {why(followup, f'{path}.course')}"] if step["course"] is None else []
            )
            if step["shared_part"]:
                old, new = (
                    step["shared_part"][when]["opacity_volume_ml"]["total"] for when in ("before", "after")
                )
                said.append(f"LOV of this part {format_ml(old)} mL, then {format_ml(new)} mL")
            notes += [f"{say_date(step['study_date'])} to {day}: {'; '.join(said)}."] if said else []
        rows.append(f"<tr><th>{name}</th>{''.join(cells)}{last}</tr>")
    for number, entry in enumerate(followup["studies"]):
        unknown = sorted(
            {
                why(followup, f"studies.{number}.{field}.{side}")
                for field in ("opacity_volume_ml", "opacity_percent_of_lung")
                for side in _SIDES
                if entry["status"] == "segmented" and entry[field][side] is None
            }
        )
        if unknown:
            notes.append(f"{say_date(entry['study_date']) or 'no date'}, not known: {'; '.join(unknown)}.")
    lines = "".join(f'<p class="note">{escape(hide_paths(line))}</p>' for line in notes)
    return (
        f'<div class="scroll"><table class="course">{head}<tbody>{"".join(rows)}</tbody></table></div>{lines}'
    )


def _value(value: float | None) -> str:
    return (
        '<td class="number none">not known</td>'
        if value is None
        else f'<td class="number">{format_ml(value)}</td>'
    )


def _signed(value: float | None) -> str:
    return (
        '<td class="number none">–</td>'
        if value is None
        else f'<td class="number">{format_signed(value)}</td>'
    )
