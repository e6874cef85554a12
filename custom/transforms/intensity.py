# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Intensity normalisation of single slices."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type, convert_to_tensor

__all__ = ["NormalizeSlicesD", "NormalizeSlicesDict", "NormalizeSlicesd"]


class NormalizeSlicesd(MapTransform):
    """Shifts and scales every axial slice to mean 0 and standard deviation 1.

    MONAI's NormalizeIntensityd takes the statistics of the whole volume; a network that is trained on single
    slices must see the same values whether a slice comes alone or in a volume. A constant slice becomes 0.

    Args:
        keys: images (C, H, W) or (C, H, W, D), the last axis of the latter being the slices.
        allow_missing_keys: whether a missing key is passed over.

    Reference:
        Zhou, Canu & Ruan, IJIST 31(1):16-27, 2021 ("intensity normalisation", not specified further).
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: images under the keys.

        Raises:
            ValueError: When an image has neither three nor four dimensions.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            if d[key].ndim not in (3, 4):
                raise ValueError(
                    f"{key}: (C, H, W) or (C, H, W, D) is needed, found shape {tuple(d[key].shape)}"
                )
            image = convert_to_tensor(d[key], dtype=torch.float32, track_meta=False)
            mean = image.mean(dim=(0, 1, 2), keepdim=True)
            deviation = image.std(dim=(0, 1, 2), keepdim=True, unbiased=False)
            d[key] = convert_to_dst_type(
                (image - mean) / deviation.clamp_min(1e-6), d[key], dtype=torch.float32
            )[0]
        return d


NormalizeSlicesD = NormalizeSlicesDict = NormalizeSlicesd
