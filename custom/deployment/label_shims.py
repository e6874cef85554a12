# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What MONAI Label 0.8.5 needs in order to run with the libraries of today; for its own environment only.

The environment's every Python process imports this file at start, because training runs in a process of its
own. It costs nothing until one of the two libraries below is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_kept: list[Any] = []  # a torch library's schemas live as long as the object


def _declare_torchvision_operators() -> None:
    """torchvision's wheel for CUDA has no operators where torch has none of CUDA, and fails to import.

    It registers shapes for these two, which no one here calls, so declaring them is enough.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[attr-defined]
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    _kept.append(library)


def _name_storage_classes() -> None:
    """pydicom-seg imports a private module that pydicom 3 no longer has."""
    import pydicom.uid

    module: Any = ModuleType("pydicom._storage_sopclass_uids")
    module.SegmentationStorage = pydicom.uid.SegmentationStorage
    sys.modules[module.__name__] = module


class _BeforeImport(MetaPathFinder):
    """Runs a preparation right before a module is imported for the first time."""

    def __init__(self, **preparations: Any) -> None:
        self.preparations = preparations

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        prepare = self.preparations.pop(fullname, None)
        if prepare is not None:
            prepare()
        return None


def install(torchvision_operators: bool) -> None:
    """
    Args:
        torchvision_operators: whether torchvision cannot be imported without them; a wheel that fits torch
            declares them itself, and a second declaration would be an error.
    """
    preparations: dict[str, Any] = {"pydicom_seg": _name_storage_classes}
    if torchvision_operators:
        preparations["torchvision"] = _declare_torchvision_operators
    sys.meta_path.insert(0, _BeforeImport(**preparations))
