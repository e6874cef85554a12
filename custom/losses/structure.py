# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Structure loss: cross-entropy and Dice that look harder at the borders of lesions."""

from __future__ import annotations

import torch
from monai.utils import LossReduction
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

__all__ = ["StructureLoss"]


class StructureLoss(_Loss):
    """Cross-entropy plus Dice in which a pixel weighs more the less its surroundings agree with it.

    ::

        w    = 1 + gamma |mean of g over a window around the pixel - g|           between 1 and 1 + gamma
        BCE  = sum(w bce) / sum(w)
        Dice = 1 - (2 sum(w p g) + 1) / (sum(w (p + g)) + 1)
        loss = BCE + Dice                                                         per image, then averaged

    with g the target, p = sigmoid(logits) and bce the cross-entropy of one pixel. Beyond the image's border
    the window counts zeros.

    This is what the paper intends. Its printed eq. (6) divides by sum(w - 1), which is 0 on a slice without
    lesion; its printed eq. (8) has (g + p + g p) in the denominator and would leave a loss of 1/3 at a
    perfect prediction; and in the code published with it the cross-entropy is averaged before it meets the
    weights, so that they cancel.

    The paper adds the losses of its network's four maps: wrap this one in MONAI's ``DeepSupervisionLoss``
    with ``weights=[1, 1, 1, 1]``.

    Args:
        window: side of the window in pixels, odd.
        gamma: how much more a pixel at a border can weigh; 0 is the unweighted loss.
        reduction: ``"mean"`` or ``"sum"`` over the images, or ``"none"``.

    Raises:
        ValueError: when the window is not a positive odd number or gamma is negative.

    Reference:
        Liu et al., Medical Image Analysis 74:102205, 2021, eqs. (5)-(8); Wei et al., F3Net, arXiv 1911.11445.
    """

    def __init__(
        self, window: int = 31, gamma: float = 5.0, reduction: LossReduction | str = LossReduction.MEAN
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be a positive odd number of pixels, got {window}.")
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}.")
        self.window = window
        self.gamma = gamma

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: logits, (B, 1, H, W).
            target: 0 or 1, (B, 1, H, W).

        Returns:
            A scalar; with reduction ``"none"`` one value per image, (B,).

        Raises:
            ValueError: when the shapes differ or are not (B, 1, H, W).
        """
        if input.shape != target.shape or input.ndim != 4 or input.shape[1] != 1:
            raise ValueError(
                "StructureLoss takes logits and target of the same shape (B, 1, H, W), "
                f"got {tuple(input.shape)} and {tuple(target.shape)}."
            )
        target = target.to(input.dtype)
        # The window's mean, by rows and then by columns: a tenth of the time of the square window at 31 x 31.
        half = self.window // 2
        around = F.avg_pool2d(target, (self.window, 1), stride=1, padding=(half, 0))
        around = F.avg_pool2d(around, (1, self.window), stride=1, padding=(0, half))
        weight = 1 + self.gamma * (around - target).abs()

        bce = F.binary_cross_entropy_with_logits(input, target, reduction="none")
        weighted_bce = (weight * bce).sum((1, 2, 3)) / weight.sum((1, 2, 3))

        probability = input.sigmoid()
        overlap = (weight * probability * target).sum((1, 2, 3))
        total = (weight * (probability + target)).sum((1, 2, 3))
        loss = weighted_bce + 1 - (2 * overlap + 1) / (total + 1)

        if self.reduction == LossReduction.MEAN.value:
            return loss.mean()
        return loss.sum() if self.reduction == LossReduction.SUM.value else loss
