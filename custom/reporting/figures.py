# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Pictures: three planes with contours, and where the network looked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from custom.data.files import atomic_path

__all__ = ["AttentionView", "draw_overview", "shown_voxel"]

LUNG_WINDOW = (-1350.0, 150.0)  # centre -600, width 1500 HU: what lungs are usually read with
OPACITY_COLOUR = "#ff3b30"
LUNG_COLOUR = "#34c7ff"
AXES = (
    "P",
    "L",
    "S",
)  # array axes of everything drawn: rows to posterior, columns to left, slices to superior


@dataclass(frozen=True)
class AttentionView:
    """One slice as the network saw it, (H, W) in 0..1, and attention maps of any size by name.

    ``aspect`` is the slice's true width divided by its true height.
    """

    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    aspect: float = 1.0


@dataclass(frozen=True)
class _Plane:
    title: str
    image: np.ndarray
    opacity: np.ndarray
    lungs: np.ndarray | None
    aspect: float
    letters: tuple[str, str, str, str]  # left, right, top, bottom


def shown_voxel(opacity: np.ndarray, lungs: np.ndarray | None = None) -> tuple[int, ...]:
    """The voxel whose three planes are shown: along each axis the plane with most opacity.

    Args:
        opacity: mask (H, W, D).
        lungs: lung mask of the same shape; opacity within it goes first.

    Returns:
        One index an axis; the middle where there is no opacity.
    """
    for within in (lungs, None):
        shown = opacity != 0
        if within is not None:
            shown &= within != 0
        if shown.any():
            axes = range(shown.ndim)
            return tuple(int(shown.sum(axis=tuple(a for a in axes if a != axis)).argmax()) for axis in axes)
    return tuple(size // 2 for size in opacity.shape)


def _upright(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorder to :data:`AXES`; returns the volume and its voxel sizes in mm."""
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(AXES)
    )
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    order = np.argsort(change[:, 0])
    return nib.orientations.apply_orientation(volume, change), sizes[order]


def _planes(
    scan: np.ndarray, opacity: np.ndarray, lungs: np.ndarray | None, affine: np.ndarray | None
) -> list[_Plane]:
    if scan.ndim == 2:
        return [_Plane("slice", scan, opacity, lungs, 1.0, ("", "", "", ""))]
    affine = np.eye(4) if affine is None else affine
    image, (rows, columns, slices) = _upright(scan, affine)
    mask = _upright(opacity, affine)[0]
    lung = None if lungs is None else _upright(lungs, affine)[0]
    i, j, k = shown_voxel(mask, lung)

    def cut(where: tuple, head_up: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        def one(volume: np.ndarray) -> np.ndarray:
            plane = volume[where]
            return plane.T[::-1] if head_up else plane

        return one(image), one(mask), None if lung is None else one(lung)

    planes = [
        _Plane(
            f"axial, slice {k + 1} of {mask.shape[2]} from below",
            *cut((..., k), False),
            rows / columns,
            ("R", "L", "A", "P"),
        )
    ]
    if mask.shape[2] > 1:
        planes.append(_Plane("coronal", *cut((i,), True), slices / columns, ("R", "L", "H", "F")))
        planes.append(_Plane("sagittal", *cut((slice(None), j), True), slices / rows, ("A", "P", "H", "F")))
    return planes


def _letters(axes: Axes, letters: Sequence[str]) -> None:
    places = ((0.01, 0.5), (0.99, 0.5), (0.5, 0.99), (0.5, 0.01))
    for letter, (x, y), (ha, va) in zip(
        letters,
        places,
        (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom")),
        strict=True,
    ):
        axes.text(x, y, letter, transform=axes.transAxes, color="white", fontsize=9, ha=ha, va=va)


def _contour(axes: Axes, mask: np.ndarray, colour: str, width: float) -> None:
    padded = np.pad(mask != 0, 1).astype(float)  # so that contours close at the image's edge
    if padded.any():
        rows, columns = padded.shape
        axes.contour(
            np.arange(columns) - 1, np.arange(rows) - 1, padded, levels=[0.5], colors=colour, linewidths=width
        )


def _draw_plane(axes: Axes, plane: _Plane, window: tuple[float, float] | None) -> None:
    low, high = window if window is not None else (float(plane.image.min()), float(plane.image.max()) or 1.0)
    axes.imshow(plane.image, cmap="gray", vmin=low, vmax=high, aspect=plane.aspect, interpolation="nearest")
    if plane.lungs is not None:
        for value in np.unique(plane.lungs[plane.lungs > 0]):
            _contour(axes, plane.lungs == value, LUNG_COLOUR, 0.7)
    _contour(axes, plane.opacity, OPACITY_COLOUR, 1.1)
    _letters(axes, plane.letters)
    axes.set_title(plane.title, fontsize=10, color="white")
    axes.set_axis_off()


def draw_overview(
    path: str | os.PathLike,
    scan: np.ndarray,
    opacity: np.ndarray,
    affine: np.ndarray | None,
    title: str,
    lines: Sequence[str] = (),
    lungs: np.ndarray | None = None,
    attention: AttentionView | None = None,
    window: tuple[float, float] | None = LUNG_WINDOW,
) -> None:
    """Draw one PNG: the planes through most opacity, with contours, and the attention maps of that slice.

    Args:
        path: PNG to write.
        scan: (H, W) or (H, W, D), HU; in any axis order, told by the affine.
        opacity: mask of the same shape.
        affine: 4x4 voxel to patient (RAS, mm); None for plain slices.
        title: heading.
        lines: numbers to print beside the picture.
        lungs: lung mask of the same shape, or None.
        attention: the slice as the network saw it, with its maps.
        window: lowest and highest shown value in HU; None takes the image's range.

    Raises:
        ValueError: When scan, mask and lungs differ in shape.
    """
    for name, array in (("opacity mask", opacity), ("lung mask", lungs)):
        if array is not None and array.shape != scan.shape:
            raise ValueError(
                f"{name} {array.shape} and scan {scan.shape} differ in shape; they must share a grid"
            )
    planes = _planes(scan, opacity, lungs, affine)
    maps = list(attention.maps.items()) if attention is not None else []
    rows = 2 if maps else 1
    columns = max(3, len(planes), len(maps))
    figure = Figure(figsize=(4.2 * columns, 4.4 * rows + 0.7), facecolor="black", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_facecolor("black")
    for axes, plane in zip(grid[0], planes, strict=False):
        _draw_plane(axes, plane, window)
    if attention is not None:
        for axes, (name, values) in zip(grid[-1], maps, strict=False):
            rows_, columns_ = attention.image.shape
            axes.imshow(attention.image, cmap="gray", vmin=0, vmax=1)
            extent = (-0.5, columns_ - 0.5, rows_ - 0.5, -0.5)
            axes.imshow(
                values, cmap="inferno", alpha=0.55, extent=extent, interpolation="bilinear", vmin=0, vmax=1
            )
            axes.set_title(
                f"attention {name}, {values.min():.2f} to {values.max():.2f}", fontsize=10, color="white"
            )
    figure.suptitle("\n".join([title, "   ".join(lines)]) if lines else title, color="white", fontsize=12)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
