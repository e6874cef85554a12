# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What the networks share: a convolution unit, the check of an input's sides, reading attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks import eval_mode
from monai.networks.blocks import Convolution
from torch import nn

__all__ = ["AttentionNetwork", "conv_bn", "require_sides"]


def conv_bn(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = 1,
    relu: bool = False,
    bias: bool = True,
    **kwargs: Any,
) -> Convolution:
    """Convolution of "same" size, batch normalisation and, with ``relu``, a ReLU."""
    kwargs |= {"act": ("relu", {"inplace": True}) if relu else None, "norm": "batch", "bias": bias}
    return Convolution(spatial_dims, in_channels, out_channels, kernel_size=kernel_size, **kwargs)


class AttentionNetwork(nn.Module):
    """Base of networks that can show where they look.

    A network names the modules whose outputs are attention maps in ``attention_map_modules``; everything that
    draws maps uses only ``attention_maps`` and ``shown_attention_maps``, whichever network it has before it.

    Attributes:
        shown_attention_maps: names of the few maps worth showing first, from coarse to fine.
    """

    shown_attention_maps = tuple[str, ...]()  # no annotation, TorchScript cannot read one of this kind

    def _show_existing_maps(self) -> None:
        """Drop from ``shown_attention_maps`` what a smaller configuration does not have."""
        maps = self.attention_map_modules()
        self.shown_attention_maps = tuple(name for name in self.shown_attention_maps if name in maps)

    def attention_map_modules(self) -> dict[str, nn.Module]:
        """Name of every attention map with the module that outputs it, (B, 1, h, w[, d]) in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not name its attention maps")

    def attention_maps(self, x: torch.Tensor, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Attention maps of a batch, from one forward pass in evaluation mode and without gradients.

        Args:
            x: input of the network, (B, C, H, W[, D]).
            names: which maps; None for all.

        Returns:
            Name -> map (B, 1, h, w[, d]) in [0, 1], at the resolution at which the network computes it.

        Raises:
            ValueError: when a name is not one of the network's maps.
        """
        modules = self.attention_map_modules()
        wanted = list(modules) if names is None else list(names)
        if unknown := [name for name in wanted if name not in modules]:
            known = ", ".join(modules) or "none, it was built without attention"
            raise ValueError(
                f"unknown attention map {', '.join(unknown)}: this {type(self).__name__} has {known}."
            )
        maps: dict[str, torch.Tensor] = {}

        def keep(name: str):
            def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                maps[name] = output

            return hook

        handles = [modules[name].register_forward_hook(keep(name)) for name in wanted]
        try:
            with eval_mode(self):
                self(x)
        finally:
            for handle in handles:
                handle.remove()
        return {name: maps[name] for name in wanted}


def require_sides(x: torch.Tensor, multiple: int, network: str) -> None:
    """Refuse an input whose sides a network could not restore; it is never padded or stretched silently.

    Args:
        x: (B, C, H, W[, D]).
        multiple: what every side must be a multiple of.
        network: name for the message.

    Raises:
        ValueError: when a side is no multiple of ``multiple``.
    """
    sides = list(x.shape[2:])
    if any(side % multiple != 0 for side in sides):
        shown = " x ".join(str(side) for side in sides)
        raise ValueError(
            f"{network} got an input of {shown}: each side must be a multiple of {multiple}: pad or resize."
        )
