# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The readers' XML files of LIDC-IDRI: outlines of nodules by up to four radiologists."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

__all__ = ["ChestXrayError", "LidcAnnotation", "LidcContour", "LidcReadings", "read_annotations"]

MAX_BYTES = 32 * 2**20
"""Larger files are refused; those of LIDC-IDRI have up to 2 MB."""


class ChestXrayError(ValueError):
    """The XML file reads a chest X-ray, of which LIDC-IDRI has some, and no CT."""


@dataclass(frozen=True, eq=False)
class LidcContour:
    """One closed outline on one slice.

    Args:
        z: third coordinate of the slice's ImagePositionPatient in mm.
        sop_uid: SOP Instance UID of the slice, or "".
        inclusion: whether it encloses the nodule (True) or a part that is none of it (False).
        points: (N, 2) integers, column (x) and row (y) from 0. They lie just outside what they enclose.
    """

    z: float
    sop_uid: str
    inclusion: bool
    points: np.ndarray


@dataclass(frozen=True)
class LidcAnnotation:
    """One nodule of 3 mm or more as one radiologist outlined it.

    Args:
        reader: which radiologist, counted from 0; their identifiers are anonymous and often the same.
        nodule_id: the reader's own name for the nodule; other readers name it otherwise.
        contours: its outlines, in the order of the file.
    """

    reader: int
    nodule_id: str
    contours: tuple[LidcContour, ...]


@dataclass(frozen=True)
class LidcReadings:
    """What all radiologists outlined in one CT series.

    Args:
        series_uid: Series Instance UID of the CT.
        study_uid: Study Instance UID, or "".
        readers: for each reading session its annotations; empty for a reader who found no nodule of 3 mm.
    """

    series_uid: str
    study_uid: str
    readers: tuple[tuple[LidcAnnotation, ...], ...]

    @property
    def annotations(self) -> tuple[LidcAnnotation, ...]:
        """The annotations of all readers, reader by reader."""
        return tuple(annotation for reader in self.readers for annotation in reader)


def read_annotations(xml_path: str | os.PathLike) -> LidcReadings:
    """Read the nodules of 3 mm or more in a reader XML file of LIDC-IDRI.

    Smaller nodules (a single point marks them) and findings that are no nodules are left out, and so are
    single points among the outlines of a larger one, since they enclose nothing.

    Args:
        xml_path: the file.

    Raises:
        FileNotFoundError: When there is no such file.
        ChestXrayError: When the file reads a chest X-ray.
        ValueError: In one line, when the file is too large, no XML, declares a document type or entities
            (which LIDC-IDRI's files never do), is no LIDC-IDRI reading, or lacks what it must have.

    Reference:
        Armato et al., The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative
        (IDRI): a completed reference database of lung nodules on CT scans, Medical Physics 38:915-931, 2011.
    """
    path = Path(xml_path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        root = _parse(path)
        if _name(root) == "IdriReadMessage":
            raise ChestXrayError("reads a chest X-ray, not a CT")
        if _name(root) != "LidcReadMessage":
            raise ValueError(f"is no LIDC-IDRI reading, its root element is '{_name(root)}'")
        series_uid = study_uid = ""
        for header in _children(root, "ResponseHeader"):
            series_uid = _text(header, "SeriesInstanceUid") or _text(header, "SeriesInstanceUID")
            study_uid = _text(header, "StudyInstanceUID")
        if not series_uid:
            raise ValueError("names no CT series, its SeriesInstanceUid is missing")
        sessions = list(_children(root, "readingSession"))
        if not sessions:
            raise ValueError("has no reading session")
        readers = tuple(tuple(_read_session(number, session)) for number, session in enumerate(sessions))
    except ChestXrayError as error:
        raise ChestXrayError(f"{path} {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return LidcReadings(series_uid, study_uid, readers)


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree, but of no document that could define entities."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("declares a document type, which no LIDC-IDRI file does; it is not read")


def _parse(path: Path) -> ElementTree.Element:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES // 2**20} MB; it is no LIDC-IDRI reading")
    parser = ElementTree.XMLParser(target=_Builder())
    try:
        with open(path, "rb") as stream:
            # In pieces, so that nothing that follows a document type is looked at.
            while piece := stream.read(4096):
                parser.feed(piece)
        return parser.close()
    except ElementTree.ParseError as error:
        raise ValueError(f"is not valid XML: {error}") from None
    except (LookupError, UnicodeError) as error:  # an encoding that does not exist
        raise ValueError(f"is not valid XML: {' '.join(str(error).split())}") from None


def _read_session(reader: int, session: ElementTree.Element) -> Iterator[LidcAnnotation]:
    for nodule in _children(session, "unblindedReadNodule"):
        nodule_id = _text(nodule, "noduleID")
        try:
            contours = [_read_contour(roi) for roi in _children(nodule, "roi")]
        except ValueError as error:
            raise ValueError(
                f"has a bad outline, reader {reader + 1}, nodule '{nodule_id}': {error}"
            ) from None
        contours = [contour for contour in contours if len(contour.points) > 1]
        if any(contour.inclusion for contour in contours):
            yield LidcAnnotation(reader, nodule_id, tuple(contours))


def _read_contour(roi: ElementTree.Element) -> LidcContour:
    position, inclusion = _text(roi, "imageZposition"), _text(roi, "inclusion").upper()
    try:
        z = float(position)
    except ValueError:
        z = math.nan
    if not math.isfinite(z):
        raise ValueError(f"imageZposition '{position}' is no number")
    if inclusion not in ("TRUE", "FALSE"):
        raise ValueError(f"inclusion is '{inclusion}' at z {z:g}, neither TRUE nor FALSE")
    points = [(_text(edge, "xCoord"), _text(edge, "yCoord")) for edge in _children(roi, "edgeMap")]
    try:
        array = np.array([(int(x), int(y)) for x, y in points], dtype=np.int32).reshape(-1, 2)
    except (ValueError, OverflowError):
        raise ValueError(f"a point at z {z:g} has coordinates that are no whole numbers") from None
    return LidcContour(z, _text(roi, "imageSOP_UID"), inclusion == "TRUE", array)


def _name(element: ElementTree.Element) -> str:
    """The element's name without its namespace."""
    return element.tag.rpartition("}")[2]


def _children(element: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    return (child for child in element if _name(child) == name)


def _text(element: ElementTree.Element, name: str) -> str:
    return next((child.text or "" for child in _children(element, name)), "").strip()
