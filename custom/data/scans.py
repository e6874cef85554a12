# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Scans of either kind, NIfTI files and DICOM studies: listing those of a folder, and reading one."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from custom.data.dicom import Study, find_studies, group_studies, refuse_denied_files, walk_files
from custom.data.dicom_series import choose_series, read_series
from custom.data.files import is_denied

__all__ = ["Scan", "is_nifti", "list_scans", "read_scan"]

_MAX_NAME = 100  # leaves room for what output files add to it


@dataclass(frozen=True)
class Scan:
    """One scan as it was stored.

    Args:
        voxels: (I, J, K) values as stored and scaled; HU for a CT.
        affine: (4, 4) from voxel indices to mm in RAS+ space.
        study: where it comes from, in plain values (str, int, float, None, lists of str) that JSON can hold:
            ``name`` for output files; ``source`` ("dicom" or "nifti"); ``files``, for DICOM in the order of
            the slices; ``series_choice``, why this series; ``notes``; and, None for NIfTI, ``study_uid``,
            ``series_uid``, ``series_number``, ``frame_of_reference_uid``, ``study_date``, ``study_time``,
            ``slice_thickness`` (mm), ``kernel``, ``patient_position``, ``contrast_agent``, ``manufacturer``
            and ``model``. There is nothing about the patient in it but what the paths in ``files`` tell.
    """

    voxels: np.ndarray
    affine: np.ndarray
    study: dict[str, Any]


def is_nifti(path: str | os.PathLike[str]) -> bool:
    """Whether a file name is that of a NIfTI file.

    Args:
        path: file name.
    """
    return str(path).lower().endswith((".nii", ".nii.gz"))


def list_scans(folder: str | os.PathLike[str], series_uid: str | None = None) -> list[dict[str, Any]]:
    """List the scans in a folder and its sub-folders: every NIfTI file and every DICOM study is one.

    A study without a series to read is listed with all its files, so that it fails, with the reason, when it
    is loaded and does not vanish from the results. So are, folder by folder, files that may not be read.

    Args:
        folder: where to look; hidden files and folders are left aside.
        series_uid: list only this DICOM series.

    Returns:
        Items sorted by path: ``image`` (a path, or the paths of a series, which
        :class:`custom.transforms.LoadCTd` loads without looking at the folder again), ``name`` (for output
        files, unique in the list: the path below ``folder`` for NIfTI, a hash of the Study Instance UID for
        DICOM) and ``series_choice`` (one line, "" for NIfTI).

    Raises:
        FileNotFoundError: When the folder does not exist or holds no scan.
        ValueError: When ``series_uid`` is given and no study has it.
    """
    files = list(walk_files(folder))
    studies = group_studies(file for file in files if not is_nifti(file))
    if series_uid is not None:
        studies = [study for study in studies if any(s.uid == series_uid for s in study.series)]
        if not studies:
            raise ValueError(f"no series {series_uid} in {folder}")
        files = []
    items = [_nifti_item(file, folder) for file in files if is_nifti(file)]
    items += [_study_item(study, series_uid) for study in studies]
    items += _denied_items(files, studies, folder)
    if not items:
        raise FileNotFoundError(f"no NIfTI file (.nii, .nii.gz) and no DICOM study in {folder}")
    items.sort(key=lambda item: item["image"] if isinstance(item["image"], str) else item["image"][0])
    counts = Counter(item["name"].lower() for item in items)
    for item in items:
        if counts[item["name"].lower()] > 1:  # a_b/ct.nii and a/b_ct.nii, or ct.nii and ct.nii.gz
            item["name"] += "_" + _hash(os.path.relpath(item["image"], folder))
    return items


