# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whether slices that come as pictures lie as they should: pictures do not say how they are stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from skimage.measure import label, regionprops
from skimage.segmentation import clear_border

__all__ = ["SIDEWAYS_ORIENTATIONS", "SIDEWAYS_WARNING", "lie_sideways", "measure_pose"]

SIDEWAYS_ORIENTATIONS = ("transposed", "rotated-90", "rotated-270")
"""Of :data:`custom.data.plain_slices.ORIENTATIONS` those of slices that lie on their side."""

SIDEWAYS_WARNING = (
    "in most of these slices the lungs lie one above the other: they seem to be stored on their side, and a "
    "network that knows upright slices does badly on them; look at one, and say how they are stored"
)

SIDE = 120  # pixels to which a slice is brought
DARK = 110  # below it lies air in the usual lung windows
BORDER = 0.9  # of the picture's border is dark: there is air around the body
SMALLEST = 0.01  # share of the picture of a region that is a lung
LUNGS = 0.04  # share of the picture of all of them
MIDDLE, OUTER = (0.4, 0.6), ((0.15, 0.35), (0.65, 0.85))
SIDEWAYS = -0.5
FEWEST = 5  # pictures that can be judged together


def measure_pose(pixels: np.ndarray) -> float | None:
    """How the two lungs of an axial slice lie: above 0 beside each other, below 0 one above the other.

    Between two lungs there is brighter tissue, from the sternum to the spine. The middle fifth of the
    columns is compared with the columns left and right of it, and likewise the rows; the difference of both
    comes in standard deviations of the grey values. Lungs that are surrounded by tissue are looked at alone,
    else the whole picture is: it is taken to be cropped to the lungs.

    Args:
        pixels: (H, W) uint8, windowed, air dark.

    Returns:
        The measure, about 1 in an upright slice through the hila; None where the body lies in air and has no
        lungs in it, or all is of one grey.
    """
    small = np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE)))
    dark = small < DARK
    inside = [r for r in regionprops(label(clear_border(dark))) if r.area > SMALLEST * dark.size]
    if sum(region.area for region in inside) > LUNGS * dark.size:
        boxes = np.array([region.bbox for region in inside])
        (top, left), (bottom, right) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        small = small[top:bottom, left:right]
    elif np.concatenate([dark[[0, -1]].ravel(), dark[:, [0, -1]].ravel()]).mean() > BORDER:
        return None
    spread = small.std()
    if spread == 0:
        return None
    columns, rows = (_middle(small.mean(axis=axis)) for axis in (0, 1))
    return float((columns - rows) / spread)


def _middle(profile: np.ndarray) -> float:
    place = (np.arange(len(profile)) + 0.5) / len(profile)
    outer = np.logical_or.reduce([(low < place) & (place < high) for low, high in OUTER])
    return profile[(MIDDLE[0] < place) & (place < MIDDLE[1])].mean() - profile[outer].mean()


def lie_sideways(measures: Sequence[float | None]) -> bool:
    """Whether a folder's slices seem to lie on their side: transposed, or rotated by a quarter.

    Args:
        measures: what :func:`measure_pose` gave for each.

    Returns:
        True when most do, False when they do not or too few can be judged.
    """
    judged = [measure for measure in measures if measure is not None]
    return len(judged) >= FEWEST and float(np.median(judged)) < SIDEWAYS
