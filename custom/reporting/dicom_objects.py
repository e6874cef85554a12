# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Results as DICOM objects: a Segmentation of lungs and opacity, and a Structured Report of the numbers."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from custom.data.files import atomic_path
from custom.reporting.dicom_common import LABELS, algorithm, claim, equipment, finding_code, series_number
from custom.reporting.dicom_report import make_report
from custom.reporting.dicom_source import DicomOutputError, SourceSeries
from custom.reporting.quantify import CONSOLIDATION_FROM_HU, LUNGS

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription

__all__ = ["SEGMENTS", "Segment", "has_highdicom", "make_segmentation", "make_segments", "write_dicom"]

SEGMENTS = tuple(LABELS)
"""Segments of the Segmentation, in their order; one without a voxel is left out."""

_STEP = 50  # slices that become frames at a time

_COLOURS = {  # as in the overview picture, ground-glass and consolidation as shades of opacity's red
    "left_lung": (52, 199, 255),
    "right_lung": (52, 199, 255),
    "opacity": (255, 59, 48),
    "ground_glass": (255, 149, 0),
    "consolidation": (175, 20, 60),
}


class Segment(NamedTuple):
    """The voxels of a label map that have one of some values; segments that share a map share its memory.

    Attributes:
        labels: (I, J, K) in any axis order.
        values: those of the segment.
    """

    labels: np.ndarray
    values: tuple[int, ...]


def make_segments(opacity: np.ndarray, lungs: np.ndarray | None, hu: np.ndarray) -> dict[str, Segment]:
    """Make the segments of a study: opacity, its parts by density, and the lungs where they are known.

    Args:
        opacity: mask (I, J, K), above 0 is opacity.
        lungs: mask of the same shape with the values of :data:`custom.reporting.quantify.LUNGS`, or None.
        hu: the scan in HU, of the same shape.
    """
    # One label map for three segments: five masks of a long scan would take more memory than the scan.
    classes = (opacity > 0).view(np.uint8)
    np.putmask(classes, (hu >= CONSOLIDATION_FROM_HU) & (opacity > 0), 2)
    segments = {
        "opacity": Segment(classes, (1, 2)),
        "ground_glass": Segment(classes, (1,)),
        "consolidation": Segment(classes, (2,)),
    }
    if lungs is not None:
        segments |= {f"{side}_lung": Segment(lungs, (value,)) for side, value in LUNGS.items()}
    return segments


def has_highdicom() -> bool:
    """Whether the library that DICOM objects are made with is installed."""
    return importlib.util.find_spec("highdicom") is not None


