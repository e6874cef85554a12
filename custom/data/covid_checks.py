# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What is checked of a public data set's volumes before a data list names them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from custom.data.scans import Scan

__all__ = ["GREY", "HU", "LabelRule", "check_same_grid", "find_value_kind", "sides_agree"]

HU = "HU"
GREY = "grey values"

_PADDING, _AIR = -1100.0, -300.0  # HU; air and aerated lung lie between
_TISSUE = (-200.0, 300.0)  # HU of fat, water, muscle, blood with contrast agent
_MIN_AIR, _MIN_TISSUE = 0.005, 0.05  # fractions of the voxels that are not padding
_TOLERANCE_MM = 0.05
_ROUNDING = 1e-3


def find_value_kind(scan: Scan) -> str:
    """Tell HU of a chest from the grey values of a windowed 8-bit picture.

    HU must pass what :class:`custom.transforms.ValidateHU` asks for, or training would refuse them later.

    Args:
        scan: as it was stored.

    Returns:
        :data:`HU`, or :data:`GREY` for values from 0 to 255.

    Raises:
        ValueError: When they are neither, not finite, or all the same.
    """
    voxels, file = scan.voxels, scan.study["files"][0]
    low, high = float(voxels.min()), float(voxels.max())  # NaN anywhere makes both NaN
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int((~np.isfinite(voxels)).sum())
        raise ValueError(f"{count} of {voxels.size} voxels are NaN or infinite: {file}")
    if low == high:
        raise ValueError(f"all voxels are {low + 0.0:g}: there is nothing to see in {file}")
    sample = voxels[:: max(1, voxels.shape[0] // 128)]
    floor = max(_PADDING, low)  # a scan's lowest value is padding as well, whatever it is
    matter = int(np.count_nonzero(sample > floor))
    air = int(np.count_nonzero((sample > floor) & (sample < _AIR)))
    tissue = int(np.count_nonzero((sample > _TISSUE[0]) & (sample < _TISSUE[1])))
    if air >= max(_MIN_AIR * matter, 1) and tissue >= max(_MIN_TISSUE * matter, 1):
        return HU
    if low >= 0 and 1 < high <= 255:
        return GREY
    raise ValueError(f"values {low:g} to {high:g} are neither HU of a chest nor 8-bit grey values: {file}")


def check_same_grid(image: Scan, mask: Scan) -> None:
    """Refuse a mask that does not lie on its image's voxels, to 0.05 mm at the volume's corners.

    Args:
        image: the CT.
        mask: what was drawn on it.

    Raises:
        ValueError: When shapes or affines differ; the message says how.
    """
    names = f"the image {image.study['files'][0]} and the mask {mask.study['files'][0]}"
    shape = image.voxels.shape
    if mask.voxels.shape != shape:
        raise ValueError(f"{names} differ in size: {shape} and {mask.voxels.shape} voxels")
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))])
    gap = np.linalg.norm((corners @ (image.affine - mask.affine).T)[:, :3], axis=1).max()
    if gap > _TOLERANCE_MM:
        raise ValueError(f"{names} lie up to {gap:.3g} mm apart: {_compare(image.affine, mask.affine)}")


def _compare(first: np.ndarray, second: np.ndarray) -> str:
    """How two affines differ, the crudest difference first."""
    axes = ["".join(nib.aff2axcodes(affine)) for affine in (first, second)]
    if axes[0] != axes[1]:
        return f"their axes run {axes[0]} and {axes[1]}; one of the headers is wrong, find out which"
    sizes = [nib.affines.voxel_sizes(affine) for affine in (first, second)]
    if not np.allclose(sizes[0], sizes[1], atol=1e-4):
        texts = [" x ".join(f"{size:.4g}" for size in both) for both in sizes]
        return f"their voxels measure {texts[0]} and {texts[1]} mm"
    if not np.allclose(first[:3, :3], second[:3, :3], atol=1e-4):
        return "their axes are tilted against each other"
    shift = ", ".join(f"{value:.4g}" for value in second[:3, 3] - first[:3, 3])
    return f"their origins differ by ({shift}) mm"


@dataclass(frozen=True)
class LabelRule:
    """What a data set's masks hold, and what becomes of it.

    Args:
        expected: the labels that a mask may have besides 0.
        drop: those that become background.
        merge: make all others 1; else they stay as they are.
    """

    expected: tuple[int, ...] = (1,)
    drop: tuple[int, ...] = ()
    merge: bool = True

    def read(self, mask: Scan) -> tuple[np.ndarray, bool]:
        """The labels of a mask.

        Args:
            mask: as it was stored.

        Returns:
            Labels (I, J, K) uint8, and whether the mask is stored as exactly these.

        Raises:
            ValueError: When it has other values than expected.
        """
        labels = np.rint(mask.voxels)
        error = float(np.abs(mask.voxels - labels).max())
        found = np.unique(labels) if error <= _ROUNDING else np.unique(mask.voxels)  # NaN is not <=
        strange = [value for value in found.tolist() if value not in (0, *self.expected)]
        if strange:
            shown = ", ".join(f"{value:g}" for value in strange[:5]) + (", ..." if len(strange) > 5 else "")
            allowed = ", ".join(map(str, (0, *self.expected)))
            raise ValueError(f"the mask {mask.study['files'][0]} has values {shown} besides {allowed}")
        labels = labels.astype(np.uint8)
        labels[np.isin(labels, self.drop)] = 0
        if self.merge:
            labels = (labels > 0).astype(np.uint8)
        return labels, bool(np.array_equal(labels, mask.voxels))


def sides_agree(lungs: np.ndarray, affine: np.ndarray) -> bool:
    """Whether label 1 lies to the patient's left of label 2, as left and right lungs do.

    Args:
        lungs: 0 background, 1 left, 2 right lung, (I, J, K).
        affine: voxel index to RAS+ mm, (4, 4).

    Returns:
        False also where a lung is missing.
    """
    across = []
    for side in (1, 2):
        where = lungs == side
        if not where.any():
            return False
        # Marginal counts give the mean position without a list of millions of positions.
        counts = [where.sum(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
        middle = [float(np.average(np.arange(len(count)), weights=count)) for count in counts]
        across.append(float(affine[0, :3] @ middle))
    return across[0] < across[1]
