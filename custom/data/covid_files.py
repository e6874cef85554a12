# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Which file of a public COVID-19 CT data set is what, by folder and name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from custom.data.dicom import walk_files
from custom.data.files import refuse_denied
from custom.data.scans import is_nifti

__all__ = [
    "covid_ct_seg_name",
    "covid_ct_seg_role",
    "find_nifti",
    "index_files",
    "match_name",
    "medseg_name",
]

COVID_CT_SEG_FOLDERS = {
    "covid-19-ct-seg_20cases": "image",
    "ct_scans": "image",  # the names of a widespread copy
    "infection_mask": "mask",
    "lung_mask": "lung",
    "lung_and_infection_mask": "",  # the other two in one, which leaves open what lies under a lesion
}


def find_nifti(source: Path, output: Path) -> list[Path]:
    """The NIfTI files below a folder, without the masks that an earlier run wrote there.

    Args:
        source: where to look.
        output: where masks are written; it may be ``source``.

    Raises:
        FileNotFoundError: When there is no such folder.
        PermissionError: When a folder may not be read.
    """
    own = {(output / folder).resolve() for folder in ("labels", "lungs")}
    found = list(walk_files(source))
    refuse_denied(path for path in found if os.path.isdir(path))
    files = (Path(file) for file in found if is_nifti(file))
    return [file for file in files if file.parent.resolve() not in own]


def index_files(files: Iterable[Path], name_of: Callable[[Path], str | None]) -> dict[str, Path]:
    """Files by the case they belong to.

    Args:
        files: to be sorted.
        name_of: gives a file's case, None for files to be passed over.

    Raises:
        ValueError: When two files are the same case's.
    """
    found: dict[str, Path] = {}
    for file in files:
        name = name_of(file)
        if name is None:
            continue
        if name in found:
            raise ValueError(f"{found[name]} and {file} are both '{name}'; move away the wrong one")
        found[name] = file
    return found


def match_name(pattern: str, file: Path) -> str | None:
    """The first group of a pattern that a NIfTI file's whole name matches, in lower case.

    Args:
        pattern: regular expression for the name without suffix.
        file: whose name it is.
    """
    match = re.fullmatch(pattern + r"\.nii(\.gz)?", file.name, re.IGNORECASE)
    return match.group(1).lower() if match else None


def covid_ct_seg_role(file: Path, source: Path) -> str:
    """What the innermost folder with a known name says that a file is.

    Args:
        file: below ``source``.
        source: the data set's folder, whose own name does not count.

    Returns:
        "image", "mask", "lung" or "".
    """
    for folder in reversed(file.relative_to(source).parts[:-1]):
        if folder.lower() in COVID_CT_SEG_FOLDERS:
            return COVID_CT_SEG_FOLDERS[folder.lower()]
    return ""


def covid_ct_seg_name(file: Path) -> str | None:
    """One name for a case, whose CT and masks have different names in some copies of the data set.

    Args:
        file: ``coronacases_001.nii.gz``, ``coronacases_org_case007.nii``, ``radiopaedia_10_85902_1.nii.gz``,
            ``radiopaedia_org_covid-19-pneumonia-10_85902_1-dcm.nii``.
    """
    if match := re.match(r"coronacases\D*(\d+)\D*$", file.name.lower()):
        return f"coronacases_{int(match.group(1)):03d}"
    if match := re.match(r"radiopaedia.*?(\d+)_(\d+)_(\d+)\D*$", file.name.lower()):
        return "radiopaedia_" + "_".join(match.groups())
    return None


def medseg_name(file: Path) -> str | None:
    """The name of a volume of data set 2.

    Args:
        file: ``1.nii.gz`` to ``9.nii.gz``.
    """
    number = match_name(r"(\d+)", file)
    return None if number is None else f"rp_{number}"