def write_dicom(
    folder: str | os.PathLike,
    name: str,
    source: SourceSeries,
    segments: Mapping[str, Segment],
    affine: np.ndarray,
    measured: Mapping[str, Any],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``<name>_seg.dcm``, where any segment has a voxel, and ``<name>_sr.dcm``.

    Args:
        folder: where to write.
        name: start of the file names.
        source: the series that the segments belong to.
        segments: see :func:`make_segmentation`.
        affine: 4x4 from the label maps' indices to mm in RAS+.
        measured: see :func:`make_report`.
        model: ``bundle``, ``software_version`` and ``weights_sha256``.

    Returns:
        ``segments``, the names of those that were written, ``seg_sop_instance_uid``, None where there is no
        Segmentation, and ``sr_sop_instance_uid``.

    Raises:
        DicomOutputError: When the objects cannot be made from what the source's headers hold.
        OSError: When a file cannot be written.
    """
    with _silence():
        try:
            segmentation = make_segmentation(source, segments, affine, model)
            report = make_report(source, segmentation, measured, model)
            for kind, dataset in (("seg", segmentation), ("sr", report)):
                if dataset is not None:
                    with atomic_path(Path(folder) / f"{name}_{kind}.dcm") as temporary:
                        dataset.save_as(temporary, enforce_file_format=True)
        except (DicomOutputError, OSError):
            raise
        except Exception as error:  # texts of pydicom and highdicom quote values of the headers
            raise DicomOutputError(
                f"the headers of the source series do not make DICOM objects ({type(error).__name__})"
            ) from error
    described = [] if segmentation is None else [item.SegmentLabel for item in segmentation.SegmentSequence]
    return {
        "segments": [name for name in SEGMENTS if LABELS[name] in described],
        "seg_sop_instance_uid": None if segmentation is None else str(segmentation.SOPInstanceUID),
        "sr_sop_instance_uid": str(report.SOPInstanceUID),
    }


def make_segmentation(
    source: SourceSeries, segments: Mapping[str, Segment], affine: np.ndarray, model: Mapping[str, Any]
) -> Segmentation | None:
    """Make a BINARY Segmentation that refers to the slices of its source; empty frames are left out.

    Args:
        source: the series that the segments belong to.
        segments: by names of :data:`SEGMENTS`, on one grid.
        affine: 4x4 from the label maps' indices to mm in RAS+.
        model: ``bundle``, ``software_version`` and ``weights_sha256``.

    Returns:
        The Segmentation, None where all segments are empty.

    Raises:
        DicomOutputError: When a label map does not lie on the grid of the series.
    """
    from highdicom.seg import Segmentation, SegmentationTypeValues

    names = [name for name in SEGMENTS if name in segments and _within(*segments[name]).any()]
    if not names:
        return None
    options: dict[str, Any] = {
        "segmentation_type": SegmentationTypeValues.BINARY,
        "segment_descriptions": [
            _describe(number, name, model) for number, name in enumerate(names, start=1)
        ],
        "series_instance_uid": generate_uid(prefix=None),
        "series_number": series_number(source, 1),
        "sop_instance_uid": generate_uid(prefix=None),
        "instance_number": 1,
        **equipment(model),
        "content_label": "LUNG_OPACITY",
        "content_description": "Lungs and opacity",
        "series_description": "Lungs and opacity, research use only",
    }
    frames = [
        segments[name]._replace(labels=source.to_frames(segments[name].labels, affine)) for name in names
    ]
    parts = []
    # highdicom holds all frames of all segments, and a sum over them of eight bytes a voxel.
    for first in reversed(range(0, len(source.headers), _STEP)):  # its frames run against the normal
        slices = slice(first, first + _STEP)
        pixels = np.stack([_within(labels[slices], values) for labels, values in frames], axis=-1)
        if pixels.any():
            headers = source.headers[slices]
            parts.append(Segmentation(source_images=headers, pixel_array=pixels.view(np.uint8), **options))
    return claim(parts[0] if len(source.headers) <= _STEP else _join(parts, source), source)


def _within(labels: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    found = labels == values[0]
    for value in values[1:]:
        found |= labels == value
    return found


def _join(parts: Sequence[Segmentation], source: SourceSeries) -> Segmentation:
    """Make one object of those of successive slices, as if it had been made at once."""
    from highdicom.seg import Segmentation

    whole, size = parts[0], int(parts[0].Rows) * int(parts[0].Columns)
    frames, before = [], 0
    for part in parts:
        count = int(part.NumberOfFrames)
        bits = np.unpackbits(np.frombuffer(part.PixelData, np.uint8), count=count * size, bitorder="little")
        highest = 0
        groups = part.PerFrameFunctionalGroupsSequence
        for group, pixels in zip(groups, bits.reshape(count, size), strict=True):
            content = group.FrameContentSequence[0]
            segment, position = (int(index) for index in content.DimensionIndexValues)
            highest = max(highest, position)
            content.DimensionIndexValues = [segment, before + position]
            # Whole bytes wherever the frames have them.
            packed = pixels.copy() if size % 8 else np.packbits(pixels, bitorder="little")
            frames.append((segment, before + position, group, packed))
        before += highest
    frames.sort(key=lambda frame: frame[:2])
    whole.PerFrameFunctionalGroupsSequence = [group for _, _, group, _ in frames]
    whole.NumberOfFrames = len(frames)
    joined = np.concatenate([pixels for *_, pixels in frames])
    content = (np.packbits(joined, bitorder="little") if size % 8 else joined).tobytes()
    whole.PixelData = content + b"\0" * (len(content) % 2)
    overlaps = {part.SegmentsOverlap for part in parts}
    whole.SegmentsOverlap = "YES" if "YES" in overlaps else whole.SegmentsOverlap
    for holder, keyword in (
        (whole, "SourceImageSequence"),
        (whole.ReferencedSeriesSequence[0], "ReferencedInstanceSequence"),
    ):
        setattr(holder, keyword, [_refer(header) for header in source.headers])
    return Segmentation.from_dataset(whole, copy=False)


def _refer(header: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    return item


def _describe(number: int, name: str, model: Mapping[str, Any]) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept

    side = {"left_lung": codes.SCT.Left, "right_lung": codes.SCT.Right}.get(name)
    category = codes.SCT.MorphologicallyAbnormalStructure if side is None else codes.SCT.AnatomicalStructure
    # A mask that was given may be corrected or drawn by hand; the lungs and the split by HU are found here.
    by_hand = not model["bundle"] and side is None
    types = SegmentAlgorithmTypeValues
    description = SegmentDescription(
        segment_number=number,
        segment_label=LABELS[name],
        segmented_property_category=category,
        segmented_property_type=finding_code(name) if side is None else codes.SCT.Lung,
        algorithm_type=types.SEMIAUTOMATIC if by_hand else types.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            **algorithm(model), family=codes.DCM.ArtificialIntelligence
        ),
        tracking_uid=generate_uid(prefix=None),
        tracking_id=LABELS[name],
        anatomic_regions=[codes.SCT.Lung] if side is None else None,
        display_color=CIELabColor.from_rgb(*_COLOURS[name]),
    )
    if side is not None:
        property_type = description.SegmentedPropertyTypeCodeSequence[0]
        property_type.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(side)]
    return description


@contextmanager
def _silence() -> Iterator[None]:
    """Keep to themselves what pydicom and highdicom remark on the headers, for they quote them."""
    loggers = [logging.getLogger(name) for name in ("highdicom", "pydicom")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
