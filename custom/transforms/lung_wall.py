# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Consolidation against the chest wall, found as tissue between aerated lung and ribs."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.morphology import convex_hull_image

__all__ = ["fill_to_wall"]

BONE_HU, AIR_HU = 150.0, -500.0
# Rays from the middle of a lung, counted from posterior towards the side: from the groove beside the spine
# to the front of the flank. Further round are mediastinum, heart and cartilage: nothing shows what is lung.
STEP_DEG, STEP_MM, RANGE_MM = 3.0, 1.5, 180.0
ANGLES_DEG = np.arange(-42.0, 121.0, STEP_DEG)
GAP_MM, GAP_DEG, SLICE_GAP_DEG = 30.0, 27.0, 63.0  # largest gaps between ribs; within one slice they are wide
PLEURA_MM = 3.0
MIN_DEPTH_MM, MAX_DEPTH_MM = 15.0, 70.0  # in health up to 14 mm lie between lung and ribs, near the base
EDGE_MM = 10.0  # a patch that is thick enough somewhere reaches as far as it is thicker than this
APEX_MM = 40.0  # the first ribs run too flat to bound the apex
SMOOTH_MM = 20.0


def fill_to_wall(
    hu: np.ndarray, lung: np.ndarray, inside: np.ndarray, spacing: np.ndarray, outward: int
) -> np.ndarray:
    """Add what lies between one lung and the inner surface of its ribs where it is too thick for a wall.

    In every slice, rays from the middle of the lung find its outermost voxel and the first bone behind that.
    Distances to bone, over angle and height, show the ribs as bands; opening them closes the gaps between.

    Args:
        hu: working grid in HU, (Z, Y, X) to head, posterior and the patient's left.
        lung: one lung as far as it is known, not empty.
        inside: the trunk.
        spacing: mm along Z, Y, X.
        outward: 1 for the left lung, -1 for the right one.

    Returns:
        ``lung`` with what was added.
    """
    slices = np.flatnonzero(lung.any((1, 2)))
    span = slice(int(slices[0]), int(slices[-1]) + 1)
    hu, part, inside = hu[span], lung[span], inside[span]
    cy, cx = _middle(part, spacing)
    radius = np.arange(0, RANGE_MM, STEP_MM)
    angle = np.deg2rad(ANGLES_DEG)[:, None]
    y = np.rint(cy[:, None, None] + np.cos(angle) * radius / spacing[1]).astype(np.intp)
    x = np.rint(cx[:, None, None] + outward * np.sin(angle) * radius / spacing[2]).astype(np.intp)
    seen = (y >= 0) & (y < part.shape[1]) & (x >= 0) & (x < part.shape[2])
    at = np.arange(len(part))[:, None, None], y.clip(0, part.shape[1] - 1), x.clip(0, part.shape[2] - 1)

    on_lung = part[at] & seen
    steps = len(radius)
    last = np.where(on_lung.any(2), steps - 1 - on_lung[:, :, ::-1].argmax(2), steps)
    bone = (hu[at] > BONE_HU) & inside[at] & seen & (np.arange(steps) > last[:, :, None])
    rib = np.where(bone.any(2), bone.argmax(2), 2 * steps) * STEP_MM
    single = len(part) == 1
    wall = ndimage.grey_opening(
        rib,
        (
            1 if single else 2 * round(GAP_MM / 2 / spacing[0]) + 1,
            2 * round((SLICE_GAP_DEG if single else GAP_DEG) / 2 / STEP_DEG) + 1,
        ),
        mode="nearest",
    )
    depth = ndimage.median_filter(wall - last * STEP_MM, (min(3, len(part)), 5), mode="nearest")
    thick = (depth > EDGE_MM) & (depth < MAX_DEPTH_MM) & (wall < RANGE_MM)
    if not single:
        thick[len(thick) - int(APEX_MM / spacing[0]) :] = False
    patches, count = ndimage.label(thick)
    sick = np.zeros(count + 1, bool)
    sick[patches[thick & (depth > MIN_DEPTH_MM)]] = True
    thick = sick[patches]

    out = lung.copy()
    for k in np.flatnonzero(thick.any(1)):
        dy = (np.arange(part.shape[1]) - cy[k])[:, None] * spacing[1]
        dx = outward * (np.arange(part.shape[2]) - cx[k]) * spacing[2]
        ray = np.rint((np.rad2deg(np.arctan2(dx, dy)) - ANGLES_DEG[0]) / STEP_DEG).astype(np.intp)
        within = (ray >= 0) & (ray < len(ANGLES_DEG))
        ray = ray.clip(0, len(ANGLES_DEG) - 1)
        far = np.hypot(dy, dx)
        added = within & thick[k, ray] & (far > last[k, ray] * STEP_MM) & (far < wall[k, ray] - PLEURA_MM)
        added &= hu[k] > AIR_HU
        if single:  # the wall is uncertain here, so no bulge between ribs is believed
            added &= convex_hull_image(part[0])
        out[span.start + k] |= added
    return out


def _middle(part: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the lung in each slice, in voxels along Y and X, smooth over the slices."""
    size = part.sum((1, 2), dtype=float)
    moments = (part.sum(2) @ np.arange(part.shape[1]), part.sum(1) @ np.arange(part.shape[2]))
    sigma = SMOOTH_MM / spacing[0]
    weight = ndimage.gaussian_filter1d(size, sigma, mode="nearest")
    cy, cx = (ndimage.gaussian_filter1d(m.astype(float), sigma, mode="nearest") / weight for m in moments)
    return cy, cx
