# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Masks that other programs have written or people have corrected, put onto the grid of their scan."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import nibabel as nib
import numpy as np
from pydicom import dcmread
from pydicom.uid import SegmentationStorage

from custom.data.scans import is_nifti, read_scan

__all__ = ["OPACITY_SEGMENT", "LUNG_SEGMENTS", "place_mask", "read_mask"]

OPACITY_SEGMENT = {"opacity": 1}
"""Names of segments of a DICOM Segmentation, in small letters, and the value they get."""

LUNG_SEGMENTS = {"left lung": 1, "right lung": 2}

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from RAS, and back
_OFF = 0.05  # of a voxel: what rounding in headers can move a grid
_HOW = "pip install 'covid-ct-bundles[dicom]'"


def read_mask(
    path: str | os.PathLike[str], segments: Mapping[str, int], label: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask.

    Args:
        path: NIfTI, NRRD (as 3D Slicer writes it) or DICOM Segmentation.
        segments: the segments of a DICOM Segmentation to take, and the value each gets; where the file has a
            single segment and one is asked for, it is taken whatever its name. Of other files the values of
            this mapping are what may be in them besides 0.
        label: the value in the file that stands for 1; None: 1 itself.

    Returns:
        (I, J, K) uint8 and the affine to mm in RAS+.

    Raises:
        FileNotFoundError: When the file does not exist.
        ValueError: When it is no mask, or holds values or segments that are not asked for.
    """
    file = os.fspath(path)
    if not os.path.isfile(file):
        raise FileNotFoundError(f"mask not found: {file}")
    if is_nifti(file):
        try:
            image = read_scan(file)
        except ValueError as error:  # it names the file, which may be named after a patient
            raise ValueError(f"the mask cannot be read: {str(error).replace(f': {file}', '')}") from None
        return _take(image.voxels, segments, label), image.affine
    if file.lower().endswith((".nrrd", ".nhdr")):
        values, affine = _read_nrrd(file)
        return _take(values, segments, label), affine
    return _read_segmentation(file, segments)


def place_mask(
    mask: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray
) -> np.ndarray:
    """Put a mask onto a scan's grid: turn its axes, and fill up what was cut off.

    Nothing is resampled: the voxels of both must be the same.

    Args:
        mask: (I, J, K).
        affine: 4x4 from its voxels to mm in RAS+.
        shape: of the scan.
        target: 4x4 from the scan's voxels to mm in RAS+.

    Raises:
        ValueError: When the mask does not lie on the scan's grid.
    """
    to_scan = np.linalg.inv(np.asarray(target, dtype=float)) @ np.asarray(affine, dtype=float)
    turn = nib.orientations.io_orientation(to_scan)
    if np.isnan(turn).any():
        raise ValueError("the mask does not lie on the grid of this scan: it is turned against it")
    turned = nib.orientations.apply_orientation(mask, turn)
    placed = to_scan @ nib.orientations.inv_ornt_aff(turn, mask.shape)
    start = np.rint(placed[:3, 3]).astype(int)
    end = start + np.array(turned.shape)
    corners = (placed[:3, :3] - np.eye(3)) * (np.array(turned.shape) - 1)
    if np.abs(corners).max() > _OFF or np.abs(placed[:3, 3] - start).max() > _OFF:
        sizes = [" × ".join(f"{mm:.3g}" for mm in nib.affines.voxel_sizes(a)) for a in (affine, target)]
        raise ValueError(
            "the mask is not one of this scan: it does not lie on its grid (voxels of "
            f"{sizes[0]} mm, the scan's of {sizes[1]} mm)"
        )
    if (start < 0).any() or (end > np.array(shape)).any():
        raise ValueError("the mask is not one of this scan: it reaches out of it")
    whole = np.zeros(shape, np.uint8)
    whole[tuple(slice(low, high) for low, high in zip(start, end, strict=True))] = turned
    return whole


def _take(values: np.ndarray, segments: Mapping[str, int], label: int | None) -> np.ndarray:
    present = np.unique(values)
    if not np.isfinite(present).all() or (present != np.rint(present)).any():
        raise ValueError("not a mask: it holds values between the whole numbers; threshold it first")
    found = sorted({int(value) for value in present} - {0})
    if label is not None:
        if found and label not in found:
            raise ValueError(
                f"no voxel of the mask has the value {label}; it holds {', '.join(map(str, found))}"
            )
        return (values == label).astype(np.uint8)
    allowed = sorted(segments.values())
    if not set(found) <= set(allowed):
        hint = "; say which value is opacity with --label" if allowed == [1] else ""
        raise ValueError(
            f"the mask holds the values {', '.join(map(str, found))}, where {', '.join(map(str, allowed))} "
            f"{'is' if len(allowed) == 1 else 'are'} expected{hint}"
        )
    return values.astype(np.uint8)


def _read_nrrd(file: str) -> tuple[np.ndarray, np.ndarray]:
    if importlib.util.find_spec("itk") is None:
        raise ValueError(f"an NRRD mask needs itk: {_HOW}, or save the mask as NIfTI (.nii.gz)")
    import itk

    try:
        image = itk.imread(file)
        values = np.asarray(itk.array_from_image(image))
        direction = np.asarray(itk.array_from_matrix(image.GetDirection()))
        spacing, origin = np.asarray(image.GetSpacing()), np.asarray(image.GetOrigin())
    except RuntimeError as error:
        raise ValueError(f"the mask is not a readable NRRD file ({type(error).__name__})") from None
    if values.ndim != 3 or len(spacing) != 3:
        raise ValueError(
            f"the NRRD file has {values.ndim} dimensions, so its segments overlap: export opacity alone"
        )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, origin
    return values.transpose(2, 1, 0), _LPS @ affine


def _read_segmentation(file: str, segments: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    try:
        header = dcmread(file, stop_before_pixels=True, specific_tags=["SOPClassUID"])
    except Exception:  # pydicom raises what it likes on files that are not DICOM
        header = None
    if header is None or header.get("SOPClassUID") != SegmentationStorage:
        raise ValueError("the mask is neither NIfTI (.nii, .nii.gz) nor NRRD nor a DICOM Segmentation")
    if importlib.util.find_spec("highdicom") is None:
        raise ValueError(f"a DICOM Segmentation needs highdicom: {_HOW}")
    import highdicom

    try:
        segmentation = highdicom.seg.segread(file)
        numbers = {
            str(item.SegmentLabel).lower(): int(item.SegmentNumber) for item in segmentation.SegmentSequence
        }
        if len(numbers) == 1 and len(segments) == 1:
            numbers = dict.fromkeys(segments, *numbers.values())
        taken = [name for name in segments if name in numbers]
        if not taken:
            there = ", ".join(sorted(numbers))
            raise ValueError(f"the DICOM Segmentation has no segment {' or '.join(segments)}, but {there}")
        volume = segmentation.get_volume(
            segment_numbers=[numbers[name] for name in taken],
            combine_segments=False,
            allow_missing_positions=True,
            rescale_fractional=False,
        )
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"not a usable DICOM Segmentation ({' '.join(str(error).split())})") from None
    array = np.asarray(volume.array) > 0
    mask = np.zeros(array.shape[:3], np.uint8)
    for number, name in enumerate(taken):
        mask[array[..., number]] = segments[name]
    return mask, _LPS @ np.asarray(volume.affine, dtype=float)
