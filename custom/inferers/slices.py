# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whole axial slices in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type
from tqdm import tqdm

from custom.console import bar_interval

__all__ = ["AxialSliceInferer"]


class AxialSliceInferer(Inferer):
    """Runs a 2-D network over a volume, whole slices in batches, without windows or stitching.

    The slices of all volumes of the batch are taken in turn, so the last batch alone may be smaller.
    A 2-D input passes through the same way. Every slice is seen alone, so in evaluation mode the
    result does not depend on the batch size.

    Args:
        batch_size: slices in one forward pass.
        flip: whether to run every slice mirrored from left to right too, and average the logits.
        progress: whether to show a bar over the slices of a volume.

    Raises:
        ValueError: When ``batch_size`` is below 1.
    """

    def __init__(self, batch_size: int = 8, flip: bool = False, progress: bool = False) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self.batch_size = batch_size
        self.flip = flip
        self.progress = progress

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: (B, C, H, W) or (B, C, H, W, D), the last axis being the slices and W running from
                right to left or left to right.
            network: maps (N, C, H, W) to (N, K, H, W); further arguments are passed on.

        Returns:
            (B, K, H, W) or (B, K, H, W, D) of the network's output type.

        Raises:
            ValueError: When ``inputs`` has another number of dimensions.
        """
        if inputs.ndim not in (4, 5):
            raise ValueError(f"(B, C, H, W) or (B, C, H, W, D) is needed, found shape {tuple(inputs.shape)}")
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        volumes = plain if plain.ndim == 5 else plain[..., None]
        n_volumes, _, _, _, depth = volumes.shape
        total = n_volumes * depth
        output: torch.Tensor | None = None
        bar = tqdm(
            total=total,
            desc="slices",
            unit="slice",
            leave=False,
            dynamic_ncols=True,
            mininterval=bar_interval(),
            disable=not self.progress or total == 1,
        )
        with bar:
            for start in range(0, total, self.batch_size):
                places = [divmod(i, depth) for i in range(start, min(start + self.batch_size, total))]
                batch = torch.stack([volumes[b, ..., d] for b, d in places])
                result = network(batch, *args, **kwargs)
                if self.flip:
                    mirrored = network(batch.flip(-1), *args, **kwargs)
                    result = (result + mirrored.flip(-1)) / 2
                if output is None:
                    shape = (n_volumes, *result.shape[1:], depth)
                    output = torch.empty(shape, dtype=result.dtype, device=result.device)
                for row, (b, d) in zip(result, places, strict=True):
                    output[b, ..., d] = row
                bar.update(len(places))
        if output is None:
            raise ValueError(f"the volume has no slices, its shape is {tuple(inputs.shape)}")
        if inputs.ndim == 4:
            output = output[..., 0]
        return convert_to_dst_type(output, inputs, dtype=output.dtype, device=output.device)[0]
