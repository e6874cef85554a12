# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Every way an input can be wrong: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_tester import run_bundle
from threshold_model import BUNDLE, inference_overrides, reports

from custom.console import CohortError, describe_error
from custom.data import make_phantom, write_dicom_series
from tests import dicom_faults

AFFINE = np.diag([-5.0, -5.0, 12.0, 1.0])


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(shape=(64, 64, 16), spacing=(5.4, 5.4, 17.0), seed=2)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def series(folder: Path, phantom) -> list[Path]:
    return write_dicom_series(folder / "dicom", phantom.image, phantom.affine, seed=5)


def truncated(folder: Path, phantom) -> None:
    nifti(folder / "a.nii.gz", phantom.image)
    dicom_faults.truncate(folder / "a.nii.gz", 0.5)


def text(folder: Path, phantom) -> None:
    (folder / "a.nii.gz").write_text("this is a report, not a scan")


def zipped_text(folder: Path, phantom) -> None:
    (folder / "a.nii.gz").write_bytes(gzip.compress(b"this is a report, not a scan"))


def zero_bytes(folder: Path, phantom) -> None:
    (folder / "a.nii.gz").touch()


def with_nan(folder: Path, phantom) -> None:
    image = phantom.image.astype(np.float32)
    image[3, 4, 5] = np.nan
    nifti(folder / "a.nii.gz", image)


def four_dimensional(folder: Path, phantom) -> None:
    nifti(folder / "a.nii.gz", np.stack([phantom.image] * 2, axis=-1))


