# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Damaged scans are read as a finite volume or refused in one line; nothing else may come of them."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom.data import list_scans, read_scan, write_dicom_series
from tests.fuzzing import fuzzed, mutated

AFFINE = np.diag([-2.0, -3.0, 4.0, 1.0])
VOXELS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def nifti_bytes() -> bytes:
    return nib.Nifti1Image(VOXELS, AFFINE).to_bytes()


def read_or_refuse(paths) -> None:
    try:
        scan = read_scan(paths)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and str(error)
        return
    assert scan.voxels.ndim == 3 and scan.voxels.size
    assert np.isfinite(scan.affine).all() and abs(np.linalg.det(scan.affine[:3, :3])) > 0


@given(mutated(nifti_bytes()))
@fuzzed(200)
def test_damaged_nifti(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.nii"
    path.write_bytes(content)
    read_or_refuse(path)


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> list[bytes]:
    files = write_dicom_series(tmp_path_factory.mktemp("whole"), VOXELS, AFFINE)
    return [file.read_bytes() for file in files]


@given(st.data())
@fuzzed(60)
def test_damaged_dicom(tmp_path_factory, slices, data):
    """One slice of a series: what is lost of it must not be lost in silence."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    victim = data.draw(st.integers(0, len(slices) - 1))
    for number, content in enumerate(slices):
        damaged = data.draw(mutated(content)) if number == victim else content
        (folder / f"{number}.dcm").write_bytes(damaged)
    try:
        (item, *others) = list_scans(folder)
    except FileNotFoundError:
        return
    if others:  # the damage is in the UID of the study
        return
    try:
        scan = read_scan(item["image"])
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and "Doe" not in str(error)
        return
    assert scan.voxels.shape[:2] == VOXELS.shape[:2]
    # A slice may only be missing where nothing of the series is left to tell, at its ends.
    assert scan.voxels.shape[2] == len(slices) or victim in (0, len(slices) - 1)


def test_values_of_an_unknown_kind(tmp_path, slices):
    """Found by the fuzzing above: pydicom raises NotImplementedError where such a value is looked at."""
    for number, content in enumerate(slices):
        (tmp_path / f"{number}.dcm").write_bytes(content)
    for tag in (b"\x02\x00\x02\x00UI", b"\x08\x00\x16\x00UI"):  # SOP class, in the file's head and beyond
        assert tag in slices[2]
        (tmp_path / "2.dcm").write_bytes(slices[2].replace(tag, tag[:4] + b"TI"))
        read_or_refuse(list_scans(tmp_path)[0]["image"])