def read_scan(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], series_uid: str | None = None
) -> Scan:
    """Read one scan.

    Args:
        paths: a NIfTI file, a folder with one DICOM study, or DICOM files of one study.
        series_uid: Series Instance UID to read in place of the one :func:`custom.data.choose_series` takes;
            NIfTI files have none and are read as they are.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: In one line, when there is no scan or more than one, or it cannot be trusted.
    """
    files = (
        [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]
    )
    nifti = [file for file in files if is_nifti(file)]
    if nifti and len(files) > 1:
        raise ValueError(f"one NIfTI file is one scan, got {len(files)} files, the first of them {files[0]}")
    if nifti:
        return _read_nifti(files[0])
    where = files[0] if len(files) == 1 else f"the {len(files)} files in {os.path.dirname(files[0]) or '.'}"
    studies = find_studies(files[0]) if len(files) == 1 and os.path.isdir(files[0]) else group_studies(files)
    if series_uid is not None and len(studies) > 1:
        studies = [study for study in studies if any(s.uid == series_uid for s in study.series)]
    if not studies:
        refuse_denied_files(files)
        raise ValueError(f"neither a NIfTI file (.nii, .nii.gz) nor a DICOM study: {where}")
    if len(studies) > 1:
        raise ValueError(
            f"{len(studies)} DICOM studies in {where}, one is a scan; give one study's folder or series UID"
        )
    series, reason = choose_series(studies[0], series_uid)
    volume = read_series(series)
    series = volume.series
    study = {
        "name": studies[0].name,
        "source": "dicom",
        "files": list(series.files),
        "series_choice": reason,
        "notes": list(volume.notes),
        "study_uid": series.study_uid,
        "series_uid": series.uid,
        "series_number": series.number,
        "frame_of_reference_uid": volume.frame_of_reference_uid or None,
        "study_date": series.study_date or None,
        "study_time": series.study_time or None,
        "slice_thickness": series.thickness,
        "kernel": series.kernel or None,
        "patient_position": series.patient_position or None,
        "contrast_agent": series.contrast_agent or None,
        "manufacturer": series.manufacturer or None,
        "model": series.model or None,
    }
    return Scan(volume.hu, volume.affine, study)


def _read_nifti(file: str) -> Scan:
    try:
        content = Path(file).read_bytes()
    except IsADirectoryError:
        raise ValueError(f"a folder with the name of a NIfTI file: {file}") from None
    except FileNotFoundError:
        raise
    except OSError as error:  # not readable, or a disk that fails
        raise ValueError(f"cannot be read ({error.strerror or error}): {file}") from None
    if not content:
        raise ValueError(f"empty file (0 bytes): {file}")
    try:
        # Unpacking it as a whole checks the checksum, which reading only the voxels would not.
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged or cut off gzip file ({error}): {file}") from None
    kinds = (nib.Nifti1Image, nib.Nifti2Image)
    kind = next((k for k in kinds if k.header_class.may_contain_header(content)), None)
    if kind is None:
        raise ValueError(f"not a NIfTI file whatever its name: {file}")
    try:
        image = kind.from_bytes(content)
        shape, stored = image.shape, image.get_data_dtype()
        if stored.names or stored.kind not in "biuf":
            raise ValueError(f"colour or complex values ({stored}) instead of one number per voxel")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"{len(shape)} dimensions {shape} instead of one 3-D volume")
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
            raise ValueError("the affine is not invertible")
        if image.header.get_xyzt_units()[0] in ("meter", "micron"):
            raise ValueError(f"lengths are in {image.header.get_xyzt_units()[0]}, not mm")
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except Exception as error:  # nibabel raises errors of many kinds on damaged files
        raise ValueError(f"{' '.join(str(error).split())}: {file}") from None
    notes = []
    if not int(image.header["sform_code"]) and not int(image.header["qform_code"]):
        notes.append(
            "the NIfTI header does not say which side is left: its first axis is taken to run to the left"
        )
    missing = dict.fromkeys(
        ["study_uid", "series_uid", "series_number", "frame_of_reference_uid", "study_date", "study_time"]
        + ["slice_thickness", "kernel", "patient_position", "contrast_agent", "manufacturer", "model"]
    )
    found = {
        "name": _safe_name(os.path.basename(file)),
        "source": "nifti",
        "files": [file],
        "series_choice": "",
    }
    return Scan(voxels, np.array(image.affine), found | {"notes": notes} | missing)


def _nifti_item(file: str, folder: str | os.PathLike[str]) -> dict[str, Any]:
    return {"image": file, "name": _safe_name(os.path.relpath(file, folder)), "series_choice": ""}


def _study_item(study: Study, series_uid: str | None) -> dict[str, Any]:
    try:
        series, reason = choose_series(study, series_uid)
        files = series.all_files
    except ValueError as error:
        files, reason = study.files, str(error)
    return {"image": list(files), "name": study.name, "series_choice": reason}


def _denied_items(
    files: Sequence[str], studies: Sequence[Study], folder: str | os.PathLike[str]
) -> Iterator[dict[str, Any]]:
    """What may not be read and is part of no study that is known, as an item for each folder."""
    known = {file for study in studies for file in study.files}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if not is_nifti(file) and file not in known and is_denied(file):
            by_folder[os.path.dirname(file)].append(file)
    for place, members in by_folder.items():
        name = f"unreadable-{_hash(os.path.relpath(place, folder))}"
        yield {"image": members, "name": name, "series_choice": ""}


def _safe_name(path: str) -> str:
    """Turn a relative path into a file name of letters, digits, dot, dash and underscore."""
    stem = re.sub(r"\.nii(\.gz)?$", "", path, flags=re.IGNORECASE)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).lstrip(".") or "scan"
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}_{_hash(path)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
