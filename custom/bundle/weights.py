# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Weights that a training starts from."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from custom.data.files import write_json
from custom.networks.imagenet import load_imagenet_resnet50

__all__ = ["prepare_network"]

logger = logging.getLogger(__name__)


def prepare_network(
    network: torch.nn.Module,
    pretrained: str | os.PathLike | None = None,
    imagenet: str | None = None,
    imagenet_sha256: str | None = None,
    imagenet_partial: bool = False,
    imagenet_report: str | os.PathLike | None = None,
) -> torch.nn.Module:
    """Give a network the weights it starts from: those of an earlier stage, or ImageNet's in its backbone.

    Args:
        network: the network; for ImageNet it must have a ``backbone``.
        pretrained: ``state_dict`` of the same network from an earlier stage; every key must fit. It
            contains all that ImageNet gave, so ``imagenet`` is not looked at then.
        imagenet: file or URL of ResNet-50 weights in torchvision's format.
        imagenet_sha256: the file's hash; a URL needs it.
        imagenet_partial: whether weights may be missing.
        imagenet_report: JSON file for the account of what was loaded.

    Returns:
        The network.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When weights do not fit.
    """
    if pretrained is not None:
        _load_stage(network, pretrained)
    elif imagenet is not None:
        backbone: Any = getattr(network, "backbone", None)
        if backbone is None:
            raise ValueError(f"{type(network).__name__} has no backbone for ImageNet weights; leave them out")
        report = load_imagenet_resnet50(backbone, imagenet, sha256=imagenet_sha256, partial=imagenet_partial)
        logger.info(report.summary())
        if imagenet_report is not None:
            write_json(imagenet_report, report.to_dict())
    return network


def _load_stage(network: torch.nn.Module, path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found; it should hold the weights of the earlier stage")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a file that is none, or holds something else, can raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} does not hold weights of this {type(network).__name__}: {reason}"
        ) from error
    logger.info(f"starting from {path}")
