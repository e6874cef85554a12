# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The lungs on a working grid of about 2.5 mm: which air is lung, and what disease has filled.

All arrays are (Z, Y, X) with Z to the patient's head, Y to posterior and X to the patient's left; ``spacing``
is in mm along Z, Y, X.
"""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage

from custom.transforms.lung_morphology import close_ball, dilate_ball, dilate_box, fill_small_holes, open_box
from custom.transforms.lung_separation import dividing_sheet, find_midline
from custom.transforms.lung_wall import fill_to_wall

__all__ = ["AERATED_HU", "find_lungs"]

AERATED_HU = -500.0  # aerated lung is below
DENSE_HU = -200.0  # ground-glass and most partial volume is below, fat is above
ISLAND_HU = -300.0
BONE_HU, GLARE_HU = 150.0, 800.0
FREE_AIR_HU = -930.0

# Levels at which air falls apart into pieces, darkest first, and what makes a piece gas instead of lung: the
# largest share of lung behind its rim, the highest lower quartile (HU), smallest and largest volume (mL) and
# the largest distance from the midline (mm). Stomach and colon can be large but are as dark as outer air;
# trachea and main bronchi touch lung; what is less dark must have tissue all around.
GAS_LEVELS_HU = (-970.0, -950.0, -930.0, -910.0)
GAS_RULES = (
    (0.1, -980.0, 1.0, np.inf, np.inf),
    (0.3, -962.0, 1.0, 100.0, 30.0),
    (0.3, -985.0, 0.2, 1.0, 50.0),
    (0.1, -940.0, 1.0, 10.0, np.inf),
)
MAX_BRIGHT_GAS_ML = 100.0
# A few slices show bronchi as separate pieces that are hardly darker than lung: one more level and rule.
THIN_LEVEL_HU, THIN_RULE = -850.0, (0.1, -880.0, 0.2, 10.0, np.inf)
MIN_EXTENT_MM = 20.0  # thinner scans count as this thick when volumes decide

SKIN_MM = 5.0  # no lung lies nearer to the skin
MAX_OPEN_SHARE = 0.05
CAGE_MM = 12.0  # half a gap between ribs
GLARE_MM = 20.0  # streaks of metal and dense contrast medium pretend to be ground-glass this far
ISLAND_MM = 10.0  # largest gap between parts of a lung
GAS_MARGIN_MM = 8.0  # pieces of lung nearer to other gas may be parts of the bowel
BRIDGE_MM, CLOSING_MM = 4.0, 15.0
MIN_AREA_MM2, MAX_HOLE_MM2 = 200.0, 1500.0


def find_lungs(hu: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find both lungs with what disease has filled, without trachea, main bronchi and bowel gas.

    Args:
        hu: working grid in HU, float32 (Z, Y, X).
        spacing: mm along Z, Y, X.

    Returns:
        The lungs, uint8 (Z, Y, X), 0 background, 1 left, 2 right, and the first column on the left lung's
        side of the sheet between them, (Z, Y).
    """
    lungs, sheet = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape[:2], np.int32)
    tissue = hu > AERATED_HU
    body = _largest(open_box(tissue, flat=True))  # opened, it lets go of the couch
    if not body.any():
        return lungs, sheet
    body = dilate_box(body, 2 * spacing[2], spacing) & tissue  # takes thin parts of the chest wall back
    closed = _closed_faces(hu)
    inside = _count_hits(body, closed) >= 3
    air = (hu < AERATED_HU) & inside
    if not air.any():
        return lungs, sheet
    midline = find_midline(hu, body, spacing)
    gas = _find_gas(hu, air, midline, spacing)
    lung_like = (hu < DENSE_HU) & inside & ~dilate_box(~inside, SKIN_MM, spacing)
    # Gas takes the partial-volume rim of its wall along, unless lung begins behind the wall.
    thick = open_box(lung_like & ~gas & (hu > GAS_LEVELS_HU[2]))
    gas |= dilate_box(gas, SKIN_MM, spacing) & inside & (hu < GAS_LEVELS_HU[2]) & ~thick
    gas |= dilate_box(gas, 2 * spacing[2], spacing) & lung_like & ~thick
    lung_like &= ~gas
    sheet = dividing_sheet(np.where(gas | ~inside, 0, hu), midline, spacing)
    left = np.arange(hu.shape[2]) >= sheet[:, :, None]

    cage = _count_hits(dilate_box((hu > BONE_HU) & inside, CAGE_MM, spacing), closed)
    glare = dilate_box(hu > GLARE_HU, GLARE_MM, spacing)
    wide_gas = dilate_box(gas, GAS_MARGIN_MM, spacing)
    opening = air & dilate_box((hu < AERATED_HU) & ~inside, spacing[2], spacing)
    open_air = dilate_box(opening, SKIN_MM + 2 * spacing[2], spacing)
    for value, side in ((1, left), (2, ~left)):
        lung = _choose(hu, lung_like & side, cage, glare, wide_gas, open_air, spacing)
        if lung.any():
            allowed = side & inside & ~gas
            lung = close_ball(lung, BRIDGE_MM, spacing) & allowed
            lung = fill_to_wall(hu, lung, inside, spacing, outward=1 if value == 1 else -1) & allowed
            lung = close_ball(lung, CLOSING_MM, spacing) & allowed
            lungs[fill_small_holes(lung, MAX_HOLE_MM2, spacing)] = value
    return lungs, sheet


