# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What goes wrong with DICOM series in practice, done to well written ones by editing their files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid


def edit(files: Path | Iterable[Path], change: Callable[[Dataset], None]) -> None:
    """Apply a change to the data set in each file."""
    for file in [files] if isinstance(files, Path) else files:
        dataset = dcmread(file)
        change(dataset)
        dataset.save_as(file)


def set_tags(files: Path | Iterable[Path], **values: object) -> None:
    """Set tags, or delete those whose value is None."""

    def change(dataset: Dataset) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    edit(files, change)


def copy_slice(file: Path, target: Path, *, new_uid: bool = True, **values: object) -> Path:
    """Write a slice a second time, as another image unless ``new_uid`` is False."""
    dataset = dcmread(file)
    if new_uid:
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[str(dataset.SOPInstanceUID), str(target)])
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    target.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(target)
    return target


def move_slice(file: Path, shift: Iterable[float]) -> None:
    """Move a slice in patient space (mm, LPS)."""

    def change(dataset: Dataset) -> None:
        position = np.asarray(dataset.ImagePositionPatient, dtype=float) + np.asarray(shift)
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in position]

    edit(file, change)


def tilt_gantry(files: Iterable[Path], degrees: float) -> None:
    """Shear an axial series as a tilted gantry does: the slices turn, the table still moves along z."""
    angle = np.deg2rad(degrees)
    set_tags(
        files, ImageOrientationPatient=["1", "0", "0", "0", f"{np.cos(angle):.8f}", f"{np.sin(angle):.8f}"]
    )


def halve_matrix(file: Path) -> None:
    """Keep every other row and column of a slice."""

    def change(dataset: Dataset) -> None:
        pixels = np.ascontiguousarray(dataset.pixel_array[::2, ::2])
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.PixelData = pixels.tobytes()

    edit(file, change)


def colour_slice(file: Path) -> None:
    """Store a slice as a picture of colours."""

    def change(dataset: Dataset) -> None:
        grey = (dataset.pixel_array >> 4).astype(np.uint8)
        dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
        dataset.PhotometricInterpretation = "RGB"
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = np.repeat(grey[..., None], 3, axis=-1).tobytes()

    edit(file, change)


def truncate(file: Path, keep: float | int) -> None:
    """Cut a file off, to a fraction of its length or to a number of bytes."""
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])


def add_localizer(file: Path, target: Path, series_uid: str | None = None) -> Path:
    """Write a sagittal scout of the same study, in a series of its own unless ``series_uid`` is given."""
    uid = series_uid or generate_uid(entropy_srcs=["localizer", str(dcmread(file).StudyInstanceUID)])
    return copy_slice(
        file,
        target,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        SeriesInstanceUID=uid,
        ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"],
    )


def add_secondary_capture(file: Path, target: Path, series_uid: str | None = None) -> Path:
    """Write a screenshot of the same study: no CT image, no geometry, but modality CT."""
    dataset = dcmread(file)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["capture", str(target)])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID = series_uid or generate_uid(
        entropy_srcs=["capture", str(dataset.StudyInstanceUID)]
    )
    dataset.SeriesNumber = 99
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(dataset, keyword)
    target.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(target)
    return target
