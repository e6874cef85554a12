# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Regions of a mask that cannot be lung opacity, because the lungs are elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from custom.transforms.lung_morphology import bounding_box, dilate_box

__all__ = ["REMOVED", "KeepLungRegionsD", "KeepLungRegionsDict", "KeepLungRegionsd"]

REMOVED = "removed_regions"
"""Where the mask's ``meta`` tells of what was removed: ``regions``, ``voxels`` and ``reach_mm``."""


class KeepLungRegionsd(MapTransform):
    """Removes the regions of a mask, 26-connected, that are nowhere within a distance of the lungs.

    A network that has only seen slices through the lungs finds opacity in the neck and the bowel. A region
    that touches the lungs stays whole, however far it reaches beyond the lung mask, since that may lack the
    airless parts. For the same reason nothing is removed unless both lungs are in the lung mask: opacity may
    fill the other. What was removed stands in the mask's ``meta`` under :data:`REMOVED`.

    Args:
        keys: masks (1, H, W, D) on the scan's grid, anything above 0.
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
        found = np.asarray(mask.cpu())[0] > 0
        if not found.any():
            return mask
        affine = np.asarray(torch.as_tensor(getattr(mask, "affine", np.eye(4))).cpu(), dtype=float)
        spacing = np.sqrt((affine[: found.ndim, : found.ndim] ** 2).sum(axis=0))
        # The box of the mask, so much larger that the lungs around it count.
        box = bounding_box(found, int(np.ceil(reach_mm / spacing.min())) + 1)
        labels, count = ndimage.label(found[box], structure=np.ones((3,) * found.ndim))
        kept = np.zeros(count + 1, dtype=bool)
        kept[labels[dilate_box(lungs[box] > 0, reach_mm, spacing)]] = True
        kept[0] = True
        if kept.all():
            return mask
        far = ~kept[labels]
        out = mask.clone()
        out[0][box][torch.from_numpy(far).to(out.device)] = 0
        if isinstance(out, MetaTensor):
            out.meta[REMOVED] = {
                "regions": int(np.count_nonzero(~kept)),
                "voxels": int(np.count_nonzero(far)),
                "reach_mm": reach_mm,
            }
        return out


KeepLungRegionsD = KeepLungRegionsDict = KeepLungRegionsd
