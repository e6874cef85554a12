# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Losses that MONAI does not have: focal Tversky and structure loss."""

from __future__ import annotations

from custom.losses.focal_tversky import FocalTverskyLoss
from custom.losses.structure import StructureLoss

__all__ = ["FocalTverskyLoss", "StructureLoss"]
