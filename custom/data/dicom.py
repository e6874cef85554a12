# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Which DICOM studies and series a folder holds.

Only headers are read here, and file names and their order are never relied on;
:mod:`custom.data.dicom_series` chooses a study's series and turns it into a volume.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from custom.data.dicom_header import Instance, get_integer, get_text, make_instance, object_kind, read_header
from custom.data.files import is_denied

__all__ = ["Series", "Study", "find_studies", "group_studies", "walk_files"]

_AXIAL_COSINE = np.cos(np.deg2rad(30))  # slices turned further than this from a body plane are oblique


@dataclass(frozen=True)
class Series:
    """One series: its CT images, and what else bears its UID.

    Args:
        uid: Series Instance UID.
        study_uid: Study Instance UID.
        number: Series Number.
        modality: Modality.
        instances: CT images, by InstanceNumber; a series that was read has them in the order of its slices.
        excluded: what the series holds besides CT images, as (kind, number of them).
        other_files: the files of ``excluded``.
        unreadable: files beside the images that should be DICOM and are not: broken or empty ones.
        study_date: DICOM date (YYYYMMDD) or "".
        study_time: DICOM time or "".
        kernel: convolution kernel or "".
        patient_position: for example HFS (head first, supine), or "".
        contrast_agent: contrast agent or "".
        manufacturer: maker of the scanner or "".
        model: the scanner's model or "".
    """

    uid: str
    study_uid: str
    number: int | None
    modality: str
    instances: tuple[Instance, ...]
    excluded: tuple[tuple[str, int], ...] = ()
    other_files: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    study_date: str = ""
    study_time: str = ""
    kernel: str = ""
    patient_position: str = ""
    contrast_agent: str = ""
    manufacturer: str = ""
    model: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the CT images."""
        return tuple(instance.file for instance in self.instances)

    @property
    def all_files(self) -> tuple[str, ...]:
        """Every file that reading the series must know of, its CT images first."""
        return self.files + self.other_files + self.unreadable

    @property
    def thickness(self) -> float | None:
        """Slice Thickness of the first image in mm, None where missing."""
        return self.instances[0].thickness if self.instances else None

    @property
    def orientation(self) -> str:
        """axial, coronal, sagittal, oblique, or unknown where the headers do not say."""
        first = next((i.orientation for i in self.instances if i.orientation), None)
        if first is None:
            return "unknown"
        normal = np.abs(np.cross(first[:3], first[3:]))
        if normal.max() < _AXIAL_COSINE:
            return "oblique"
        return ("sagittal", "coronal", "axial")[int(normal.argmax())]

    @property
    def label(self) -> str:
        """How messages call the series: by its number and UID, since descriptions may hold names."""
        return f"series {'(no number)' if self.number is None else self.number} ({self.uid})"


@dataclass(frozen=True)
class Study:
    """One study: a visit to the scanner.

    Args:
        uid: Study Instance UID.
        date: DICOM date (YYYYMMDD) or "".
        series: its series, by number.
    """

    uid: str
    date: str
    series: tuple[Series, ...]

    @property
    def name(self) -> str:
        """Name for output files: always the same, safe on any file system, and silent about the patient."""
        return "study-" + hashlib.sha256(self.uid.encode()).hexdigest()[:12]

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the study, each once."""
        return tuple(dict.fromkeys(file for series in self.series for file in series.all_files))


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the files below a folder in a fixed order, without hidden files and folders.

    A folder that may not be read is yielded in place of its files, lest they vanish in silence. Links to
    folders are followed; a folder that several paths lead to is walked once, so links in a circle end.

    Args:
        folder: where to look, with all its sub-folders.

    Raises:
        FileNotFoundError: When there is no such folder.
    """
    if not Path(folder).is_dir():
        hint = "; this is a file, give the folder that holds it" if Path(folder).is_file() else ""
        raise FileNotFoundError(f"no such folder: {folder}{hint}")
    denied: list[str] = []
    walked: set[str] = set()
    walk = os.walk(os.fspath(folder), onerror=lambda e: denied.append(e.filename), followlinks=True)
    for path, folders, files in walk:
        yield from denied
        denied.clear()
        if os.path.realpath(path) in walked:
            folders.clear()
            continue
        walked.add(os.path.realpath(path))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = os.path.join(path, name)
            # Reading a pipe or a device may never end. A link to nothing is a file that was lost.
            if not name.startswith(".") and (os.path.isfile(file) or os.path.islink(file)):
                yield file
    yield from denied


def find_studies(folder: str | os.PathLike[str]) -> list[Study]:
    """Find the DICOM studies in a folder and its sub-folders; whatever is not DICOM is left aside.

    Args:
        folder: where to look.

    Returns:
        The studies by date and UID; an empty list where there are none.

    Raises:
        FileNotFoundError: When there is no such folder.
    """
    return group_studies(walk_files(folder))


def group_studies(files: Iterable[str | os.PathLike[str]]) -> list[Study]:
    """Group files by study and series, from their headers alone.

    A file that is broken, or that has the suffix of the DICOM files beside it and is none, is no reason to
    lose a slice in silence: it is remembered with the series of its folder, and reading those fails.

    Args:
        files: any files, in any order.

    Returns:
        The studies by date and UID.

    Raises:
        FileNotFoundError: When a file does not exist.
    """
    headers: dict[str, Dataset] = {}
    broken, foreign = set(), set()
    for file in map(str, files):
        header = read_header(file)
        if isinstance(header, Dataset):
            headers[file] = header
        elif header == "broken":
            broken.add(file)
        elif header == "foreign":
            foreign.add(file)

    suffixes = {(os.path.dirname(file), _suffix(file)) for file in headers}
    for file in foreign:
        # A text beside files without suffix (README) is common; an empty or binary file is a lost image.
        beside = (os.path.dirname(file), _suffix(file)) in suffixes
        if beside and (_suffix(file) or not _is_text(file)):
            broken.add(file)

    by_study: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, header in headers.items():
        by_study[str(header.StudyInstanceUID)][str(header.SeriesInstanceUID)].append(file)
    studies = []
    for uid, by_series in by_study.items():
        series = [_make_series({f: headers[f] for f in members}, broken) for members in by_series.values()]
        series.sort(key=lambda s: (s.number is None, s.number or 0, s.uid))
        date = next((s.study_date for s in series if s.study_date), "")
        studies.append(Study(uid, date, tuple(series)))
    return sorted(studies, key=lambda s: (s.date, s.uid))


def refuse_denied_files(files: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse files and folders that this user may not read; paths are not named, since folders bear names.

    Args:
        files: of no study that is known.

    Raises:
        ValueError: In one line with their number.
    """
    if count := sum(is_denied(file) for file in files):
        what = "a file or folder" if count == 1 else f"{count} files or folders"
        raise ValueError(f"permission denied to read {what}; 'find SCANS ! -readable' lists them")


