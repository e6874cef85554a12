# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Regions of a mask that cannot be lung opacity, because the lungs are elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from custom.transforms.lung_morphology import bounding_box, dilate_box

__all__ = ["REMOVED", "KeepLungRegionsD", "KeepLungRegionsDict", "KeepLungRegionsd"]

REMOVED = "removed_regions"
"""Where the mask's ``meta`` tells of what was removed: ``regions``, ``voxels`` and ``reach_mm``."""

_STEP = 64  # planes


class KeepLungRegionsd(MapTransform):
    """Removes the regions of a mask, 26-connected, that are nowhere within a distance of the lungs.

    A network that has only seen slices through the lungs finds opacity in the neck and the bowel. A region
    that touches the lungs stays whole, however far it reaches beyond the lung mask, since that may lack the
    airless parts. For the same reason nothing is removed unless both lungs are in the lung mask: opacity may
    fill the other. What was removed stands in the mask's ``meta`` under :data:`REMOVED`.

    Args:
        keys: masks (1, H, W, D) on the scan's grid, nonzero is the region.
        mask_key: the lung mask of the same shape, 1 left, 2 right; without one all is kept.
        reach_mm: distance to the lungs, along each axis, from which on a region is removed; None keeps all.
        allow_missing_keys: whether a missing mask is passed over.

    Raises:
        ValueError: When the distance is negative.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str = "lung",
        reach_mm: float | None = 5.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if reach_mm is not None and reach_mm < 0:
            raise ValueError(f"reach_mm must not be negative, found {reach_mm}")
        self.mask_key = mask_key
        self.reach_mm = reach_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: holds the masks and, where one was made, the lung mask.

        Returns:
            The item with masks without these regions, of the type they had.

        Raises:
            ValueError: When mask and lung mask differ in shape.
        """
        d = dict(data)
        lungs = d.get(self.mask_key)
        if self.reach_mm is None or lungs is None:
            return d
        halves = np.asarray(lungs.cpu())[0]
        if not ((halves == 1).any() and (halves == 2).any()):
            return d
        for key in self.key_iterator(d):
            if d[key].shape != lungs.shape:
                sizes = f"{tuple(d[key].shape)} and {tuple(lungs.shape)}"
                raise ValueError(f"{key} is not on the grid of {self.mask_key}: {sizes} voxels")
            d[key] = self._keep(d[key], halves, self.reach_mm)
        return d

    def _keep(self, mask: torch.Tensor, lungs: np.ndarray, reach_mm: float) -> torch.Tensor:
        whole = np.asarray(mask.cpu())[0]
        if not whole.any():
            return mask
        affine = np.asarray(torch.as_tensor(getattr(mask, "affine", np.eye(4))).cpu(), dtype=float)
        spacing = np.sqrt((affine[: whole.ndim, : whole.ndim] ** 2).sum(axis=0))
        # The box of the mask, so much larger that the lungs around it count.
        box = bounding_box(whole, int(np.ceil(reach_mm / spacing.min())) + 1)
        kept, regions = _near_regions(whole[box], lungs[box], reach_mm, spacing)
        if not regions:
            return mask
        out = mask.clone()
        removed = 0
        for part, labels, first in _label_parts(whole[box]):
            far = ~kept[np.where(labels, labels + first, 0)]
            if part.start:
                far[..., 0] = False  # a plane of the part before, too
            removed += int(np.count_nonzero(far))
            out[0][box][..., part][torch.from_numpy(far).to(out.device)] = 0
        if isinstance(out, MetaTensor):
            out.meta[REMOVED] = {"regions": regions, "voxels": removed, "reach_mm": reach_mm}
        return out


def _label_parts(mask: np.ndarray) -> Iterator[tuple[slice, np.ndarray, int]]:
    """Number the regions of a few planes at a time; the labels of a long scan take more memory than the scan.

    Yields:
        The planes, of which the first is the last one of the part before, the labels in them, and the number
        to add to these, so that no two parts share one.
    """
    structure = np.ones((3,) * mask.ndim)
    first = 0
    for start in range(0, max(mask.shape[-1] - 1, 1), _STEP):
        part = slice(start, min(start + _STEP + 1, mask.shape[-1]))
        labels, count = ndimage.label(mask[..., part], structure)
        yield part, labels, first
        first += count


def _near_regions(
    mask: np.ndarray, lungs: np.ndarray, reach_mm: float, spacing: np.ndarray
) -> tuple[np.ndarray, int]:
    """Which labels belong to a region that comes near the lungs, and the number of regions that do not."""
    reach = max(1, round(reach_mm / spacing[-1]))
    near: list[np.ndarray] = [np.zeros(1, np.intp)]
    links: list[np.ndarray] = []
    total, last = 0, None
    for part, labels, first in _label_parts(mask):
        start = max(part.start - reach, 0)
        around = dilate_box(lungs[..., start : part.stop + reach] > 0, reach_mm, spacing)
        around = around[..., part.start - start :][..., : labels.shape[-1]]
        near.append(np.flatnonzero(np.bincount(labels[around & (labels > 0)])) + first)
        if last is not None:  # one plane with two sets of labels
            both = last > 0
            links.append(np.stack([last[both], labels[..., 0][both] + first]))
        total = first + int(labels.max())
        last = np.where(labels[..., -1], labels[..., -1] + first, 0)
    pairs = np.concatenate([np.zeros((2, 0), np.intp), *links], axis=1)
    graph = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(total + 1, total + 1))
    count, region = connected_components(graph, directed=False)
    kept = np.zeros(count, dtype=bool)
    kept[region[np.concatenate(near)]] = True  # among them 0, no region
    return kept[region], int(count - np.count_nonzero(kept))


KeepLungRegionsD = KeepLungRegionsDict = KeepLungRegionsd
