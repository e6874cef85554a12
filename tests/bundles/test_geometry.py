# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Masks land where they belong, whatever the scan's axis order."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from report_checks import centre, check_dicom, millilitres, read_segment
from threshold_model import BUNDLE, THRESHOLD_HU, bright_phantom, inference_overrides, lesion, reports

from custom.data import write_dicom_series

SHAPE, SPACING = (96, 84, 36), (3.6, 4.1, 7.5)
AXCODES = [
    codes for order in itertools.permutations(("LR", "PA", "SI")) for codes in itertools.product(*order)
]


def turned(array: np.ndarray, affine: np.ndarray, codes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    start = nib.orientations.io_orientation(affine)
    change = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))
    image = nib.Nifti1Image(array, affine).as_reoriented(change)
    return np.asarray(image.dataobj), image.affine


@pytest.fixture(scope="module")
def phantom():
    return bright_phantom((lesion((0.55, 0.7, 0.62), (18.0, 23.4, 27.0), "left"),), SHAPE, SPACING)


def check(folder: Path, name: str, affine: np.ndarray, shape: tuple, phantom) -> None:
    report = reports(folder)[name]
    mask = nib.load(folder / "output" / name / report["files"]["opacity"])
    truth = phantom.image > THRESHOLD_HU
    assert mask.shape == tuple(shape)
    assert np.allclose(mask.affine, affine, atol=1e-4)
    found = mask.get_fdata() > 0
    error = centre(found, mask.affine) - centre(phantom.label > 0, phantom.affine)
    assert np.all(np.abs(error) < np.array(SPACING) / 2), f"{name}: centroid off by {error} mm"
    volume = report["opacity_volume_ml"]
    expected = truth.sum() * np.prod(SPACING) / 1000
    assert volume["total"] == pytest.approx(expected, rel=0.01), name
    assert volume["left"] == pytest.approx(volume["total"], rel=0.01), "the lesion lies in the left lung"
    zones = {zone: found["opacity_volume_ml"] for zone, found in report["zones"]["left"].items()}
    assert zones["upper"] > 0 and zones["lower"] == 0, "the lesion lies above the lower zone"
    assert zones["dorsal"] > zones["ventral"], "and behind the middle"
    assert report["regions"]["truncated_count"] == 0


def check_segmentation(folder: Path, report: dict, phantom) -> None:
    """The Segmentation, as highdicom reads it, has the lesion where it is and both lungs on their sides."""
    file = folder / "output" / report["study"] / report["files"]["seg"]
    mask, affine = read_segment(file, "Opacity")
    error = centre(mask, affine) - centre(phantom.label > 0, phantom.affine)
    assert np.all(np.abs(error) < np.array(SPACING) / 2), f"centroid off by {error} mm"
    expected = (phantom.image > THRESHOLD_HU).sum() * np.prod(SPACING) / 1000
    assert millilitres(mask, affine) == pytest.approx(expected, rel=0.01)
    for side, value in (("left", 1), ("right", 2)):
        mask, affine = read_segment(file, f"{side.capitalize()} lung")
        assert millilitres(mask, affine) == pytest.approx(report["lung_volume_ml"][side], rel=0.001)
        offset = centre(mask, affine) - centre(phantom.lungs == value, phantom.affine)
        assert np.abs(offset).max() < 15, f"the {side} lung is off by {offset} mm"


def run(folder: Path, scans: Path) -> None:
    workflow = BUNDLE.workflow("infer", ("inference",), inference_overrides(folder, scans))
    workflow.run()


def test_nifti_in_all_48_axis_orders_and_oblique(phantom, tmp_path):
    scans, expected = tmp_path / "scans", {}
    scans.mkdir()
    for codes in AXCODES:
        image, affine = turned(phantom.image, phantom.affine, codes)
        name = "".join(codes)
        nib.save(nib.Nifti1Image(image, affine), scans / f"{name}.nii.gz")
        expected[name] = (affine, image.shape)
    assert len(expected) == 48
    run(tmp_path, scans)
    for name, (affine, shape) in expected.items():
        check(tmp_path, name, affine, shape, phantom)


def test_oblique_nifti(phantom, tmp_path):
    angle = np.deg2rad(8)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ phantom.affine
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(phantom.image, affine), tmp_path / "scans" / "oblique.nii.gz")
    run(tmp_path, tmp_path / "scans")
    mask = nib.load(next((tmp_path / "output").rglob("*_opacity.nii.gz")))
    assert np.allclose(mask.affine, affine, atol=1e-4)
    error = centre(mask.get_fdata() > 0, affine) - centre(phantom.label > 0, affine)
    assert np.all(np.abs(error) < np.array(SPACING) / 2)


def test_dicom_in_the_24_proper_orientations_in_any_file_order(phantom, tmp_path):
    proper = []
    for codes in AXCODES:
        image, affine = turned(phantom.image, phantom.affine, codes)
        if np.linalg.det(affine[:3, :3]) > 0:  # DICOM slices are stacked along their normal
            proper.append((codes, image, affine))
    assert len(proper) == 24
    for number, (codes, image, affine) in enumerate(proper):
        name = "".join(codes)
        files = write_dicom_series(tmp_path / name / "scans", image, affine, seed=number, shuffle=True)
        overrides = inference_overrides(tmp_path / name, tmp_path / name / "scans")
        # A sagittal or coronal series is read when it is asked for by its UID.
        overrides["series_uid"] = str(pydicom.dcmread(files[0]).SeriesInstanceUID)
        BUNDLE.workflow("infer", ("inference",), overrides).run()
        ((study, report),) = reports(tmp_path / name).items()
        mask = nib.load(tmp_path / name / "output" / study / report["files"]["opacity"])
        check(tmp_path / name, study, mask.affine, mask.shape, phantom)
        check_segmentation(tmp_path / name, report, phantom)
    for kind in ("seg", "sr"):
        check_dicom(tmp_path / name / "output" / study / report["files"][kind])


def test_one_slice_with_non_square_pixels(tmp_path):
    one = bright_phantom(
        (lesion((0.55, 0.7, 0.5), (24.0, 31.0, 36.0), "right"),), (96, 80, 1), (3.6, 4.4, 5.0)
    )
    write_dicom_series(tmp_path / "scans", one.image, one.affine, seed=1)
    run(tmp_path, tmp_path / "scans")
    ((name, report),) = reports(tmp_path).items()
    mask = nib.load(tmp_path / "output" / name / report["files"]["opacity"])
    truth = one.image > THRESHOLD_HU
    for found, affine in (
        (mask.get_fdata() > 0, mask.affine),
        read_segment(tmp_path / "output" / name / report["files"]["seg"], "Opacity"),
    ):
        error = centre(found, affine) - centre(truth, one.affine)
        assert np.all(np.abs(error)[:2] < np.array([3.6, 4.4]) / 2) and abs(error[2]) < 2.5
    assert report["opacity_voxels"] == pytest.approx(truth.sum(), rel=0.02)
