# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What ties bundles together: weights and their settings, training in stages, cross-validation."""

from custom.bundle.cross_validation import CrossValidation
from custom.bundle.loading import WeightsLoader
from custom.bundle.settings import trained_with
from custom.bundle.study import read_study
from custom.bundle.transfer import TransferPipeline
from custom.bundle.weights import prepare_network

__all__ = [
    "CrossValidation",
    "TransferPipeline",
    "WeightsLoader",
    "prepare_network",
    "read_study",
    "trained_with",
]
