# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Transforms that the bundles need and MONAI does not have."""

from custom.transforms.checks import CheckSameGridD, CheckSameGridd, CheckSameGridDict
from custom.transforms.greys import MatchGreysD, MatchGreysd, MatchGreysDict
from custom.transforms.hounsfield import ValidateHU, ValidateHUD, ValidateHUd, ValidateHUDict
from custom.transforms.intensity import NormalizeSlicesD, NormalizeSlicesd, NormalizeSlicesDict
from custom.transforms.invert import InvertToMaskD, InvertToMaskd, InvertToMaskDict
from custom.transforms.load import LoadCTD, LoadCTd, LoadCTDict
from custom.transforms.lung import (
    CropLungD,
    CropLungd,
    CropLungDict,
    LungMaskD,
    LungMaskd,
    LungMaskDict,
    NoLungError,
)
from custom.transforms.lung_extraction import extract_lungs
from custom.transforms.lung_regions import KeepLungRegionsD, KeepLungRegionsd, KeepLungRegionsDict
from custom.transforms.pictures import LoadPictureD, LoadPictured, LoadPictureDict

__all__ = [
    "CheckSameGridD",
    "CheckSameGridDict",
    "CheckSameGridd",
    "CropLungD",
    "CropLungDict",
    "CropLungd",
    "InvertToMaskD",
    "InvertToMaskDict",
    "InvertToMaskd",
    "KeepLungRegionsD",
    "KeepLungRegionsDict",
    "KeepLungRegionsd",
    "LoadCTD",
    "LoadCTDict",
    "LoadCTd",
    "LoadPictureD",
    "LoadPictureDict",
    "LoadPictured",
    "LungMaskD",
    "LungMaskDict",
    "LungMaskd",
    "MatchGreysD",
    "MatchGreysDict",
    "MatchGreysd",
    "NoLungError",
    "NormalizeSlicesD",
    "NormalizeSlicesDict",
    "NormalizeSlicesd",
    "ValidateHU",
    "ValidateHUD",
    "ValidateHUDict",
    "ValidateHUd",
    "extract_lungs",
]
