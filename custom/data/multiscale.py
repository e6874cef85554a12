# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Training batches at several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from torch.nn.functional import interpolate

__all__ = ["MultiScaleBatch"]


class MultiScaleBatch:
    """Resizes each training batch by one of several factors; give it to a trainer as ``prepare_batch``.

    Sides are rounded to a multiple of ``multiple``. Images are resized bilinearly, labels by the nearest
    neighbour, so that they stay 0 and 1.

    Args:
        scales: the factors.
        multiple: what the network's sides must be multiples of.
        order: ``"random"`` draws one factor a batch, from torch's generator, whose state is part of a
            checkpoint; ``"cycle"`` takes them in turn, for :class:`custom.data.EpochSampler` with as many
            ``passes``, so that every batch is trained at every scale.

    Raises:
        ValueError: When ``order`` is unknown or there is no positive factor.

    Reference:
        Liu et al., MedIA 74:102205, 2021: scales 0.75, 1 and 1.25, at 352 x 352 sides 256, 352 and 448.
    """

    def __init__(
        self, scales: Sequence[float] = (0.75, 1.0, 1.25), multiple: int = 32, order: str = "random"
    ) -> None:
        if order not in ("random", "cycle"):
            raise ValueError(f"order must be 'random' or 'cycle', found '{order}'")
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be positive factors, found {list(scales)}")
        self.scales = list(scales)
        self.multiple = multiple
        self.order = order
        self._turn = 0

    def __call__(
        self,
        batch: Mapping[str, Any],
        device: torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            batch: holds ``image`` and ``label``, (B, C, H, W).
            device: where they go.
            non_blocking: whether the copy may be asynchronous.
            kwargs: further arguments of ``torch.Tensor.to``.

        Returns:
            Image and label of one size.
        """
        image, label = (
            batch[key].to(device=device, non_blocking=non_blocking, **kwargs) for key in ("image", "label")
        )
        image, label = (x.as_tensor() if isinstance(x, MetaTensor) else x for x in (image, label))
        if self.order == "cycle":
            scale = self.scales[self._turn % len(self.scales)]
            self._turn += 1
        else:
            scale = self.scales[int(torch.randint(len(self.scales), (1,)))]
        size = [max(1, round(side * scale / self.multiple)) * self.multiple for side in image.shape[2:]]
        if size == list(image.shape[2:]):
            return image, label
        return (
            interpolate(image, size=size, mode="bilinear", align_corners=False),
            interpolate(label, size=size, mode="nearest"),
        )
