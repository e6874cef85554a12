# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""UNet++, plain and with attention gates: what SCOAT-Net is compared with in its paper's Table III."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from monai.networks.layers.factories import Conv, Pool
from monai.networks.nets.attentionunet import AttentionBlock
from torch import nn

from custom.networks.base import AttentionNetwork, conv_bn, require_sides

__all__ = ["NestedUNet", "UNetPlusPlus"]


class VGGBlock(nn.Sequential):
    """conv3x3-BN-ReLU twice."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__(
            conv_bn(spatial_dims, in_channels, out_channels, 3, relu=True),
            conv_bn(spatial_dims, out_channels, out_channels, 3, relu=True),
        )


class PlainNode(nn.Module):
    """Node X(i, j) of UNet++: a block over the concatenation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, skips: list[torch.Tensor], lower: torch.Tensor) -> torch.Tensor:
        return self.block(torch.cat(skips + [lower], 1))


class GatedNode(nn.Module):
    """Node X(i, j), i, j >= 1, with an attention gate.

    With x = x(i, j-1), g = Up(x(i+1, j-1)) and W_x, W_g, psi 1x1 convolutions, each with BN::

        m      = sigmoid( psi( ReLU( W_g g + W_x x ) ) )
        x(i,j) = block [ x(i, 0), ..., x(i, j-2), m * x, g ]

    The inner width of the gate is that of g. Only the map that the gate sees is gated; the older ones of its
    row pass as they are.
    """

    def __init__(self, spatial_dims: int, skips: int, channels: int, lower_channels: int) -> None:
        super().__init__()
        self.gate = AttentionBlock(spatial_dims, f_int=lower_channels, f_g=lower_channels, f_l=channels)
        self.block = VGGBlock(spatial_dims, skips * channels + lower_channels, channels)

    def forward(self, skips: list[torch.Tensor], lower: torch.Tensor) -> torch.Tensor:
        return self.block(torch.cat(skips[:-1] + [self.gate(lower, skips[-1]), lower], 1))


class NestedUNet(AttentionNetwork):
    """The graph of UNet++'s nodes; a subclass says what the nodes are.

    Nodes X(i, j) have depth i (0 = full resolution) and column j. Column 0 is the encoder, with a 2x2 max
    pooling between its blocks. Every other node takes all earlier maps of its depth and the deeper map of the
    previous column, enlarged bilinearly (``align_corners=True``, no convolution). Heads are 3x3 convolutions.

    Convolutions and linear layers start from Kaiming's normal distribution (fan-in), batch normalisation
    weights from N(1, 0.02), all biases from 0.

    Args:
        spatial_dims: 2, or 3 (trilinear enlargement).
        in_channels: channels of the input.
        out_channels: channels of the logits.
        channels: width of each level, finest first; at least two levels.
        deep_supervision: also train heads on the other full-resolution nodes.
        block: makes a block from its number of input and output channels.
        inner_node: makes a node X(i, j), i >= 1, from j, the width of its level and of the deeper one; None
            for the plain node that the full-resolution row has.

    Raises:
        ValueError: for fewer than two levels or spatial_dims other than 2 and 3.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        deep_supervision: bool,
        block: Callable[[int, int], nn.Module],
        inner_node: Callable[[int, int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        levels = len(channels)
        self.name = type(self).__name__
        if levels < 2:
            raise ValueError(f"{self.name} needs at least two levels, got channels {tuple(channels)}.")
        self.channels = tuple(channels)
        self.deep_supervision = deep_supervision
        self.side_multiple = 2 ** (levels - 1)

        def plain_node(skips: int, width: int, lower_width: int) -> nn.Module:
            return PlainNode(block(skips * width + lower_width, width))

        widths = [in_channels, *channels]
        self.encoder = nn.ModuleList(block(widths[i], widths[i + 1]) for i in range(levels))
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.up = nn.Upsample(scale_factor=2, mode=mode, align_corners=True)
        self.columns = nn.ModuleList()
        for j in range(1, levels):
            column = nn.ModuleDict()
            for i in range(levels - j):
                make = plain_node if i == 0 or inner_node is None else inner_node
                column[f"x{i}_{j}"] = make(j, channels[i], channels[i + 1])
            self.columns.append(column)

        conv = Conv[Conv.CONV, spatial_dims]
        self.head = conv(channels[0], out_channels, kernel_size=3, padding=1)
        self.auxiliary_heads = nn.ModuleList(
            conv(channels[0], out_channels, kernel_size=3, padding=1)
            for _ in range(levels - 2 if deep_supervision else 0)
        )
        self._show_existing_maps()
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")
            elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                nn.init.normal_(module.weight, 1.0, 0.02)
            else:
                continue
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            x: (B, in_channels, H, W[, D]), every side a multiple of ``2 ** (levels - 1)``.

        Returns:
            Logits (B, out_channels, H, W[, D]) of the last node, X(0, 4). In training mode with deep
            supervision a list of such maps, finest first: X(0, 4), X(0, 3), X(0, 2), X(0, 1).

        Raises:
            ValueError: when a side is no multiple of ``2 ** (levels - 1)``.
        """
        require_sides(x, self.side_multiple, self.name)
        rows: list[list[torch.Tensor]] = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            rows.append([x])
        for column in self.columns:
            # Going down a column, the last map of row i + 1 is still that of the previous column.
            for level, node in enumerate(column.values()):  # type: ignore[operator]
                rows[level].append(node(rows[level], self.up(rows[level + 1][-1])))
        logits = self.head(rows[0][-1])
        if not (self.training and self.deep_supervision):
            return logits
        outputs = [logits]
        for index, head in enumerate(self.auxiliary_heads):
            outputs.append(head(rows[0][-2 - index]))
        return outputs


