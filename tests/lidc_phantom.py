# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A tiny data set like LIDC-IDRI: synthetic CTs as DICOM, with the readings of four radiologists as XML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from pydicom import dcmread
from scipy.ndimage import binary_dilation, binary_erosion

from custom.data.dicom_writer import write_dicom_series
from custom.data.phantom import Lesion, Phantom, make_phantom

CROSS = np.zeros((3, 3, 3), bool)
CROSS[:, 1, 1] = CROSS[1, :, 1] = True  # grows and shrinks within a slice, 4-connected
SHAPE, SPACING = (100, 100, 12), (3.4, 3.4, 8.0)
NODULES = (
    Lesion("nodule", (0.5, 0.45, 0.6), (14, 12, 20), side="left"),
    Lesion("nodule", (0.55, 0.4, 0.5), (12, 14, 20), side="right"),
)


@dataclass(frozen=True)
class Outlined:
    """A nodule as a reader outlines it.

    Args:
        name: the reader's name for it.
        mask: bool (I, J, K), what the outlines enclose.
        hole: bool (I, J, K), what is excluded from it.
    """

    name: str
    mask: np.ndarray
    hole: np.ndarray | None = None

    @property
    def truth(self) -> np.ndarray:
        """What belongs to the nodule."""
        return self.mask if self.hole is None else self.mask & ~self.hole


@dataclass(frozen=True)
class LidcCase:
    """A case as it was written.

    Args:
        patient: Patient ID.
        series_uid: Series Instance UID.
        dicom: folder of the slices.
        xml: the XML file.
        image: HU (I, J, K).
        affine: (4, 4) to RAS+ mm.
        half: voxels that at least half of a nodule's annotations have, bool (I, J, K).
        two_of_four: voxels that at least two readers have, bool (I, J, K).
        voxels: those of ``half`` by nodule, from inferior to superior.
    """

    patient: str
    series_uid: str
    dicom: Path
    xml: Path
    image: np.ndarray
    affine: np.ndarray
    half: np.ndarray
    two_of_four: np.ndarray
    voxels: tuple[int, ...]


@lru_cache(maxsize=1)
def _chest() -> Phantom:
    return make_phantom(SHAPE, SPACING, seed=1, lesions=NODULES, scale=1.0)


def write_case(folder: Path, number: int = 1, series_number: int = 1) -> LidcCase:
    """Write one patient as the Cancer Imaging Archive lays it out: patient/study/series with the XML inside.

    All four readers outline the first nodule, two of them alike, one wider by a pixel and one narrower; all
    but the last exclude its middle voxel. The first two outline the second nodule, one without its top slice.

    Args:
        folder: of the collection.
        number: of the patient.
        series_number: tells several scans of one patient apart.
    """
    phantom = _chest()
    image = phantom.image + np.int16(10 * number + series_number)  # the same chest, and no two files alike
    patient = f"LIDC-IDRI-{number:04d}"
    nodule, other = (phantom.label > 0) & (phantom.lungs == 1), (phantom.label > 0) & (phantom.lungs == 2)
    middle = np.argwhere(nodule).mean(axis=0).round().astype(int)
    hole = np.zeros_like(nodule)
    hole[tuple(middle)] = True
    narrow = binary_erosion(nodule, CROSS)
    top = np.flatnonzero(other.any(axis=(0, 1)))[-1]
    shorter = other.copy()
    shorter[:, :, top] = False
    readers = [
        [Outlined("Nodule 001", nodule, hole), Outlined("Nodule 002", other)],
        [Outlined("IL057_1", shorter), Outlined("IL057_2", nodule, hole)],
        [Outlined("MI014_7", binary_dilation(nodule, CROSS), hole)],
        [Outlined("0", narrow)],
    ]
    first = np.mean([r.truth for r in (readers[0][0], readers[1][1], readers[2][0], readers[3][0])], axis=0)
    second = np.mean([other, shorter], axis=0)

    target = folder / patient / f"study-{series_number}" / f"series-{series_number}"
    files = write_dicom_series(
        target,
        image,
        phantom.affine,
        seed=number,
        patient_id=patient,
        series_number=series_number,
        slice_thickness=SPACING[2],
        shuffle=True,
    )
    headers = [dcmread(file, stop_before_pixels=True) for file in files]
    xml = target / f"{60 + number:03d}.xml"
    slices = [(float(h.ImagePositionPatient[2]), str(h.SOPInstanceUID)) for h in headers]
    write_readings(xml, str(headers[0].SeriesInstanceUID), slices, readers)
    half = [int((first >= 0.5).sum()), int((second >= 0.5).sum())]
    heights = [np.argwhere(mask)[:, 2].mean() for mask in (nodule, other)]
    return LidcCase(
        patient=patient,
        series_uid=str(headers[0].SeriesInstanceUID),
        dicom=target,
        xml=xml,
        image=image,
        affine=phantom.affine,
        half=(first >= 0.5) | (second >= 0.5),
        two_of_four=(first >= 0.5) | shorter,
        voxels=tuple(half[i] for i in np.argsort(heights)),
    )


