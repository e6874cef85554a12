# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Attention blocks of the three networks, each usable on its own.

========================  =============================================================================
block                     where it comes from
========================  =============================================================================
SCOATSpatialAttention     SCOAT-Net, eqs. (1)-(2)
ChannelSE                 SCOAT-Net, eqs. (4)-(5), reduction 16; and the channel half of scSE, reduction 2
SCSEBlock                 Zhou, Canu & Ruan, eqs. (4)-(7): concurrent spatial and channel SE
ECABlock                  efficient channel attention inside nCoVSegNet's backbone
GCABlock                  nCoVSegNet, eq. (1): global context awareness
DAFBlock                  nCoVSegNet, eqs. (2)-(4): dual-attention fusion
========================  =============================================================================

``AttentionNetwork`` is the base class of the networks: through it any of them can show its attention maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv, Norm, Pool
from torch import nn

from custom.networks.base import conv_bn

__all__ = [
    "ChannelSE",
    "DAFBlock",
    "ECABlock",
    "GCABlock",
    "SCOATSpatialAttention",
    "SCSEBlock",
]

# Twofold enlargement by a transposed convolution of kernel 4.
DECONVOLUTION: dict[str, Any] = {
    "kernel_size": 4,
    "strides": 2,
    "padding": 1,
    "output_padding": 0,
    "is_transposed": True,
}


