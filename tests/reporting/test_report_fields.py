# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_checks import unexplained

from custom.reporting import measure_opacity
from custom.reporting.report import SCHEMA_VERSION, build_failure, build_report
from custom.reporting.table import flatten_report, write_table

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
MODEL = {"bundle": "a", "software_version": "1", "weights_sha256": None}
AFFINE = np.diag([-10.0, -10.0, 10.0, 1.0])
STUDY = {
    "name": "x",
    "source": "dicom",
    "files": ["/nowhere/Mustermann/1.dcm"],
    "series_choice": "series 3 (1.2.840.113.1.2.3): the only axial CT series, 9 slices",
    "notes": ["1 localizer left out of the series"],
    "study_uid": "1.2.840.113.1",
    "series_uid": "1.2.840.113.1.2",
    "series_number": 3,
    "study_date": "20200301",
    "study_time": None,
    "slice_thickness": 10.0,
    "kernel": None,
    "patient_position": "HFS",
    "contrast_agent": None,
    "manufacturer": "Maker",
    "model": "M1",
}
MISSING = {"lungs": "no lung mask was made", "seg": "switched off", "sr": "switched off", "page": "off"}


def make(study=STUDY, deidentify: bool = False) -> dict:
    lungs = np.zeros((4, 6, 9), np.uint8)
    lungs[:2, 1:5, 1:8], lungs[2:, 1:5, 1:8] = 2, 1
    opacity = np.zeros_like(lungs)
    opacity[0, 2, 2:4] = 1
    measured = measure_opacity(opacity, AFFINE, lungs, np.full(lungs.shape, -500.0))
    files = {"opacity": "x_opacity.nii.gz", "lungs": "x_lungs.nii.gz", "overview": "x_overview.png"}
    return build_report(
        "x", MODEL, study, AFFINE, lungs.shape, lungs, measured, files, MISSING, None, deidentify=deidentify
    )


def paths(value: object, path: str = "") -> set[str]:
    if isinstance(value, dict) and value:
        return {inner for key in value for inner in paths(value[key], f"{path}.{key}".lstrip("."))}
    return {path}


def test_every_field_is_on_the_page_and_every_field_of_the_page_is_there():
    rows = re.findall(r"^\| (`[a-z_0-9`, ]+) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    described = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    report = make()
    assert set(report) == set(described) - {c["name"] for c in report["acquisition"]["checks"]}
    for field in ("files", "source", "grid", "acquisition", "regions", "severity", "model"):
        named = set(re.findall(r"`(\w+)`", described[field]))
        assert set(report[field]) <= named, field
    assert set(report["regions"]["largest"][0]) <= set(re.findall(r"`(\w+)`", described["regions"]))
    assert {c["name"] for c in report["acquisition"]["checks"]} <= set(described)
    assert f"version {SCHEMA_VERSION}" in PAGE and report["schema_version"] == SCHEMA_VERSION


def test_units_are_in_the_names():
    for path in paths(make()):
        for word in ("volume", "spacing", "thickness", "distance", "coverage", "centroid"):
            if word in path and not path.startswith("reasons"):
                assert re.search(r"_(ml|mm|hu)\b", path), path


@pytest.mark.parametrize("source", ["dicom", "nifti"])
@pytest.mark.parametrize("deidentify", [False, True])
def test_every_null_has_a_reason(source, deidentify):
    study = STUDY | {"source": source}
    if source == "nifti":
        study = {key: value if key in ("source", "files") else None for key, value in study.items()}
    report = make(study, deidentify)
    assert unexplained(report) == []
    assert json.loads(json.dumps(report)) == report
    assert unexplained(build_failure("x", MODEL, "no lung was found", deidentify)) == []


def test_a_failure_has_the_same_fields():
    report, failure = make(), build_failure("x", MODEL, "no lung was found")
    assert list(report) == list(failure)
    assert failure["status"] == "failed" and failure["reason"] == "no lung was found"
    for field in ("opacity_volume_ml", "zones", "severity", "files"):
        assert paths(report[field]) == paths(failure[field])


def test_deidentified_reports_leave_out_uids_dates_and_paths():
    text = json.dumps(make(deidentify=True))
    for secret in ("1.2.840", "20200301", "Mustermann", "patient-"):
        assert secret not in text, secret
    assert "1.2.840" in json.dumps(make())
    reason = "series 3 (1.2.840.113.1.2): not a scan: /home/Max Mustermann/a b.nii.gz"
    kept = build_failure("x", MODEL, reason, deidentify=True)
    assert kept["reason"] == "series 3 ((UID left out)): not a scan: (path left out)"
    assert "Mustermann" not in json.dumps(kept) and "Mustermann" in json.dumps(
        build_failure("x", MODEL, reason)
    )
    relative = build_failure("x", MODEL, "empty file (0 bytes): data/Max Mustermann/ct.nii", deidentify=True)
    assert relative["reason"] == "empty file (0 bytes): (path left out)"
    half = build_failure("x", MODEL, "12.5 mm / 3 slices", deidentify=True)
    assert half["reason"] == "12.5 mm / 3 slices", "neither a UID nor a path"


def test_the_table_has_a_row_a_study_and_empty_cells_for_nulls(tmp_path):
    reports = [build_failure("bad", MODEL, 'it says "no", and stops'), make()]
    write_table(tmp_path / "cohort.csv", [flatten_report(report) for report in reports])
    with open(tmp_path / "cohort.csv", newline="", encoding="utf-8") as file:
        bad, good = csv.DictReader(file)
    assert good["study"] == "x" and good["status"] == "segmented" and bad["status"] == "failed"
    assert float(good["opacity_volume_ml.right"]) == 2.0 and good["severity.zones.right.lower"] == "1"
    assert good["severity.lobar_score"] == "" and bad["opacity_volume_ml.total"] == ""
    assert good["regions.count"] == "1" and float(good["regions.largest_ml"]) == 2.0
    assert good["acquisition.flagged"] == "slice_thickness slice_distance field_of_view"
    assert bad["reason"] == 'it says "no", and stops'
    assert list(good)[:3] == ["study", "status", "reason"]
    assert "Mustermann" not in (tmp_path / "cohort.csv").read_text(encoding="utf-8")
