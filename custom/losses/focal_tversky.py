# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Focal Tversky loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.losses import TverskyLoss
from monai.utils import LossReduction
from torch.nn.modules.loss import _Loss

__all__ = ["FocalTverskyLoss"]

# The gradient of x ** (1 / gamma) grows without bound as x approaches 0.
SMALLEST_LOSS = 1e-7


class FocalTverskyLoss(_Loss):
    """Tversky loss raised to a power that makes badly segmented structures count for more.

    ::

        TI  = (sum p g + s) / (sum p g + alpha sum (1 - p) g + beta sum p (1 - g) + s)
        FTL = (1 - TI) ** (1 / gamma)

    Here **alpha weighs the false negatives and beta the false positives**, as in the paper. MONAI's
    ``TverskyLoss``, on which this is built, has the two the other way round.

    ``gamma=1`` is the Tversky loss, and with ``alpha=beta=0.5`` the Dice loss. 1 - TI is held above 1e-7, so
    that the gradient stays finite at a perfect prediction.

    Args:
        alpha: weight of the false negatives.
        beta: weight of the false positives.
        gamma: the exponent is ``1 / gamma``; 1 to 3 in the paper.
        sigmoid: apply a sigmoid to the prediction.
        batch: sum over the whole batch before dividing, so that a slice without lesion does not decide alone.
        include_background: False leaves out channel 0.
        to_onehot_y: turn the target's labels into one channel each.
        softmax: apply a softmax to the prediction.
        other_act: another activation for the prediction.
        reduction: ``"mean"`` or ``"sum"`` over the channels (unless ``batch``, the items too), or ``"none"``.
        smooth_nr: s in the numerator.
        smooth_dr: s in the denominator.
        soft_label: the target holds values between 0 and 1.
        ignore_index: label whose voxels are left out.

    Raises:
        ValueError: when gamma is not positive, alpha or beta negative or more than one activation given.

    Reference:
        Zhou, Canu & Ruan, IJIST 31(1):16-27, 2021, eqs. (9)-(11); Abraham & Khan, arXiv 1810.07842.
    """

    def __init__(
        self,
        alpha: float = 0.7,
        beta: float = 0.3,
        gamma: float = 4 / 3,
        sigmoid: bool = False,
        batch: bool = True,
        include_background: bool = True,
        to_onehot_y: bool = False,
        softmax: bool = False,
        other_act: Callable | None = None,
        reduction: LossReduction | str = LossReduction.MEAN,
        smooth_nr: float = 1e-5,
        smooth_dr: float = 1e-5,
        soft_label: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        if gamma <= 0:
            raise ValueError(f"gamma must be greater than 0, got {gamma}.")
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha and beta must not be negative, got {alpha} and {beta}.")
        self.gamma = gamma
        self.tversky = TverskyLoss(
            include_background=include_background,
            to_onehot_y=to_onehot_y,
            sigmoid=sigmoid,
            softmax=softmax,
            other_act=other_act,
            alpha=beta,
            beta=alpha,
            reduction=LossReduction.NONE,
            smooth_nr=smooth_nr,
            smooth_dr=smooth_dr,
            batch=batch,
            soft_label=soft_label,
            ignore_index=ignore_index,
        )

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: prediction, (B, C, H, W[, D]).
            target: (B, C, H, W[, D]), or (B, 1, H, W[, D]) with ``to_onehot_y``.

        Returns:
            A scalar; with reduction ``"none"`` one value per channel, (C,), or (B, C) unless ``batch``.
        """
        loss = self.tversky(input, target).clamp(min=SMALLEST_LOSS) ** (1 / self.gamma)
        if self.reduction == LossReduction.MEAN.value:
            return loss.mean()
        return loss.sum() if self.reduction == LossReduction.SUM.value else loss