def write_readings(
    path: Path,
    series_uid: str,
    slices: Sequence[tuple[float, str]],
    readers: Sequence[Sequence[Outlined]],
) -> None:
    """Write an XML file as LIDC-IDRI has them, with a nodule below 3 mm and a non-nodule from each reader.

    Args:
        path: the file.
        series_uid: Series Instance UID.
        slices: z in mm and SOP Instance UID of each slice.
        readers: what each reader outlined.
    """
    root = ElementTree.Element("LidcReadMessage", {"uid": "1.2.3", "xmlns": "http://www.nih.gov"})
    header = ElementTree.SubElement(root, "ResponseHeader")
    _add(header, Version="1.8.1", SeriesInstanceUid=series_uid, StudyInstanceUID="1.2.4")
    for reader in readers:
        session = ElementTree.SubElement(root, "readingSession")
        _add(session, annotationVersion="3.12", servicingRadiologistID="anonymous")
        for outlined in reader:
            nodule = ElementTree.SubElement(session, "unblindedReadNodule")
            _add(nodule, noduleID=outlined.name)
            _add(ElementTree.SubElement(nodule, "characteristics"), subtlety=5, malignancy=3)
            masks = [(outlined.mask, "TRUE")] + (
                [(outlined.hole, "FALSE")] if outlined.hole is not None else []
            )
            for mask, inclusion in masks:
                for k in np.flatnonzero(mask.any(axis=(0, 1))):
                    _add_roi(nodule, slices[k], inclusion, outline(mask[:, :, k]))
        small = ElementTree.SubElement(session, "unblindedReadNodule")
        _add(small, noduleID="small")
        _add_roi(small, slices[1], "TRUE", [(40, 41)])
        other = ElementTree.SubElement(session, "nonNodule")
        _add(other, nonNoduleID="scar", imageZposition=slices[2][0], imageSOP_UID=slices[2][1])
        _add(ElementTree.SubElement(other, "locus"), xCoord=12, yCoord=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="UTF-8", xml_declaration=True)


def write_chest_xray(path: Path) -> None:
    """Write the reading of a chest X-ray, which has another root element."""
    root = ElementTree.Element("IdriReadMessage", {"xmlns": "http://www.nih.gov/idri"})
    _add(ElementTree.SubElement(root, "ResponseHeader"), SeriesInstanceUID="1.2.9", Modality="CXR")
    ElementTree.ElementTree(root).write(path, encoding="UTF-8", xml_declaration=True)


def outline(mask: np.ndarray) -> list[tuple[int, int]]:
    """The pixels just outside a convex region (I, J), in order and closed, as readers' tools write them."""
    ring = np.argwhere(binary_dilation(mask, CROSS[:, :, 1]) & ~mask)
    away = ring - np.argwhere(mask).mean(axis=0)
    ring = ring[np.argsort(np.arctan2(away[:, 1], away[:, 0]))]
    return [(int(x), int(y)) for x, y in [*ring, ring[0]]]


def _add_roi(nodule: ElementTree.Element, place: tuple[float, str], inclusion: str, points) -> None:
    roi = ElementTree.SubElement(nodule, "roi")
    _add(roi, imageZposition=f"{place[0]:.6f} ", imageSOP_UID=place[1], inclusion=inclusion)
    for x, y in points:
        _add(ElementTree.SubElement(roi, "edgeMap"), xCoord=x, yCoord=y)


def _add(parent: ElementTree.Element, **texts) -> None:
    for name, text in texts.items():
        ElementTree.SubElement(parent, name).text = str(text)
