# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The three networks of the bundles, what they are compared with, and the blocks they are made of."""

from __future__ import annotations

from custom.networks.attention import (
    ChannelSE,
    DAFBlock,
    ECABlock,
    GCABlock,
    SCOATSpatialAttention,
    SCSEBlock,
)
from custom.networks.base import AttentionNetwork
from custom.networks.baselines import BaselineNetwork, SegmentationModel
from custom.networks.dilated_attention_unet import DilatedAttentionUNet, DilatedResidualUnit
from custom.networks.ncovsegnet import ECAResNet50, NCoVSegNet
from custom.networks.scoatnet import SCOATNet
from custom.networks.unetplusplus import UNetPlusPlus

__all__ = [
    "AttentionNetwork",
    "BaselineNetwork",
    "ChannelSE",
    "DAFBlock",
    "DilatedAttentionUNet",
    "DilatedResidualUnit",
    "ECABlock",
    "ECAResNet50",
    "GCABlock",
    "NCoVSegNet",
    "SCOATNet",
    "SCOATSpatialAttention",
    "SCSEBlock",
    "SegmentationModel",
    "UNetPlusPlus",
]
