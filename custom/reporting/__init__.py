# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""From masks to numbers, pictures and DICOM: knows arrays and geometry, no network and no engine."""

from custom.reporting.acquisition import check_acquisition
from custom.reporting.figures import draw_overview
from custom.reporting.quantify import measure_opacity
from custom.reporting.table import write_table

__all__ = ["check_acquisition", "draw_overview", "measure_opacity", "write_table"]
