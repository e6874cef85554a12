# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What the header of one DICOM file says, with missing and malformed values made None."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

__all__ = ["Instance", "get_integer", "get_text", "make_instance", "object_kind", "read_header"]

_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("StudyDate", "StudyTime", "Modality", "Manufacturer", "ManufacturerModelName", "ImageType"),
    *("SeriesNumber", "InstanceNumber", "ConvolutionKernel", "PatientPosition", "ContrastBolusAgent"),
    *("SliceThickness", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType"),
]


@dataclass(frozen=True)
class Instance:
    """What the header of one image says; None or "" where a value is missing or malformed.

    Lengths are in mm and positions in DICOM's patient space (x to the left, y to posterior, z to superior).
    ``shape`` is (rows, columns), ``pixel_spacing`` is in DICOM's order: between rows, between columns.
    """

    file: str
    uid: str
    number: int | None
    image_type: tuple[str, ...]
    frame_of_reference_uid: str
    shape: tuple[int, int] | None
    frames: int
    samples: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    thickness: float | None
    slope: float | None
    intercept: float | None
    rescale_type: str


def read_header(file: str) -> Dataset | str:
    """Read the tags needed here; the pixels are not touched.

    Args:
        file: any file.

    Returns:
        The header, or what else the file is: "foreign" (not DICOM), "broken", or "directory" (a DICOMDIR).

    Raises:
        FileNotFoundError: When there is no such file.
    """
    try:
        header = dcmread(file, stop_before_pixels=True, specific_tags=list(_TAGS))
    except InvalidDicomError:
        return "foreign"
    except FileNotFoundError:
        if os.path.islink(file):  # to nothing
            return "broken"
        raise FileNotFoundError(f"no such file: {file}") from None
    except Exception:  # pydicom raises whatever a broken header leads it into
        return "broken"
    # Values are decoded here, and one of an unknown kind cannot be.
    if _value(header.file_meta, "MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return "directory"
    needed = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
    return header if all(_value(header, keyword) for keyword in needed) else "broken"


def object_kind(header: Dataset) -> str:
    """Say what an object is if it is no CT slice; empty for a slice.

    Args:
        header: as :func:`read_header` returns it.
    """
    sop_class = header.SOPClassUID
    if sop_class in (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
        return "enhanced (multi-frame) CT, to be converted to single-frame CT images"
    if sop_class != CTImageStorage:
        return str(sop_class.name)
    return "localizer" if "LOCALIZER" in _words(header, "ImageType") else ""


def make_instance(file: str, header: Dataset) -> Instance:
    """Take what reading the slice needs out of its header.

    Args:
        file: where the header is from.
        header: as :func:`read_header` returns it.
    """
    rows, columns = get_integer(header, "Rows"), get_integer(header, "Columns")
    return Instance(
        file=file,
        uid=get_text(header, "SOPInstanceUID"),
        number=get_integer(header, "InstanceNumber"),
        image_type=_words(header, "ImageType"),
        frame_of_reference_uid=get_text(header, "FrameOfReferenceUID"),
        shape=(rows, columns) if rows and columns else None,
        frames=get_integer(header, "NumberOfFrames") or 1,
        samples=get_integer(header, "SamplesPerPixel") or 1,
        position=_numbers(header, "ImagePositionPatient", 3),
        orientation=_numbers(header, "ImageOrientationPatient", 6),
        pixel_spacing=_numbers(header, "PixelSpacing", 2),
        thickness=_number(header, "SliceThickness"),
        slope=_number(header, "RescaleSlope"),
        intercept=_number(header, "RescaleIntercept"),
        rescale_type=get_text(header, "RescaleType").upper(),
    )


def get_text(header: Dataset, keyword: str) -> str:
    """Return a value as text, "" where it is missing.

    Args:
        header: as :func:`read_header` returns it.
        keyword: DICOM keyword.
    """
    value = _value(header, keyword)
    if value is None:
        return ""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return (" ".join(map(str, value)) if several else str(value)).strip()


def get_integer(header: Dataset, keyword: str) -> int | None:
    """Return a value as an integer, None where it is missing or malformed.

    Args:
        header: as :func:`read_header` returns it.
        keyword: DICOM keyword.
    """
    number = _number(header, keyword)
    return None if number is None else int(number)


def _value(header: Dataset, keyword: str) -> Any:
    try:
        return header.get(keyword)
    except Exception:  # a value that does not fit its type is as good as missing
        return None


def _words(header: Dataset, keyword: str) -> tuple[str, ...]:
    value = _value(header, keyword) or []
    return tuple(str(word).strip().upper() for word in ([value] if isinstance(value, str) else value))


def _numbers(header: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    value = _value(header, keyword)
    values = [] if value is None else [value] if isinstance(value, (str, int, float)) else list(value)
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _number(header: Dataset, keyword: str) -> float | None:
    numbers = _numbers(header, keyword, 1)
    return None if numbers is None else numbers[0]
