# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Grey values of slices whose window is not known."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from custom.data.grey_match import count_greys, match_peaks

__all__ = ["GREY_MATCH", "MatchGreysD", "MatchGreysDict", "MatchGreysd"]

GREY_MATCH = "grey_match"
"""Key of the metadata under which :class:`MatchGreysd` says what it did."""


class MatchGreysd(MapTransform):
    """Brings single 8-bit slices of unknown windows to the window of the training slices.

    A linear mapping takes the two peaks of a slice's histogram, aerated lung and soft tissue, to those of
    COVID-SemiSeg's labelled slices, which the shipped weights were trained on; see
    :mod:`custom.data.grey_match`. A slice without two such peaks stays as it is. What was done stands in the
    metadata under :data:`GREY_MATCH`: "lung 77, tissue 231", or why nothing was.

    Args:
        keys: slices of values from 0 to 255.
        allow_missing_keys: whether a missing key is passed over.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: slices (1, H, W) under the keys.

        Returns:
            The item with slices of the same shape, float32, values from 0 to 255.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            image: Any = convert_to_tensor(d[key], dtype=torch.float32, track_meta=True)
            pixels = np.rint(np.asarray(image.as_tensor())).clip(0, 255)
            try:
                mapping = match_peaks(count_greys(pixels))
            except ValueError as error:
                image.meta[GREY_MATCH] = f"as it is: {error}"
            else:
                image = (image * mapping.scale + mapping.offset).clamp(0, 255)
                image.meta[GREY_MATCH] = f"lung {mapping.lung}, tissue {mapping.tissue}"
            d[key] = image
        return d


MatchGreysD = MatchGreysDict = MatchGreysd
