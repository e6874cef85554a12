# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A download of LIDC-IDRI: which CT series and which readings of them are there."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from tqdm import tqdm

from custom.console import bar_interval
from custom.data.dicom import group_studies, refuse_denied_files, walk_files
from custom.data.dicom_series import CTVolume, read_series
from custom.data.files import file_sha256
from custom.data.lidc import ChestXrayError, LidcReadings, read_annotations
from custom.data.work import LeftOut, work_through

__all__ = [
    "LidcSeries",
    "LidcXml",
    "download_lidc",
    "find_readings",
    "find_series",
]

CHUNK = 256  # files whose headers one task reads


@dataclass(frozen=True)
class LidcXml:
    """A reader XML file.

    Args:
        readings: what is in it.
        digest: SHA-256 of the file.
    """

    readings: LidcReadings
    digest: str


@dataclass
class LidcSeries:
    """The files of a series, from a first look at their headers.

    Args:
        uid: Series Instance UID.
        modality: Modality.
        patient: the public number of LIDC-IDRI, or a hash of any other Patient ID.
        files: its DICOM files.
        unreadable: what else is in their folders and is not DICOM.
    """

    uid: str
    modality: str
    patient: str
    files: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def read(self) -> CTVolume:
        """Read the voxels.

        Raises:
            ValueError: When files beside the slices are broken, or the series cannot be trusted, see
                :func:`custom.data.dicom_series.read_series`.
        """
        studies = group_studies(self.files + self.unreadable)
        series = next((s for study in studies for s in study.series if s.uid == self.uid), None)
        if series is None:
            raise ValueError("its files hold no images")
        if series.unreadable:
            first = os.path.basename(series.unreadable[0])
            raise ValueError(
                f"{len(series.unreadable)} of the files beside its slices are broken or empty, the first is "
                f"{first}; copy the series again, or remove what does not belong to it"
            )
        return read_series(series)


def find_readings(folder: str | os.PathLike) -> tuple[dict[str, LidcXml], list[LeftOut]]:
    """Read all XML files of a folder.

    Args:
        folder: where they are, in whatever sub-folders.

    Returns:
        The CT readings by Series Instance UID, and the files that are none.

    Raises:
        FileNotFoundError: When the folder does not exist or has no XML file.
    """
    files = [file for file in walk_files(folder) if file.lower().endswith(".xml")]
    if not files:
        raise FileNotFoundError(
            f"no XML file under {folder}; the Cancer Imaging Archive offers those of LIDC-IDRI by themselves"
        )
    found: dict[str, LidcXml] = {}
    left_out = []
    ambiguous = set()
    for file in _bar(files, len(files), "XML files", "file"):
        name = os.path.relpath(file, folder)
        try:
            readings = read_annotations(file)
        except ChestXrayError:
            left_out.append(LeftOut(name, "XML of a chest X-ray", "it reads a chest X-ray, not a CT", False))
            continue
        except ValueError as error:
            reason = str(error).removeprefix(f"{file} ")
            left_out.append(LeftOut(name, "bad XML", f"it {reason}", True))
            continue
        uid, digest = readings.series_uid, file_sha256(file)
        if found.setdefault(uid, LidcXml(readings, digest)).digest != digest:
            reason = f"it reads series {uid} otherwise than another XML file does; keep one of them"
            left_out.append(LeftOut(name, "bad XML", reason, True))
            ambiguous.add(uid)
    return {uid: xml for uid, xml in found.items() if uid not in ambiguous}, left_out


def find_series(source: str | os.PathLike, num_workers: int = 0) -> dict[str, LidcSeries]:
    """Find the DICOM series of a folder, from their headers alone.

    Args:
        source: where they are, in whatever sub-folders.
        num_workers: processes; 0 and 1 use none besides this one.

    Returns:
        The series by Series Instance UID.

    Raises:
        FileNotFoundError: When there is no such folder.
        ValueError: When files may not be read that are beside no series, which would miss them.
    """
    files = [file for file in walk_files(source) if not file.lower().endswith(".xml")]
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    found: dict[str, LidcSeries] = {}
    unreadable: dict[str, list[str]] = defaultdict(list)
    for rows in work_through(_read_headers, chunks, num_workers, "DICOM headers", f"x{CHUNK} files"):
        for file, uid, modality, patient in rows:
            if uid:
                found.setdefault(uid, LidcSeries(uid, modality, patient)).files.append(file)
            else:
                unreadable[os.path.dirname(file)].append(file)
    known = {os.path.dirname(file) for series in found.values() for file in series.files}
    lost = [file for folder in sorted(unreadable.keys() - known) for file in unreadable[folder]]
    refuse_denied_files(lost)
    for series in found.values():
        series.files.sort()
        for folder in sorted({os.path.dirname(file) for file in series.files}):
            series.unreadable += sorted(unreadable.get(folder, []))
    return found


def download_lidc(xml_dir: str | os.PathLike, folder: str | os.PathLike) -> int:
    """Download the CT series that XML files outline nodules in, from the NCI Imaging Data Commons.

    It has LIDC-IDRI's DICOM files and not its XML files, which are a small download from the Cancer Imaging
    Archive. What is there already is not fetched again.

    Args:
        xml_dir: folder with the XML files.
        folder: gets the series.

    Returns:
        The number of series asked for.

    Raises:
        FileNotFoundError: When there is no XML file.
        ValueError: When none of them outlines a nodule, or the client, idc-index, is not installed.
    """
    try:
        from idc_index import IDCClient
    except ImportError:
        raise ValueError(
            "downloading needs the client of the Imaging Data Commons, which is not installed: "
            "pip install idc-index"
        ) from None
    found, _ = find_readings(xml_dir)
    uids = sorted(uid for uid, xml in found.items() if xml.readings.annotations)
    if not uids:
        raise ValueError(f"no XML file under {xml_dir} outlines a nodule of 3 mm or more in a CT")
    Path(folder).mkdir(parents=True, exist_ok=True)
    IDCClient().download_from_selection(str(folder), seriesInstanceUID=uids, use_s5cmd_sync=True)
    return len(uids)


def _read_headers(files: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """File, series UID ("" where it is no DICOM image), modality and patient."""
    tags = ("SeriesInstanceUID", "Modality", "PatientID", "StudyInstanceUID")
    rows = []
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
            uid, modality, patient, study = (str(header.get(tag) or "").strip() for tag in tags)
        except Exception:  # pydicom raises whatever a damaged or foreign file leads it into
            uid = modality = patient = study = ""
        rows.append((file, uid, modality, _pseudonym(patient or study)))
    return rows


def _pseudonym(patient_id: str) -> str:
    """LIDC-IDRI's own numbers are public; anything else could name a patient."""
    if re.fullmatch(r"LIDC-IDRI-\d{4}", patient_id):
        return patient_id
    return f"patient-{hashlib.sha256(patient_id.encode()).hexdigest()[:12]}"


def _bar(items: Any, total: int, desc: str, unit: str) -> tqdm:
    return tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True, mininterval=bar_interval())
