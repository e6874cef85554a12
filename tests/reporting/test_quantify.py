# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from custom.data.phantom import Lesion, make_phantom
from custom.reporting import measure_opacity

AFFINE = np.array([[0, -2.0, 0, 5], [4.0, 0, 0, 6], [0, 0, 10.0, 7], [0, 0, 0, 1]])  # a voxel is 80 mm^3


def masks() -> tuple[np.ndarray, np.ndarray]:
    lungs = np.zeros((10, 10, 4), np.uint8)
    lungs[:, :5] = 1  # left, 200 voxels
    lungs[:, 5:, :2] = 2  # right, 100 voxels
    opacity = np.zeros_like(lungs)
    opacity[:5, 0, 0] = 1  # 5 voxels in the left lung
    opacity[:10, 9, 0] = 1  # 10 in the right
    opacity[0, 9, 3] = 1  # 1 outside
    return opacity, lungs


def test_volumes_and_percentages_by_hand():
    opacity, lungs = masks()
    measured = measure_opacity(opacity, AFFINE, lungs)
    assert measured["voxel_volume_ml"] == pytest.approx(0.08)
    assert measured["opacity_voxels"] == 16
    volumes = {"left": 0.4, "right": 0.8, "outside_lungs": 0.08, "total": 1.28}
    assert measured["opacity_volume_ml"] == pytest.approx(volumes)
    assert measured["lung_volume_ml"] == pytest.approx({"left": 16.0, "right": 8.0, "total": 24.0})
    assert measured["opacity_percent_of_lung"] == pytest.approx({"left": 2.5, "right": 10.0, "total": 5.0})
    assert list(measured["reasons"]) == ["opacity_volume_ml_by_zone"], "the right lung has two slices only"


def test_zones_are_thirds_of_each_lungs_height_whatever_the_axis_order():
    lungs = np.zeros((4, 6, 9), np.uint8)
    lungs[:, :3] = 1
    lungs[:, 3:, 3:] = 2  # the right lung is shorter: slices 3 to 8
    opacity = np.zeros_like(lungs)
    opacity[0, 0, [0, 2, 3, 8]] = 1  # left: two lower, one middle, one upper
    opacity[0:2, 5, 4] = 1  # right: two lower
    opacity[0, 5, 8] = 1  # right: one upper
    affine = np.diag([-10.0, -10.0, 10.0, 1.0])
    expected = {
        "left": {"lower": 2.0, "middle": 1.0, "upper": 1.0},
        "right": {"lower": 2.0, "middle": 0.0, "upper": 1.0},
    }
    assert measure_opacity(opacity, affine, lungs)["opacity_volume_ml_by_zone"] == expected
    for codes in ("RAI", "SPL", "AIR"):
        change = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        )
        turned = [nib.Nifti1Image(array, affine).as_reoriented(change) for array in (opacity, lungs)]
        masks_ = [np.asarray(image.dataobj) for image in turned]
        measured = measure_opacity(masks_[0], turned[0].affine, masks_[1])
        assert measured["opacity_volume_ml_by_zone"] == expected, codes


def test_what_is_unknown_is_null_with_a_reason():
    opacity, lungs = masks()
    measured = measure_opacity(opacity, None, None)
    assert measured["opacity_volume_ml"]["total"] is None and measured["opacity_voxels"] == 16
    assert set(measured["lung_volume_ml"].values()) == {None}
    unknown = {"voxel_volume_ml", "lung_volume_ml", "opacity_percent_of_lung", "opacity_volume_ml_by_zone"}
    assert set(measured["reasons"]) == unknown
    lungs[lungs == 1] = 0
    measured = measure_opacity(opacity, AFFINE, lungs)
    assert measured["opacity_percent_of_lung"]["left"] is None
    assert measured["reasons"]["opacity_percent_of_lung.left"] == "no such lung was found"
    assert measured["lung_volume_ml"]["left"] == 0.0


def test_an_empty_mask_is_zero_and_not_null():
    opacity, lungs = masks()
    measured = measure_opacity(np.zeros_like(opacity), AFFINE, lungs)
    assert measured["opacity_volume_ml"] == {"left": 0.0, "right": 0.0, "outside_lungs": 0.0, "total": 0.0}
    assert measured["opacity_percent_of_lung"]["total"] == 0.0


def test_masks_on_different_grids_are_refused():
    opacity, lungs = masks()
    with pytest.raises(ValueError, match="must share a grid"):
        measure_opacity(opacity, AFFINE, lungs[:, :, 1:])


def test_a_lesion_in_the_left_upper_zone_is_reported_left_and_upper():
    small = Lesion("consolidation", centre=(0.5, 0.6, 0.82), radii=(10, 10, 10), side="left")
    phantom = make_phantom(shape=(64, 64, 30), spacing=(5.4, 5.4, 9.0), seed=2, lesions=[small])
    measured = measure_opacity(phantom.label > 0, phantom.affine, phantom.lungs)
    zones, volume = measured["opacity_volume_ml_by_zone"], measured["opacity_volume_ml"]
    assert volume["left"] == volume["total"] == zones["left"]["upper"] > 0
    assert zones["right"] == {"lower": 0.0, "middle": 0.0, "upper": 0.0}
