# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Making sure that an image holds Hounsfield units."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_dst_type, convert_to_tensor

from custom.transforms.load import describe_origin

__all__ = ["ValidateHU", "ValidateHUD", "ValidateHUDict", "ValidateHUd"]

_PADDING = -1100.0  # HU; below it there is no matter, only padding outside the field of view
_AIR = -300.0  # HU of air and aerated lung are below
_TISSUE = (-200.0, 300.0)  # HU of fat, water, muscle, blood with contrast agent
_MIN_AIR, _MIN_TISSUE = 0.005, 0.05  # fractions of the voxels that are not padding


class ValidateHU(Transform):
    """Refuse an image that does not hold HU of a chest; clip the padding of one that does.

    A chest has air or lung (-1100 to -300 HU) as well as soft tissue (-200 to 300 HU): of the voxels that are
    not padding these must make up 0.5 % and 5 %. Values without rescaling (air near 0, tissue near 1000),
    8-bit images, images scaled to [0, 1] or z-scores, MR and PET have nothing in the range of air; values
    rescaled twice have only dense bone, at most 2 %, in that of soft tissue. A chest has a third of each.

    Values below ``minimum``, as scanners write outside their field of view (-2048, -3024), become
    ``minimum``. High values, as of metal, are left alone.

    Args:
        minimum: HU that lower values are raised to.
    """

    backend = [TransformBackends.TORCH]

    def __init__(self, minimum: float = -1024.0) -> None:
        self.minimum = minimum

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """Check and clip one image.

        Args:
            img: (1, I, J, K) image.

        Returns:
            (1, I, J, K) image, of the same kind.

        Raises:
            ValueError: When it has other dimensions, no voxels, NaN or infinite values, one value throughout,
                or no Hounsfield units of a chest.
        """
        if img.ndim != 4 or img.shape[0] != 1 or 0 in img.shape:
            raise ValueError(f"a CT has shape (1, I, J, K), got {tuple(img.shape)}")
        values = convert_to_tensor(img, track_meta=False)
        low, high = (float(v) for v in torch.aminmax(values))  # NaN anywhere makes both NaN
        if not (np.isfinite(low) and np.isfinite(high)):
            count = int((~torch.isfinite(values)).sum())
            raise ValueError(f"{count} of {values.numel()} voxels are NaN or infinite")
        if low == high:
            raise ValueError(f"all voxels are {low + 0.0:g}: there is nothing to see in it")
        sample = values[:, :: max(1, values.shape[1] // 128)]  # fractions need no more, and it saves time
        floor = max(_PADDING, low)  # a scan's lowest value is padding as well, whatever it is
        matter = int(torch.count_nonzero(sample > floor))
        air = int(torch.count_nonzero((sample > floor) & (sample < _AIR)))
        tissue = int(torch.count_nonzero((sample > _TISSUE[0]) & (sample < _TISSUE[1])))
        if air < max(_MIN_AIR * matter, 1) or tissue < max(_MIN_TISSUE * matter, 1):
            raise ValueError(
                f"values {low:g} to {high:g} are not HU of a chest: {self._guess(values, low, high, air)}"
            )
        return convert_to_dst_type(values.clamp(min=self.minimum), dst=img)[0]

    @staticmethod
    def _guess(values: torch.Tensor, low: float, high: float, air: int) -> str:
        """What the values look like instead, and what to do."""
        if low >= 0 and high <= 1:
            return "they look scaled to [0, 1]; give the scan before any windowing"
        if low >= 0 and high <= 255:
            return "they look like an 8-bit picture; give the scan before any windowing"
        if air:
            return "there is air or lung and no soft tissue; all air, or rescaled twice"
        dense = values[values > _PADDING]
        if high > 1000 and dense.numel() and float(dense.median()) >= 0:
            return "there is no air; rescale slope and intercept may not have been applied, or it is no CT"
        return "there is no air or lung; it may be windowed, scaled, or no CT"


class ValidateHUd(MapTransform):
    """Dictionary-based wrapper of :class:`ValidateHU`.

    Args:
        keys: keys of the CT images.
        minimum: HU that lower values are raised to.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        ValueError: When called, in one line that names the file.
    """

    backend = ValidateHU.backend

    def __init__(
        self, keys: KeysCollection, minimum: float = -1024.0, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.validate = ValidateHU(minimum)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check and clip the images of one item, each (1, I, J, K)."""
        d = dict(data)
        for key in self.key_iterator(d):
            try:
                d[key] = self.validate(d[key])
            except ValueError as error:
                raise ValueError(f"{describe_origin(d[key], key)}: {error}") from None
        return d


ValidateHUD = ValidateHUDict = ValidateHUd
