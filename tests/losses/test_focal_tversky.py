# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss, TverskyLoss

from custom.losses import FocalTverskyLoss


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 8, 9, generator=generator)
    return logits, (torch.rand(3, 2, 8, 9, generator=generator) > 0.6).float()


def reference(
    p: np.ndarray, g: np.ndarray, alpha: float, beta: float, gamma: float, axes: tuple
) -> np.ndarray:
    """Eqs. (9)-(11) of the paper, one value per channel (and image)."""
    missed, excess, both = ((1 - p) * g).sum(axes), (p * (1 - g)).sum(axes), (p * g).sum(axes)
    index = (both + 1e-5) / (both + alpha * missed + beta * excess + 1e-5)
    return (1 - index) ** (1 / gamma)


@pytest.mark.parametrize("gamma", [1, 4 / 3, 3])
@pytest.mark.parametrize("batch", [True, False])
def test_against_the_equations(pair, gamma, batch):
    logits, target = pair
    axes = (0, 2, 3) if batch else (2, 3)
    expected = reference(
        1 / (1 + np.exp(-logits.double().numpy())), target.double().numpy(), 0.7, 0.3, gamma, axes
    )
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        loss = FocalTverskyLoss(gamma=gamma, sigmoid=True, batch=batch, reduction=reduction)
        np.testing.assert_allclose(loss(logits, target).numpy(), value, rtol=1e-5)


def test_alpha_weighs_false_negatives():
    # Four lesion pixels, two of them found, and one pixel too many: TP 2, FN 2, FP 1.
    target = torch.tensor([1.0, 1, 1, 1, 0, 0]).view(1, 1, 2, 3)
    prediction = torch.tensor([1.0, 1, 0, 0, 1, 0]).view(1, 1, 2, 3)
    loss = FocalTverskyLoss(alpha=0.7, beta=0.3, gamma=4 / 3)(prediction, target).item()
    assert loss == pytest.approx((1 - 2 / (2 + 0.7 * 2 + 0.3 * 1)) ** 0.75, rel=1e-4)
    missed = FocalTverskyLoss(alpha=1, beta=0, gamma=1)(prediction, target).item()
    assert missed == pytest.approx(1 - 2 / (2 + 2), rel=1e-4)
    excess = FocalTverskyLoss(alpha=0, beta=1, gamma=1)(prediction, target).item()
    assert excess == pytest.approx(1 - 2 / (2 + 1), rel=1e-4)


@pytest.mark.parametrize("batch", [True, False])
def test_gamma_one_is_tversky_with_monais_names_swapped(pair, batch):
    ours = FocalTverskyLoss(alpha=0.8, beta=0.1, gamma=1, sigmoid=True, batch=batch)
    monai = TverskyLoss(alpha=0.1, beta=0.8, sigmoid=True, batch=batch)
    torch.testing.assert_close(ours(*pair), monai(*pair))


def test_equal_weights_and_gamma_one_are_dice(pair):
    ours = FocalTverskyLoss(alpha=0.5, beta=0.5, gamma=1, sigmoid=True)
    dice = DiceLoss(sigmoid=True, batch=True)
    torch.testing.assert_close(ours(*pair), dice(*pair), rtol=1e-5, atol=1e-6)


def test_softmax_one_hot_and_background(pair):
    logits, _ = pair
    labels = (logits[:, :1] > 0.3).long()
    loss = FocalTverskyLoss(softmax=True, to_onehot_y=True, include_background=False)
    p = logits.double().softmax(1).numpy()[:, 1:]
    expected = reference(p, labels.double().numpy(), 0.7, 0.3, 4 / 3, (0, 2, 3))
    np.testing.assert_allclose(loss(logits, labels).item(), expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("gamma", [1, 4 / 3, 3])
@pytest.mark.parametrize("lesion", [0.0, 1.0])
@pytest.mark.parametrize("batch", [True, False])
def test_gradient_is_finite_at_a_perfect_prediction_and_without_lesion(gamma, lesion, batch):
    target = torch.zeros(2, 1, 6, 6)
    target[:, :, 2:4, 2:4] = lesion
    prediction = target.clone().requires_grad_()
    loss = FocalTverskyLoss(gamma=gamma, batch=batch)(prediction, target)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=0.01)
    assert prediction.grad.isfinite().all()


def test_an_empty_slice_pulls_predictions_down():
    logits = torch.zeros(1, 1, 6, 6, requires_grad=True)
    FocalTverskyLoss(sigmoid=True)(logits, torch.zeros(1, 1, 6, 6)).backward()
    assert logits.grad.isfinite().all() and (logits.grad > 0).all()


@pytest.mark.parametrize(
    "arguments", [{"gamma": 0}, {"alpha": -0.1}, {"beta": -1}, {"sigmoid": True, "softmax": True}]
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        FocalTverskyLoss(**arguments)