def _suffix(file: str) -> str:
    # The last part of a UID used as a file name is no suffix.
    suffix = os.path.splitext(file)[1].lower()
    return "" if suffix[1:].isdigit() else suffix


def _is_text(file: str) -> bool:
    with open(file, "rb") as stream:
        start = stream.read(132)
    return bool(start) and b"\0" not in start


def _make_series(headers: dict[str, Dataset], broken: set[str]) -> Series:
    kinds = {file: object_kind(header) for file, header in sorted(headers.items())}
    instances = [make_instance(file, headers[file]) for file, kind in kinds.items() if not kind]
    instances.sort(key=lambda i: (i.number is None, i.number or 0, i.uid, i.file))
    first = headers[instances[0].file if instances else min(headers)]
    folders = {os.path.dirname(file) for file in headers}
    return Series(
        uid=str(first.SeriesInstanceUID),
        study_uid=str(first.StudyInstanceUID),
        number=get_integer(first, "SeriesNumber"),
        modality=get_text(first, "Modality"),
        instances=tuple(instances),
        excluded=tuple(sorted(Counter(kind for kind in kinds.values() if kind).items())),
        other_files=tuple(file for file, kind in kinds.items() if kind),
        unreadable=tuple(sorted(file for file in broken if os.path.dirname(file) in folders)),
        study_date=get_text(first, "StudyDate"),
        study_time=get_text(first, "StudyTime"),
        kernel=get_text(first, "ConvolutionKernel"),
        patient_position=get_text(first, "PatientPosition"),
        contrast_agent=get_text(first, "ContrastBolusAgent"),
        manufacturer=get_text(first, "Manufacturer"),
        model=get_text(first, "ManufacturerModelName"),
    )