def _largest(mask: np.ndarray) -> np.ndarray:
    labels = cc3d.connected_components(mask, connectivity=6)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def _closed_faces(hu: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Where the lateral faces of the image cut through the body instead of showing air around it."""
    faces = {(axis, step): np.take(hu, [0 if step == 1 else -1], axis) for axis in (1, 2) for step in (1, -1)}
    return {key: ndimage.uniform_filter(face, 5, mode="nearest") > FREE_AIR_HU for key, face in faces.items()}


def _count_hits(mask: np.ndarray, closed: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """In how many of the four directions in plane ``mask`` lies or the image ends in the body, (Z, Y, X)."""
    hits = np.zeros(mask.shape, np.uint8)
    for (axis, step), end in closed.items():
        view = (slice(None),) * axis + (slice(None, None, step),)
        hits[view] += np.maximum.accumulate(mask[view], axis=axis) | end
    return hits


def _find_gas(hu: np.ndarray, air: np.ndarray, midline: int, spacing: np.ndarray) -> np.ndarray:
    """Air that is not lung: darker than lung, and behind its rim lies tissue where lung would go on."""
    gas = np.zeros(hu.shape, bool)
    extent = len(hu) * spacing[0]
    voxel_ml = spacing.prod() / 1000 * max(1.0, MIN_EXTENT_MM / extent)
    levels: tuple[float, ...] = GAS_LEVELS_HU
    rules: tuple[tuple[float, ...], ...] = GAS_RULES
    if extent < MIN_EXTENT_MM:
        levels, rules = (*levels, THIN_LEVEL_HU), (*rules, THIN_RULE)
    for level in levels:
        labels = cc3d.connected_components(air & (hu < level), connectivity=6)
        volumes = np.bincount(labels.ravel()) * voxel_ml
        volumes[0] = 0
        boxes = ndimage.find_objects(labels)
        for n in np.flatnonzero(volumes > min(rule[2] for rule in rules)):
            if volumes[n] > MAX_BRIGHT_GAS_ML and level > GAS_LEVELS_HU[0]:
                continue  # lung itself, in one piece
            box = tuple(slice(max(0, s.start - 5), s.stop + 5) for s in boxes[n - 1])
            part = labels[box] == n
            rim = dilate_box(part, spacing[2], spacing)
            behind = dilate_box(rim, 2 * spacing[2], spacing) & ~rim
            lung = np.count_nonzero(behind & air[box] & (hu[box] >= level))
            tissue = np.count_nonzero(behind & (hu[box] >= AERATED_HU))
            share, quartile = lung / max(1, lung + tissue), np.percentile(hu[box][part], 25)
            columns = boxes[n - 1][2]
            off = max(columns.start - midline, midline - columns.stop, 0) * spacing[2]
            if any(
                share < s and quartile < q and least < volumes[n] < most and off < o
                for s, q, least, most, o in rules
            ):
                gas[box] |= part
    return gas


def _choose(
    hu: np.ndarray,
    lung_like: np.ndarray,
    cage: np.ndarray,
    glare: np.ndarray,
    wide_gas: np.ndarray,
    open_air: np.ndarray,
    spacing: np.ndarray,
) -> np.ndarray:
    """The large pieces on one side with the islands that disease has left near them.

    Args:
        hu: working grid in HU.
        lung_like: voxels of one side that may be lung.
        cage: in how many directions bone lies: 3 or 4 in the chest, fewer between arm, skin and couch.
        glare: where streaks are to be expected.
        wide_gas: surroundings of other air, where no islands are taken.
        open_air: where a hollow of the body's surface opens, as between neck and shoulder.
        spacing: mm along Z, Y, X.
    """
    labels, count = cc3d.connected_components(lung_like, connectivity=6, return_N=True)

    def voxels(mask: np.ndarray) -> np.ndarray:
        return np.bincount(labels[lung_like & mask], minlength=count + 1)

    aerated = lung_like & (hu < AERATED_HU)
    size, air = np.bincount(labels[lung_like], minlength=count + 1), voxels(aerated)
    good = voxels(aerated & (cage >= 3)) >= 0.5 * air
    good &= (voxels(hu < ISLAND_HU) > 0.55 * size) | (voxels((cage == 4) & ~glare) > 0.5 * size)
    good &= voxels(open_air) <= MAX_OPEN_SHARE * size
    good[0] = False
    main = np.where(good, air, 0)
    big = good & (main >= 0.2 * main.max())
    core = big[labels]
    if (core & aerated).sum((1, 2)).max() * spacing[1] * spacing[2] < MIN_AREA_MM2:
        return np.zeros_like(lung_like)
    lung = (good & (big | (voxels(wide_gas) == 0)))[labels]
    groups, count = cc3d.connected_components(
        dilate_ball(lung, ISLAND_MM / 2, spacing), connectivity=6, return_N=True
    )
    chosen = np.zeros(count + 1, bool)
    chosen[groups[core]] = True
    return lung & chosen[groups]
