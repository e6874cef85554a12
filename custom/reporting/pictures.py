# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A study's slices and masks, reduced so that hundreds of them fit into one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from custom.reporting.figures import AXES, LUNG_WINDOW
from custom.reporting.levels import LungLevels
from custom.reporting.picture_codes import (
    QUALITIES,
    decode_classes,
    decode_image,
    encode_image,
    encode_outline,
    encode_overlay,
)
from custom.reporting.quantify import CONSOLIDATION_FROM_HU, LUNGS

__all__ = ["MARGIN_MM", "Plane", "StudyPictures", "take_pictures"]

MAX_SIDE = 448
"""Pixels of a slice's longer side: on this grid 300 slices take less than 15 MB."""

MAX_SLICES = 320
"""Of a study with more slices every second (third, ...) one is shown."""

MAX_LETTERS = 10_000_000
"""Of all slices' grey pictures together; noisy scans, which compress badly, are compressed more."""

MARGIN_MM = 20.0
"""What is shown around lungs and opacity."""

_FORMAT = 1


@dataclass(frozen=True)
class Plane:
    """One picture: grey values and classes of the same shape, and its true size.

    Args:
        image: (H, W) uint8 in the lung window.
        opacity: (H, W), 0 none, 1 ground-glass, 2 consolidation.
        lungs: (H, W), 0 none, 1 left, 2 right.
        width_mm: true width.
        height_mm: true height.
        letters: where left, right, top and bottom of the picture lie in the patient.
    """

    image: np.ndarray
    opacity: np.ndarray
    lungs: np.ndarray
    width_mm: float
    height_mm: float
    letters: tuple[str, str, str, str]


