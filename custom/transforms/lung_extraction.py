# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Unsupervised extraction of the lungs from chest CT, diseased lung included."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from torch.nn.functional import interpolate

from custom.transforms.lung_search import AIR_HU, find_lungs, open_box
from scipy import ndimage

__all__ = ["extract_lungs"]

WORKING_MM = 2.5
BORDER_HU = -600.0

def extract_lungs(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    canon = nib.orientations.axcodes2ornt("SPL")
    to = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), canon)
    back = nib.orientations.ornt_transform(canon, nib.orientations.io_orientation(affine))
    order = np.argsort(to[:, 0]).astype(int)
    spacing = np.sqrt((np.asarray(affine, float)[:3, :3] ** 2).sum(0))[order]
    values = nib.orientations.apply_orientation(hu, to)
    values = np.clip(values, -1024, 1000).astype(np.int16, copy=False)
    factor = tuple(max(1, min(int(WORKING_MM / step + 1e-3), size)) for step, size in zip(spacing, values.shape, strict=True))
    small = _shrink(values, factor)
    lungs, sheet = find_lungs(small, spacing * factor)
    out = _refine(values, small, lungs, sheet, factor)
    return np.ascontiguousarray(nib.orientations.apply_orientation(out, back))


def _shrink(hu: np.ndarray, factor) -> np.ndarray:
    """Mean of blocks; edge repeated"""
    fz, fy, fx = factor
    pad = [(0, -n % f) for n, f in zip(hu.shape, factor, strict=True)]
    if any(p for _, p in pad):
        hu = np.pad(hu, pad, mode="edge")
    rows = hu[:, 0::fy].astype(np.int16 if fy <= 32 else np.int32)
    for n in range(1, fy):
        rows += hu[:, n::fy]
    out = rows[:, :, 0::fx].astype(np.float32)
    for n in range(1, fx):
        out += rows[:, :, n::fx]
    if fz > 1:
        out = out.reshape(-1, fz, *out.shape[1:]).sum(1)
    return out / np.float32(fz * fy * fx)


def _enlarge(mask, factor, size):
    """linear"""
    fz, fy, fx = factor
    x = torch.from_numpy(mask.astype(np.float32))
    if fz > 1:
        x = interpolate(x.flatten(1).T[None], scale_factor=fz, mode="linear")[0].T.reshape(-1, *x.shape[1:])
    return interpolate(x[:, None], scale_factor=(fy, fx), mode="bilinear")[:, 0].numpy()


def _refine(hu, small, lungs, sheet, factor):
    out = np.zeros(hu.shape, np.uint8)
    mask = lungs > 0
    if not mask.any():
        return out
    flat = np.ones((3 if factor[0] > 1 else 1, 3, 3), bool)
    core = ndimage.binary_erosion(mask, flat, border_value=1)
    dense = open_box(mask & (small >= AIR_HU))
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        box.append(slice(max(0, hit[0] - 1), hit[-1] + 2))
    mask, core, dense, sheet = mask[tuple(box)], core[tuple(box)], dense[tuple(box)], sheet[tuple(box[:2])]
    fine = tuple(slice(b.start * f, min(b.stop * f, n)) for b, f, n in zip(box, factor, hu.shape, strict=True))
    hu, out_box = hu[fine], out[fine]
    size = hu.shape
    K = max(1, 16 // factor[0])
    for k in range(0, len(mask), K):
        a, b = max(0, k - 1), min(len(mask), k + K + 1)
        cut = slice((k - a) * factor[0], (k - a) * factor[0] + K * factor[0])
        up = lambda m: _enlarge(m[a:b], factor, size)[cut, : size[1], : size[2]]
        rows = slice(k * factor[0], min((k + K) * factor[0], size[0]))
        plane = hu[rows]
        n = len(plane)
        m = ((up(mask)[:n] > 0.1) & (plane < BORDER_HU)) | (up(core)[:n] > 0.5) | (up(dense)[:n] > 0.5)
        s = np.repeat(np.repeat(sheet[k : k + K], factor[0], 0), factor[1], 1)[:n, : size[1]] * factor[2] - fine[2].start
        left = np.arange(size[2]) >= s[:, :, None]
        out_box[rows] = np.where(m, np.where(left, 1, 2), 0)
    return out
