# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""SCOAT-Net: UNet++ with spatial and channel attention at its inner nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from custom.networks.attention import ChannelSE, SCOATSpatialAttention
from custom.networks.base import conv_bn
from custom.networks.unetplusplus import NestedUNet

__all__ = ["SCOATNet"]

VARIANTS = ("paper", "released")


class ResidualBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus a conv1x1-BN shortcut (also where the widths agree), then ReLU."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(spatial_dims, in_channels, out_channels, 3, relu=True)
        self.conv2 = conv_bn(spatial_dims, out_channels, out_channels, 3)
        self.shortcut = conv_bn(spatial_dims, in_channels, out_channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv2(self.conv1(x)) + self.shortcut(x))


class AttentionNode(nn.Module):
    """Node X(i, j), i, j >= 1: spatial attention on the deeper map, channel attention on the concatenation.

    ::

        x_c = [ x(i, 0), ..., x(i, j-1), x_s ]                    eq. (3)
        x   = H_R^2( x_V * x_c ) + H_R( x_c )                     eq. (6)

    H_R is conv1x1-BN-ReLU, H_R^2 is conv3x3-BN-ReLU-conv3x3-BN.
    """

    def __init__(
        self,
        spatial_dims: int,
        skips: int,
        channels: int,
        lower_channels: int,
        reduction: int,
        released: bool,
    ) -> None:
        super().__init__()
        width = skips * channels + lower_channels
        self.spatial = SCOATSpatialAttention(
            spatial_dims, channels, lower_channels, relu_before_sum=not released
        )
        self.channel = ChannelSE(spatial_dims, width, reduction)
        self.conv1 = conv_bn(spatial_dims, width, channels, 3, relu=True)
        self.conv2 = conv_bn(spatial_dims, channels, channels, 3)
        self.shortcut = conv_bn(spatial_dims, width, channels, relu=not released)
        self.act = nn.ReLU(inplace=True) if released else nn.Identity()
        self.released = released

    def forward(self, skips: list[torch.Tensor], lower: torch.Tensor) -> torch.Tensor:
        concatenated = torch.cat(skips + [self.spatial(skips[-1], lower)], 1)
        gated = self.channel(concatenated)
        residual = self.shortcut(gated if self.released else concatenated)
        return self.act(self.conv2(self.conv1(gated)) + residual)


class SCOATNet(NestedUNet):
    """Spatial- and channel-wise coarse-to-fine attention network for lung opacity segmentation.

    Nodes X(i, j) have depth i (0 = full resolution) and column j. Column 0 is the encoder: residual blocks
    with a 2x2 max pooling between them. Every other node takes all earlier maps of its depth and the deeper
    map of the previous column, enlarged bilinearly (``align_corners=True``, no convolution); nodes with
    i >= 1 carry a spatial and a channel attention module, the full-resolution row does not.

    Two variants, with the same parameters in number and name:

    - ``"paper"``, the equations as printed: a ReLU inside each H_R before the sum of eq. (1); in eq. (6) the
      shortcut takes the *un-gated* concatenation through conv1x1-BN-ReLU, and the sum is the output.
    - ``"released"``, what the authors' code computes: the sum of eq. (1) first, then one ReLU; the shortcut
      (conv1x1-BN) takes the *gated* concatenation, and a ReLU follows the sum.

    A checkpoint of one variant loads into the other but means something else there.

    The defaults have 10,208,723 parameters (10,209,363 with three input channels; deep supervision adds three
    heads, 867). Convolutions and linear layers start from Kaiming's normal distribution (fan-in), batch
    normalisation weights from N(1, 0.02), all biases from 0.

    Args:
        spatial_dims: 2, or 3 (trilinear enlargement).
        in_channels: channels of the input.
        out_channels: channels of the logits.
        channels: width of each level, finest first; at least two levels.
        reduction: reduction ratio of the channel attention.
        variant: ``"paper"`` or ``"released"``.
        deep_supervision: also train heads on the other full-resolution nodes. The paper computes its loss on
            the final output, hence False.

    Raises:
        ValueError: for an unknown variant, fewer than two levels or spatial_dims other than 2 and 3.

    Reference:
        Zhao et al., SCOAT-Net: A Novel Network for Segmenting COVID-19 Lung Opacification from CT Images,
        doi:10.1101/2020.09.23.20191726, fig. 1, eqs. (1)-(6).
    """

    #: The three maps the paper shows, from coarse to fine; with fewer levels, those of them that exist.
    shown_attention_maps = ("x1_1", "x2_2", "x1_3")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        reduction: int = 16,
        variant: str = "paper",
        deep_supervision: bool = False,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: SCOATNet has {', '.join(VARIANTS)}.")
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            channels,
            deep_supervision,
            block=partial(ResidualBlock, spatial_dims),
            inner_node=partial(
                AttentionNode, spatial_dims, reduction=reduction, released=variant == "released"
            ),
        )

    def attention_map_modules(self) -> dict[str, nn.Module]:
        """Spatial attention maps of all nodes X(i, j), i >= 1, j >= 1, named ``x{i}_{j}``."""
        maps: dict[str, nn.Module] = {}
        for name, module in self.columns.named_modules():
            if isinstance(module, AttentionNode):
                maps[name.split(".")[-1]] = module.spatial.map
        return maps
