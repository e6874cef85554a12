# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The series that results refer to: its headers, in the order of the slices, and whose they are."""

from __future__ import annotations

import hashlib
import secrets
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pydicom.valuerep import format_number_as_ds

from custom.data.dicom_header import get_text, make_instance
from custom.data.dicom_stack import stack_slices

__all__ = ["DicomOutputError", "SourceSeries", "identify_study", "patient_key", "read_source"]

_TOLERANCE_MM = 1e-2
_NEEDED = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("Modality", "Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
]
_KEPT = _NEEDED + [
    *("SliceThickness", "InstanceNumber", "SeriesNumber", "PositionReferenceIndicator"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
]
_EMPTY = ["PatientID", "PatientName", "PatientBirthDate", "PatientSex", "ReferringPhysicianName"] + [
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime")
]
_UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


class DicomOutputError(ValueError):
    """DICOM objects cannot be made for a study; the message tells nothing of the patient."""


@dataclass(frozen=True)
class SourceSeries:
    """A CT series without its pixels.

    Args:
        headers: one for each slice, in ascending order along the slices' normal; they hold what geometry and
            references need, and empty values in place of all that is known of patient and study.
        affine: (4, 4) from (column, row, slice) to mm in RAS+.
        identity: a whole header, for the Patient and Study modules; None where these are not to be known.
    """

    headers: tuple[Dataset, ...]
    affine: np.ndarray
    identity: Dataset | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        first = self.headers[0]
        return int(first.Columns), int(first.Rows), len(self.headers)

    def to_frames(self, mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Bring a mask, in any axis order, to the order of the series' slices, rows and columns.

        Args:
            mask: (I, J, K).
            affine: 4x4 from its indices to mm in RAS+.

        Returns:
            (slices, rows, columns), a view.

        Raises:
            DicomOutputError: When the mask does not lie on the grid of the series.
        """
        turn = nib.orientations.io_orientation(np.linalg.inv(self.affine) @ affine)
        if np.isnan(turn).any():
            raise DicomOutputError("the mask does not lie on the grid of its source series")
        turned = nib.orientations.apply_orientation(mask, turn)
        placed = affine @ nib.orientations.inv_ornt_aff(turn, mask.shape)
        if turned.shape != self.shape or not np.allclose(placed, self.affine, atol=_TOLERANCE_MM):
            raise DicomOutputError("the mask does not lie on the grid of its source series")
        return turned.transpose(2, 1, 0)


def read_source(files: Sequence[str], deidentify: bool = False) -> SourceSeries:
    """Read the headers of a series that has been read before; the pixels are not touched.

    Args:
        files: its files, in any order.
        deidentify: give the series, study, frame of reference and images new random UIDs, and forget whose
            they are.

    Raises:
        DicomOutputError: When a file is gone or is not what it was, or a tag that results need is missing.
    """
    try:
        headers = {
            file: dcmread(file, stop_before_pixels=True, specific_tags=list(_KEPT))
            for file in map(str, files)
        }
        identity = None if deidentify else dcmread(files[0], stop_before_pixels=True)
        missing = [tag for tag in _NEEDED if not all(get_text(header, tag) for header in headers.values())]
        if missing:
            raise DicomOutputError(f"the source series has no {', '.join(missing)}")
        instances, affine = stack_slices([make_instance(*item) for item in headers.items()])
        kept = [_clean(headers[instance.file]) for instance in instances]
    except DicomOutputError:
        raise
    except Exception as error:  # pydicom raises what it likes; its texts hold file names and values
        raise DicomOutputError(
            f"the headers of the source series cannot be read again ({type(error).__name__})"
        ) from None
    _even_out(kept, affine)
    if deidentify:
        new: dict[str, str] = defaultdict(lambda: generate_uid(prefix=None))
        nobody = f"anon-{secrets.token_hex(6)}"  # viewers take studies without Patient ID for one patient's
        for header in kept:
            header.PatientID, header.PatientName = nobody, f"{nobody}^"
            for keyword in _UIDS:
                setattr(header, keyword, new[header[keyword].value])
    return SourceSeries(tuple(kept), affine, identity)


def identify_study(image: str | Sequence[str]) -> dict[str, Any] | None:
    """What the header of a study says of whose and when it is, for one that cannot be read as a scan.

    Args:
        image: a NIfTI file, or the files of a DICOM study.

    Returns:
        Some of the keys that :class:`custom.data.Scan` describes; None where there is no header to read.
    """
    if isinstance(image, str):
        return {"source": "nifti", "files": [image]}
    tags = ("StudyInstanceUID", "StudyDate", "StudyTime")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote values
            header = dcmread(image[0], stop_before_pixels=True, specific_tags=list(tags))
            uid, day, time = (get_text(header, tag) or None for tag in tags)
    except Exception:  # no longer there, or broken
        return None
    return {"source": "dicom", "files": list(image), "study_uid": uid, "study_date": day, "study_time": time}


def patient_key(file: str) -> str | None:
    """A name for a patient that tells nothing of who it is, the same for all studies of that patient.

    It is made from Patient ID and its issuer alone. Who knows an ID can compute its key: it is a pseudonym.

    Args:
        file: an image of a study.

    Returns:
        "patient-" and twelve hexadecimal digits, None where there is no Patient ID.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's warnings quote values
            header = dcmread(file, stop_before_pixels=True, specific_tags=["PatientID", "IssuerOfPatientID"])
            issuer, patient = (get_text(header, tag) for tag in ("IssuerOfPatientID", "PatientID"))
    except Exception:  # no longer there, or broken: the study has been read, only its key is not known
        return None
    if not patient:
        return None
    return "patient-" + hashlib.sha256(f"{issuer}\\{patient}".encode()).hexdigest()[:12]


def _clean(header: Dataset) -> Dataset:
    clean = Dataset()
    for keyword in _KEPT:
        if keyword in header:
            setattr(clean, keyword, getattr(header, keyword))
    for keyword in _EMPTY:
        setattr(clean, keyword, "")
    return clean


def _even_out(headers: Sequence[Dataset], affine: np.ndarray) -> None:
    """Give all slices the values of the first where they may differ by rounding alone."""
    first = headers[0]
    distance = format_number_as_ds(float(np.linalg.norm(affine[:3, 2])))
    for header in headers:
        header.ImageOrientationPatient = first.ImageOrientationPatient
        header.PixelSpacing = first.PixelSpacing
        header.SliceThickness = first.get("SliceThickness") or distance
        if len(headers) > 1:
            header.SpacingBetweenSlices = distance
