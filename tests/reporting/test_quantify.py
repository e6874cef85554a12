# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

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
    assert measured["reasons"] == {}


def test_what_is_unknown_is_null_with_a_reason():
    opacity, lungs = masks()
    measured = measure_opacity(opacity, None, None)
    assert measured["opacity_volume_ml"]["total"] is None and measured["opacity_voxels"] == 16
    assert set(measured["lung_volume_ml"].values()) == {None}
    assert set(measured["reasons"]) == {"voxel_volume_ml", "lung_volume_ml", "opacity_percent_of_lung"}
    lungs[lungs == 1] = 0
    measured = measure_opacity(opacity, AFFINE, lungs)
    assert measured["opacity_percent_of_lung"]["left"] is None
    assert measured["reasons"] == {"opacity_percent_of_lung.left": "no such lung was found"}
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
