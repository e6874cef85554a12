# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Transforms that the bundles need and MONAI does not have."""

from custom.transforms.checks import CheckSameGridD, CheckSameGridd, CheckSameGridDict
from custom.transforms.hounsfield import ValidateHU, ValidateHUD, ValidateHUd, ValidateHUDict
from custom.transforms.load import LoadCTD, LoadCTd, LoadCTDict

__all__ = [
    "CheckSameGridD",
    "CheckSameGridDict",
    "CheckSameGridd",
    "LoadCTD",
    "LoadCTDict",
    "LoadCTd",
    "ValidateHU",
    "ValidateHUD",
    "ValidateHUDict",
    "ValidateHUd",
]
