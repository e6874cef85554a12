# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""DICOM codes for the segments of a MONAI Label server, those that our own DICOM objects have.

MONAI Label 0.8.5 calls every segment SCT 78961009, which is the spleen, unless each brings its own codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from custom.reporting.dicom_common import finding_code

__all__ = ["FINDINGS", "complete_label_info"]

FINDINGS = ("opacity", "ground_glass", "consolidation")
COLOUR = (220, 60, 20)  # sRGB


def complete_label_info(
    label_info: Sequence[Mapping[str, Any]] | None, values: Sequence[int], source: str, by_hand: bool = False
) -> list[dict[str, Any]]:
    """Give every segment of a label its codes.

    Args:
        label_info: what the client says of the segments, one entry a label value in rising order; an entry
            may have ``name`` (opacity unless given), ``color``, ``description``, ``model_name`` and, in
            dcmqi's words, ``segmentAttribute``, which is kept. The client need not say anything.
        values: label values that occur in the mask, rising, without 0.
        source: what made the mask, for the series description.
        by_hand: whether a person may have edited the mask.

    Returns:
        One entry a value, each with ``segmentAttribute``.

    Raises:
        ValueError: When a segment has a name whose codes are not known.
    """
    given = [dict(entry) for entry in label_info or ()]
    given += [{} for _ in values[len(given) :]]
    completed = []
    for value, entry in zip(values, given, strict=False):
        name = str(entry.get("name") or "opacity")
        if "segmentAttribute" not in entry:
            entry["segmentAttribute"] = {
                "labelID": int(value),
                "SegmentLabel": name,
                "SegmentDescription": str(entry.get("description") or name),
                "SegmentAlgorithmType": "SEMIAUTOMATIC" if by_hand else "AUTOMATIC",
                "SegmentAlgorithmName": source,
                "recommendedDisplayRGBValue": [int(part) for part in list(entry.get("color") or COLOUR)[:3]],
                **_codes(name),
            }
        completed.append({**entry, "name": name, "model_name": str(entry.get("model_name") or source)})
    return completed


def _codes(name: str) -> dict[str, Any]:
    if name.lower() not in FINDINGS:
        raise ValueError(
            f"no DICOM codes are known for the segment '{name}' (known: {', '.join(FINDINGS)}); "
            "use a known name, or give the codes as segmentAttribute in label_info"
        )
    return {
        "SegmentedPropertyCategoryCodeSequence": _words(codes.SCT.MorphologicallyAbnormalStructure),
        "SegmentedPropertyTypeCodeSequence": _words(finding_code(name.lower())),
        "AnatomicRegionSequence": _words(codes.SCT.Lung),
    }


def _words(code: Code) -> dict[str, str]:
    """A code in dcmqi's words."""
    return {
        "CodeValue": code.value,
        "CodingSchemeDesignator": code.scheme_designator,
        "CodeMeaning": code.meaning,
    }
