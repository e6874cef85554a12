# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Networks of other libraries in the place of ours, for comparisons with the same data, loss and schedule."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from monai.networks.nets import BasicUNetPlusPlus
from torch import nn

from custom.networks.base import require_sides

__all__ = ["BaselineNetwork", "SegmentationModel"]

LIBRARY = "segmentation_models_pytorch"
COARSER_HEADS = ("final_conv_0_1", "final_conv_0_2", "final_conv_0_3")


class BaselineNetwork(nn.Module):
    """Lets a library's network behave as ours do: sides are checked, and evaluation gives one map of logits.

    MONAI's BasicUNet and BasicUNetPlusPlus pad sides that do not fit, its AttentionUnet fails inside; here
    all of them refuse such sides. BasicUNetPlusPlus always returns a list, coarsest first: the finest map is
    taken. The names in the ``state_dict`` are the network's with ``network.`` before them.

    Args:
        network: maps (B, C, H, W) to logits of the same sides, or to a list of such maps, finest last.
        side_multiple: what every side must be a multiple of: 16 fits four halvings.
        deep_supervision: in training mode return all maps. BasicUNetPlusPlus is the only one that can;
            without it, the heads of its coarser maps, which no loss would reach, are left out.

    Raises:
        ValueError: for deep supervision of a network that has none.
    """

    def __init__(self, network: nn.Module, side_multiple: int = 16, deep_supervision: bool = False) -> None:
        super().__init__()
        self.name = type(network).__name__
        self.network = network
        self.side_multiple = side_multiple
        self.deep_supervision = deep_supervision
        if isinstance(network, BasicUNetPlusPlus):
            network.deep_supervision = deep_supervision
            if not deep_supervision:
                # Parameters without a gradient stop distributed training.
                for head in COARSER_HEADS:
                    setattr(network, head, nn.Identity())
        elif deep_supervision:
            raise ValueError(f"{self.name} has no deep supervision: leave deep_supervision false.")

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Args:
            x: (B, C, H, W[, D]), every side a multiple of ``side_multiple``.

        Returns:
            Logits (B, out_channels, H, W[, D]). In training mode with deep supervision a list of such maps,
            finest first.

        Raises:
            ValueError: when a side is no multiple of ``side_multiple``.
        """
        require_sides(x, self.side_multiple, self.name)
        outputs = self.network(x)
        if isinstance(outputs, list):
            if self.training and self.deep_supervision:
                return outputs[::-1]
            return outputs[-1]
        return outputs


class SegmentationModel(nn.Module):
    """A network of segmentation-models-pytorch, such as DeepLabV3Plus or PSPNet (2-D).

    The library is an optional extra and imported only here. It needs torchvision, whose usual wheel is built
    for CUDA and cannot be imported beside a CPU-only torch, so the tests that run these networks are skipped
    there: where the import fails, this class is untested.

    Args:
        architecture: the library's class, e.g. ``"DeepLabV3Plus"`` or ``"PSPNet"``.
        encoder: the library's name of the encoder.
        encoder_weights: the library's name of pretrained weights, which it downloads; None for random ones.
        in_channels: channels of the input.
        out_channels: channels of the logits.

    Raises:
        ValueError: when the library cannot be imported or does not have the architecture.

    Reference:
        Chen et al., DeepLabv3+, arXiv 1802.02611; Zhao et al., Pyramid Scene Parsing Network,
        arXiv 1612.01105; https://github.com/qubvel-org/segmentation_models.pytorch.
    """

    def __init__(
        self,
        architecture: str,
        encoder: str = "resnet50",
        encoder_weights: str | None = None,
        in_channels: int = 1,
        out_channels: int = 1,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        build = getattr(_import_library(architecture), architecture, None)
        if not isinstance(build, type):
            raise ValueError(f"segmentation-models-pytorch has no architecture {architecture!r}.")
        self.model: nn.Module = build(
            encoder_name=encoder,
            encoder_weights=encoder_weights,
            in_channels=in_channels,
            classes=out_channels,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (B, in_channels, H, W).

        Returns:
            Logits (B, out_channels, H, W).

        Raises:
            ValueError: in training mode, for a batch of one where the architecture cannot take it.
        """
        try:
            return self.model(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            # The global pooling of DeepLab normalises one value per image and channel over the batch.
            raise ValueError(
                f"{self.architecture} cannot be trained on a batch of one slice, as an epoch's last can be: "
                "add --train::dataloader::drop_last true, with a batch_size of at least 2."
            ) from None


def _import_library(architecture: str) -> Any:
    try:
        return importlib.import_module(LIBRARY)
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{architecture} needs segmentation-models-pytorch, which cannot be imported ({reason}): "
            "pip install 'covid-ct-bundles[baselines]', with a torchvision built for the installed torch."
        ) from None
