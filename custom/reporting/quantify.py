# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Volumes of opacity and lung."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

__all__ = ["LUNGS", "ZONES", "measure_opacity"]

LUNGS = {"left": 1, "right": 2}
"""Values of the lungs in a lung mask."""

ZONES = ("lower", "middle", "upper")
"""Thirds of each lung's height, an approximation of the zones that radiologists read by anatomy."""


def measure_opacity(
    opacity: np.ndarray,
    affine: np.ndarray | None,
    lungs: np.ndarray | None = None,
    no_lungs_reason: str = "no lung mask was made",
    no_volume_reason: str = "the image has no voxel size",
) -> dict[str, Any]:
    """Volumes in mL, per lung where a lung mask is given; what is unknown is null and has a reason.

    The volume is the number of voxels times the volume of one, the absolute determinant of the affine.
    The percentage is 100 |opacity and lung| / |lung|; opacity outside the lung mask is a number of its own.

    Args:
        opacity: mask (H, W[, D]), nonzero is opacity.
        affine: 4x4 voxel to patient matrix in mm; None where the voxel size is unknown.
        lungs: mask of the same shape with the values of :data:`LUNGS`, or None.
        no_lungs_reason: why there is no lung mask.
        no_volume_reason: why there is no voxel size.

    Returns:
        ``voxel_volume_ml``, ``opacity_voxels``, ``opacity_volume_ml`` and ``lung_volume_ml`` (each with
        ``left``, ``right``, ``total``; opacity also ``outside_lungs``), ``opacity_percent_of_lung``,
        ``opacity_volume_ml_by_zone`` (for each lung the :data:`ZONES`) and ``reasons``, which names why a
        value is null.

    Raises:
        ValueError: When mask and lungs differ in shape.
    """
    if lungs is not None and lungs.shape != opacity.shape:
        raise ValueError(
            f"opacity {opacity.shape} and lung mask {lungs.shape} differ in shape; they must share a grid"
        )
    found = opacity != 0
    voxel_ml = (
        None if affine is None else float(abs(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3])) / 1000)
    )
    reasons: dict[str, str] = {}
    if voxel_ml is None:
        reasons["voxel_volume_ml"] = no_volume_reason

    def millilitres(voxels: int | None) -> float | None:
        return None if voxels is None or voxel_ml is None else round(voxels * voxel_ml, 3)

    opacity_voxels: dict[str, int | None] = {side: None for side in (*LUNGS, "outside_lungs")}
    lung_voxels: dict[str, int | None] = dict.fromkeys((*LUNGS, "total"))
    percent: dict[str, float | None] = dict.fromkeys((*LUNGS, "total"))
    if lungs is None:
        reasons["lung_volume_ml"] = no_lungs_reason
        reasons["opacity_percent_of_lung"] = no_lungs_reason
    else:
        for side, value in LUNGS.items():
            lung = lungs == value
            lung_voxels[side] = int(lung.sum())
            opacity_voxels[side] = int((found & lung).sum())
        opacity_voxels["outside_lungs"] = int((found & (lungs == 0)).sum())
        lung_voxels["total"] = sum(lung_voxels[side] or 0 for side in LUNGS)
        inside = {side: opacity_voxels[side] or 0 for side in LUNGS}
        inside["total"] = sum(inside.values())
        for side, voxels in inside.items():
            if lung_voxels[side]:
                percent[side] = round(100 * voxels / lung_voxels[side], 3)  # type: ignore[operator]
            else:
                reasons[f"opacity_percent_of_lung.{side}"] = "no such lung was found"
    zones = _by_zone(found, lungs, affine)
    if zones is None:
        reasons["opacity_volume_ml_by_zone"] = (
            no_lungs_reason
            if lungs is None
            else "zones need an orientation and at least three slices with lung"
        )
    total = int(found.sum())
    return {
        "voxel_volume_ml": voxel_ml,
        "opacity_voxels": total,
        "opacity_volume_ml": {
            **{k: millilitres(v) for k, v in opacity_voxels.items()},
            "total": millilitres(total),
        },
        "lung_volume_ml": {k: millilitres(v) for k, v in lung_voxels.items()},
        "opacity_percent_of_lung": percent,
        "opacity_volume_ml_by_zone": zones
        and {side: {zone: millilitres(v) for zone, v in one.items()} for side, one in zones.items()},
        "reasons": reasons,
    }


def _by_zone(
    found: np.ndarray, lungs: np.ndarray | None, affine: np.ndarray | None
) -> dict[str, dict[str, int]] | None:
    """Voxels of opacity in the thirds of each lung's height, None where that cannot be told."""
    if lungs is None or affine is None or found.ndim != 3:
        return None
    orientation = nib.orientations.io_orientation(affine)
    axis = int(np.flatnonzero(orientation[:, 0] == 2)[0])
    others = tuple(a for a in range(3) if a != axis)
    zones = {}
    for side, value in LUNGS.items():
        planes = np.flatnonzero((lungs == value).any(axis=others))
        if not len(planes):
            zones[side] = dict.fromkeys(ZONES, 0)
            continue
        first, height = int(planes[0]), int(planes[-1] - planes[0]) + 1
        if height < len(ZONES):
            return None
        counts = (found & (lungs == value)).sum(axis=others)[first : first + height]
        if orientation[axis, 1] < 0:  # the axis runs to the feet
            counts = counts[::-1]
        third = (np.arange(height) + 0.5) * len(ZONES) // height
        zones[side] = {zone: int(counts[third == number].sum()) for number, zone in enumerate(ZONES)}
    return zones
