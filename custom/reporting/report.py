# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The JSON report of a study, whose fields ``docs/report.md`` describes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from custom.reporting.acquisition import check_acquisition
from custom.reporting.dicom_source import patient_key
from custom.reporting.quantify import unmeasured
from custom.reporting.wording import hide_paths

__all__ = ["SCHEMA_VERSION", "build_failure", "build_report", "headline"]

SCHEMA_VERSION = "2.0"

_NOTICE = "Research use only. Not a medical device."
_FILES = ("opacity", "lungs", "overview", "seg", "sr", "page")
_IDENTIFYING = ("patient_key", "study_uid", "series_uid", "series_number", "study_date", "study_time")
_UID = re.compile(r"\b\d+(?:\.\d+){4,}\b")


def build_report(
    name: str,
    model: Mapping[str, Any],
    study: Mapping[str, Any],
    affine: np.ndarray,
    shape: Sequence[int],
    lungs: np.ndarray | None,
    measured: Mapping[str, Any],
    files: Mapping[str, str | None],
    missing_files: Mapping[str, str],
    dicom: Mapping[str, Any] | None,
    lungs_doubt: str = "",
    deidentify: bool = False,
) -> dict[str, Any]:
    """Put together the report of a study that was segmented.

    Args:
        name: of the study.
        model: ``bundle``, ``software_version`` and ``weights_sha256``.
        study: what :class:`custom.data.Scan` says of the scan; may be empty.
        affine: 4x4 voxel to patient matrix (RAS, mm).
        shape: of the scan, (I, J, K).
        lungs: the lung mask that was used, (I, J, K), or None.
        measured: see :func:`custom.reporting.measure_opacity`.
        files: names of the files beside the report, by kind.
        missing_files: why files of other kinds were not written.
        dicom: what the DICOM objects hold, None where there are none.
        lungs_doubt: why a lung mask that was made or given is not used, or "".
        deidentify: leave out what identifies patient and study.
    """
    source, reasons = _describe_source(study, deidentify)
    acquisition = check_acquisition(study, shape, affine, lungs, lungs_doubt)
    unsaid = "a NIfTI file does not say" if source["kind"] == "nifti" else "the header does not say"
    reasons |= {f"acquisition.{key}": unsaid for key, value in acquisition.items() if value is None}
    reasons |= {f"files.{kind}": missing_files[kind] for kind in _FILES if not files.get(kind)}
    if dicom is None:
        reasons["dicom"] = missing_files["sr"]
    elif dicom["seg_sop_instance_uid"] is None:
        reasons["dicom.seg_sop_instance_uid"] = missing_files["seg"]
    numbers = {key: value for key, value in measured.items() if key != "reasons"}
    return {
        **_head(name, model, "segmented", None),
        "files": {kind: files.get(kind) for kind in _FILES},
        "dicom": None if dicom is None else {"deidentified": deidentify, **dicom},
        "source": source,
        "grid": {
            "shape": [int(n) for n in shape],
            "spacing_mm": [round(float(mm), 6) for mm in nib.affines.voxel_sizes(affine)],
            "affine": np.asarray(affine, dtype=float).tolist(),
        },
        "acquisition": acquisition,
        **numbers,
        "reasons": {**reasons, **measured["reasons"]},
    }


def build_failure(
    name: str,
    model: Mapping[str, Any],
    reason: str,
    deidentify: bool = False,
    study: Mapping[str, Any] | None = None,
    page: str | None = None,
) -> dict[str, Any]:
    """The report of a study that could not be segmented: the same fields, None but for its source and page.

    Args:
        name: of the study.
        model: ``bundle``, ``software_version`` and ``weights_sha256``.
        reason: why.
        deidentify: leave UIDs and paths out of the reason, and what identifies patient and study.
        study: what is known of the scan, or None.
        page: name of the page beside the report.
    """
    if deidentify:
        reason = hide_paths(_UID.sub("(UID left out)", reason))
    nothing = unmeasured(reason)
    source, unknown = _describe_source(study, deidentify) if study else (None, {"source": reason})
    for path in unknown:
        if path.removeprefix("source.") not in _IDENTIFYING:
            unknown[path] = reason
    absent = ("dicom", "grid", "acquisition")
    reasons = dict.fromkeys(("files", *absent), reason) | unknown | nothing.pop("reasons")
    return {
        **_head(name, model, "failed", reason),
        "files": {**dict.fromkeys(_FILES), "page": page},
        "dicom": None,
        "source": source,
        "grid": None,
        "acquisition": None,
        **nothing,
        "reasons": reasons,
    }


def headline(measured: Mapping[str, Any]) -> list[str]:
    """The numbers to see first, as short texts.

    Args:
        measured: see :func:`custom.reporting.measure_opacity`.
    """
    volume, percent = measured["opacity_volume_ml"], measured["opacity_percent_of_lung"]["total"]
    if volume["total"] is None:
        return [f"opacity {measured['opacity_voxels']} voxels"]
    lines = [f"opacity {volume['total']:.1f} mL"]
    if percent is not None:
        lines.append(
            f"{percent:.1f} % of lung (left {volume['left']:.1f} mL, right {volume['right']:.1f} mL)"
        )
    if volume["outside_lungs"]:
        lines.append(f"{volume['outside_lungs']:.1f} mL outside the lung mask")
    return lines


def _head(name: str, model: Mapping[str, Any], status: str, reason: str | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "study": name,
        "notice": _NOTICE,
        "model": dict(model),
        "status": status,
        "reason": reason,
    }


def _describe_source(study: Mapping[str, Any], deidentify: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Where the scan comes from, and why some of that is not known."""
    kind = study.get("source")
    identity: dict[str, Any] = dict.fromkeys(_IDENTIFYING)
    why = "left out: the results are de-identified"
    if not deidentify:
        identity |= {key: study.get(key) for key in _IDENTIFYING}
        identity["patient_key"] = patient_key(study["files"][0]) if kind == "dicom" else None
        why = "a NIfTI file does not say" if kind == "nifti" else "the header does not say"
    choice = None if deidentify else study.get("series_choice") or None
    source = {
        "kind": kind,
        **identity,
        "manufacturer": study.get("manufacturer"),
        "model": study.get("model"),
        "series_choice": choice,
        "notes": list(study.get("notes") or []),
    }
    return source, {f"source.{key}": why for key, value in source.items() if value is None}