@dataclass(frozen=True)
class StudyPictures:
    """What a page shows of a scan: rows to posterior, columns to the patient's left, slices to superior.

    Args:
        image: (H, W, S) uint8 in the lung window.
        opacity: (H, W, S), 0 none, 1 ground-glass, 2 consolidation.
        lungs: (H, W, S), 0 none, 1 left, 2 right.
        pixel_mm: width and height of a pixel.
        slice_mm: distance between the scan's slices.
        slices: for each of the S its number in the scan, from 0, from below.
        total: number of slices of the scan.
        levels: volumes on all slices of the scan, from the masks as they are, not as they are shown.
    """

    image: np.ndarray
    opacity: np.ndarray
    lungs: np.ndarray
    pixel_mm: float
    slice_mm: float
    slices: tuple[int, ...]
    total: int
    levels: LungLevels

    def axial(self, number: int) -> Plane:
        """A slice.

        Args:
            number: its place among the slices that are kept.
        """
        rows, columns = self.image.shape[:2]
        image, opacity, lungs = (volume[..., number] for volume in (self.image, self.opacity, self.lungs))
        size = (columns * self.pixel_mm, rows * self.pixel_mm)
        return Plane(image, opacity, lungs, *size, letters=("R", "L", "A", "P"))

    def coronal(self, row: int) -> Plane:
        """A plane from right to left.

        Args:
            row: 0 is the front of what is kept.
        """
        return self._upright(row, 0, ("R", "L", "H", "F"))

    def sagittal(self, column: int) -> Plane:
        """A plane from front to back.

        Args:
            column: 0 is the right side of what is kept.
        """
        return self._upright(column, 1, ("A", "P", "H", "F"))

    def _upright(self, at: int, axis: int, letters: tuple[str, str, str, str]) -> Plane:
        image, opacity, lungs = (
            np.take(volume, at, axis=axis).T[::-1] for volume in (self.image, self.opacity, self.lungs)
        )
        height_mm = image.shape[0] * self._kept_mm
        size = (image.shape[1], max(round(height_mm / self.pixel_mm), 1))
        smooth = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        opacity, lungs = (
            np.asarray(Image.fromarray(np.ascontiguousarray(mask)).resize(size, Image.Resampling.NEAREST))
            for mask in (opacity, lungs)
        )
        return Plane(smooth, opacity, lungs, image.shape[1] * self.pixel_mm, height_mm, letters)

    @property
    def _kept_mm(self) -> float:
        step = self.slices[1] - self.slices[0] if len(self.slices) > 1 else 1
        return step * self.slice_mm

    @property
    def busiest(self) -> int:
        """The kept slice, by its number in the scan, with most opacity; that in the lungs goes first."""
        ml = self.levels.opacity_ml
        for amount in (ml["left"] + ml["right"], ml["outside_lungs"]):
            kept = [float(amount[k]) for k in self.slices]
            if any(kept):
                return self.slices[int(np.argmax(kept))]
        return self.slices[len(self.slices) // 2]

    def nearest(self, height_mm: float) -> int:
        """Which kept slice lies nearest to a height above the scan's lower edge."""
        heights = (np.array(self.slices) + 0.5) * self.slice_mm
        return int(np.abs(heights - height_mm).argmin())

    def to_json(self) -> dict[str, Any]:
        """Plain values for the page: pictures as base64, slices from the head down."""
        quality = self._quality()
        return {
            "format": _FORMAT,
            "pixel_mm": self.pixel_mm,
            "slice_mm": self.slice_mm,
            "rows": self.image.shape[0],
            "columns": self.image.shape[1],
            "total": self.total,
            "start": self.busiest + 1,
            "slices": [
                {
                    "number": self.slices[n] + 1,
                    "image": encode_image(self.image[..., n], quality),
                    "opacity": encode_overlay(self.opacity[..., n]),
                    "lungs": encode_outline(self.lungs[..., n]),
                }
                for n in reversed(range(len(self.slices)))
            ],
            "levels": self.levels.to_json(),
        }

    def _quality(self) -> int:
        """The best quality with which all slices are not too large, judged by some of them."""
        some = range(0, len(self.slices), max(len(self.slices) // 8, 1))
        for quality in QUALITIES:
            mean = sum(len(encode_image(self.image[..., n], quality)) for n in some) / len(some)
            if mean * len(self.slices) <= MAX_LETTERS:
                break
        return quality

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> StudyPictures:
        """Take back what :meth:`to_json` gave; the lungs' outlines become masks again.

        Raises:
            ValueError: When the content is of another format.
        """
        if content.get("format") != _FORMAT:
            raise ValueError(f"pictures of format {content.get('format')}, not {_FORMAT}: make the page anew")
        items = content["slices"][::-1]
        shape = (int(content["rows"]), int(content["columns"]))
        image = np.stack([decode_image(item["image"], shape) for item in items], axis=-1)
        opacity = np.stack([decode_classes(item["opacity"], shape) for item in items], axis=-1)
        lungs = np.stack([decode_classes(item["lungs"], shape) for item in items], axis=-1)
        return cls(
            image,
            opacity,
            lungs,
            float(content["pixel_mm"]),
            float(content["slice_mm"]),
            tuple(int(item["number"]) - 1 for item in items),
            int(content["total"]),
            LungLevels.from_json(content["levels"]),
        )


def take_pictures(
    hu: np.ndarray, opacity: np.ndarray, lungs: np.ndarray | None, affine: np.ndarray
) -> StudyPictures:
    """Reduce a scan and its masks to what a page shows.

    Kept are the slices that show lung or opacity, cut to their box and a margin; the whole scan where a lung
    is missing, for what is not marked must be seen as well.

    Args:
        hu: scan (I, J, K) in HU, in any axis order.
        opacity: mask of the same shape, nonzero is opacity.
        lungs: mask of the same shape, 1 left, 2 right, or None.
        affine: 4x4 voxel to patient matrix (RAS, mm).
    """
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(AXES)
    )
    spacing = nib.affines.voxel_sizes(affine)[np.argsort(turn[:, 0])]
    upright = nib.orientations.apply_orientation
    scan, found = upright(hu, turn), upright(opacity != 0, turn)
    halves = np.zeros(opacity.shape, np.uint8) if lungs is None else lungs.astype(np.uint8, copy=False)
    sides = upright(halves, turn)
    both = all((sides == value).any() for value in LUNGS.values())
    box = _box(found | (sides > 0), spacing) if both else [(0, size) for size in found.shape]
    low, high = box[2]
    kept = range(low, high, -(-(high - low) // MAX_SLICES))
    part = (slice(*box[0]), slice(*box[1]))
    height, width = (box[a][1] - box[a][0] for a in (0, 1))
    extent = (height * spacing[0], width * spacing[1])
    pixel = max(min(spacing[:2]), max(extent) / MAX_SIDE)
    size = (max(round(extent[1] / pixel), 1), max(round(extent[0] / pixel), 1))

    def reduce(plane: np.ndarray, how: Image.Resampling) -> np.ndarray:
        plane = np.ascontiguousarray(plane)
        return plane if size == (width, height) else np.asarray(Image.fromarray(plane).resize(size, how))

    images, masks, lung_masks = [], [], []
    for k in kept:
        values, opaque = scan[..., k][part], found[..., k][part]
        classes = np.where(values >= CONSOLIDATION_FROM_HU, np.uint8(2), np.uint8(1)) * opaque
        images.append(reduce(_window(values), Image.Resampling.LANCZOS))
        masks.append(reduce(classes, Image.Resampling.NEAREST))
        lung_masks.append(reduce(sides[..., k][part], Image.Resampling.NEAREST))
    return StudyPictures(
        np.stack(images, axis=-1),
        np.stack(masks, axis=-1),
        np.stack(lung_masks, axis=-1),
        float(pixel),
        float(spacing[2]),
        tuple(kept),
        scan.shape[2],
        LungLevels.measure(opacity, lungs, affine),
    )


def _window(hu: np.ndarray) -> np.ndarray:
    low, high = LUNG_WINDOW
    return np.clip(np.rint((hu - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def _box(shown: np.ndarray, spacing: np.ndarray) -> list[tuple[int, int]]:
    """First and last + 1 index along each axis; the margin is added within slices only."""
    box = []
    for axis, size in enumerate(shown.shape):
        planes = np.flatnonzero(shown.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = round(MARGIN_MM / spacing[axis]) if axis < 2 else 0
        box.append((max(int(planes[0]) - margin, 0), min(int(planes[-1]) + 1 + margin, size)))
    return box
