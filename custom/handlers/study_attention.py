# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The attention maps of a study, on the slice that its picture shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from custom.reporting.figures import AttentionView

__all__ = ["view_attention"]


def view_attention(
    network: torch.nn.Module, image: Any, voxel: tuple[int, ...], affine: np.ndarray
) -> AttentionView | None:
    """Run the network on one slice more and take its maps.

    Args:
        network: one of :mod:`custom.networks`; None comes of one without ``attention_maps``.
        image: what the network saw, (C, H, W) or (C, H, W, D), with an ``affine`` where it is a volume.
        voxel: of the scan, in the slice that is shown.
        affine: 4x4 from the scan's indices to mm in RAS+.
    """
    maps_of = getattr(network, "attention_maps", None)
    if maps_of is None:
        return None
    seen = image.as_tensor() if hasattr(image, "as_tensor") else image
    if seen.ndim == 4:
        # From the scan's voxel through patient space to the slice of the network's own grid.
        point = affine @ [*voxel, 1.0]
        depth = round(float((np.linalg.inv(np.asarray(image.affine, dtype=float)) @ point)[2]))
        # A copy: a view would keep the whole scan, as the network saw it, until the picture is drawn.
        seen = seen[..., min(max(depth, 0), seen.shape[-1] - 1)].clone()
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    with torch.no_grad():
        maps = maps_of(seen[None].to(device), getattr(network, "shown_attention_maps", None))
    network.train(training)
    spacing = np.linalg.norm(np.asarray(getattr(image, "affine", np.eye(4)), dtype=float)[:3, :2], axis=0)
    return AttentionView(
        seen[0].cpu().numpy(),
        {key: value[0, 0].float().cpu().numpy() for key, value in maps.items()},
        aspect=float(spacing[1] * seen.shape[2] / (spacing[0] * seen.shape[1])),
    )
