# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The lungs on a working grid of about 2.5 mm: what is lung, what is other air, and what disease has filled.

All arrays are (Z, Y, X) with Z to the patient's head, Y to posterior and X to the patient's left; ``spacing`` is in
mm along Z, Y, X.
"""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage

from custom.transforms.lung_separation import dividing_sheet, find_midline

__all__ = ["AIR_HU", "find_lungs", "open_box"]

AIR_HU = -500.0  # aerated lung is below
DENSE_HU = -200.0  # ground-glass is below; fat begins at about -130
GAS_HU = -950.0  # free air is below
GAS_LEVELS_HU = (-970.0, -950.0, -930.0, -910.0)
BONE_HU = 150.0
GLARE_HU = 900.0
GLARE_MM = 20.0
CLOSING_MM = 12.0
ISLAND_MM = 10.0
SKIN_MM = 5.0
MIN_AREA_MM2 = 200.0
HOLE_MM2 = 500.0


def find_lungs(hu: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find both lungs with what disease has filled, without airways and bowel gas.

    Args:
        hu: working grid in HU, float32 (Z, Y, X).
        spacing: mm along Z, Y, X.

    Returns:
        The lungs, uint8 (Z, Y, X), 0 background, 1 left, 2 right, and the first column on the left lung's side of
        the sheet between them, (Z, Y).
    """
    lungs = np.zeros(hu.shape, np.uint8)
    body = _largest(open_box(hu > AIR_HU, flat=True))
    if not body.any():
        return lungs, np.zeros(hu.shape[:2], np.int32)
    closed = _closed_faces(hu)
    inside = _count_hits(body, closed) >= 3
    air = (hu < AIR_HU) & inside
    gas = _find_gas(hu, air, spacing)
    airy = (hu < DENSE_HU) & inside & ~_grow(~inside, SKIN_MM, spacing)
    # Gas goes with the partial-volume rim of its wall, where no lung lies behind the rim.
    thick = open_box(airy & ~gas & (hu > GAS_LEVELS_HU[-2]))
    gas |= _grow(gas, SKIN_MM, spacing) & (hu < GAS_LEVELS_HU[-2]) & ~thick
    gas |= _grow(gas, 2 * spacing[2], spacing) & airy & ~thick
    airy &= ~gas
    sheet = dividing_sheet(np.where(gas | ~inside, 0, hu), find_midline(hu, body, spacing), spacing)
    left = np.arange(hu.shape[2]) >= sheet[:, :, None]

    bone = _grow((hu > BONE_HU) & inside, CLOSING_MM, spacing)
    caged = _count_hits(bone, closed)
    caged -= (caged == 4) & _grow(hu > GLARE_HU, GLARE_MM, spacing)
    for value, side in ((1, left), (2, ~left)):
        lung = _choose(hu, airy & side, caged, gas, spacing)
        if lung.any():
            box = _margin_box(lung, spacing.max(), spacing)
            filled = _close(lung[box], CLOSING_MM, spacing) & side[box] & inside[box] & ~gas[box]
            lungs[box][_fill_small_holes(filled, spacing)] = value
    return lungs, sheet


def open_box(mask: np.ndarray, flat: bool = False) -> np.ndarray:
    """Binary opening with 3 x 3 x 3 voxels, or 3 x 3 in plane if ``flat`` or if there are too few slices."""
    return ndimage.binary_opening(mask, np.ones((1 if flat or len(mask) < 3 else 3, 3, 3)))


def _largest(mask: np.ndarray) -> np.ndarray:
    labels = cc3d.connected_components(mask, connectivity=6)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def _grow(mask: np.ndarray, mm: float, spacing: np.ndarray) -> np.ndarray:
    """Dilation with a box that reaches ``mm``, at least one voxel, in each direction."""
    out = mask.view(np.uint8)
    for axis, step in enumerate(spacing):
        if mask.shape[axis] > 1:
            out = ndimage.maximum_filter1d(out, 2 * max(1, round(mm / step)) + 1, axis=axis, mode="constant")
    return out.view(bool)


def _close(mask: np.ndarray, mm: float, spacing: np.ndarray) -> np.ndarray:
    """Closing with a ball; what the edge of the image cuts is taken to go on beyond it."""
    pad = [int(np.ceil(2 * mm / s)) if n > 1 else 0 for s, n in zip(spacing, mask.shape, strict=True)]
    wide = np.pad(mask, [(p, p) for p in pad], mode="edge")
    grown = ndimage.distance_transform_edt(~wide, sampling=spacing) <= mm
    closed = ndimage.distance_transform_edt(grown, sampling=spacing) > mm
    return closed[tuple(slice(p, p + n) for p, n in zip(pad, mask.shape, strict=True))]


