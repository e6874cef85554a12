# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Volumes and stacks of slices written out as plain 8-bit pictures, upright, with their masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from custom.console import bar_interval
from custom.data.covid_checks import HU, LabelRule, find_value_kind
from custom.data.files import atomic_path
from custom.data.plain_slices import ORIENTATIONS, group_similar, turn
from custom.data.scans import Scan, read_scan

__all__ = ["SliceOptions", "write_stack", "write_volume_slices"]

UPRIGHT = "PLS"


@dataclass(frozen=True)
class SliceOptions:
    """How slices become pictures.

    Args:
        window: HU that become 0 and 255; grey values stay as they are.
        orientation: how slices of stacks and of grey values are stored, one of
            :data:`custom.data.plain_slices.ORIENTATIONS`; the headers of such files are not to be trusted.
            Volumes in HU are turned by their header.
        merged: whether the masks have one label, to be written as 255; else labels are written as they are.

    Raises:
        ValueError: When the window is empty or the orientation unknown.
    """

    window: tuple[float, float] = (-1000.0, 400.0)
    orientation: str = "transposed"
    merged: bool = True

    def __post_init__(self) -> None:
        if not self.window[0] < self.window[1]:
            raise ValueError(f"the window must grow, got {self.window[0]:g} to {self.window[1]:g} HU")
        if self.orientation not in ORIENTATIONS:
            raise ValueError(
                f"unknown orientation '{self.orientation}'; choose from {', '.join(ORIENTATIONS)}"
            )

    def to_grey(self, values: np.ndarray, kind: str) -> np.ndarray:
        """Values of any shape as uint8."""
        if kind == HU:
            low, high = self.window
            values = (np.asarray(values, np.float32) - low) * (255 / (high - low))
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def write_volume_slices(
    folder: Path,
    name: str,
    scan: Scan,
    kind: str,
    labels: np.ndarray,
    options: SliceOptions,
) -> list[str]:
    """Write those slices of a volume that have a lesion.

    Args:
        folder: gets ``images/`` and ``masks/``.
        name: the files are ``<name>_<slice>.png``; slices are counted from 0, those in HU from inferior.
        scan: the volume.
        kind: what :func:`custom.data.covid_checks.find_value_kind` found it to hold.
        labels: 0 where there is no lesion, (I, J, K) uint8.
        options: how.

    Returns:
        The names without ``.png``.
    """
    voxels = scan.voxels
    if kind == HU:
        stored = nib.orientations.io_orientation(scan.affine)
        turned = nib.orientations.ornt_transform(stored, nib.orientations.axcodes2ornt(UPRIGHT))
        voxels = nib.orientations.apply_orientation(voxels, turned)
        labels = nib.orientations.apply_orientation(labels, turned)
    stems = []
    for number in np.flatnonzero(labels.any(axis=(0, 1))).tolist():
        stems.append(f"{name}_{number:04d}")
        grey, lesion = options.to_grey(voxels[:, :, number], kind), labels[:, :, number]
        if kind != HU:
            grey, lesion = turn(grey, options.orientation), turn(lesion, options.orientation)
        _write_pair(folder, stems[-1], grey, lesion, options.merged)
    return stems


def write_stack(
    folder: Path, name: str, image: Path, mask: Path, rule: LabelRule, options: SliceOptions
) -> list[tuple[str, str]]:
    """Write all slices of a stack of unrelated slices, which is stored as a volume and is none.

    Only the sizes of image and mask are compared: such slices have no place in space for a header to tell.

    Args:
        folder: gets ``images/`` and ``masks/``.
        name: the files are ``<name>_<slice>.png``, counted from 0.
        image: NIfTI file of HU or grey values, (I, J, slices).
        mask: NIfTI file of labels, (I, J, slices).
        rule: what the mask holds.
        options: how.

    Returns:
        For each slice its name without ``.png``, and the name of the first slice that looks alike: theirs may
        be the same patient.

    Raises:
        ValueError: When a file cannot be used.
    """
    scan, drawn = read_scan(image), read_scan(mask)
    if scan.voxels.shape != drawn.voxels.shape:
        sizes = f"{scan.voxels.shape} and {drawn.voxels.shape}"
        raise ValueError(f"the image {image} and the mask {mask} differ in size: {sizes} voxels")
    kind = find_value_kind(scan)
    labels, _ = rule.read(drawn)
    pictures, stems = [], []
    slices = range(labels.shape[2])
    for number in tqdm(slices, desc=name, unit="slice", dynamic_ncols=True, mininterval=bar_interval()):
        stems.append(f"{name}_{number:04d}")
        pictures.append(turn(options.to_grey(scan.voxels[:, :, number], kind), options.orientation))
        lesion = turn(labels[:, :, number], options.orientation)
        _write_pair(folder, stems[-1], pictures[-1], lesion, options.merged)
    return [(stem, stems[group]) for stem, group in zip(stems, group_similar(pictures), strict=True)]


def _write_pair(folder: Path, stem: str, grey: np.ndarray, labels: np.ndarray, merged: bool) -> None:
    # The mask comes last: where it exists, its image does too.
    for kind, pixels in (("images", grey), ("masks", labels * np.uint8(255) if merged else labels)):
        with atomic_path(folder / kind / f"{stem}.png") as temporary:
            Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
