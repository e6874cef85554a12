# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Reading slices that come as pictures."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from custom.data.pictures import read_grey
from custom.data.plain_slices import ORIENTATIONS, turn

__all__ = ["LoadPictureD", "LoadPictureDict", "LoadPictured"]


class LoadPictured(MapTransform):
    """Reads 8-bit grey slices and turns them upright; what is not one is refused with the reason.

    Args:
        keys: paths of pictures.
        stored_orientation: how the slices are stored, one of :data:`custom.data.plain_slices.ORIENTATIONS`.
        allow_missing_keys: whether a missing key is passed over.

    Raises:
        ValueError: When the orientation is unknown.
    """

    def __init__(
        self, keys: KeysCollection, stored_orientation: str = "upright", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if stored_orientation not in ORIENTATIONS:
            raise ValueError(
                f"unknown stored_orientation '{stored_orientation}'; choose from {', '.join(ORIENTATIONS)}"
            )
        self.stored_orientation = stored_orientation

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: paths under the keys.

        Returns:
            The item with slices (1, H, W) of values from 0 to 255, float32: rows grow to posterior, columns
            to the patient's left.

        Raises:
            ValueError: In one line, when a file is no picture of 8-bit grey values.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            pixels = turn(read_grey(d[key]), self.stored_orientation).astype(np.float32)
            d[key] = MetaTensor(
                torch.from_numpy(np.ascontiguousarray(pixels))[None],
                meta={"filename_or_obj": str(d[key])},
            )
        return d


LoadPictureD = LoadPictureDict = LoadPictured
