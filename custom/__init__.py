# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Components that the lung opacity bundles name in their configs.

The sub-packages bear the names of MONAI's own: networks, losses, metrics, transforms, inferers, data,
handlers; reporting turns masks into numbers, pictures and DICOM objects.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = (
    "bundle",
    "console",
    "data",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "reporting",
    "transforms",
)


def __getattr__(name: str) -> Any:
    # A config says "$import custom" and then names custom.data and others; each is loaded when first used.
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
