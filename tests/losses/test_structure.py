# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DeepSupervisionLoss
from torch.nn import functional as F

from custom.losses import StructureLoss


def square(side: int = 40, start: int = 12, stop: int = 25) -> torch.Tensor:
    target = torch.zeros(1, 1, side, side)
    target[..., start:stop, start:stop] = 1
    return target


def reference(logits: np.ndarray, target: np.ndarray, window: int, gamma: float) -> float:
    """One image (H, W): weights by walking over the pixels, then the two terms as written down."""
    height, width = target.shape
    half = window // 2
    weight = np.empty_like(target)
    for row in range(height):
        for column in range(width):
            rows = slice(max(0, row - half), row + half + 1)
            columns = slice(max(0, column - half), column + half + 1)
            around = target[rows, columns].sum() / window**2  # zeros beyond the border
            weight[row, column] = 1 + gamma * abs(around - target[row, column])
    p = 1 / (1 + np.exp(-logits))
    bce = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    dice = 1 - (2 * (weight * p * target).sum() + 1) / ((weight * (p + target)).sum() + 1)
    return (weight * bce).sum() / weight.sum() + dice


@pytest.mark.parametrize(("window", "gamma"), [(31, 5), (5, 1), (1, 5), (7, 0)])
def test_against_an_independent_computation(window, gamma):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 1, 20, 24))
    target = (rng.random((3, 1, 20, 24)) > 0.7).astype(float)
    target[0, 0, 4:12, 6:15] = 1
    expected = [reference(logits[i, 0], target[i, 0], window, gamma) for i in range(3)]
    tensors = torch.from_numpy(logits), torch.from_numpy(target)
    for reduction, value in (("none", expected), ("mean", np.mean(expected)), ("sum", np.sum(expected))):
        loss = StructureLoss(window, gamma, reduction)
        np.testing.assert_allclose(loss(*tensors).numpy(), value, rtol=1e-10)


def test_a_mistake_at_the_border_costs_more_than_one_inside():
    target = square()
    right = 60 * (target - 0.5)  # so sure that only the one mistake costs anything
    at_corner, at_centre = right.clone(), right.clone()
    at_corner[..., 12, 12] *= -1
    at_centre[..., 18, 18] *= -1
    # In the 5 x 5 window around the square's corner 9 pixels are lesion: weight 1 + 5 (1 - 9 / 25) = 4.2;
    # around its centre all are: weight 1.
    weight = 1 + 5 * (F.avg_pool2d(target, 5, 1, 2) - target).abs()
    assert weight[0, 0, 12, 12].item() == pytest.approx(4.2) and weight[0, 0, 18, 18] == 1
    loss = StructureLoss(window=5)
    for wrong, own in ((at_corner, 4.2), (at_centre, 1.0)):
        lesion = (weight * target).sum().item()
        dice = 1 - (2 * (lesion - own) + 1) / (2 * lesion - own + 1)
        assert loss(wrong, target).item() == pytest.approx(30 * own / weight.sum().item() + dice, rel=1e-4)
    plain = StructureLoss(window=5, gamma=0)
    assert plain(at_corner, target).item() == pytest.approx(plain(at_centre, target).item(), rel=1e-5)


def test_the_weights_do_not_cancel_in_the_cross_entropy():
    target = square()
    logits = 60 * (target - 0.5)
    logits[..., 12, 12] = -30
    weighted, plain = StructureLoss(window=5), StructureLoss(window=5, gamma=0)
    difference = weighted(logits, target) - plain(logits, target)
    # Unweighted it is 30 / 1600; the gain is more than the Dice term alone could bring.
    weight = 1 + 5 * (F.avg_pool2d(target, 5, 1, 2) - target).abs()
    gain = 30 * 4.2 / weight.sum().item() - F.binary_cross_entropy_with_logits(logits, target).item()
    assert gain > 0.02
    assert difference.item() > gain


def test_a_perfect_prediction_costs_nothing():
    target = square()
    assert StructureLoss()(60 * (target - 0.5), target).item() == pytest.approx(0, abs=1e-5)


def test_a_slice_without_lesion():
    target = torch.zeros(1, 1, 32, 32)
    logits = torch.zeros(1, 1, 32, 32, requires_grad=True)
    loss = StructureLoss()(logits, target)
    loss.backward()
    # Every weight is 1: BCE ln 2, Dice 1 - 1 / (32 * 32 / 2 + 1).
    assert loss.item() == pytest.approx(np.log(2) + 1 - 1 / 513, rel=1e-5)
    assert (logits.grad > 0).all()
    assert StructureLoss()(torch.full((1, 1, 32, 32), -30.0), target).item() == pytest.approx(0, abs=1e-6)


def test_extreme_logits_stay_finite():
    target = square()
    logits = (200 * (0.5 - target)).requires_grad_()
    loss = StructureLoss()(logits, target)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_integer_targets():
    target = square()
    logits = torch.randn(1, 1, 40, 40)
    torch.testing.assert_close(
        StructureLoss()(logits, target.to(torch.uint8)), StructureLoss()(logits, target)
    )


def test_four_supervised_maps_are_added():
    target, maps = square(), [torch.randn(1, 1, 40, 40) for _ in range(4)]
    loss = StructureLoss()
    together = DeepSupervisionLoss(loss, weights=[1, 1, 1, 1])(maps, target)
    torch.testing.assert_close(together, sum(loss(map_, target) for map_ in maps))


@pytest.mark.parametrize("arguments", [{"window": 30}, {"window": -1}, {"gamma": -1}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        StructureLoss(**arguments)


@pytest.mark.parametrize("shape", [(1, 1, 8, 9), (1, 8, 8), (1, 2, 8, 8)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        StructureLoss()(torch.zeros(shape), torch.zeros(shape[:-1] + (8,)))
