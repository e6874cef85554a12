# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Pictures and masks as text that an HTML file can hold."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from scipy import ndimage

__all__ = ["COLOURS", "QUALITIES", "data_uri", "decode_classes", "decode_image"]
__all__ += ["encode_image", "encode_outline", "encode_overlay"]

COLOURS = {"ground_glass": (255, 176, 32), "consolidation": (255, 56, 96), "lungs": (64, 196, 255)}

QUALITIES = (78, 60, 45, 30)
"""Of WebP, the best first: its differences to the original are below the noise of a CT."""

_FILL = 90  # alpha of a mask, whose edge is opaque


def encode_image(image: np.ndarray, quality: int = QUALITIES[0]) -> str:
    """A grey or RGB picture as WebP, base64.

    Args:
        image: (H, W) or (H, W, 3) uint8.
        quality: of WebP, to 100.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", quality=quality, method=2)
    return base64.b64encode(file.getvalue()).decode()


def encode_overlay(classes: np.ndarray) -> str | None:
    """The opacity mask as a transparent PNG in colour with an opaque edge, base64; None where it is empty.

    Args:
        classes: (H, W), 0 none, 1 ground-glass, 2 consolidation.
    """
    if not classes.any():
        return None
    edge = (classes > 0) & ~ndimage.binary_erosion(classes > 0, border_value=0)
    indices = np.where(edge, classes + 2, classes)
    colours = [COLOURS["ground_glass"], COLOURS["consolidation"]]
    return _encode_palette(indices, [*colours, *colours], [_FILL, _FILL, 255, 255])


def encode_outline(lungs: np.ndarray) -> str | None:
    """The lungs' outlines as a transparent PNG, base64; None where there is none.

    Args:
        lungs: (H, W), 0 none, 1 left, 2 right.
    """
    if not lungs.any():
        return None
    # The filled lungs are kept as well, invisible: the follow-up takes the masks from here.
    indices = lungs.astype(np.uint8)
    for side in (1, 2):
        inside = lungs == side
        indices[inside & ~ndimage.binary_erosion(inside, border_value=0)] = side + 2
    return _encode_palette(indices, [COLOURS["lungs"]] * 4, [0, 0, 210, 210])


def _encode_palette(indices: np.ndarray, colours: list[tuple[int, int, int]], alphas: list[int]) -> str:
    picture = Image.fromarray(indices.astype(np.uint8))
    picture.putpalette([0, 0, 0, *(value for colour in colours for value in colour)])
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=bytes([0, *alphas]), compress_level=6, bits=4)
    return base64.b64encode(file.getvalue()).decode()


def data_uri(encoded: str) -> str:
    """What a browser takes as the address of a picture.

    Args:
        encoded: from :func:`encode_image` or :func:`encode_overlay`.
    """
    kind = "png" if encoded.startswith("iVBOR") else "webp"
    return f"data:image/{kind};base64,{encoded}"


def decode_image(encoded: str | None, shape: tuple[int, int]) -> np.ndarray:
    """The grey values, or the palette's indices, of a picture.

    Args:
        encoded: from one of the functions here.
        shape: (H, W) of what None stands for.
    """
    if encoded is None:
        return np.zeros(shape, np.uint8)
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.asarray(picture if picture.mode in ("P", "L") else picture.convert("L"))


def decode_classes(encoded: str | None, shape: tuple[int, int]) -> np.ndarray:
    """The mask of an overlay or outline, whose edge has the mask's values plus two.

    Args:
        encoded: from :func:`encode_overlay` or :func:`encode_outline`.
        shape: (H, W) of what None stands for.
    """
    indices = decode_image(encoded, shape)
    return np.where(indices > 2, indices - 2, indices).astype(np.uint8)
