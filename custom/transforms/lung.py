# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The lung mask, and the crop to its box."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform
from monai.transforms.croppad.array import Crop
from monai.utils import convert_to_dst_type

from custom.transforms.load import describe_origin
from custom.transforms.lung_extraction import extract_lungs

__all__ = [
    "CropLungD",
    "CropLungDict",
    "CropLungd",
    "LungMaskD",
    "LungMaskDict",
    "LungMaskd",
    "NoLungError",
]


class NoLungError(ValueError):
    """No lung was found in a scan."""


class LungMaskd(MapTransform):
    """Adds the mask of the lungs, diseased parts included: 0 background, 1 left lung, 2 right lung.

    It works on the scan's own grid, in any axis order, on whole volumes and single slices. A mask that is
    there already, because the data list names one, is kept.

    Args:
        keys: the scan, in HU.
        mask_key: where the mask goes, (1, H, W, D) uint8 on the scan's grid.
        allow_missing_keys: whether a missing scan is passed over.

    Reference:
        After Liao et al., IEEE TNNLS 30(11):3484-3495, 2019; see :func:`extract_lungs`.
    """

    def __init__(
        self, keys: KeysCollection, mask_key: str = "lung", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: holds the scan, (1, H, W, D) with an affine.

        Raises:
            NoLungError: When no lung is found.
            ValueError: When the scan is not one volume in HU, or a given mask has other values than 0, 1 and
                2 or another shape than the scan.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            scan = d[key]
            if self.mask_key in d:
                self._check(d[self.mask_key], scan)
                continue
            if not isinstance(scan, MetaTensor) or scan.ndim != 4 or scan.shape[0] != 1:
                raise ValueError(
                    f"{key!s}: need one scan (1, H, W, D) with an affine, got {tuple(scan.shape)}"
                )
            try:
                mask = extract_lungs(np.asarray(scan.cpu())[0], np.asarray(scan.affine.cpu(), dtype=float))
            except ValueError as error:
                raise ValueError(f"{describe_origin(scan, key)}: {error}") from None
            if not mask.any():
                raise NoLungError(f"{describe_origin(scan, key)}: no lung was found; is it a chest CT?")
            # With the scan's meta data and trace the mask can be saved and inverted as the scan can.
            mask_tensor = torch.from_numpy(np.ascontiguousarray(mask)[None])
            d[self.mask_key] = convert_to_dst_type(mask_tensor, dst=scan, dtype=torch.uint8)[0]
        return d

    def _check(self, mask: Any, scan: Any) -> None:
        values = set(np.unique(np.asarray(mask.cpu())).tolist())
        shape, needed = tuple(mask.shape[1:]), tuple(scan.shape[1:])
        if shape != needed or not values <= {0, 1, 2} or values == {0}:
            raise ValueError(
                f"the given {self.mask_key} mask has shape {shape} and values {sorted(values)}; "
                f"the scan's shape {needed} and the values 1 (left) and 2 (right) are needed"
            )


class CropLungd(MapTransform, InvertibleTransform):
    """Crops to the box of the lung mask and a margin; its inverse pads with zeros to where the box was.

    Args:
        keys: what is cropped; all must lie on the mask's grid.
        mask_key: the lung mask, anything above 0 is lung. It may be one of the keys.
        margin_mm: margin on every side, cut off at the scan's edge.
        allow_missing_keys: whether a missing key is passed over.

    Raises:
        ValueError: When the margin is negative.
    """

    def __init__(
        self,
        keys: KeysCollection,
        mask_key: str = "lung",
        margin_mm: float = 5.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if margin_mm < 0:
            raise ValueError(f"margin_mm must not be negative, found {margin_mm}")
        self.mask_key = mask_key
        self.margin_mm = margin_mm
        self.cropper = Crop()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: holds the keys and the mask, (C, H, W, D).

        Raises:
            NoLungError: When the mask is empty.
            ValueError: When there is no mask or a key does not have its shape.
        """
        d = dict(data)
        if self.mask_key not in d:
            raise ValueError(f"there is no '{self.mask_key}' mask to crop to; put LungMaskd before CropLungd")
        mask = d[self.mask_key]
        box = self._box(mask)
        for key in self.key_iterator(d):
            if d[key].shape[1:] != mask.shape[1:]:
                sizes = f"{tuple(d[key].shape[1:])} and {tuple(mask.shape[1:])}"
                raise ValueError(f"{key} is not on the grid of {self.mask_key}: {sizes} voxels")
            cropped = self.cropper(d[key], box)
            # A view would keep the whole scan in memory as long as its part.
            d[key] = cropped.clone(memory_format=torch.contiguous_format)
        return d

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: holds cropped keys with their trace.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.cropper.inverse(d[key])
        return d

    def _box(self, mask: Any) -> tuple[slice, ...]:
        found: Any = np.asarray(mask.cpu()).any(axis=0)
        if not found.any():
            raise NoLungError("the lung mask is empty; there is nothing to crop to")
        affine = np.asarray(mask.affine.cpu(), dtype=float)
        sizes = np.sqrt((affine[: found.ndim, : found.ndim] ** 2).sum(axis=0))
        box = []
        for axis, (length, size) in enumerate(zip(found.shape, sizes, strict=True)):
            inside = np.flatnonzero(found.any(axis=tuple(a for a in range(found.ndim) if a != axis)))
            margin = math.ceil(self.margin_mm / size)
            box.append(slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, length)))
        return tuple(box)


LungMaskD = LungMaskDict = LungMaskd
CropLungD = CropLungDict = CropLungd
