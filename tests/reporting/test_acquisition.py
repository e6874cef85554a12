# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from custom.reporting.acquisition import check_acquisition, doubt_lungs

AFFINE = np.diag([-0.8, -0.8, 2.5, 1.0])
STUDY = {
    "source": "dicom",
    "slice_thickness": 2.5,
    "kernel": "B40f",
    "patient_position": "HFS",
    "contrast_agent": None,
}


def lungs() -> np.ndarray:
    mask = np.zeros((20, 20, 10), np.uint8)
    mask[2:9, 5:15, 2:8] = 2
    mask[11:18, 5:15, 2:8] = 1
    return mask


def statuses(study: dict, affine=AFFINE, mask=None, shape=(20, 20, 10), doubt="") -> dict[str, str]:
    checks = check_acquisition(study, shape, affine, mask, doubt)["checks"]
    assert all(check["message"] and "\n" not in check["message"] for check in checks)
    return {check["name"]: check["status"] for check in checks}


def test_a_good_scan():
    acquisition = check_acquisition(STUDY, (20, 20, 10), AFFINE, lungs())
    found = statuses(STUDY, mask=lungs())
    assert {name for name, status in found.items() if status != "ok"} == {"contrast"}
    assert found["contrast"] == "unknown", "no agent in the header need not mean that none was given"
    del acquisition["checks"]
    assert acquisition == {
        "slice_thickness_mm": 2.5,
        "slice_distance_mm": 2.5,
        "slices": 10,
        "pixel_spacing_mm": [0.8, 0.8],
        "coverage_mm": 25.0,
        "kernel": "B40f",
        "contrast_agent": None,
        "patient_position": "HFS",
    }


@pytest.mark.parametrize(
    ("change", "name", "status"),
    [
        ({"slice_thickness": 5.0}, "slice_thickness", "ok"),
        ({"slice_thickness": 8.0}, "slice_thickness", "flagged"),
        ({"slice_thickness": None}, "slice_thickness", "unknown"),
        ({"slice_thickness": 1.25}, "slice_distance", "flagged"),  # 1.25 mm every 2.5 mm
        ({"contrast_agent": "OMNIPAQUE 300"}, "contrast", "flagged"),
        ({"contrast_agent": "NONE"}, "contrast", "ok"),
        ({"kernel": "B70f"}, "kernel", "flagged"),
        ({"kernel": "LUNG"}, "kernel", "flagged"),
        ({"kernel": None}, "kernel", "unknown"),
        ({"patient_position": "FFS"}, "patient_position", "ok"),
        ({"patient_position": "HFP"}, "patient_position", "flagged"),
        ({"patient_position": None}, "patient_position", "unknown"),
    ],
)
def test_values_of_the_header(change, name, status):
    assert statuses({**STUDY, **change})[name] == status


def test_what_nothing_is_known_of_is_unknown_and_not_ok():
    found = statuses({})
    assert found.pop("slice_distance") == "ok", "the affine tells it"
    assert set(found.values()) == {"unknown"}


def test_coverage_is_that_of_the_lungs():
    assert statuses(STUDY, mask=lungs())["coverage"] == "ok"
    bottom = lungs()
    bottom[12, 7, 0:2] = 1  # one voxel of the left lung on the lowest slice
    assert statuses(STUDY, mask=bottom)["coverage"] == "flagged"
    side = lungs()
    side[0:2, 7, 5] = 2
    found = statuses(STUDY, mask=side)
    assert found["coverage"] == "ok" and found["field_of_view"] == "flagged"
    one = lungs()
    one[one == 1] = 0
    assert statuses(STUDY, mask=one)["coverage"] == "flagged"
    (message,) = [
        check["message"]
        for check in check_acquisition(STUDY, (20, 20, 10), AFFINE, bottom)["checks"]
        if check["name"] == "coverage"
    ]
    assert "left lung at the bottom (1 % of its largest cross-section)" in message
    assert statuses(STUDY, mask=bottom[:, :, ::-1], affine=np.diag([-0.8, -0.8, -2.5, 1.0]))["coverage"] == (
        "flagged"
    )


def test_slices_of_a_sagittal_series_and_a_single_slice():
    affine = np.array([[0, 0, 3.0, 0], [0.7, 0, 0, 0], [0, 0.9, 0, 0], [0, 0, 0, 1]])  # slices go right
    acquisition = check_acquisition(STUDY, (20, 30, 40), affine)
    assert acquisition["slices"] == 40 and acquisition["slice_distance_mm"] == 3.0
    assert acquisition["coverage_mm"] == 27.0 and acquisition["pixel_spacing_mm"] == [0.7, 0.9]
    assert statuses(STUDY, shape=(20, 20, 1))["slice_distance"] == "flagged"


def test_a_lung_mask_of_another_study_is_doubted():
    mask = lungs()
    hu = np.where(mask > 0, -850.0, 40.0)
    assert doubt_lungs(mask, hu) == ""
    assert "almost no air" in doubt_lungs(np.roll(mask, 8, axis=1) * (mask == 0), hu)
    assert "nothing but air" in doubt_lungs(mask, np.full(mask.shape, -1000.0))
    diseased = np.where(np.random.default_rng(0).random(mask.shape) < 0.9, 30.0, -850.0)
    assert doubt_lungs(mask, diseased) == "", "lungs that are nine tenths consolidated are lungs"
    assert statuses(STUDY, doubt="the lung mask holds almost no air")["lung_mask"] == "flagged"
