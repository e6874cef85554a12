# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Inferers: how a two-dimensional network goes through a scan."""

from custom.inferers.slices import AxialSliceInferer

__all__ = ["AxialSliceInferer"]
