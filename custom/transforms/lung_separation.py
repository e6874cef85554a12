# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["dividing_sheet", "find_spine"]


def find_spine(d, body, spacing):
    """x of midline and y of spinous tip (in voxels)"""
    _, ys, xs = np.nonzero(body[:: max(1, len(body) // 20)])
    cx, cy = xs.mean(), ys.mean()
    bone = (d > 200) & body
    bone[:, : int(cy)] = False
    x = np.arange(d.shape[2])
    profile = bone.sum((0, 1)) * np.exp(-0.5 * ((x - cx) * spacing[2] / 50) ** 2)
    profile = ndimage.gaussian_filter1d(profile.astype(float), 12 / spacing[2], mode="constant")
    if profile.max() <= 0:
        return cx, None
    mid = int(profile.argmax())
    w = max(1, int(12 / spacing[2]))
    col = bone[:, :, max(0, mid - w) : mid + w + 1].any(2)
    rows = [np.flatnonzero(c)[-1] for c in col if c.any()]
    return float(mid), float(np.median(rows)) if rows else None


def dividing_sheet(d, mid, spacing):
    """first column that belongs to the left lung, (Z, Y)"""
    half = int(50 / spacing[2])
    x = np.clip(np.arange(int(mid) - half, int(mid) + half + 1), 0, d.shape[2] - 1)
    cost = np.clip((-200 - d[:, :, x]) / 700, 0, 1)
    cost = cost + 0.03 * np.abs(x - mid) * spacing[2] / 50 
    reach, bend = 2, 0.05
    total = np.empty_like(cost)
    total[:, 0] = cost[:, 0]
    steps = np.arange(-reach, reach + 1)
    back = np.zeros(cost.shape, np.int8)
    n = len(x)
    for y in range(1, cost.shape[1]):
        p = np.pad(total[:, y - 1], ((0, 0), (reach, reach)), constant_values=np.inf)
        options = np.stack([p[:, reach + s : reach + s + n] + bend * abs(s) for s in steps])
        best = options.argmin(0)
        back[:, y] = steps[best]
        total[:, y] = np.take_along_axis(options, best[None], 0)[0] + cost[:, y]
    col = total[:, -1].argmin(1)
    sheet = np.empty(cost.shape[:2], np.int32)
    z = np.arange(len(cost))
    for y in range(cost.shape[1] - 1, -1, -1):
        sheet[:, y] = x[col]
        col = col + back[z, y, col]
    return sheet
