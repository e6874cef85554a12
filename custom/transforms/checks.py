# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Checks that belong between loading and everything else."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from custom.transforms.load import STUDY_KEY, describe_origin

__all__ = ["CheckSameGridD", "CheckSameGridDict", "CheckSameGridd"]


class CheckSameGridd(MapTransform):
    """Refuses a mask that does not lie on its image's grid, instead of training on shifted truth.

    A mask with voxels that are not finite is refused too: a threshold would make background of them.

    Args:
        keys: the image first, then what must share its grid.
        tolerance_mm: largest difference of the affines' entries.
        allow_missing_keys: whether a missing key is passed over.
    """

    def __init__(
        self, keys: KeysCollection, tolerance_mm: float = 0.05, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.tolerance_mm = tolerance_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: channel-first MetaTensors (C, H, W[, D]).

        Raises:
            ValueError: When shapes or affines differ, or a mask holds NaN; the message names the files.
        """
        d = dict(data)
        first, *others = self.key_iterator(d)
        image = d[first]
        for key in others:
            files = f"{first} {_source(image)} and {key} {_source(d[key])}"
            if image.shape[1:] != d[key].shape[1:]:
                raise ValueError(
                    f"{files} differ in size: {tuple(image.shape[1:])} and {tuple(d[key].shape[1:])} voxels"
                )
            if not np.isfinite(np.asarray(d[key].cpu())).all():
                raise ValueError(
                    f"{key} {_source(d[key])} holds NaN or infinity, which is neither in a mask nor out of it"
                )
            if not np.allclose(image.affine, d[key].affine, atol=self.tolerance_mm):
                raise ValueError(
                    f"{files} lie in different places: their affines differ; resample one onto the other"
                )
        return d


def _source(image: Any) -> str:
    meta = getattr(image, "meta", {})
    if STUDY_KEY in meta:
        return describe_origin(image, STUDY_KEY)
    return str(meta.get("filename_or_obj", "(in memory)"))


CheckSameGridD = CheckSameGridDict = CheckSameGridd
