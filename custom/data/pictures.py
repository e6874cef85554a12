# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Single slices and masks as pictures of 8-bit grey values: reading them strictly, writing them whole."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from custom.data.files import atomic_path

__all__ = ["PICTURES", "list_pictures", "read_grey", "write_picture"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Suffixes of files that are taken for pictures."""


def list_pictures(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The pictures of a folder, which are known by their names without suffix.

    Args:
        folder: where they are; sub-folders and hidden files are left aside.

    Returns:
        Items ``image`` (a path) and ``name``, in the order in which people count.

    Raises:
        FileNotFoundError: When the folder does not exist or holds no picture.
        ValueError: When two have the same name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} not found; it should hold pictures of slices")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURES or path.name.startswith(".") or path.is_dir():
            continue
        if path.stem in found:
            raise ValueError(f"{found[path.stem]} and {path} have the same name, and so would their masks")
        found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"no picture ({', '.join(PICTURES)}) in {folder}")
    return [{"image": str(found[name]), "name": name} for name in sorted(found, key=_natural)]


def read_grey(path: str | os.PathLike) -> np.ndarray:
    """Read one picture of 8-bit grey values, in whatever way they are stored.

    Args:
        path: the picture; one of two colours, black and white, becomes 0 and 255.

    Returns:
        (H, W), uint8.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: In one line, when it is damaged, in colour, transparent, of more than 8 bits or several.
    """
    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            mode = picture.mode
            colours = np.asarray(picture.convert("RGB")) if mode in ("1", "L", "P", "RGB") else None
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file's bytes happen to mean
        raise ValueError(f"{path} cannot be read as a picture: {' '.join(str(error).split())}") from None
    if frames > 1:
        raise ValueError(f"{path} holds {frames} pictures; give one file for each")
    if colours is None:
        depth = "more than 8 bits" if mode[0] in "IF" else "transparency or other colours"
        raise ValueError(f"{path} is a picture of mode {mode} ({depth}); 8-bit grey values are needed")
    if (colours != colours[..., :1]).any():
        raise ValueError(f"{path} is a picture in colour; 8-bit grey values are needed")
    return np.ascontiguousarray(colours[..., 0])


def write_picture(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write a PNG file, atomically.

    Args:
        path: the file.
        pixels: uint8, (H, W) or (H, W, 3).
    """
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
