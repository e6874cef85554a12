# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Inferers: how a two-dimensional network goes through a scan, and which program runs it."""

from custom.inferers.backends import BACKENDS, BackendSliceInferer, NetworkBackend, export_onnx
from custom.inferers.precision import Bfloat16Inferer
from custom.inferers.slices import AxialSliceInferer

__all__ = [
    "BACKENDS",
    "AxialSliceInferer",
    "Bfloat16Inferer",
    "BackendSliceInferer",
    "NetworkBackend",
    "export_onnx",
]
