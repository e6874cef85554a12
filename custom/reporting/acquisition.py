# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whether a scan was taken in a way that its numbers can be relied on and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from custom.data.dicom_series import is_sharp_kernel
from custom.reporting.quantify import LUNGS
from custom.reporting.zones import cut_ends

__all__ = ["MAX_SLICE_MM", "check_acquisition", "doubt_lungs", "doubt_opacity"]

MAX_SLICE_MM = 5.0
"""Slices thicker, or further apart, than this average small and subpleural opacity away."""

_GAP = 1.5  # slices this many times further apart than they are thick leave tissue unseen
_SUPINE = ("HFS", "FFS")
_NO_CONTRAST = {"NO", "NONE", "N", "WITHOUT", "WO", "NATIVE", "NO CONTRAST", "PLAIN"}
_AERATED_HU = -500
_AIR_HU = -950
_LEAST_AERATED, _MOST_AIR = 0.05, 0.8
_MOST_OUTSIDE = 0.5
_HEALTHY_HU = -800  # opacity with a mean below is as airy as healthy lung


def check_acquisition(
    study: Mapping[str, Any],
    shape: Sequence[int],
    affine: np.ndarray,
    lungs: np.ndarray | None = None,
    doubt: str = "",
) -> dict[str, Any]:
    """Collect how a scan was taken and flag what is out of range.

    Args:
        study: what :class:`custom.data.Scan` says of the scan; keys may be missing.
        shape: of the scan, (I, J, K).
        affine: 4x4 voxel to patient matrix (RAS, mm).
        lungs: 1 left, 2 right, of that shape, or None.
        doubt: why the lung mask is not used, as :func:`doubt_lungs` says it, or "".

    Returns:
        ``slice_thickness_mm``, ``slice_distance_mm``, ``slices``, ``pixel_spacing_mm`` (the slice's two
        directions), ``coverage_mm`` (the scan's extent along the body), ``kernel``,
        ``contrast_agent``, ``patient_position`` (None where the header does not say), and ``checks``: for
        each a ``name``, a ``status`` ("ok", "flagged" or "unknown") and a one-line ``message``.
    """
    spacing = nib.affines.voxel_sizes(affine)
    superior = int(np.flatnonzero(nib.orientations.io_orientation(affine)[:, 0] == 2)[0])
    through = 2 if study.get("source") == "dicom" else superior  # a DICOM series may be sagittal
    thickness, distance, slices = study.get("slice_thickness"), float(spacing[through]), int(shape[through])
    values: dict[str, Any] = {
        "slice_thickness_mm": thickness,
        "slice_distance_mm": round(distance, 4),
        "slices": slices,
        "pixel_spacing_mm": [round(float(mm), 4) for axis, mm in enumerate(spacing) if axis != through],
        "coverage_mm": round(float(shape[superior] * spacing[superior]), 2),
        "kernel": study.get("kernel"),
        "contrast_agent": study.get("contrast_agent"),
        "patient_position": study.get("patient_position"),
    }
    checks = {
        "slice_thickness": _thickness(thickness),
        "slice_distance": _distance(distance, thickness, slices),
        "coverage": _coverage(lungs, affine),
        "field_of_view": _field_of_view(lungs, superior),
        "lung_mask": _lung_mask(lungs, doubt),
        "contrast": _contrast(values["contrast_agent"]),
        "kernel": _kernel(values["kernel"]),
        "patient_position": _position(values["patient_position"]),
    }
    listed = [
        {"name": name, "status": status, "message": message} for name, (status, message) in checks.items()
    ]
    return {**values, "checks": listed}


def doubt_lungs(lungs: np.ndarray, hu: np.ndarray) -> str:
    """Say why a lung mask cannot be that of this scan, or "".

    A mask of another study may lie on the same grid. In the lungs, however full of disease, some air is left,
    and they are not all air, as the room around the patient is.

    Args:
        lungs: mask (I, J, K), not empty.
        hu: scan of the same shape.
    """
    values = hu[lungs != 0]
    if np.mean(values < _AERATED_HU) < _LEAST_AERATED:
        return "the lung mask holds almost no air: it is not a mask of this scan"
    if np.mean(values < _AIR_HU) > _MOST_AIR:
        return "the lung mask holds almost nothing but air: it is not a mask of this scan"
    return ""


