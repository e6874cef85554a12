# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Metrics that count lesions, not voxels: region precision and recall, and the centre of a region."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from monai.utils import MetricReduction
from scipy import ndimage

from custom.metrics.volume import MaskMetric

__all__ = ["RegionCounts", "RegionPrecisionMetric", "RegionRecallMetric", "count_regions", "region_centers"]

MODES = ("center", "overlap")
SPATIAL = ("slice", "volume")


class RegionCounts(NamedTuple):
    """How many regions there are and how many of them the other mask confirms."""

    predicted: int
    """N_a, regions of the prediction."""
    confirmed: int
    """N_p, those whose centre lies inside the truth."""
    true: int
    """N_b, regions of the truth."""
    found: int
    """N_t, those that hold the centre of at least one predicted region."""
    touched: int
    """Regions of the truth that share at least one pixel with the prediction."""


def region_centers(mask: np.ndarray) -> np.ndarray:
    """The centre of each connected region, eq. (10): its pixel whose greatest distance to its edge is least.

    The centre is a pixel of the region, also where the centroid is not, as in a ring. Of several such pixels
    it is the first one in the order of the array. The edge is the region minus its erosion, with everything
    beyond the image's border taken as background; distances are in pixels. The result is exact.

    Args:
        mask: (H, W), regions 8-connected, or (H, W, D), regions 26-connected.

    Returns:
        Indices of the centres, (number of regions, 2 or 3).

    Raises:
        ValueError: when the mask has another number of dimensions.
    """
    labels = _label(mask)[0]
    points = np.argwhere(labels)
    owner = labels[tuple(points.T)]
    order = np.argsort(owner, kind="stable")
    points, sizes = points[order], np.bincount(owner)[1:]
    starts = np.cumsum(sizes) - sizes
    centers = points[starts]  # right for regions of one pixel and, the first of two equal ones, of two
    for index in np.flatnonzero(sizes > 2):
        centers[index] = _center(points[starts[index] : starts[index] + sizes[index]].T)
    return centers


def count_regions(pred: np.ndarray, truth: np.ndarray) -> RegionCounts:
    """Count the regions of one slice, or of one volume taken as 3-D.

    Args:
        pred: prediction, (H, W) or (H, W, D), nonzero is foreground.
        truth: truth of the same shape.

    Raises:
        ValueError: when the shapes differ or are not these.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
    pred = pred != 0
    labels, true = _label(truth)
    centers = region_centers(pred)
    hit = labels[tuple(centers.T)]
    hit = hit[hit > 0]
    touched = np.unique(labels[pred & (labels > 0)])
    return RegionCounts(len(centers), len(hit), true, len(np.unique(hit)), len(touched))


def _label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Regions whose pixels touch at least at a corner: 8- and 26-connected."""
    if mask.ndim not in (2, 3):
        raise ValueError(f"a slice (H, W) or a volume (H, W, D) is needed, got the shape {mask.shape}")
    # Not cc3d, which is faster: release 4.1.1 labels some slices of odd size, as 511x511, wrongly.
    return ndimage.label(mask != 0, structure=np.ones((3,) * mask.ndim))


def _center(points: np.ndarray) -> np.ndarray:
    """Centre of the pixels of one region, given in the order of the array, (2 or 3, number of pixels).

    The pixel of the edge that is farthest from any given pixel is a corner of the region's convex hull, so
    that the greatest distance to the edge is the greatest distance to the region's own pixels, and of these
    only the ends of runs along the last axis can be corners. ``reach`` is a lower bound of it, the greatest
    distance to the corners looked at so far. Where the bound is least it is checked against all corners:
    either it holds there, and then nowhere else is better, or it names a corner not yet looked at.
    """
    breaks = np.diff(points[:-1]).any(axis=0)
    ends = points[:, np.append(True, breaks) | np.append(breaks, True)]
    reach = np.zeros(points.shape[1], dtype=points.dtype)
    least = np.iinfo(points.dtype).max
    while True:
        best = int(reach.argmin())
        distances = _squared(ends, points[:, best])
        farthest = int(distances.argmax())
        if distances[farthest] <= reach[best]:
            return points[:, best]
        least = min(least, distances[farthest])
        reach = np.maximum(reach, _squared(points, ends[:, farthest]))
        still = reach <= least  # keeps every pixel that could be the centre, and their order
        points, reach = points[:, still], reach[still]


