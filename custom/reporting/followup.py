# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Several studies of one patient: what changed, and whether opacity increases, stays or resolves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from custom.reporting.followup_step import RULE, TOLERANCE_ML, TOLERANCE_PERCENT, compare_two
from custom.reporting.levels import LungLevels
from custom.reporting.wording import lookup, parse_date, why

__all__ = ["SCHEMA_VERSION", "STAGES", "compare_studies"]

SCHEMA_VERSION = "1.0"

STAGES = (
    "clinical stages (early, progressive, peak, absorption) are not inferred: they need symptoms and their "
    "onset, which images do not show"
)

_NOTICE = "Research use only. Not a medical device."


def compare_studies(
    reports: Sequence[Mapping[str, Any]], levels: Mapping[str, LungLevels] | None = None
) -> dict[str, Any]:
    """Put the studies of one patient in the order of time and compare each with the one before.

    A study that failed, or whose date is not known, is listed with the reason and compared with none; the
    next one is compared with the last that has numbers.

    Args:
        reports: contents of ``*_report.json``, of one patient.
        levels: volumes by slice of the studies, by name, where they are known. They decide whether scans show
            the lungs from end to end; where not, the part that both show is compared.

    Returns:
        The fields that ``docs/report.md`` describes under "Follow-up".

    Raises:
        ValueError: When there are fewer than two studies, two of one name, or studies of different patients.
    """
    names = [report["study"] for report in reports]
    if len(reports) < 2:
        raise ValueError(f"a follow-up needs two studies of a patient, got {len(reports)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two reports of the study {twice[0]}: leave one of them out")
    keys = {lookup(report, "source.patient_key") for report in reports} - {None}
    if len(keys) > 1:
        raise ValueError(f"the reports are of {len(keys)} patients: {', '.join(sorted(keys))}")

    ordered = sorted(reports, key=_order)
    dates = [parse_date(lookup(report, "source.study_date")) for report in ordered]
    reasons: dict[str, str] = {"clinical_stages": STAGES}
    first = next((day for day in dates if day is not None), None)
    studies: list[dict[str, Any]] = []
    prior: int | None = None
    for number, (report, day) in enumerate(zip(ordered, dates, strict=True)):
        path = f"studies.{number}"
        entry = _describe(report, day, first)
        _explain(entry, report, path, reasons)
        step, why_not = None, ""
        measured = report["status"] == "segmented" and day is not None
        if report["status"] != "segmented":
            why_not = f"this study could not be measured: {report['reason']}"
        elif day is None:
            why_not = "the date of this study is not known: it has no place in the course"
        elif prior is None:
            why_not = "it is the first study with numbers and a date"
        else:
            before = ordered[prior]
            days = (day - (dates[prior] or day)).days
            step = compare_two(before, report, days, levels or {}, f"{path}.since_prior", reasons)
            if days == 0 and not _times_known(before, report):
                step["course"] = None
                reasons[f"{path}.since_prior.course"] = (
                    "both are of one day, and which came first is not known"
                )
        if why_not:
            reasons[f"{path}.since_prior"] = why_not
        if measured:
            prior = number
        studies.append({**entry, "since_prior": step})

    steps = [n for n, entry in enumerate(studies) if entry["since_prior"] is not None]
    course = studies[steps[-1]]["since_prior"]["course"] if steps else None
    if not steps:
        reasons["course"] = "fewer than two studies have both numbers and a date"
    elif course is None:
        reasons["course"] = reasons[f"studies.{steps[-1]}.since_prior.course"]
    if not keys:
        reasons["patient_key"] = "the reports do not say whose they are: they were put together by hand"
    return {
        "schema_version": SCHEMA_VERSION,
        "notice": _NOTICE,
        "patient_key": next(iter(keys), None),
        "course": course,
        "rule": RULE,
        "tolerance_percent": TOLERANCE_PERCENT,
        "tolerance_ml": TOLERANCE_ML,
        "clinical_stages": None,
        "studies": studies,
        "reasons": reasons,
    }


def _order(report: Mapping[str, Any]) -> tuple[bool, date, str, str]:
    day = parse_date(lookup(report, "source.study_date"))
    return day is None, day or date.min, str(lookup(report, "source.study_time") or ""), report["study"]


def _times_known(*reports: Mapping[str, Any]) -> bool:
    times = {lookup(report, "source.study_time") for report in reports}
    return None not in times and len(times) == len(reports)


def _describe(report: Mapping[str, Any], day: date | None, first: date | None) -> dict[str, Any]:
    checks = lookup(report, "acquisition.checks") or []
    if lookup(report, "acquisition.slices") == 1:  # of course it does not show the whole lungs
        checks = [check for check in checks if check["name"] != "coverage"]
    return {
        "study": report["study"],
        "study_date": lookup(report, "source.study_date"),
        "study_time": lookup(report, "source.study_time"),
        "days_since_first": None if day is None or first is None else (day - first).days,
        "status": report["status"],
        "reason": report["reason"],
        "opacity_volume_ml": dict(report["opacity_volume_ml"]),
        "opacity_percent_of_lung": dict(report["opacity_percent_of_lung"]),
        "lung_volume_ml": dict(report["lung_volume_ml"]),
        "severity_score": lookup(report, "severity.score"),
        "flagged": [check["message"] for check in checks if check["status"] == "flagged"],
    }


def _explain(entry: Mapping[str, Any], report: Mapping[str, Any], path: str, reasons: dict[str, str]) -> None:
    """Take over the reasons of what is not known."""
    for field in ("opacity_volume_ml", "opacity_percent_of_lung", "lung_volume_ml"):
        for side, value in entry[field].items():
            if value is None:
                reasons[f"{path}.{field}.{side}"] = why(report, f"{field}.{side}")
    if entry["severity_score"] is None:
        reasons[f"{path}.severity_score"] = why(report, "severity.score")
    for field in ("study_date", "study_time"):
        if entry[field] is None:
            reasons[f"{path}.{field}"] = why(report, f"source.{field}")
    if entry["days_since_first"] is None:
        reasons[f"{path}.days_since_first"] = why(report, "source.study_date") or "the study date is no date"
