# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The losses of SCOAT-Net's table I that the configs take from MONAI are what the paper means by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 1, 12, 10, generator=generator, dtype=torch.float64)
    target = (torch.rand(4, 1, 12, 10, generator=generator) > 0.8).double()
    target[2] = 0  # a slice without lesion in the batch
    return logits, target


def test_dice_ce_is_equation_7(batch):
    logits, target = batch
    y, p = target.numpy(), 1 / (1 + np.exp(-logits.numpy()))
    bce = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    # One Dice over all pixels of the batch, squares in the denominator; printed without the constant 1.
    dice = -2 * (y * p).sum() / ((y**2).sum() + (p**2).sum())
    loss = DiceCELoss(sigmoid=True, squared_pred=True, batch=True, lambda_dice=0.5)(*batch)
    assert loss.item() == pytest.approx(bce + 0.5 * (1 + dice), rel=1e-6)


def test_dice_over_the_batch_is_not_the_mean_over_its_slices(batch):
    together = DiceCELoss(sigmoid=True, squared_pred=True, batch=True, lambda_dice=0.5)(*batch)
    apart = DiceCELoss(sigmoid=True, squared_pred=True, batch=False, lambda_dice=0.5)(*batch)
    assert abs(together.item() - apart.item()) > 0.01


def test_jaccard_is_the_soft_iou(batch):
    logits, target = batch
    y, p = target.numpy(), 1 / (1 + np.exp(-logits.numpy()))
    both = (y * p).sum()
    expected = 1 - both / (y.sum() + p.sum() - both)
    loss = DiceLoss(sigmoid=True, jaccard=True, batch=True)(*batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_squared_dice(batch):
    logits, target = batch
    y, p = target.numpy(), 1 / (1 + np.exp(-logits.numpy()))
    expected = 1 - 2 * (y * p).sum() / ((y**2).sum() + (p**2).sum())
    loss = DiceLoss(sigmoid=True, squared_pred=True, batch=True)(*batch)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
