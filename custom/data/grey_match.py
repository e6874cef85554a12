# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Grey values of a CT volume's 8-bit slices brought to the window of other slices.

Hounsfield units are linear, and so is every window, apart from what it cuts off. Two known materials, aerated
lung and soft tissue, therefore fix the whole mapping from one window to another. Both are peaks of a chest
CT's histogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks as find_maxima
from skimage.filters import threshold_otsu

__all__ = ["REFERENCE_PEAKS", "GreyMapping", "count_greys", "find_peaks", "match_peaks"]

LEVELS = 256
REFERENCE_PEAKS = (45, 211)
"""Aerated lung and soft tissue in the 50 labelled slices of COVID-SemiSeg, found by :func:`find_peaks` in the
histogram of them all. Before smoothing its maxima are 44 and 211; the medians of the single slices are 43 and
216. With lung at about -870 HU and soft tissue at about 40 HU the slices show about -1120 to 280 HU."""

SMOOTHING = 0.02  # standard deviation, as a fraction of the distance between dark and bright
PROMINENCE = 0.002  # of the highest peak; below it a maximum is noise
DOMINANT = 0.5  # a peak this high, compared with the highest of its side, counts
DEEPEST_VALLEY = 0.7  # the valley must be lower than this fraction of the lower peak
MIN_DISTANCE = 20  # levels between the peaks; noise and rounding would be enlarged too much below it
MIN_PIXELS = 10_000


@dataclass(frozen=True)
class GreyMapping:
    """A linear mapping of grey values, cut off at 0 and 255.

    Args:
        lung: grey value of aerated lung.
        tissue: grey value of soft tissue.
        reference: what the two become.
    """

    lung: int
    tissue: int
    reference: tuple[int, int] = REFERENCE_PEAKS

    @property
    def scale(self) -> float:
        """Output levels per input level."""
        return (self.reference[1] - self.reference[0]) / (self.tissue - self.lung)

    @property
    def offset(self) -> float:
        """What 0 becomes, before it is cut off."""
        return self.reference[0] - self.scale * self.lung

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Map grey values of any shape, uint8."""
        levels = np.arange(LEVELS) * self.scale + self.offset
        return np.clip(np.rint(levels), 0, LEVELS - 1).astype(np.uint8)[pixels]


def count_greys(pixels: np.ndarray) -> np.ndarray:
    """Histogram of 8-bit grey values of any shape, (256,)."""
    return np.bincount(np.asarray(pixels, np.uint8).ravel(), minlength=LEVELS)


def find_peaks(histogram: np.ndarray) -> tuple[int, int]:
    """Find aerated lung and soft tissue in the histogram of a chest CT.

    Otsu's threshold parts dark from bright. On each side of it the outermost peak that is at least half as
    high as the highest there is taken: the darkest in the lung, since disease only makes lung brighter, and
    the brightest in the tissue, since fat is darker. What is cut off at 0 and 255 is not looked at.

    Args:
        histogram: pixels of each grey value, (256,), over a whole volume: single slices may have little
            aerated lung.

    Returns:
        The grey values of lung and soft tissue.

    Raises:
        ValueError: When there are no two such peaks, or too few pixels; the reason is given.

    Reference:
        Otsu, A threshold selection method from gray-level histograms, IEEE Transactions on Systems, Man, and
        Cybernetics 9(1):62-66, 1979.
    """
    counts = np.asarray(histogram, float)
    if counts.shape != (LEVELS,):
        raise ValueError(f"a histogram of {LEVELS} grey values is needed, got shape {counts.shape}")
    if counts.sum() < MIN_PIXELS or np.count_nonzero(counts) < 3:
        raise ValueError(
            f"{counts.sum():.0f} pixels of {np.count_nonzero(counts)} grey values are no chest CT"
        )
    levels = np.arange(LEVELS)
    threshold = int(threshold_otsu(hist=(counts, levels)))
    dark = np.average(levels[: threshold + 1], weights=counts[: threshold + 1])
    bright = np.average(levels[threshold + 1 :], weights=counts[threshold + 1 :])
    curve = np.zeros(LEVELS)
    curve[1:-1] = gaussian_filter1d(counts[1:-1], SMOOTHING * (bright - dark), mode="nearest")
    if not curve.any():
        raise ValueError("all pixels are black or white")
    # The ends hold what was cut off: a rise towards them is no peak.
    maxima = find_maxima(curve[1:-1], prominence=PROMINENCE * curve.max())[0] + 1
    sides = {
        "aerated lung": [int(m) for m in maxima if m <= threshold],
        "soft tissue": [int(m) for m in maxima if m > threshold],
    }
    for name, found in sides.items():
        if not found:
            where = "below" if name == "aerated lung" else "above"
            raise ValueError(f"its histogram has no peak of {name}, {where} grey value {threshold}")
    lungs, tissues = ([m for m in s if curve[m] >= DOMINANT * max(curve[s])] for s in sides.values())
    lung, tissue = min(lungs), max(tissues)
    if tissue - lung < MIN_DISTANCE:
        raise ValueError(f"its peaks, at {lung} and {tissue}, are less than {MIN_DISTANCE} grey values apart")
    if curve[lung:tissue].min() > DEEPEST_VALLEY * min(curve[lung], curve[tissue]):
        raise ValueError(f"its peaks, at {lung} and {tissue}, do not stand apart")
    return lung, tissue


def match_peaks(histogram: np.ndarray, reference: tuple[int, int] = REFERENCE_PEAKS) -> GreyMapping:
    """The mapping that brings a volume's two peaks to those of a reference.

    Args:
        histogram: of a whole volume, see :func:`find_peaks`.
        reference: grey values of aerated lung and soft tissue to reach.

    Raises:
        ValueError: When there are no two peaks.
    """
    return GreyMapping(*find_peaks(histogram), reference)
