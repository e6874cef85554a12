# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What the Segmentation and the Structured Report share: names, codes, equipment, and whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from custom.reporting.dicom_source import SourceSeries

__all__ = ["LABELS", "MANUFACTURER", "algorithm", "claim", "equipment", "finding_code", "series_number"]

MANUFACTURER = "covid-ct-bundles"

LABELS = {
    "left_lung": "Left lung",
    "right_lung": "Right lung",
    "opacity": "Opacity",
    "ground_glass": "Ground-glass opacity",
    "consolidation": "Consolidation",
}
"""Labels of the segments, which name the measurement groups, too."""


def finding_code(name: str) -> Code:
    """The finding that a segment of opacity shows.

    Args:
        name: opacity, ground_glass or consolidation.
    """
    if name == "consolidation":  # DICOM's own lists of findings do not have it
        return Code("95436008", "SCT", "Lung consolidation")
    return {"opacity": codes.DCM.Opacity, "ground_glass": codes.DCM.GroundGlassOpacity}[name]


def algorithm(model: Mapping[str, Any]) -> dict[str, Any]:
    """What found the opacity: ``name``, ``version`` and ``parameters`` as a dictionary.

    Args:
        model: ``bundle``, ``software_version`` and ``weights_sha256``.
    """
    weights = model.get("weights_sha256")
    return {
        "name": str(model["bundle"]) or MANUFACTURER,
        "version": str(model["software_version"]),
        "parameters": {"weights_sha256": weights} if weights else {},
    }


def equipment(model: Mapping[str, Any]) -> dict[str, Any]:
    """What made an object, as highdicom's classes take it.

    Args:
        model: ``bundle``, ``software_version`` and ``weights_sha256``.
    """
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": str(model["bundle"]) or MANUFACTURER,
        "software_versions": str(model["software_version"]),
        "device_serial_number": "none",
    }


def series_number(source: SourceSeries, offset: int) -> int:
    """A Series Number beside that of the source, and not one that a scanner gives.

    Args:
        source: the source series.
        offset: 1 to 99.
    """
    number = source.headers[0].get("SeriesNumber")
    return (int(number) * 100 if number and 0 < int(number) < 10**7 else 9000) + offset


def claim(dataset: Any, source: SourceSeries) -> Any:
    """Say whose an object is: the source's patient and study, or no one's.

    Args:
        dataset: object of highdicom.
        source: the source series.
    """
    dataset.SpecificCharacterSet = "ISO_IR 192"
    if source.identity is not None:
        dataset.copy_patient_and_study_information(source.identity)
        return dataset
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "Made without patient and study attributes; UIDs are new"
    dataset.LongitudinalTemporalInformationModified = "REMOVED"
    return dataset
