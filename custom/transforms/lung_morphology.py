# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Binary morphology with reaches in mm; at these radii several times faster than by distance transforms."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["bounding_box", "close_ball", "dilate_ball", "dilate_box", "fill_small_holes", "open_box"]


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """Smallest box around a non-empty mask, grown by ``margin`` voxels as far as the array goes."""
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(0, int(hit[0]) - margin), min(mask.shape[axis], int(hit[-1]) + 1 + margin)))
    return tuple(box)


def open_box(mask: np.ndarray, flat: bool = False) -> np.ndarray:
    """Opening with 3 x 3 x 3 voxels; 3 x 3 in plane if ``flat`` or with fewer than three slices."""
    return ndimage.binary_opening(mask, np.ones((1 if flat or len(mask) < 3 else 3, 3, 3)))


def dilate_box(mask: np.ndarray, mm: float, spacing: np.ndarray) -> np.ndarray:
    """Dilation with a box that reaches ``mm``, at least one voxel, to each side, where there are voxels."""
    out = mask
    for axis, step in enumerate(spacing):
        reach = min(max(1, round(mm / step)), mask.shape[axis] - 1)
        view = (slice(None),) * axis
        done = 0
        while done < reach:  # the reach doubles with each step
            shift = min(reach - done, done + 1)
            source, out = out, out.copy()
            for to, of in _shifts(shift):
                out[view + (to,)] |= source[view + (of,)]
            done += shift
    return out


def dilate_ball(mask: np.ndarray, mm: float, spacing: np.ndarray) -> np.ndarray:
    """Dilation with a ball of radius ``mm``.

    The ball is a stack of runs along the last axis: the mask dilated along it, shifted along the others.
    """
    reach_z, reach_y, reach_x = (
        int(min(mm / step, n - 1)) for step, n in zip(spacing, mask.shape, strict=True)
    )
    runs = [mask]
    for x in range(1, reach_x + 1):
        run = runs[-1].copy()
        run[:, :, x:] |= mask[:, :, :-x]
        run[:, :, :-x] |= mask[:, :, x:]
        runs.append(run)
    out = runs[-1].copy()
    for z in range(reach_z + 1):
        for y in range(reach_y + 1):
            rest = mm**2 - (z * spacing[0]) ** 2 - (y * spacing[1]) ** 2
            if rest < 0:
                break
            run = runs[min(int(np.sqrt(rest) / spacing[2]), reach_x)]
            for z_to, z_of in _shifts(z):
                for y_to, y_of in _shifts(y):
                    out[z_to, y_to] |= run[z_of, y_of]
    return out


def _shifts(n: int) -> tuple[tuple[slice, slice], ...]:
    if n == 0:
        return ((slice(None), slice(None)),)
    return (slice(n, None), slice(None, -n)), (slice(None, -n), slice(n, None))


def close_ball(mask: np.ndarray, mm: float, spacing: np.ndarray) -> np.ndarray:
    """Closing of a non-empty mask with a ball; what the image's edge cuts is taken to go on beyond it."""
    reach = [int(mm / step) + 1 if n > 1 else 0 for step, n in zip(spacing, mask.shape, strict=True)]
    box = bounding_box(mask)
    # Within the image the ball needs room to grow; beyond it, room for the continued mask as well.
    grow = [(min(r, b.start), min(r, n - b.stop)) for r, b, n in zip(reach, box, mask.shape, strict=True)]
    wide_box = tuple(slice(b.start - g[0], b.stop + g[1]) for b, g in zip(box, grow, strict=True))
    pad = [tuple(2 * r if end < r else 0 for end in g) for r, g in zip(reach, grow, strict=True)]
    wide = np.pad(mask[wide_box], pad, mode="edge")
    closed = ~dilate_ball(~dilate_ball(wide, mm, spacing), mm, spacing)
    out = mask.copy()
    out[wide_box] |= closed[tuple(slice(p[0], n - p[1]) for p, n in zip(pad, wide.shape, strict=True))]
    return out


def fill_small_holes(mask: np.ndarray, max_mm2: float, spacing: np.ndarray) -> np.ndarray:
    """Fill what the mask encloses in an axial slice, unless the hole is larger than ``max_mm2``."""
    box = bounding_box(mask, margin=1)
    part = mask[box]
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(~part, plane)
    small = np.bincount(labels.ravel()) * spacing[1] * spacing[2] <= max_mm2
    for face in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        small[face] = False
    small[0] = False
    out = mask.copy()
    out[box] |= small[labels]
    return out
