# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writing a volume, such as the synthetic chest phantom, as a DICOM CT series."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)
from pydicom.valuerep import format_number_as_ds

__all__ = ["write_dicom_series"]

_LPS = np.diag([-1.0, -1.0, 1.0])  # from RAS+ to DICOM's patient space


def write_dicom_series(
    folder: str | os.PathLike[str],
    hu: np.ndarray,
    affine: np.ndarray,
    *,
    seed: int = 0,
    patient_id: str = "PHANTOM",
    patient_name: str = "Phantom^Chest",
    study_date: str = "20200301",
    study_time: str = "120000",
    series_number: int = 1,
    kernel: str = "STANDARD",
    patient_position: str = "HFS",
    slice_thickness: float | None = None,
    rescale_slope: float = 1.0,
    rescale_intercept: float = -1024.0,
    signed: bool = False,
    transfer_syntax: str = ExplicitVRLittleEndian,
    shuffle: bool = False,
) -> list[Path]:
    """Write a volume as a CT Image Storage series, one file per slice along the last axis.

    The UIDs follow from ``seed``, patient, study date and time, and series number: the same call writes the
    same files, and two calls that differ in the series number alone write two series of one study.

    Args:
        folder: where to write; it is created.
        hu: (columns, rows, slices) Hounsfield units.
        affine: (4, 4) from those indices to mm in RAS+ patient space; any orthogonal axes, either handedness.
        seed: tells apart what is otherwise equal.
        patient_id: Patient ID.
        patient_name: Patient's Name.
        study_date: YYYYMMDD.
        study_time: HHMMSS.
        series_number: Series Number.
        kernel: Convolution Kernel.
        patient_position: Patient Position.
        slice_thickness: mm, defaults to the distance between slices.
        rescale_slope: HU per stored unit.
        rescale_intercept: HU of the stored value 0.
        signed: store signed integers.
        transfer_syntax: UID of the transfer syntax; a compressed one must be lossless.
        shuffle: give file names that do not follow the order of the slices.

    Returns:
        The files in the order of the slices.

    Raises:
        ValueError: When the volume is not 3-D, the affine's axes are not orthogonal, or the rescaling cannot
            store the values.
    """
    hu = np.asarray(hu)
    if hu.ndim != 3 or hu.size == 0:
        raise ValueError(f"a CT volume has 3 dimensions (column, row, slice), got shape {hu.shape}")
    affine = np.asarray(affine, dtype=float)
    axes = _LPS @ affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(affine).all() and spacing.min() > 0):
        raise ValueError("the affine has an axis without length")
    cosines = axes / spacing
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 1e-4:
        raise ValueError("the affine's axes are not orthogonal; DICOM slices cannot be sheared")
    stored = _to_stored(hu, rescale_slope, rescale_intercept, signed)

    def uid(what: str) -> UID:
        return generate_uid(entropy_srcs=["|".join([str(seed), patient_id, study_date, study_time, what])])

    names = np.arange(1, hu.shape[2] + 1)
    if shuffle:
        names = np.random.default_rng(seed).permutation(names)

    series = Dataset()
    series.SOPClassUID = CTImageStorage
    series.PatientName, series.PatientID = patient_name, patient_id
    series.PatientBirthDate, series.PatientSex = "", ""
    series.StudyInstanceUID = uid("study")
    series.SeriesInstanceUID = uid(f"series {series_number}")
    series.FrameOfReferenceUID = uid("frame of reference")
    series.StudyDate = series.SeriesDate = series.AcquisitionDate = series.ContentDate = study_date
    series.StudyTime = series.SeriesTime = series.AcquisitionTime = series.ContentTime = study_time
    series.ReferringPhysicianName, series.AccessionNumber = "", ""
    series.StudyID, series.SeriesNumber, series.AcquisitionNumber = "1", series_number, 1
    series.Modality, series.BodyPartExamined, series.PatientPosition = "CT", "CHEST", patient_position
    series.PositionReferenceIndicator = ""
    series.Manufacturer, series.ManufacturerModelName = "covid-ct-bundles", "Synthetic phantom"
    series.DeviceSerialNumber, series.SoftwareVersions = "1", "1"
    series.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    series.KVP, series.ConvolutionKernel = "120", kernel
    series.SliceThickness = _decimal(spacing[2] if slice_thickness is None else slice_thickness)
    # The row direction is the one in which the column index grows; the first spacing is between rows.
    series.ImageOrientationPatient = [_decimal(v) for v in (*cosines[:, 0], *cosines[:, 1])]
    series.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
    series.SamplesPerPixel, series.PhotometricInterpretation = 1, "MONOCHROME2"
    series.Columns, series.Rows = hu.shape[:2]
    series.BitsAllocated, series.BitsStored, series.HighBit = 16, 16, 15
    series.PixelRepresentation = int(signed)
    series.RescaleSlope, series.RescaleIntercept = _decimal(rescale_slope), _decimal(rescale_intercept)
    series.RescaleType = "HU"
    series.WindowCenter, series.WindowWidth = "-600", "1500"

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(cosines[:, 0], cosines[:, 1])
    files = []
    for k, name in enumerate(names):
        image = deepcopy(series)
        position = _LPS @ affine[:3, 3] + k * axes[:, 2]
        image.SOPInstanceUID = uid(f"series {series_number}, slice {k}")
        image.InstanceNumber = k + 1
        image.ImagePositionPatient = [_decimal(v) for v in position]
        image.SliceLocation = _decimal(position @ normal)
        image.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        image.file_meta = FileMetaDataset()
        image.file_meta.MediaStorageSOPClassUID = CTImageStorage
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
        syntax = UID(transfer_syntax)
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax.is_encapsulated else syntax
        if syntax.is_encapsulated:
            image.compress(syntax, generate_instance_uid=False)
        file = folder / f"{name:05d}.dcm"
        image.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def _to_stored(hu: np.ndarray, slope: float, intercept: float, signed: bool) -> np.ndarray:
    if not slope:
        raise ValueError("rescale_slope must not be 0")
    values = (hu.astype(np.float64) - intercept) / slope
    stored_type = np.dtype("<i2" if signed else "<u2")
    low, high = values.min(), values.max()
    limits = np.iinfo(stored_type)
    if not (limits.min <= low and high <= limits.max):
        raise ValueError(
            f"stored values {low:g} to {high:g} do not fit {stored_type.name}; "
            "choose another rescale_intercept, or signed storage"
        )
    return np.rint(values).astype(stored_type)


def _decimal(value: float) -> str:
    return format_number_as_ds(float(value) + 0.0)  # + 0.0 turns -0.0 into 0.0
