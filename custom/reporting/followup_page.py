# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The course of a patient as one HTML file: curve, table, and pictures of the same levels side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from custom.reporting.followup_pictures import show_side_by_side
from custom.reporting.followup_table import draw_course
from custom.reporting.page_frame import NOTICE, assemble_page, describe_software, section
from custom.reporting.wording import (
    escape,
    format_ml,
    format_number,
    format_signed,
    hide_paths,
    lookup,
    say_date,
    why,
)

__all__ = ["build_followup_page"]


def build_followup_page(
    followup: Mapping[str, Any],
    reports: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Mapping[str, Any]],
    links: Mapping[str, str] | None = None,
    made_on: date | None = None,
) -> str:
    """Write the page of a patient's course.

    Args:
        followup: from :func:`custom.reporting.followup.compare_studies`.
        reports: the reports that it was made from.
        pictures: of the studies, by name, as :meth:`StudyPictures.to_json` gives them; those that failed have
            none. One study's are unpacked at a time.
        links: addresses of the studies' own pages, by name, below the folder of this page.
        made_on: today, if None.
    """
    whose = followup["patient_key"] or "one patient"
    body = "".join(
        [
            _header(followup, whose),
            _first(followup),
            section("course", "Course", draw_course(followup, links or {})),
            show_side_by_side(followup, pictures),
            _differences(followup),
            _origin(followup, reports, made_on),
        ]
    )
    return assemble_page(f"Lung opacity · course · {whose}", body)


def _header(followup: Mapping[str, Any], whose: str) -> str:
    days = [day for entry in followup["studies"] if (day := say_date(entry["study_date"]))]
    facts = [f"{len(followup['studies'])} studies"]
    if len(days) > 1:
        facts.append(f"{days[0]} to {days[-1]}")
    undated = len(followup["studies"]) - len(days)
    if undated:
        facts.append(f"{undated} without a date")
    return (
        f'<header><p class="kind"><span>Lung opacity on chest CT, course</span><strong>{NOTICE}</strong></p>'
        f'<h1>{escape(whose)}</h1><p class="facts">{escape(" · ".join(facts))}</p></header>'
    )


def _first(followup: Mapping[str, Any]) -> str:
    steps = [n for n, entry in enumerate(followup["studies"]) if entry["since_prior"]]
    course = followup["course"]
    if course is None:
        said = escape(hide_paths(why(followup, "course")))
        word = f'<p class="big words" data-field="course">not stated</p><p class="under">{said}</p>'
    else:
        word = f'<p class="big words" data-field="course">{course}</p><p class="under">by the rule below</p>'
    cards = [f'<div><p class="label">Course since the prior study</p>{word}</div>']
    known = [n for n, e in enumerate(followup["studies"]) if lookup(e, "opacity_volume_ml.total") is not None]
    if known:
        entry = followup["studies"][known[-1]]
        day = say_date(entry["study_date"])
        percent = entry["opacity_percent_of_lung"]["total"]
        under = (
            f"{format_ml(percent)} % of the lungs"
            if percent is not None
            else "percentage of the lungs not known"
        )
        cards.append(
            f'<div><p class="label">Lung opacity volume (LOV){f" on {day}" if day else ""}</p>'
            f'<p class="big">{format_ml(entry["opacity_volume_ml"]["total"])}<small>mL</small></p>'
            f'<p class="under">{under}</p></div>'
        )
    if steps:
        step = followup["studies"][steps[-1]]["since_prior"]
        change, relative = step["change_ml"]["total"], step["change_percent"]["total"]
        days = f"{step['days']} day{'s' if step['days'] != 1 else ''}"
        under = f"{format_signed(relative)} % in {days}" if relative is not None else f"in {days}"
        basis = {"shared_part": ", of the part that both show", "as_scanned": ", of what each scan shows"}
        cards.append(
            f'<div><p class="label">Change since {say_date(step["study_date"])}</p>'
            f'<p class="big">{format_signed(change)}<small>mL</small></p>'
            f'<p class="under">{under}{basis.get(step["basis"], "")}</p></div>'
        )
    return f'<section class="first">{"".join(cards)}</section>'


def _differences(followup: Mapping[str, Any]) -> str:
    rows = []
    for entry in followup["studies"]:
        step = entry["since_prior"]
        if step is None:
            continue
        cells = [
            f"<td>{escape(item['name'])}</td><td>{escape(_plain(item['before']))}</td>"
            f'<td class="differs">{escape(_plain(item["after"]))}</td>'
            for item in step["differences"]
        ] or ['<td colspan="3">no difference</td>']
        span = f"{say_date(step['study_date'])}<br>to {say_date(entry['study_date'])}"
        cells[0] = f'<th rowspan="{len(cells)}">{span}</th>{cells[0]}'
        rows += [f"<tr>{cell}</tr>" for cell in cells]
    flagged = [
        f"<li>{say_date(entry['study_date']) or 'no date'}: "
        f"{escape(hide_paths('; '.join(entry['flagged'])))}</li>"
        for entry in followup["studies"]
        if entry["flagged"]
    ]
    looked = f'<h3>Checks that were flagged</h3><ul class="plain">{"".join(flagged)}</ul>' if flagged else ""
    head = "<thead><tr><th>Between</th><th>What</th><th>Before</th><th>After</th></tr></thead>"
    table = f'<div class="scroll"><table class="course">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    table = table if rows else ""
    return section(
        "differences",
        "How the scans differ",
        table + looked,
        "A change may come from another scanner, other slices or another breath as well as from the disease.",
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " × ".join(f"{part:g}" for part in value)
    return format_number(value, 1).removesuffix(".0") if isinstance(value, (int, float)) else str(value)


def _origin(followup: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], made_on: date | None) -> str:
    models = {tuple(sorted(report["model"].items(), key=str)): report["model"] for report in reports}
    rows = []
    if len(models) > 1:
        rows.append(
            ("Attention", f"the studies were measured with {len(models)} different models or versions")
        )
    for model in models.values():
        rows += describe_software(model)
    rows.append(("Page made on", (made_on or date.today()).isoformat()))
    rows.append(("Studies", escape(", ".join(entry["study"] for entry in followup["studies"]))))
    if followup["patient_key"] is None:
        rows.append(("Patient", escape(why(followup, "patient_key"))))
    listed = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return section(
        "origin",
        "How this was made",
        f'<div class="scroll"><table class="scan"><tbody>{listed}</tbody></table></div>',
        f"{NOTICE} Numbers to all digits are in the JSON file of the same name.",
    )
