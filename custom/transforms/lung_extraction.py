# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Unsupervised extraction of the lungs from chest CT, diseased lung included."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch.nn.functional import interpolate

from custom.transforms.lung_morphology import bounding_box, open_box
from custom.transforms.lung_search import find_lungs

__all__ = ["extract_lungs"]

WORKING_MM = 2.5  # the working grid's largest spacing
BORDER_HU = -600  # as in the published steps
CHUNK = 16  # slices of the working grid at a time


def extract_lungs(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Extract the left and the right lung from a chest CT; nothing is trained.

    Vessels, ground-glass, consolidation and masses belong to the lungs; trachea, main bronchi, heart,
    mediastinum and gas in stomach and bowel do not. Tissue between aerated lung and ribs counts as lung, so
    consolidation against the chest wall does, and so does pleural effusion. Consolidation wider than 30 mm
    against mediastinum or diaphragm cannot be told from them and stays out.

    What is lung is decided on a grid of about 2.5 mm, the border at full resolution where CT shows one.

    Args:
        hu: whole scan, part of one or a single slice in Hounsfield units, (I, J, K), axes in any order.
        affine: voxel index to RAS+ mm, (4, 4).

    Returns:
        0 background, 1 left lung, 2 right lung, uint8 (I, J, K); all 0 where no lung is found.

    Raises:
        ValueError: When ``hu`` is not 3-D or cannot be HU, or ``affine`` is no invertible 4 x 4 matrix.

    Reference:
        After the steps of Liao et al., "Evaluate the Malignancy of Pulmonary Nodules Using the 3-D Deep Leaky
        Noisy-OR Network", IEEE TNNLS 30(11), 2019, with their threshold at the border; unlike them it keeps
        lung that disease has filled, and takes single slices and parts of scans.
    """
    hu, affine = np.asarray(hu), np.asarray(affine, float)
    if hu.ndim != 3 or hu.size == 0:
        raise ValueError(f"extract_lungs: need one volume (I, J, K), got an array of shape {hu.shape}")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError("extract_lungs: need an invertible 4 x 4 affine from voxels to RAS+ mm")
    lowest = hu.min()
    if not lowest < 0:  # NaN, too, comes out as the minimum
        raise ValueError(
            f"extract_lungs: the lowest value is {lowest}, but air is about -1000 HU; rescale to HU"
        )
    start, canonical = nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt("SPL")
    there = nib.orientations.ornt_transform(start, canonical)
    spacing = np.empty(3)
    spacing[there[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    values = nib.orientations.apply_orientation(hu, there)
    # Padding (-2048, -3024) becomes air, metal becomes bone.
    values = np.clip(values, -1024, 1000).astype(np.int16, copy=False)
    factor = [
        max(1, min(int(WORKING_MM / mm + 1e-3), n)) for mm, n in zip(spacing, values.shape, strict=True)
    ]

    working = _shrink(values, factor)
    lungs, sheet = find_lungs(working, spacing * factor)
    out = _refine(values, working, lungs, sheet, factor)
    back = nib.orientations.ornt_transform(canonical, start)
    return nib.orientations.apply_orientation(out, back).copy(order="K")


def _shrink(hu: np.ndarray, factor: Sequence[int]) -> np.ndarray:
    """Mean over blocks, the last ones filled up with the edge, float32."""
    pad = [(0, -n % f) for n, f in zip(hu.shape, factor, strict=True)]
    if np.any(pad):
        hu = np.pad(hu, pad, mode="edge")
    fz, fy, fx = factor
    rows = hu[:, 0::fy].astype(np.int32 if fy > 31 else np.int16)  # 31 * 1024 still fits
    for n in range(1, fy):
        rows += hu[:, n::fy]
    out = rows[:, :, 0::fx].astype(np.float32)
    for n in range(1, fx):
        out += rows[:, :, n::fx]
    return out.reshape(-1, fz, *out.shape[1:]).sum(1) / np.float32(fz * fy * fx)


def _enlarge(mask: np.ndarray, factor: Sequence[int]) -> np.ndarray:
    """Linear interpolation of a mask at full resolution, float32."""
    out = torch.from_numpy(mask.astype(np.float32))
    if factor[0] > 1:
        columns = out.flatten(1).T[None]
        out = interpolate(columns, scale_factor=factor[0], mode="linear")[0].T.reshape(-1, *mask.shape[1:])
    return interpolate(out[:, None], scale_factor=tuple(factor[1:]), mode="bilinear")[:, 0].numpy()


def _refine(
    hu: np.ndarray,
    working: np.ndarray,
    lungs: np.ndarray,
    sheet: np.ndarray,
    factor: Sequence[int],
) -> np.ndarray:
    """Bring the lungs of the working grid to full resolution.

    Inside, the working grid decides. At the border the threshold does, in the voxels that the working grid
    can be wrong about. Where the outer layer is dense, there is no border to see: the mask is interpolated.
    """
    out = np.zeros(hu.shape, np.uint8)
    mask = lungs > 0
    if not mask.any():
        return out
    core = ndimage.binary_erosion(mask, np.ones((3, 3, 3)), border_value=1)
    dense = open_box(mask & (working >= BORDER_HU))
    box = bounding_box(mask, margin=1)
    fine = tuple(
        slice(b.start * f, min(b.stop * f, n)) for b, f, n in zip(box, factor, hu.shape, strict=True)
    )
    mask, core, dense, sheet = mask[box], core[box], dense[box], sheet[box[:2]]
    hu, target = hu[fine], out[fine]
    column = np.arange(fine[2].start, fine[2].stop)
    for k in range(0, len(mask), CHUNK):
        low, high = max(0, k - 1), k + CHUNK + 1  # with a neighbour to interpolate towards
        rows = slice(k * factor[0], min((k + CHUNK) * factor[0], len(hu)))
        skip = (k - low) * factor[0]
        keep = slice(skip, skip + rows.stop - rows.start), slice(hu.shape[1]), slice(hu.shape[2])
        near = _enlarge(mask[low:high], factor)[keep] > 0.1
        lung = near & (hu[rows] < BORDER_HU)
        lung |= _enlarge(core[low:high], factor)[keep] > 0.5
        lung |= _enlarge(dense[low:high], factor)[keep] > 0.5
        first = factor[2] * sheet[k : k + CHUNK].repeat(factor[0], 0).repeat(factor[1], 1)
        first = first[: len(lung), : hu.shape[1]]
        target[rows] = np.where(column >= first[:, :, None], np.uint8(1), np.uint8(2)) * lung
    return out