def _closed_faces(hu: np.ndarray) -> dict[tuple[int, int], bool]:
    """Which lateral faces of the grid cut through the body instead of showing air around it."""
    return {
        (axis, step): bool((np.take(hu, 0 if step == 1 else -1, axis) < GAS_HU).mean() < 0.5)
        for axis in (1, 2)
        for step in (1, -1)
    }


def _count_hits(mask: np.ndarray, closed: dict[tuple[int, int], bool]) -> np.ndarray:
    """In how many of the four directions in plane ``mask`` lies, or the image ends within the body."""
    hits = np.zeros(mask.shape, np.uint8)
    for (axis, step), end in closed.items():
        if end:
            hits += 1
        else:
            view = (slice(None),) * axis + (slice(None, None, step),)
            hits[view] += np.maximum.accumulate(mask[view], axis=axis)
    return hits


def _margin_box(mask: np.ndarray, mm: float, spacing: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis, step in enumerate(spacing):
        hit = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        reach = int(np.ceil(mm / step)) + 1
        box.append(slice(max(0, int(hit[0]) - reach), int(hit[-1]) + 1 + reach))
    return tuple(box)


def _find_gas(hu: np.ndarray, air: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Air that is not lung: darker than lung, and with tissue behind its rim where lung would go on as lung."""
    gas = np.zeros(hu.shape, bool)
    single = len(hu) == 1
    ml = spacing.prod() / 1000
    for level in (*GAS_LEVELS_HU, *((-850.0,) if single else ())):
        labels = cc3d.connected_components(air & (hu < level), connectivity=6)
        sizes = np.bincount(labels.ravel()) * (spacing[1] * spacing[2] / 50 if single else ml)
        boxes = ndimage.find_objects(labels)
        for n in np.flatnonzero(sizes > 0.2):
            if n == 0 or (sizes[n] > 100 and level != GAS_LEVELS_HU[0]):
                continue
            box = tuple(slice(max(0, s.start - 5), s.stop + 5) for s in boxes[n - 1])
            part = labels[box] == n
            rim = _grow(part, spacing[2], spacing)
            shell = _grow(rim, 2 * spacing[2], spacing) & ~rim
            lung = np.count_nonzero(shell & air[box] & (hu[box] >= level))
            tissue = np.count_nonzero(shell & (hu[box] >= AIR_HU))
            dark = np.percentile(hu[box][part], 25)
            share = lung / max(1, lung + tissue)
            if (
                (share < 0.1 and dark < -880 and sizes[n] < 10)
                or (share < 0.3 and dark < -962 and sizes[n] < 100)
                or (share < 0.3 and dark < -980)
            ):
                gas[box] |= part
    return gas


def _choose(hu: np.ndarray, airy: np.ndarray, caged: np.ndarray, gas: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The large components of aerated lung on one side with the islands near them."""
    labels, count = cc3d.connected_components(airy, connectivity=6, return_N=True)
    aerated = airy & (hu < AIR_HU)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    aerated_sizes = np.bincount(labels[aerated], minlength=count + 1)
    good = np.bincount(labels[airy & (hu < -300)], minlength=count + 1) > 0.55 * sizes
    good |= np.bincount(labels[airy & (caged == 4)], minlength=count + 1) > 0.5 * sizes
    good &= np.bincount(labels[aerated & (caged >= 3)], minlength=count + 1) >= 0.5 * aerated_sizes
    good[0] = False
    main = np.where(good, aerated_sizes, 0)
    big = main >= 0.2 * main.max()
    big &= good
    if not big.any():
        return np.zeros_like(airy)
    core = big[labels]
    if (core & aerated).sum((1, 2)).max() * spacing[1] * spacing[2] < MIN_AREA_MM2:
        return np.zeros_like(airy)
    beside_gas = np.bincount(labels[airy & _grow(gas, SKIN_MM, spacing)], minlength=count + 1) > 0
    good &= big | ~beside_gas
    lung = good[labels]
    reach = ndimage.distance_transform_edt(~lung, sampling=spacing) <= ISLAND_MM / 2
    groups, count = cc3d.connected_components(reach, connectivity=6, return_N=True)
    chosen = np.zeros(count + 1, bool)
    chosen[np.unique(groups[core])] = True
    return lung & chosen[groups]


def _fill_small_holes(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Fill what lung encloses in an axial slice, unless it is as large as the dome of the diaphragm."""
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(~mask, plane)
    small = np.bincount(labels.ravel()) * spacing[1] * spacing[2] < HOLE_MM2
    for face in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        small[face] = False
    small[0] = True
    return small[labels]
