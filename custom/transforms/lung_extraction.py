# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""wip"""

from __future__ import annotations

import cc3d
import nibabel as nib
import numpy as np
from scipy import ndimage
from custom.transforms.lung_separation import dividing_sheet, find_spine

AIR, DENSE, GAS = -500.0, -200.0, -950.0
GAS_LEVELS = (-970.0, -950.0, -930.0, -910.0, -850.0)
ISLAND_MM = 10.0
CLOSE_MM = 12.0
WORK_MM = 2.5


def _shrink(hu, factor):
    """block mean, edges repeated"""
    fz, fy, fx = factor
    pad = [(-n) % f for n, f in zip(hu.shape, factor)]
    if any(pad):
        hu = np.pad(hu, [(0, p) for p in pad], mode="edge")
    total = hu[:, 0::fy].astype(np.int16)
    for row in range(1, fy):
        total += hu[:, row::fy]   # overflow? 
    out = total[:, :, 0::fx].astype(np.float32)
    for c in range(1, fx):
        out += total[:, :, c::fx]
    if fz > 1:
        out = out.reshape(-1, fz, *out.shape[1:]).sum(1)
    return out / np.prod(factor)


def _largest(mask):
    lab = cc3d.connected_components(mask, connectivity=6)
    n = np.bincount(lab.ravel())
    n[0] = 0
    return lab == n.argmax() if len(n) > 1 else np.zeros_like(mask)


def _inside(d, spacing):
    body = _largest(ndimage.binary_opening(d > AIR, np.ones((1, 3, 3))))
    hits = np.zeros(d.shape, np.uint8)
    for axis in (1, 2):
        for step in (1, -1):
            view = [slice(None)] * 3
            view[axis] = slice(None, None, step)
            view = tuple(view)
            closed = (np.take(d, 0 if step == 1 else -1, axis) < GAS).mean() < 0.5
            hits[view] += np.maximum.accumulate(body[view], axis=axis) | closed
    return body, hits >= 3


def _dilate(mask, mm, spacing):
    """ball"""
    return ndimage.distance_transform_edt(~mask, sampling=spacing) <= mm


def _box(mask, n, spacing):
    size = [1 if mask.shape[0] == 1 else 2 * max(1, round(n / spacing[0])) + 1] + [2 * max(1, round(n / s)) + 1 for s in spacing[1:]]
    out = mask.view(np.uint8)
    for ax, k in enumerate(size):
        if k > 1:
            out = ndimage.maximum_filter1d(out, k, axis=ax)
    return out.astype(bool)


def _other_gas(d, air, spacing):
    """airways, bowel"""
    out = np.zeros(d.shape, bool)
    for level in GAS_LEVELS:
        gas = air & (d < level)
        lab, n = cc3d.connected_components(gas, connectivity=6, return_N=True)
        if not n:
            continue
        st = cc3d.statistics(lab)
        band = air & ~gas
        for i in np.flatnonzero(st["voxel_counts"] * spacing.prod() > 200 * (1 if len(d) > 1 else .3)):
            if i == 0: continue
            box = tuple(slice(max(0, b.start - 5), b.stop + 5) for b in st["bounding_boxes"][i])
            m = lab[box] == i
            near = _box(m, spacing[2], spacing)
            shell = _box(near, 2 * spacing[2], spacing) & ~near
            lung = (band[box] & shell).sum()
            soft = ((d[box] > AIR) & shell).sum()
            share = lung / max(1, lung + soft)
            dark = np.percentile(d[box][m], 25)
            big = st['voxel_counts'][i] * spacing.prod() / 1000 * (1 if len(d) > 1 else 20 / spacing[0])
            if (share < .1 and dark < -880 and big < 10) or (share < .3 and dark < -962 and big < 100) or (share < .3 and dark < -980):
                out[box] |= m
    return out


def _close(mask, mm, spacing):
    grown = ndimage.distance_transform_edt(~mask, sampling=spacing) <= mm
    return ndimage.distance_transform_edt(grown, sampling=spacing) > mm


def coarse(hu, spacing):
    f = [max(1, int(WORK_MM / s)) for s in spacing]
    f[0] = min(f[0], hu.shape[0])
    hu = np.clip(hu, -1024, 1000)
    d = _shrink(hu, f)
    spacing = np.asarray(spacing) * f
    R = {}
    body, inside = _inside(d, spacing)
    air = (d < AIR) & inside
    other = _other_gas(d, air, spacing)
    lungy = (d < DENSE) & inside & ~_box(~inside, 5, spacing)
    thick = ndimage.binary_opening(lungy & ~other, np.ones((3 if len(d) > 2 else 1, 3, 3)))
    parenchyma = ndimage.binary_opening(lungy & ~other & (d > -930), np.ones((3 if len(d) > 2 else 1, 3, 3)))
    other |= _box(other, 5, spacing) & (d < -930) & ~parenchyma & inside
    near_gas = _box(other, 2 * spacing[2], spacing) & ~thick & ~other
    lungy &= ~near_gas & ~other
    mid, tip = find_spine(d, body, spacing)
    sheet = dividing_sheet(np.where(other | near_gas | ~inside, 0, d), mid, spacing)
    left = np.arange(d.shape[2]) >= sheet[:, :, None]
    R.update(d=d, body=body, inside=inside, air=air, other=other, lungy=lungy, spacing=spacing, f=f, mid=mid, tip=tip, sheet=sheet, near_gas=near_gas)
    sides = np.zeros(d.shape, np.uint8)
    open_ = _box(~inside, spacing[2], spacing)
    R["first"] = np.zeros_like(sides)
    for value, side in ((1, left), (2, ~left)):
        part = _choose(d, lungy & side, spacing, tip, open_, inside)
        R["first"][part] = value
        if part.any():
            part = _close(part, CLOSE_MM, spacing) & side & inside
            part &= ~other & ~near_gas
            sides[part & (sides == 0)] = value
    R["sides"] = sides
    return R


def _choose(d, lungy, spacing, tip, open_, inside):
    lab, n = cc3d.connected_components(lungy, connectivity=6, return_N=True)
    ml = spacing.prod() / 1000
    aer = lungy & (d < AIR)
    counts = np.bincount(lab[aer], minlength=n + 1) * ml
    if not n: return np.zeros_like(lungy)
    st = cc3d.statistics(lab)
    ok = np.ones(n + 1, bool); ok[0] = False
    if tip is not None:
        ok &= st["centroids"][:, 1] < tip
    med = ndimage.median(d, np.where(aer, lab, 0), np.arange(n + 1))
    ok &= ~((med < -950) & (counts > 0))
    edge = _box(~inside, 8, spacing) & lungy
    touch = np.bincount(lab[edge], minlength=n + 1) / st["voxel_counts"]
    ok &= touch < 0.1
    counts[~ok] = 0
    main = counts.argmax()
    if counts[main] <= 0: return np.zeros_like(lungy)
    keep = counts >= 0.2 * counts[main]
    part = keep[lab]
    while True:
        near = ndimage.distance_transform_edt(~part, sampling=spacing) <= ISLAND_MM
        more = np.zeros(n + 1, bool)
        more[np.unique(lab[near])] = True
        more &= ok & ~keep
        if not more.any():
            return part
        keep |= more
        part = keep[lab]
