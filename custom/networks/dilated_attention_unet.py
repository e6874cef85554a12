# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Attention U-Net with dilated residual units of Zhou, Canu & Ruan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.blocks import Convolution
from monai.networks.layers.factories import Conv
from torch import nn

from custom.networks.attention import SCSEBlock
from custom.networks.base import AttentionNetwork, require_sides

__all__ = ["DilatedAttentionUNet", "DilatedResidualUnit"]

NORM = ("instance", {"affine": True})
ACT = ("leakyrelu", {"negative_slope": 0.01, "inplace": True})
UPSAMPLE_MODES = ("nearest", "bilinear")


class DilatedResidualUnit(nn.Module):
    """A 3x3 convolution followed by two dilated ones (rates 2 and 4) whose result is added to the first's.

    ::

        y = conv3x3(x);   out = y + conv3x3_dil4( conv3x3_dil2( y ) )

    Every convolution is followed by normalisation and activation; nothing follows the sum. At stride 1 the
    unit's receptive field is 1 + 2 (1 + 2 + 4) = 15, the 15 x 15 of the paper, which hence counts the leading
    convolution (the dilated ones alone would see 13 x 13).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        strides: of the leading convolution; 2 halves the sides.
        norm: MONAI's normalisation name and arguments; None for none.
        act: MONAI's activation name and arguments; None for none.

    Reference:
        Zhou, Canu & Ruan, IJIST 31(1):16-27, 2021, the res_dil block.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        strides: int = 1,
        norm: tuple | str | None = NORM,
        act: tuple | str | None = ACT,
    ) -> None:
        super().__init__()
        self.conv = Convolution(spatial_dims, in_channels, out_channels, strides=strides, norm=norm, act=act)
        self.dilated = nn.Sequential(
            Convolution(spatial_dims, out_channels, out_channels, dilation=2, norm=norm, act=act),
            Convolution(spatial_dims, out_channels, out_channels, dilation=4, norm=norm, act=act),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / strides, W / strides)."""
        x = self.conv(x)
        return x + self.dilated(x)


