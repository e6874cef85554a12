# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Which files belong to a bundle, and what they must hash to once it is packed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = [
    "MANIFEST",
    "REQUIRED",
    "REQUIRED_PACKED",
    "SETTINGS",
    "WEIGHTS",
    "is_part",
    "is_work",
    "walk",
]

MANIFEST = "manifest.json"
WEIGHTS = "models/model.pt"
SETTINGS = "models/model.json"  # that the weights were trained with
REQUIRED = (
    "LICENSE",
    "configs/evaluate.json",
    "configs/inference.json",
    "configs/logging.conf",
    "configs/metadata.json",
    "configs/train.json",
    "docs/README.md",
    "docs/data_license.txt",
)
REQUIRED_PACKED = ("README.md", "requirements.txt", MANIFEST, "custom/__init__.py")

# Nothing else is taken for a part of a bundle: a stray torch.py would run in place of torch, a JSON file
# elsewhere could be laid over a config, and MONAI Label loads the weights with the shortest name.
_PARTS = re.compile(
    r"LICENSE|configs/\w+\.json|configs/logging\.conf|docs/([\w-]+/)*[\w.-]+\.(md|txt|png|jpg)"
    r"|models/(model\.(pt|json)|LICENSE)",
    re.ASCII,
)
# Python would run a compiled file in place of the source that is hashed.
_PACKED_PARTS = re.compile(
    r"README\.md|requirements\.txt|manifest\.json|custom/(?!.*(__pycache__|\.pyc$))([\w-]+/)*[\w-]+\.\w+",
    re.ASCII,
)
_WORK = re.compile(
    r"(eval|output|cache|data|transfer)/.*|(.*/)?__pycache__/.*"
    r"|models/(checkpoint\w*\.pt|model_[0-9a-f]{8}\.pt|(?!model\.json)\w+\.json|\w+\.(onnx|ts))"
)


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files and links below a folder with their names in it, in a fixed order; links are not followed.

    Args:
        folder: the folder.
    """
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name) for name in (*files, *links)]
    named = ((path.relative_to(folder).as_posix(), path) for path in found)
    yield from sorted(named, key=lambda item: PurePosixPath(item[0]).parts)


def is_part(name: str, packed: bool) -> bool:
    """Whether a file belongs to a bundle.

    Args:
        name: path in the bundle, with slashes.
        packed: whether the bundle is packed and carries its code.
    """
    return bool(_PARTS.fullmatch(name) or (packed and _PACKED_PARTS.fullmatch(name)))


def is_work(name: str) -> bool:
    """Whether training, evaluation or inference left the file beside a bundle.

    Args:
        name: path in the bundle, with slashes.
    """
    return bool(_WORK.fullmatch(name))