def doubt_opacity(measured: Mapping[str, Any]) -> str:
    """Say why an opacity mask may not be that of this scan, or "". It is measured all the same.

    Args:
        measured: see :func:`custom.reporting.measure_opacity`.
    """
    volume, mean = measured["opacity_volume_ml"], measured["opacity_mean_hu"]["total"]
    if volume["outside_lungs"] and volume["outside_lungs"] > _MOST_OUTSIDE * volume["total"]:
        share = 100 * volume["outside_lungs"] / volume["total"]
        return f"{share:.0f} % of the opacity lies outside the lungs: is it a mask of this scan?"
    if mean is not None and mean < _HEALTHY_HU:
        return f"the opacity has a mean of {mean:.0f} HU, as airy as healthy lung: is it a mask of this scan?"
    return ""


_Check = tuple[str, str]


def _thickness(thickness: float | None) -> _Check:
    if thickness is None:
        return "unknown", "the header does not say how thick slices are"
    if thickness > MAX_SLICE_MM:
        return "flagged", f"slices are {thickness:g} mm thick, more than {MAX_SLICE_MM:g} mm"
    return "ok", f"{thickness:g} mm"


def _distance(distance: float, thickness: float | None, slices: int) -> _Check:
    if slices == 1:
        return "flagged", "a single slice: volumes and percentages are those of this slice alone"
    if thickness and distance > _GAP * thickness:
        return "flagged", f"slices of {thickness:g} mm every {distance:g} mm: what lies between was not seen"
    if distance > MAX_SLICE_MM:
        return "flagged", f"a slice every {distance:g} mm, more than {MAX_SLICE_MM:g} mm"
    return "ok", f"a slice every {distance:g} mm"


def _coverage(lungs: np.ndarray | None, affine: np.ndarray) -> _Check:
    if lungs is None or not lungs.any():
        return "unknown", "without a lung mask it is not known whether the lungs are wholly in the scan"
    cut = {
        f"{side} lung at the {end} ({_percent(part)} of its largest cross-section)"
        for side, value in LUNGS.items()
        if (lung := lungs == value).any()
        for end, part in cut_ends(lung, affine).items()
        if part
    }
    missing = [side for side, value in LUNGS.items() if not (lungs == value).any()]
    if missing:
        return "flagged", f"the {' and the '.join(missing)} lung was not found"
    if cut:
        return "flagged", f"the scan cuts off the {', the '.join(sorted(cut))}"
    return "ok", "both lungs are wholly in the scan"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.005 else "less than 1 %"


def _field_of_view(lungs: np.ndarray | None, superior: int) -> _Check:
    if lungs is None or not lungs.any():
        return "unknown", "without a lung mask it is not known whether the image is wide enough"
    sides = [axis for axis in range(3) if axis != superior]
    if any(np.moveaxis(lungs, axis, 0)[end].any() for axis in sides for end in (0, -1)):
        return "flagged", "a lung reaches the side of the image and may go on outside it"
    return "ok", "the image is wider than the lungs"


def _lung_mask(lungs: np.ndarray | None, doubt: str) -> _Check:
    if doubt:
        return "flagged", doubt
    return ("unknown", "there is no lung mask") if lungs is None else ("ok", "holds air as lungs do")


def _contrast(agent: str | None) -> _Check:
    if not agent:
        return "unknown", "the header names no contrast agent, which need not mean that none was given"
    if agent.upper().strip(" .-") in _NO_CONTRAST:
        return "ok", "no contrast agent"
    return "flagged", "a contrast agent was given: vessels and opacity are denser than without"


def _kernel(kernel: str | None) -> _Check:
    if not kernel:
        return "unknown", "the header does not name the reconstruction kernel"
    if is_sharp_kernel(kernel):
        return "flagged", f"{kernel} is a sharp kernel: noise shifts the split by HU"
    return "ok", kernel


def _position(position: str | None) -> _Check:
    if not position:
        return "unknown", "the header does not say how the patient lay"
    if position.upper() not in _SUPINE:
        return "flagged", f"{position}: the patient did not lie on the back, which moves dependent opacity"
    return "ok", position