def rgb(folder: Path, phantom) -> None:
    colour = np.zeros((8, 8, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nifti(folder / "a.nii.gz", colour)


def eight_bit(folder: Path, phantom) -> None:
    nifti(folder / "a.nii.gz", np.clip((phantom.image + 1000) / 1400 * 255, 0, 255).astype(np.uint8))


def no_rescale(folder: Path, phantom) -> None:
    nifti(folder / "a.nii.gz", (phantom.image + 1024).astype(np.uint16))


def constant(folder: Path, phantom) -> None:
    nifti(folder / "a.nii.gz", np.full((16, 16, 4), 40, np.int16))


def all_air(folder: Path, phantom) -> None:
    nifti(folder / "a.nii.gz", np.random.default_rng(0).integers(-1020, -980, (16, 16, 4)).astype(np.int16))


def no_lung(folder: Path, phantom) -> None:
    """An abdomen: a body of soft tissue in air."""
    grid = np.mgrid[-1:1:64j, -1:1:64j]
    body = np.where((grid**2).sum(axis=0) < 0.5, 50, -1000)[..., None] * np.ones(6)
    nifti(folder / "a.nii.gz", (body + np.random.default_rng(0).normal(0, 10, body.shape)).astype(np.int16))


def missing_slice(folder: Path, phantom) -> None:
    series(folder, phantom)[7].unlink()


def duplicate_slice(folder: Path, phantom) -> None:
    files = series(folder, phantom)
    dicom_faults.copy_slice(files[7], folder / "dicom" / "again.dcm")


def mixed_spacing(folder: Path, phantom) -> None:
    dicom_faults.set_tags(series(folder, phantom)[7], PixelSpacing=[9.0, 9.0])


def tilted(folder: Path, phantom) -> None:
    dicom_faults.tilt_gantry(series(folder, phantom), 12)


def not_ct(folder: Path, phantom) -> None:
    dicom_faults.set_tags(series(folder, phantom), Modality="MR")


def dicom_without_rescale(folder: Path, phantom) -> None:
    dicom_faults.set_tags(series(folder, phantom), RescaleIntercept=None, RescaleSlope=None)


def torn_slice(folder: Path, phantom) -> None:
    dicom_faults.truncate(series(folder, phantom)[7], 0.6)


TABLE: list[tuple[Callable, str]] = [
    (truncated, "a.nii.gz"),
    (text, "a.nii.gz"),
    (zipped_text, "a.nii.gz"),
    (zero_bytes, "a.nii.gz"),
    (with_nan, "NaN"),
    (four_dimensional, "a.nii.gz"),
    (rgb, "a.nii.gz"),
    (eight_bit, "Hounsfield|HU"),
    (no_rescale, "Hounsfield|HU|rescale"),
    (constant, "all voxels are 40"),
    (all_air, "Hounsfield|HU|tissue"),
    (no_lung, "lung"),
    (missing_slice, "missing|gap"),
    (duplicate_slice, "share their position"),
    (mixed_spacing, "spacing"),
    (tilted, "tilt"),
    (not_ct, "MR|CT"),
    (dicom_without_rescale, "[Rr]escale"),
    (torn_slice, "cannot be read|damaged|truncated|pixel"),
]


@pytest.mark.parametrize(("make", "message"), TABLE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_scan_is_refused_in_one_line_and_leaves_a_report_with_nulls(tmp_path, phantom, make, message):
    scans = tmp_path / "scans"
    scans.mkdir()
    make(scans, phantom)
    workflow = BUNDLE.workflow("infer", ("inference",), inference_overrides(tmp_path, scans))
    with pytest.raises(Exception) as caught:  # noqa: B017 - MONAI wraps it; what the user sees is checked
        workflow.run()
    line = describe_error(caught.value)
    assert line is not None and "\n" not in line
    assert re.search(message, line), line
    cause = caught.value
    while not isinstance(cause, CohortError):
        cause = cause.__cause__
    assert cause.exit_code == 2
    files = [p.name for p in (tmp_path / "output").rglob("*") if p.is_file()]
    assert len(files) == 1 and files[0].endswith("_report.json")
    (report,) = reports(tmp_path).values()
    assert report["status"] == "failed" and report["reason"] and report["opacity_volume_ml"]["total"] is None


def test_the_other_studies_of_a_cohort_are_done_and_the_failures_listed(tmp_path, phantom):
    scans = tmp_path / "scans ä with spaces"
    scans.mkdir()
    for name in ("one", "two"):
        nifti(scans / f"{name} ü.nii.gz", phantom.image, phantom.affine)
    (scans / "broken.nii.gz").touch()
    overrides = inference_overrides(tmp_path, scans)
    stale = tmp_path / "output" / "broken" / "broken_opacity.nii.gz"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = run_bundle(BUNDLE, ("inference",), overrides)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "1 of 3 studies failed: broken: " in line and "Traceback" not in done.stderr
    statuses = sorted(report["status"] for report in reports(tmp_path).values())
    assert statuses == ["failed", "segmented", "segmented"]
    assert not stale.exists(), "a mask of an earlier run must not pass for this one's"


def test_folders_that_hold_nothing_or_cannot_be_written(tmp_path, phantom):
    (tmp_path / "empty").mkdir()
    done = run_bundle(BUNDLE, ("inference",), inference_overrides(tmp_path, tmp_path / "empty"))
    assert done.returncode == 2 and "no NIfTI file" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "scans").mkdir()
    nifti(tmp_path / "scans" / "a.nii.gz", phantom.image, phantom.affine)
    overrides = inference_overrides(tmp_path, tmp_path / "scans")
    (tmp_path / "file").touch()
    overrides["output_dir"] = str(tmp_path / "file" / "output")  # a file is no folder, even for root
    done = run_bundle(BUNDLE, ("inference",), overrides)
    assert done.returncode == 2 and "Not a directory" in done.stderr and "Traceback" not in done.stderr


def test_a_misspelt_key_on_the_command_line_is_refused(tmp_path):
    overrides = {**inference_overrides(tmp_path, tmp_path), "datasetdir": "x"}
    done = run_bundle(BUNDLE, ("inference",), overrides)
    assert done.returncode == 2 and "did you mean --dataset_dir?" in done.stderr


def test_training_refuses_a_mask_of_another_shape(tmp_path, cohort):
    data = tmp_path / "data"
    shutil.copytree(cohort, data)
    label = next(data.glob("*_001_opacity.nii.gz"))
    image = nib.load(label)
    voxels = np.asarray(image.dataobj)[:-1].astype(np.uint8)
    nifti(label, voxels, image.affine)
    paths = {
        **BUNDLE.training_paths(tmp_path, data),
        "image_size": [32, 32],
        "network_def::channels": [8] * 5,
    }
    done = run_bundle(BUNDLE, ("train",), paths)
    assert done.returncode == 2 and "differ in size" in done.stderr and "Traceback" not in done.stderr