class UNetPlusPlus(NestedUNet):
    """UNet++ of VGG blocks (conv3x3-BN-ReLU twice), the network SCOAT-Net is built on.

    Without ``attention_gates`` the row "UNet++" of the paper's Table III, 9,163,009 parameters (9,163,585
    with three input channels; deep supervision adds three heads, 867). With them the row "AttentionV2",
    9,836,435 parameters (9,837,011): the gates of Attention U-Net at the six nodes X(i, j), i, j >= 1, where
    SCOAT-Net has its modules. The paper does not draw these networks; the sizes it prints for them fit.

    Args:
        spatial_dims: 2, or 3 (trilinear enlargement).
        in_channels: channels of the input.
        out_channels: channels of the logits.
        channels: width of each level, finest first; at least two levels.
        attention_gates: whether the nodes below full resolution have attention gates.
        deep_supervision: also train heads on the other full-resolution nodes.

    Raises:
        ValueError: for fewer than two levels or spatial_dims other than 2 and 3.

    Reference:
        Zhou et al., UNet++, arXiv 1807.10165; Oktay et al., Attention U-Net, arXiv 1804.03999;
        Zhao et al., SCOAT-Net, doi:10.1101/2020.09.23.20191726, Table III.
    """

    #: The gates at the nodes whose maps SCOAT-Net's paper shows, so that the two can be compared.
    shown_attention_maps = ("x1_1", "x2_2", "x1_3")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        attention_gates: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            channels,
            deep_supervision,
            block=partial(VGGBlock, spatial_dims),
            inner_node=partial(GatedNode, spatial_dims) if attention_gates else None,
        )

    def attention_map_modules(self) -> dict[str, nn.Module]:
        """Gates of all nodes X(i, j), i >= 1, j >= 1, named ``x{i}_{j}``; without gates none."""
        maps: dict[str, nn.Module] = {}
        for name, module in self.columns.named_modules():
            if isinstance(module, GatedNode):
                maps[name.split(".")[-1]] = module.gate.psi
        return maps