def _squared(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Squared distances as integers: the comparisons are exact."""
    return np.square(points - point[:, None]).sum(axis=0)


class _RegionMetric(MaskMetric):
    def __init__(self, spatial: str, reduction: MetricReduction | str, get_not_nans: bool) -> None:
        super().__init__(reduction, get_not_nans)
        if spatial not in SPATIAL:
            raise ValueError(f"spatial must be one of {', '.join(SPATIAL)}, got '{spatial}'.")
        self.spatial = spatial

    def _score(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        if self.spatial == "volume" and pred.ndim != 5:
            raise ValueError(f'spatial="volume" takes (B, C, H, W, D), got {tuple(pred.shape)}.')
        values = torch.full(pred.shape[:2], torch.nan, device=pred.device)
        for b, c in np.ndindex(*pred.shape[:2]):
            part, whole = self._parts(self._count(pred[b, c].cpu().numpy(), truth[b, c].cpu().numpy()))
            if whole:
                values[b, c] = part / whole
        return values

    def _count(self, pred: np.ndarray, truth: np.ndarray) -> RegionCounts:
        if pred.ndim == 2 or self.spatial == "volume":
            return count_regions(pred, truth)
        used = np.flatnonzero(pred.any((0, 1)) | truth.any((0, 1)))
        slices = [count_regions(pred[:, :, k], truth[:, :, k]) for k in used]
        return RegionCounts(*(sum(column) for column in zip(*slices, strict=True))) if slices else _NOTHING

    @abstractmethod
    def _parts(self, counts: RegionCounts) -> tuple[int, int]:
        """Numerator and denominator."""


_NOTHING = RegionCounts(0, 0, 0, 0, 0)


class RegionPrecisionMetric(_RegionMetric):
    """Region-level precision, RLP = N_p / N_a: the part of predicted regions whose centre is in the truth.

    Regions are counted on each slice, 8-connected, and summed over a case before the division. NaN where
    nothing is predicted. For the centre see :func:`region_centers`.

    Args:
        spatial: ``"slice"``: regions are 2-D, the slices of (B, C, H, W, D) lie along the last axis; or
            ``"volume"``: regions are 3-D, 26-connected, distances in voxels.
        reduction: see :class:`MaskMetric`.
        get_not_nans: see :class:`MaskMetric`.

    Raises:
        ValueError: when ``spatial`` is neither.

    Reference:
        Zhao et al., SCOAT-Net, doi:10.1101/2020.09.23.20191726, eq. (10). The paper leaves the dimension and
        the connectivity of regions open.
    """

    def __init__(
        self,
        spatial: str = "slice",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(spatial, reduction, get_not_nans)

    def _parts(self, counts: RegionCounts) -> tuple[int, int]:
        return counts.confirmed, counts.predicted


class RegionRecallMetric(_RegionMetric):
    """Region-level recall, RLR = N_t / N_b: the part of the true regions that were found.

    The paper gives N_t in the words it gives N_p in; what they count must be truths, since they are divided
    by truths. A region of the truth is found when it holds the centre of at least one predicted region
    (``"center"``), or shares at least one pixel with the prediction (``"overlap"``). Regions are counted on
    each slice, 8-connected, and summed over a case before the division. NaN where the truth is empty.

    Args:
        mode: ``"center"`` or ``"overlap"``.
        spatial: as in :class:`RegionPrecisionMetric`.
        reduction: see :class:`MaskMetric`.
        get_not_nans: see :class:`MaskMetric`.

    Raises:
        ValueError: when ``mode`` or ``spatial`` is none of these.

    Reference:
        Zhao et al., SCOAT-Net, doi:10.1101/2020.09.23.20191726, eq. (10).
    """

    def __init__(
        self,
        mode: str = "center",
        spatial: str = "slice",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(spatial, reduction, get_not_nans)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got '{mode}'.")
        self.mode = mode

    def _parts(self, counts: RegionCounts) -> tuple[int, int]:
        return counts.found if self.mode == "center" else counts.touched, counts.true
