# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""From masks to numbers and pictures: knows arrays and geometry, no network and no engine."""

from custom.reporting.figures import draw_overview
from custom.reporting.quantify import measure_opacity

__all__ = ["draw_overview", "measure_opacity"]