class SCOATSpatialAttention(nn.Module):
    """Spatial attention of SCOAT-Net: which places of the deeper feature map matter.

    With ``same`` = x(i, j), the map of the same depth and previous column, and ``lower`` = Up(x(i+1, j))::

        m   = S( H_R(same) + H_R(lower) )         H_R: 1x1 conv, BN, ReLU         eq. (1)
        x_s = (1 + m) * lower                                                     eq. (2)

    where S is a 1x1 convolution to one channel, BN and a sigmoid. x_s has the channels of ``lower``: the
    paper prints those of ``same``, which no operation in eq. (2) could yield.

    Args:
        spatial_dims: 2 or 3.
        same_channels: channels of ``same``; also the width of the sum inside S.
        lower_channels: channels of ``lower``.
        relu_before_sum: True as eq. (1) is printed; False for ReLU(BN(conv) + BN(conv)), the attention gate's
            order, which the authors' code computes.

    Reference:
        Zhao et al., SCOAT-Net, doi:10.1101/2020.09.23.20191726, eqs. (1)-(2).
    """

    def __init__(
        self, spatial_dims: int, same_channels: int, lower_channels: int, relu_before_sum: bool = True
    ) -> None:
        super().__init__()
        self.same = conv_bn(spatial_dims, same_channels, same_channels, relu=relu_before_sum)
        self.lower = conv_bn(spatial_dims, lower_channels, same_channels, relu=relu_before_sum)
        self.act = nn.Identity() if relu_before_sum else nn.ReLU(inplace=True)
        self.map = nn.Sequential(conv_bn(spatial_dims, same_channels, 1), nn.Sigmoid())

    def forward(self, same: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        """(B, same_channels, H, W), (B, lower_channels, H, W) -> (B, lower_channels, H, W)."""
        return (1 + self.map(self.act(self.same(same) + self.lower(lower)))) * lower


class ChannelSE(nn.Module):
    """Channel attention: squeeze and excitation without biases (MONAI's ``ChannelSELayer`` always has them).

    ::

        x_V = sigmoid( W_2 ReLU( W_1 GAP(x) ) )        SCOAT-Net eqs. (4)-(5), Zhou et al. eqs. (4)-(5)
        out = x_V * x

    Args:
        spatial_dims: 2 or 3.
        channels: channels of x.
        reduction: W_1 has ``channels // reduction`` rows.

    Reference:
        Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507; Zhao et al., SCOAT-Net,
        doi:10.1101/2020.09.23.20191726, eqs. (4)-(5).
    """

    def __init__(self, spatial_dims: int, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(
                f"reduction must lie between 1 and the number of channels, {channels}; got {reduction}."
            )
        hidden = channels // reduction
        self.pool = Pool[Pool.ADAPTIVEAVG, spatial_dims](1)
        self.weight = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
            nn.Unflatten(1, (channels,) + (1,) * spatial_dims),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> the same shape."""
        return self.weight(self.pool(x)) * x


class SCSEBlock(nn.Module):
    """Concurrent spatial and channel squeeze and excitation, joined by a sum, without biases.

    ::

        Z_c = sigmoid( W_1 ReLU( W_2 GAP(Z) ) ) * Z        per channel           eqs. (4)-(5)
        Z_s = sigmoid( conv1x1(Z) ) * Z                    per place             eq. (6)
        Z_f = Z_c + Z_s                                                          eq. (7)

    Args:
        spatial_dims: 2 or 3.
        channels: channels of Z.
        reduction: W_2 has ``channels // reduction`` rows; 2 in the paper.

    Reference:
        Zhou, Canu & Ruan, IJIST 31(1):16-27, 2021, eqs. (4)-(7); Roy et al., arXiv 1803.02579.
    """

    def __init__(self, spatial_dims: int, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.channel = ChannelSE(spatial_dims, channels, reduction)
        conv = Conv[Conv.CONV, spatial_dims](channels, 1, kernel_size=1, bias=False)
        self.map = nn.Sequential(conv, nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> the same shape."""
        return self.channel(x) + self.map(x) * x


class ECABlock(nn.Module):
    """Efficient channel attention: each channel is weighed from its neighbours' means by a short convolution.

    ::

        out = sigmoid( Conv1d_k( GAP(x) ) ) * x            along the channel axis, no bias

    Args:
        spatial_dims: 2 or 3.
        kernel_size: k, odd; 3 throughout nCoVSegNet.

    Reference:
        Wang et al., ECA-Net, arXiv 1910.03151.
    """

    def __init__(self, spatial_dims: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size of ECABlock must be odd, got {kernel_size}.")
        self.spatial_dims = spatial_dims
        self.pool = Pool[Pool.ADAPTIVEAVG, spatial_dims](1)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same shape."""
        weight = torch.sigmoid(self.conv(self.pool(x).flatten(1).unsqueeze(1))).squeeze(1)
        for _ in range(self.spatial_dims):
            weight = weight.unsqueeze(-1)
        return weight * x


class GCABlock(nn.Module):
    """Global context awareness: parallel branches of growing reach, fused and added to a shortcut (2-D).

    ::

        f_1 = conv1x1                                                               C -> O
        f_k = conv1x1, conv1xk, convkx1, conv3x3 with dilation k                    C -> O
        out = ReLU( conv3x3 [ f_1, f_k ... ] + conv1x1(x) )                         eq. (1)

    Every convolution is without bias and followed by BN; only the sum has a ReLU.

    Args:
        in_channels: C.
        out_channels: O; C / 2 in the paper.
        kernel_sizes: the odd k of the long branches; (3, 5, 7), in the deepest of the four blocks (3, 5).

    Reference:
        Liu et al., COVID-19 lung infection segmentation with a novel two-stage cross-domain transfer learning
        framework, Medical Image Analysis 74:102205, 2021, eq. (1).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_sizes: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(2, in_channels, out_channels, bias=False)])
        for k in kernel_sizes:
            branch = nn.Sequential(
                conv_bn(2, in_channels, out_channels, bias=False),
                conv_bn(2, out_channels, out_channels, (1, k), bias=False),
                conv_bn(2, out_channels, out_channels, (k, 1), bias=False),
                conv_bn(2, out_channels, out_channels, 3, bias=False, dilation=k),
            )
            self.branches.append(branch)
        self.fuse = conv_bn(2, len(self.branches) * out_channels, out_channels, 3, bias=False)
        self.shortcut = conv_bn(2, in_channels, out_channels, bias=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        fused = self.fuse(torch.cat([branch(x) for branch in self.branches], 1))
        return self.act(fused + self.shortcut(x))


class ChannelMax(nn.Module):
    """(B, C, H, W) -> (B, 1, H, W), the greatest value over the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(1, keepdim=True)


class DualAttention(nn.Module):
    """The two weights of :class:`DAFBlock`, multiplied: W_SA (B, 1, 2H, 2W) times W_CA (B, C, 1, 1)."""

    def __init__(self, spatial_dims: int, high_channels: int, low_channels: int) -> None:
        super().__init__()
        enlarged = Convolution(
            spatial_dims, high_channels, high_channels, bias=False, conv_only=True, **DECONVOLUTION
        )
        self.map = nn.Sequential(enlarged, ChannelMax(), nn.Sigmoid())
        self.pool = Pool[Pool.ADAPTIVEAVG, spatial_dims](1)
        self.conv = Conv[Conv.CONV, spatial_dims](high_channels, low_channels, kernel_size=1, bias=False)
        self.norm = Norm[Norm.BATCH, spatial_dims](low_channels)

    def forward(self, high: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.pool(high))
        if self.training and x.shape[0] == 1:
            # One value per channel has no variance; see DAFBlock.
            x = nn.functional.batch_norm(
                x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, False
            )
        else:
            x = self.norm(x)
        return self.map(high) * torch.sigmoid(x)


class DAFBlock(nn.Module):
    """Dual-attention fusion: the deeper map says which channels and which places of the finer map to trust.

    With ``high`` the deeper and ``low`` the finer map::

        W_CA = sigmoid( BN( conv1x1( GAP(high) ) ) )                                eq. (2)
        W_SA = sigmoid( max over channels of deconv4x4/2(high) )                    eq. (3)
        out  = ReLU( W_SA * W_CA * BN(conv3x3(low)) + BN(deconv4x4/2(high)) )       eq. (4)

    The two transposed convolutions are different ones; none of the convolutions has a bias.

    The BN of W_CA (in the authors' code, not in eq. (2)) sees one value per image and channel, so a training
    batch of one image has no variance. Such a batch is normalised with the running statistics instead, as in
    evaluation, and leaves them as they are: batches of two and more behave as published, a last incomplete
    batch does not stop the training, the parameters stay the same, and training at batch size 1 throughout
    leaves the BN a plain scale and shift.

    Args:
        spatial_dims: 2 or 3.
        high_channels: channels of ``high``.
        low_channels: channels of ``low`` and of the output.
        attention: False sets both weights to one: fusion by addition, without the attention's parameters.

    Reference:
        Liu et al., Medical Image Analysis 74:102205, 2021, eqs. (2)-(4).
    """

    def __init__(
        self, spatial_dims: int, high_channels: int, low_channels: int, attention: bool = True
    ) -> None:
        super().__init__()
        self.low = conv_bn(spatial_dims, low_channels, low_channels, 3, bias=False)
        self.high = conv_bn(spatial_dims, high_channels, low_channels, bias=False, **DECONVOLUTION)
        self.attention = DualAttention(spatial_dims, high_channels, low_channels) if attention else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """(B, high_channels, H, W), (B, low_channels, 2H, 2W) -> (B, low_channels, 2H, 2W)."""
        low = self.low(low)
        if self.attention is not None:
            low = self.attention(high) * low
        return self.act(low + self.high(high))
