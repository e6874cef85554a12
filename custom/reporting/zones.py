# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Parts of a lung that are told by geometry alone: thirds of its height, its ventral and dorsal half."""

from __future__ import annotations

from typing import NamedTuple

import nibabel as nib
import numpy as np

__all__ = ["HALVES", "MAX_CUT", "ZONES", "ZoneCount", "count_zones", "cut_ends"]

ZONES = ("upper", "middle", "lower")
"""Thirds of each lung's height, an approximation of the zones that radiologists read by anatomy."""

HALVES = ("ventral", "dorsal")
"""Halves of each lung's extent from front to back."""

MAX_CUT = 0.25
"""A lung whose cross-section on the scan's first or last slice is more than this fraction of its largest one
is not whole, and thirds of what is left of it are not the zones."""

_ANTERIOR, _SUPERIOR = 1, 2


class ZoneCount(NamedTuple):
    """Voxels of a part of a lung."""

    lung: int
    opacity: int


def count_zones(
    lung: np.ndarray, opacity: np.ndarray, affine: np.ndarray
) -> tuple[dict[str, ZoneCount | None], dict[str, str]]:
    """Count the voxels of lung and opacity in the :data:`ZONES` and :data:`HALVES` of one lung.

    Planes of the array stand for the body's planes; in an oblique scan they are the nearest ones.

    Args:
        lung: mask of one lung (I, J, K), not empty, in any axis order.
        opacity: mask of the same shape.
        affine: 4x4 voxel to patient matrix (RAS, mm).

    Returns:
        The counts by name, None where a part cannot be told, and the reasons for those.
    """
    inside = opacity & lung
    counts: dict[str, ZoneCount | None] = dict.fromkeys((*ZONES, *HALVES))
    lungs, found = _profile(lung, affine, _SUPERIOR), _profile(inside, affine, _SUPERIOR)
    reason = _height_reason(lungs)
    reasons = dict.fromkeys(ZONES, reason) if reason else {}
    if not reason:
        counts.update(_parts(lungs, found, ZONES[::-1]))
    lungs, found = _profile(lung, affine, _ANTERIOR), _profile(inside, affine, _ANTERIOR)
    counts.update(_parts(lungs, found, HALVES[::-1]))
    for name, count in counts.items():
        if count is not None and not count.lung:  # a lung in pieces, or one voxel deep
            counts[name], reasons[name] = None, "no voxel of this lung lies there"
    return counts, reasons


def cut_ends(lung: np.ndarray, affine: np.ndarray) -> dict[str, float]:
    """How much of a lung lies on the scan's lowest and highest plane.

    Args:
        lung: mask (I, J, K), not empty.
        affine: 4x4 voxel to patient matrix (RAS, mm).

    Returns:
        ``bottom`` and ``top``: the cross-section there as a fraction of the largest one; 0 where the scan
        goes beyond the lung.
    """
    profile = _profile(lung, affine, _SUPERIOR)
    return {"bottom": float(profile[0] / profile.max()), "top": float(profile[-1] / profile.max())}


def _profile(mask: np.ndarray, affine: np.ndarray, direction: int) -> np.ndarray:
    """Voxels per plane along a direction of the body, in its order (RAS)."""
    orientation = nib.orientations.io_orientation(affine)
    axis = int(np.flatnonzero(orientation[:, 0] == direction)[0])
    counts = np.count_nonzero(mask, axis=tuple(a for a in range(3) if a != axis))
    return counts if orientation[axis, 1] > 0 else counts[::-1]


def _height_reason(profile: np.ndarray) -> str:
    if np.count_nonzero(profile) < len(ZONES):
        return f"this lung is seen on fewer than {len(ZONES)} slices"
    ends = {"bottom": profile[0] / profile.max(), "top": profile[-1] / profile.max()}
    end = max(ends, key=lambda name: ends[name])
    if ends[end] > MAX_CUT:
        return (
            f"the scan cuts off the {end} of this lung: its cross-section on the {end} slice is "
            f"{100 * ends[end]:.0f} % of its largest one"
        )
    return ""


def _parts(lungs: np.ndarray, found: np.ndarray, names: tuple[str, ...]) -> dict[str, ZoneCount]:
    """Split the planes that hold lung into equally many each; names in the order of the planes."""
    planes = np.flatnonzero(lungs)
    first, extent = planes[0], planes[-1] - planes[0] + 1
    part = (np.arange(len(lungs)) - first + 0.5) * len(names) // extent
    return {
        name: ZoneCount(int(lungs[part == n].sum()), int(found[part == n].sum()))
        for n, name in enumerate(names)
    }
