# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The sheet between the left and the right lung."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["dividing_sheet", "find_midline"]

BONE_HU = 200.0
REACH_MM = 50.0  # how far from the midline the sheet may lie: lungs reach over it in front of heart and spine
MAX_SLOPE = 2  # columns per row
BEND_COST, DISTANCE_COST = 0.05, 0.03  # a bend or a detour must never cost more than crossing lung


def find_midline(hu: np.ndarray, body: np.ndarray, spacing: np.ndarray) -> int:
    """Column of the spine, or of the body's centre where no bone is seen.

    Args:
        hu: working grid, (Z, Y, X), Y to posterior.
        body: the trunk in the same grid.
        spacing: mm along Z, Y, X.
    """
    columns = np.arange(hu.shape[2])
    weight = body.sum((0, 1), dtype=float)
    centre = (weight * columns).sum() / weight.sum()
    rows = body.sum((0, 2), dtype=float)
    middle = int((rows * np.arange(hu.shape[1])).sum() / rows.sum())
    profile = ((hu[:, middle:] > BONE_HU) & body[:, middle:]).sum((0, 1), dtype=float)
    # Ribs seen edge on in the flanks can outweigh vertebrae, so bone counts less there.
    profile *= np.exp(-0.5 * ((columns - centre) * spacing[2] / REACH_MM) ** 2)
    profile = ndimage.gaussian_filter1d(profile, 12 / spacing[2], mode="constant")
    return int(profile.argmax() if profile.max() > 0 else round(centre))


def dividing_sheet(hu: np.ndarray, midline: int, spacing: np.ndarray) -> np.ndarray:
    """Cheapest path from front to back in each axial slice, where air has a price and tissue is nearly free.

    Between lungs that touch, the path follows the membrane at their junction, which partial volume makes a
    little brighter than lung.

    Args:
        hu: working grid with airways and outer air set to tissue, (Z, Y, X), X to the patient's left.
        midline: column near which the path is sought.
        spacing: mm along Z, Y, X.

    Returns:
        The first column on the left lung's side, (Z, Y).

    Reference:
        Brown et al., "Method for Segmenting Chest CT Image Data Using an Anatomical Model: Preliminary
        Results", IEEE TMI 16(6), 1997: the anterior junction as a minimum-cost path.
    """
    half = int(REACH_MM / spacing[2])
    x = np.arange(max(0, midline - half), min(hu.shape[2], midline + half + 1))
    cost = np.clip((-200 - hu[:, :, x]) / 700, 0, 1)
    cost += DISTANCE_COST * np.abs(x - midline) * spacing[2] / REACH_MM
    steps = np.arange(-MAX_SLOPE, MAX_SLOPE + 1)
    came_from = np.zeros(cost.shape, np.int8)
    total = cost[:, 0]
    for y in range(1, cost.shape[1]):
        padded = np.pad(total, ((0, 0), (MAX_SLOPE, MAX_SLOPE)), constant_values=np.inf)
        options = np.stack([padded[:, MAX_SLOPE + s :][:, : len(x)] + BEND_COST * abs(s) for s in steps])
        best = options.argmin(0)
        came_from[:, y] = steps[best]
        total = np.take_along_axis(options, best[None], 0)[0] + cost[:, y]
    column, slices = total.argmin(1), np.arange(len(cost))
    sheet = np.empty(cost.shape[:2], np.int32)
    for y in range(cost.shape[1] - 1, -1, -1):
        sheet[:, y] = x[column]
        column = column + came_from[slices, y, column]
    return sheet
