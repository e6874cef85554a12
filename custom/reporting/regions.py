# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The regions that opacity falls into: number, size, side, and whether the scan cuts them off."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

__all__ = ["LISTED", "list_regions"]

LISTED = 20
"""How many of the regions, the largest ones, are listed one by one."""

_STEP = 32  # slices

_PADDING_HU = -1500  # below what CT can measure: what scanners write outside their field of view


def list_regions(
    opacity: np.ndarray, lungs: np.ndarray | None, hu: np.ndarray | None, affine: np.ndarray | None
) -> dict[str, Any]:
    """Count the regions of a mask, 26-connected, and describe the largest.

    A region is truncated when it has a voxel on one of the six faces of the array, or beside padding: it goes
    on outside the scan, and its volume is a lower bound.

    Args:
        opacity: mask (I, J, K) of bool.
        lungs: 1 left, 2 right, of the same shape, or None.
        hu: scan of the same shape, or None.
        affine: 4x4 voxel to patient matrix (RAS, mm), or None.

    Returns:
        ``count``, ``truncated_count`` and ``largest``, a list of ``volume_ml``, ``mean_hu``, ``side`` (where
        most of it lies: left, right or outside_lungs), ``centroid_mm`` (RAS) and ``truncated``; what is not
        known is None.
    """
    if not opacity.any():
        return {"count": 0, "truncated_count": 0, "largest": []}
    box = ndimage.find_objects(opacity.astype(np.uint8))[0]
    # Not cc3d, which is faster: release 4.1.1 labels some images of odd size wrongly.
    labels, count = ndimage.label(opacity[box], structure=np.ones((3, 3, 3)))
    padding = None if hu is None else _beside_padding(hu, box)
    sizes, cuts, sums = (np.zeros(count) for _ in range(3))
    places, halves = np.zeros((3, count)), np.zeros((3, count))
    # A few slices at a time: the places of all voxels of a large region take more memory than the scan.
    for first in range(0, labels.shape[2], _STEP):
        part = labels[..., first : first + _STEP]
        within = np.nonzero(part)
        owner = part[within]
        starts = (box[0].start, box[1].start, box[2].start + first)
        where = tuple(axis + start for axis, start in zip(within, starts, strict=True))

        def total(weights: np.ndarray | None = None, owner: np.ndarray = owner) -> np.ndarray:
            return np.bincount(owner, weights, minlength=count + 1)[1:]

        sizes += total()
        ends = [(axis == 0) | (axis == size - 1) for axis, size in zip(where, opacity.shape, strict=True)]
        cuts += total(np.any(ends, axis=0))
        if padding is not None:
            cuts += total(padding[..., first : first + _STEP][within])
        if hu is not None:
            sums += total(hu[where])
        if lungs is not None:
            halves += [total(lungs[where] == value) for value in range(3)]
        places += [total(axis) for axis in where]
    cut = cuts > 0
    voxel_ml = None if affine is None else float(abs(np.linalg.det(np.asarray(affine)[:3, :3])) / 1000)
    largest = np.argsort(-sizes, kind="stable")[:LISTED]
    centres = places.T[largest] / sizes[largest, None]
    placed = None if affine is None else nib.affines.apply_affine(affine, centres)
    return {
        "count": int(count),
        "truncated_count": int(cut.sum()),
        "largest": [
            {
                "volume_ml": None if voxel_ml is None else round(float(sizes[n]) * voxel_ml, 3),
                "mean_hu": None if hu is None else round(float(sums[n] / sizes[n]), 1),
                "side": None if lungs is None else ("outside_lungs", "left", "right")[halves[:, n].argmax()],
                "centroid_mm": None if placed is None else np.round(placed[rank], 2).tolist(),
                "truncated": bool(cut[n]),
            }
            for rank, n in enumerate(largest)
        ],
    }


def _beside_padding(hu: np.ndarray, box: tuple[slice, ...]) -> np.ndarray | None:
    """Voxels of the box that touch padding, looked for one voxel beyond the box too; None where none is."""
    wide = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
    padding = hu[wide] < _PADDING_HU
    if not padding.any():
        return None
    touched = ndimage.binary_dilation(padding)
    inner = tuple(
        slice(side.start - outer.start, side.stop - outer.start)
        for side, outer in zip(box, wide, strict=True)
    )
    return touched[inner]
