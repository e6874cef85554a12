# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Loading masks that exist already onto the grid of their scan."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from custom.data.masks import OPACITY_SEGMENT, place_mask, read_mask

__all__ = ["LoadMaskD", "LoadMaskDict", "LoadMaskd"]


class LoadMaskd(MapTransform):
    """Loads masks, NIfTI, NRRD or DICOM Segmentation, and puts them onto the grid of a scan.

    Axes are turned and what was cut off is filled with zeros; nothing is resampled.

    Args:
        keys: of the paths.
        reference_key: the loaded scan, (1, I, J, K) with an affine.
        segments: see :func:`custom.data.masks.read_mask`.
        label: see :func:`custom.data.masks.read_mask`.
        allow_missing_keys: whether a missing mask is passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        reference_key: str,
        segments: Mapping[str, int] = OPACITY_SEGMENT,
        label: int | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reference_key = reference_key
        self.segments = dict(segments)
        self.label = label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: holds the scan and the paths.

        Raises:
            ValueError: When a mask cannot be read, or does not lie on the scan's grid.
        """
        d = dict(data)
        scan = d[self.reference_key]
        for key in self.key_iterator(d):
            mask, affine = read_mask(d[key], self.segments, self.label)
            target = np.asarray(scan.affine.cpu(), dtype=float)
            placed = place_mask(mask, affine, tuple(scan.shape[1:]), target)
            tensor = torch.from_numpy(np.ascontiguousarray(placed)[None])
            d[key] = convert_to_dst_type(tensor, dst=scan, dtype=torch.uint8)[0]
        return d


LoadMaskD = LoadMaskDict = LoadMaskd
