# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The attention blocks against their equations, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from network_tester import fill
from scipy.signal import correlate

from custom.networks import ChannelSE, DAFBlock, ECABlock, GCABlock, SCOATSpatialAttention, SCSEBlock


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def weight(layer: torch.nn.Module) -> np.ndarray:
    return layer.weight.detach().double().numpy()


def normalise(x: np.ndarray, bn: torch.nn.Module) -> np.ndarray:
    """Batch normalisation in evaluation mode over channel axis 1."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, var, scale, shift = (
        tensor.detach().double().numpy().reshape(shape)
        for tensor in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    return (x - mean) / np.sqrt(var + bn.eps) * scale + shift


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolution of "same" size, (B, C, H, W) with (O, C, k, k)."""
    planes = [
        [sum(correlate(c, k, "same") for c, k in zip(image, out, strict=True)) for out in kernel]
        for image in x
    ]
    return np.array(planes)


def deconvolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Transposed 4x4 convolution of stride 2 and padding 1: every input pixel stamps its scaled kernel."""
    batch, _, height, width = x.shape
    out = np.zeros((batch, kernel.shape[1], 2 * height + 2, 2 * width + 2))
    for row in range(height):
        for column in range(width):
            stamp = np.einsum("bi,iokl->bokl", x[:, :, row, column], kernel)
            out[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += stamp
    return out[:, :, 1:-1, 1:-1]


def check(block: torch.nn.Module, expected: np.ndarray, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        np.testing.assert_allclose(block(*inputs).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_channel_se():
    block = ChannelSE(2, 8, reduction=4).eval()
    x = torch.randn(2, 8, 3, 5)
    z = x.double().numpy()
    hidden = np.maximum(z.mean((2, 3)) @ weight(block.weight[1]).T, 0)
    gate = sigmoid(hidden @ weight(block.weight[3]).T)
    assert hidden.shape == (2, 2)
    check(block, z * gate[:, :, None, None], x)


def test_scse():
    block = SCSEBlock(2, 6).eval()
    x = torch.randn(2, 6, 4, 3)
    z = x.double().numpy()
    hidden = np.maximum(z.mean((2, 3)) @ weight(block.channel.weight[1]).T, 0)
    channel = sigmoid(hidden @ weight(block.channel.weight[3]).T)[:, :, None, None]
    spatial = sigmoid(np.einsum("bchw,c->bhw", z, weight(block.map[0])[0, :, 0, 0]))[:, None]
    assert hidden.shape == (2, 3)
    check(block, channel * z + spatial * z, x)
    assert sum(p.numel() for p in block.parameters()) == 6 * 3 + 3 * 6 + 6


def test_eca():
    block = ECABlock(2).eval()
    x = torch.randn(2, 7, 3, 3)
    z = x.double().numpy()
    means = np.pad(z.mean((2, 3)), ((0, 0), (1, 1)))
    kernel = weight(block.conv)[0, 0]
    gate = sigmoid(sum(kernel[k] * means[:, k : k + 7] for k in range(3)))
    check(block, z * gate[:, :, None, None], x)
    assert sum(p.numel() for p in block.parameters()) == 3


@pytest.mark.parametrize("relu_before_sum", [True, False])
def test_scoat_spatial_attention(relu_before_sum):
    block = SCOATSpatialAttention(2, 3, 5, relu_before_sum).eval()
    fill(block)
    same, lower = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)

    def project(part, x: np.ndarray) -> np.ndarray:
        bias = part.conv.bias.detach().double().numpy().reshape(1, -1, 1, 1)
        return normalise(np.einsum("bchw,oc->bohw", x, weight(part.conv)[:, :, 0, 0]) + bias, part.adn.N)

    a, b = project(block.same, same.double().numpy()), project(block.lower, lower.double().numpy())
    joined = np.maximum(a, 0) + np.maximum(b, 0) if relu_before_sum else np.maximum(a + b, 0)
    check(block, (1 + sigmoid(project(block.map[0], joined))) * lower.double().numpy(), same, lower)


def test_daf():
    block = DAFBlock(2, 6, 3).eval()
    fill(block)
    high, low = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 6, 8)
    h, fine = high.double().numpy(), low.double().numpy()
    gate = block.attention
    channel = normalise(np.einsum("bc,oc->bo", h.mean((2, 3)), weight(gate.conv)[:, :, 0, 0]), gate.norm)
    spatial = deconvolve(h, weight(gate.map[0].conv)).max(1)
    weights = sigmoid(channel)[:, :, None, None] * sigmoid(spatial)[:, None]
    fine = normalise(convolve(fine, weight(block.low.conv)), block.low.adn.N)
    deep = normalise(deconvolve(h, weight(block.high.conv)), block.high.adn.N)
    check(block, np.maximum(weights * fine + deep, 0), high, low)


def test_daf_trains_on_one_image_and_keeps_its_batch_statistics_for_more():
    block = DAFBlock(2, 6, 3).train()
    high, low = torch.randn(3, 6, 4, 4), torch.randn(3, 3, 8, 8)
    norm = block.attention.norm
    block(high[:1], low[:1]).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0
    block(high, low)
    described = block.attention.conv(block.attention.pool(high)).detach()
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * described.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("wide", "narrow", "kernels", "count"),
    [(256, 128, (3, 5, 7), 1_691_392), (2048, 1024, (3, 5), 72_374_272)],
)
def test_gca_parameters(wide, narrow, kernels, count):
    with torch.device("meta"):
        block = GCABlock(wide, narrow, kernels)
    assert sum(p.numel() for p in block.parameters()) == count


def test_gca_reach_and_units():
    block = GCABlock(2, 1).eval()
    for parameter in block.parameters():
        torch.nn.init.ones_(parameter)
    image = torch.zeros(1, 2, 41, 41, requires_grad=True)
    block(image)[0, 0, 20, 20].backward()
    # Longest branch: 7 from 1x7 and 7x1, plus 2 * 7 from the dilated 3x3, plus 2 from the fusing 3x3.
    rows, columns = torch.nonzero(image.grad[0, 0], as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 7 + 14 + 2
    # The units have no ReLU: with the shortcut silenced and the fusion negated, negative values get through.
    torch.nn.init.zeros_(block.shortcut.adn.N.weight)
    torch.nn.init.constant_(block.fuse.conv.weight, -1)
    for branch in block.branches[1:]:
        torch.nn.init.zeros_(branch[-1].adn.N.weight)
    assert (block(-100 * torch.ones(1, 2, 9, 9)) > 100).all()
    assert [type(m).__name__ for m in block.modules()].count("ReLU") == 1


def test_blocks_work_in_three_dimensions():
    x = torch.randn(2, 4, 3, 4, 5)
    deep = torch.randn(2, 6, 3, 4, 5)
    assert ChannelSE(3, 4, 2)(x).shape == x.shape
    assert SCSEBlock(3, 4)(x).shape == x.shape
    assert ECABlock(3)(x).shape == x.shape
    assert SCOATSpatialAttention(3, 4, 6)(x, deep).shape == deep.shape
    assert DAFBlock(3, 6, 4)(deep, torch.randn(2, 4, 6, 8, 10)).shape == (2, 4, 6, 8, 10)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="reduction"):
        ChannelSE(2, 8, reduction=9)
    with pytest.raises(ValueError, match="odd"):
        ECABlock(2, kernel_size=4)
