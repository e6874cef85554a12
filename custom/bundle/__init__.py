# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What ties bundles together: weights to start from, and training in stages."""

from custom.bundle.transfer import TransferPipeline
from custom.bundle.weights import prepare_network

__all__ = ["TransferPipeline", "prepare_network"]