class EncoderLevel(nn.Module):
    """A unit, of stride 2 below the first level, and its attention."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: int,
        strides: int,
        attention: bool,
        norm: tuple | str | None,
        act: tuple | str | None,
    ) -> None:
        super().__init__()
        self.unit = DilatedResidualUnit(spatial_dims, in_channels, channels, strides, norm, act)
        self.attention = SCSEBlock(spatial_dims, channels) if attention else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.unit(x))


class DecoderLevel(nn.Module):
    """A 3x3 convolution that halves the enlarged map's channels; with the skip, a unit and its attention."""

    def __init__(
        self,
        spatial_dims: int,
        lower_channels: int,
        channels: int,
        attention: bool,
        norm: tuple | str | None,
        act: tuple | str | None,
    ) -> None:
        super().__init__()
        self.halve = Convolution(spatial_dims, lower_channels, channels, norm=norm, act=act)
        self.unit = DilatedResidualUnit(spatial_dims, 2 * channels, channels, norm=norm, act=act)
        self.attention = SCSEBlock(spatial_dims, channels) if attention else nn.Identity()

    def forward(self, enlarged: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.attention(self.unit(torch.cat([self.halve(enlarged), skip], 1)))


class DilatedAttentionUNet(AttentionNetwork):
    """U-Net of dilated residual units with spatial and channel attention (scSE) in encoder and decoder.

    Every encoder level is a :class:`DilatedResidualUnit`, of stride 2 below the first (no pooling), and its
    attention; the result is both the skip and the input of the next level. Every decoder level enlarges
    twofold, halves the channels, joins the skip and passes through a unit and its attention.

    Deep supervision is a property of the output, in training and evaluation alike: 1x1 convolutions turn the
    finest decoder levels into logits, each map is enlarged and added to the next finer one, and their sum is
    the result (one tensor, one loss). The paper gives no number of levels; three are those of the network it
    follows (Isensee et al., BraTS 2017).

    Not printed in the paper and chosen here: instance normalisation with scale and shift, convolutions with
    bias, LeakyReLU 0.01 after the normalisation, nearest-neighbour enlargement, no dropout.

    The defaults have 13,005,091 parameters, 12,567,395 without attention.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the logits.
        channels: width of each level, finest first; at least two levels.
        attention: False leaves the scSE modules out: the paper's baseline.
        deep_supervision_levels: how many decoder levels are summed to the logits, 1 to ``len(channels) - 1``.
        upsample: ``"nearest"`` or ``"bilinear"`` (trilinear where ``spatial_dims=3``).
        norm: MONAI's normalisation name and arguments.
        act: MONAI's activation name and arguments.

    Raises:
        ValueError: for spatial_dims, channels, deep_supervision_levels or upsample out of range.

    Reference:
        Zhou, Canu & Ruan, Automatic COVID-19 CT segmentation using U-Net integrated spatial and channel
        attention mechanism, IJIST 31(1):16-27, 2021 (arXiv 2004.06673), fig. 1, eqs. (4)-(7).
    """

    #: The spatial maps of the three finest decoder levels, from coarse to fine; those of them that exist.
    shown_attention_maps = ("decoder_3", "decoder_2", "decoder_1")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        attention: bool = True,
        deep_supervision_levels: int = 3,
        upsample: str = "nearest",
        norm: tuple | str = NORM,
        act: tuple | str = ACT,
    ) -> None:
        super().__init__()
        levels = len(channels)
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if levels < 2:
            raise ValueError(
                f"DilatedAttentionUNet needs at least two levels, got channels {tuple(channels)}."
            )
        if not 1 <= deep_supervision_levels < levels:
            raise ValueError(
                f"deep_supervision_levels must lie between 1 and {levels - 1}, the number of decoder levels, "
                f"got {deep_supervision_levels}."
            )
        if upsample not in UPSAMPLE_MODES:
            raise ValueError(
                f"unknown upsample {upsample!r}: DilatedAttentionUNet has {', '.join(UPSAMPLE_MODES)}."
            )
        self.channels = tuple(channels)
        self.side_multiple = 2 ** (levels - 1)

        widths = [in_channels, *channels]
        self.encoder = nn.ModuleList(
            EncoderLevel(spatial_dims, widths[i], widths[i + 1], 1 if i == 0 else 2, attention, norm, act)
            for i in range(levels)
        )
        if upsample == "bilinear" and spatial_dims == 3:
            upsample = "trilinear"
        self.up = nn.Upsample(scale_factor=2, mode=upsample)
        # Decoder levels and heads stand in the order in which they run, coarse to fine.
        self.decoder = nn.ModuleList(
            DecoderLevel(spatial_dims, channels[i + 1], channels[i], attention, norm, act)
            for i in reversed(range(levels - 1))
        )
        self.heads = nn.ModuleList(
            Conv[Conv.CONV, spatial_dims](channels[i], out_channels, kernel_size=1)
            for i in reversed(range(deep_supervision_levels))
        )
        self._show_existing_maps()

    def attention_map_modules(self) -> dict[str, nn.Module]:
        """Spatial scSE maps ``encoder_1`` to ``encoder_5`` and ``decoder_4`` to ``decoder_1``, 1 = finest."""
        gates = {f"encoder_{i + 1}": level.attention for i, level in enumerate(self.encoder)}
        gates |= {f"decoder_{len(self.decoder) - i}": level.attention for i, level in enumerate(self.decoder)}
        return {name: gate.map for name, gate in gates.items() if isinstance(gate, SCSEBlock)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, in_channels, H, W[, D]), every side a multiple of ``2 ** (levels - 1)``.

        Returns:
            Logits (B, out_channels, H, W[, D]).

        Raises:
            ValueError: when a side is no multiple of ``2 ** (levels - 1)``.
        """
        require_sides(x, self.side_multiple, "DilatedAttentionUNet")
        skips: list[torch.Tensor] = []
        for level in self.encoder:
            x = level(x)
            skips.append(x)
        x = skips.pop()
        decoded: list[torch.Tensor] = []
        for level in self.decoder:
            x = level(self.up(x), skips.pop())
            decoded.append(x)
        sums: list[torch.Tensor] = []
        for index, head in enumerate(self.heads):
            logits = head(decoded[index - len(self.heads)])
            sums.append(logits if index == 0 else self.up(sums[-1]) + logits)
        return sums[-1]
