# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""nCoVSegNet: a ResNet-50 encoder with global context awareness and dual-attention fusion."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import nn

from custom.networks.attention import DAFBlock, DualAttention, ECABlock, GCABlock
from custom.networks.base import AttentionNetwork, conv_bn, require_sides

__all__ = ["ECAResNet50", "NCoVSegNet"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ECABottleneck(ResNetBottleneck):
    """MONAI's bottleneck with efficient channel attention between its last normalisation and the addition."""

    def __init__(self, in_planes: int, planes: int, spatial_dims: int = 2, **kwargs: Any) -> None:
        super().__init__(in_planes, planes, spatial_dims, **kwargs)
        self.eca = ECABlock(spatial_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        residual = x if self.downsample is None else self.downsample(x)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.act(self.eca(self.bn3(self.conv3(x))) + residual)


class ECAResNet50(ResNet):
    """MONAI's ResNet-50 without pooling and classifier, with ECA (k = 3) in all 16 bottlenecks.

    Its state_dict has torchvision's ``resnet50`` names and shapes, less ``fc.*`` and plus the 16
    ``*.eca.conv.weight``: ImageNet weights load by name.

    Args:
        in_channels: channels of the input.
        stride_in_conv1: put the stride of each down-sampling bottleneck into its first convolution (1x1), as
            ResNet's first version and hence weights converted from Keras, instead of its second (3x3).
    """

    def __init__(self, in_channels: int = 3, stride_in_conv1: bool = False) -> None:
        super().__init__(
            ECABottleneck,
            [3, 4, 6, 3],
            [64, 128, 256, 512],
            spatial_dims=2,
            n_input_channels=in_channels,
            conv1_t_stride=2,
            feed_forward=False,
            bias_downsample=False,
        )
        if stride_in_conv1:
            for layer in (self.layer2, self.layer3, self.layer4):
                block: Any = layer[0]
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        """(B, in_channels, H, W) -> four maps of 256, 512, 1024, 2048 channels at 1/4, 1/8, 1/16, 1/32."""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        quarter = self.layer1(x)
        eighth = self.layer2(quarter)
        sixteenth = self.layer3(eighth)
        return [quarter, eighth, sixteenth, self.layer4(sixteenth)]


class NCoVSegNet(AttentionNetwork):
    """Lung infection segmentation network with an ImageNet backbone, for transfer in two stages.

    The four backbone stages pass through a GCA block each, which halves their channels; from the deepest
    upwards DAF blocks fuse each with the next finer one (DAF 3 takes GCA 4 and GCA 3, DAF 2 takes DAF 3 and
    GCA 2, DAF 1 takes DAF 2 and GCA 1). 1x1 convolutions without bias turn DAF 1, 2, 3 and GCA 4 into logits,
    enlarged bilinearly (``align_corners=False``) to the size of the input; evaluation uses DAF 1 alone.

    Rows of the paper's ablation (table 5): A has ``gca``, ``daf`` and ``deep_supervision`` off, B has gca, C
    daf, D deep supervision, E gca and deep supervision, F daf and deep supervision, G gca and daf; H, with
    all, is the default. The paper does not say what stands in place of a block left out. Here a GCA block
    keeps only its shortcut, ReLU(BN(conv1x1)), and a DAF block only its sum, with both weights one.

    Full size has 168,169,968 parameters (0.67 GB), all of them in use: 23,508,080 in the backbone,
    107,839,744 in GCA, 36,820,224 in DAF and 1,920 in the heads. ``width`` narrows GCA and DAF for smaller
    machines; the backbone stays whole, so that ImageNet weights load.

    A training batch of one image works (see :class:`~custom.networks.attention.DAFBlock`) from 64 x 64 on; at
    32 x 32 the deepest map is a single value, which batch normalisation refuses.

    Args:
        spatial_dims: 2; no other value, the backbone's weights being those of a 2-D network.
        in_channels: channels of the backbone's input, 3 for ImageNet weights. An input of one channel (a CT
            slice) is replicated to them.
        out_channels: channels of the logits.
        width: factor on the widths of GCA and DAF, which are 128, 256, 512 and 1024 at 1.0.
        gca: global context awareness.
        daf: dual-attention fusion.
        deep_supervision: train a head on each of the four scales.
        imagenet_normalization: shift and scale the input, expected in [0, 1], by ImageNet's mean and
            standard deviation inside the network. Needs ``in_channels=3``.
        stride_in_conv1: where the backbone's bottlenecks have their stride, see :class:`ECAResNet50`.

    Raises:
        ValueError: for spatial_dims other than 2, a width of 0 or less, or normalisation without 3 channels.

    Reference:
        Liu et al., COVID-19 lung infection segmentation with a novel two-stage cross-domain transfer learning
        framework, Medical Image Analysis 74:102205, 2021, fig. 1, eqs. (1)-(4), table 5.
    """

    #: The spatial weights W_SA of the three DAF blocks, from coarse to fine; none without DAF.
    shown_attention_maps = ("daf_3", "daf_2", "daf_1")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        width: float = 1.0,
        gca: bool = True,
        daf: bool = True,
        deep_supervision: bool = True,
        imagenet_normalization: bool = True,
        stride_in_conv1: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims != 2:
            raise ValueError(f"NCoVSegNet is a 2-D network: spatial_dims must be 2, got {spatial_dims}.")
        if width <= 0:
            raise ValueError(f"width must be greater than 0, got {width}.")
        if imagenet_normalization and in_channels != 3:
            raise ValueError(
                f"imagenet_normalization needs in_channels=3, got {in_channels}; set it to False otherwise."
            )
        self.side_multiple = 32
        self.in_channels = in_channels
        self.deep_supervision = deep_supervision
        self.imagenet_normalization = imagenet_normalization
        # Constants, not weights: they are left out of checkpoints.
        self.register_buffer("imagenet_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("imagenet_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

        self.backbone = ECAResNet50(in_channels, stride_in_conv1)
        channels = [max(1, round(c * width)) for c in (128, 256, 512, 1024)]
        kernels: list[tuple[int, ...]] = [(3, 5, 7), (3, 5, 7), (3, 5, 7), (3, 5)]
        self.gca = nn.ModuleList(
            GCABlock(wide, narrow, k) if gca else conv_bn(2, wide, narrow, relu=True, bias=False)
            for wide, narrow, k in zip((256, 512, 1024, 2048), channels, kernels, strict=True)
        )
        # In the order in which they run: DAF 3, DAF 2, DAF 1.
        self.daf = nn.ModuleList(DAFBlock(2, channels[i + 1], channels[i], attention=daf) for i in (2, 1, 0))
        self.head = nn.Conv2d(channels[0], out_channels, kernel_size=1, bias=False)
        self.auxiliary_heads = nn.ModuleList(
            nn.Conv2d(c, out_channels, kernel_size=1, bias=False) for c in channels[1:] if deep_supervision
        )
        self._show_existing_maps()

    def attention_map_modules(self) -> dict[str, nn.Module]:
        """The spatial weights W_SA of the DAF blocks, ``daf_3``, ``daf_2`` and ``daf_1`` (1 = finest)."""
        gates = {f"daf_{len(self.daf) - i}": block.attention for i, block in enumerate(self.daf)}
        return {name: gate.map for name, gate in gates.items() if isinstance(gate, DualAttention)}

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            x: (B, in_channels, H, W) or (B, 1, H, W), in [0, 1]; H and W multiples of 32.

        Returns:
            Logits (B, out_channels, H, W). In training mode with deep supervision a list of four such maps,
            from the finest scale to the coarsest.

        Raises:
            ValueError: when a side is no multiple of 32 or the channels are neither 1 nor ``in_channels``.
        """
        require_sides(x, self.side_multiple, "NCoVSegNet")
        if x.shape[1] != 1 and x.shape[1] != self.in_channels:
            raise ValueError(f"NCoVSegNet takes 1 or {self.in_channels} channels, got {x.shape[1]}.")
        x = x.expand(-1, self.in_channels, -1, -1)
        if self.imagenet_normalization:
            x = (x - self.imagenet_mean) / self.imagenet_std  # type: ignore[operator]
        contexts: list[torch.Tensor] = []
        features = self.backbone(x)
        for index, block in enumerate(self.gca):
            contexts.append(block(features[index]))
        x = contexts.pop()
        fused = [x]
        for block in self.daf:
            x = block(x, contexts.pop())
            fused.append(x)
        outputs = [enlarge(self.head(x), 4)]
        if not (self.training and self.deep_supervision):
            return outputs[0]
        for index, head in enumerate(self.auxiliary_heads):
            outputs.append(enlarge(head(fused[-2 - index]), 8 << index))
        return outputs


def enlarge(logits: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear enlargement, (B, C, H, W) -> (B, C, factor * H, factor * W)."""
    return nn.functional.interpolate(logits, scale_factor=float(factor), mode="bilinear", align_corners=False)
