# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from custom.reporting.regions import LISTED, list_regions

AFFINE = np.array([[-2.0, 0, 0, 10], [0, -2, 0, 20], [0, 0, 5, 30], [0, 0, 0, 1]])  # a voxel is 0.02 mL


def test_number_size_place_and_density_by_hand():
    mask = np.zeros((12, 12, 8), bool)
    mask[2:5, 2:4, 3:5] = True  # 12 voxels, centre (3, 2.5, 3.5)
    mask[7, 7, 3] = mask[8, 8, 4] = True  # two voxels that touch at a corner: one region
    hu = np.full(mask.shape, -500.0)
    hu[2:5, 2:4, 3] = -300
    lungs = np.zeros(mask.shape, np.uint8)
    lungs[:6] = 2
    regions = list_regions(mask, lungs, hu, AFFINE)
    assert regions["count"] == 2 and regions["truncated_count"] == 0
    assert regions["largest"] == [
        {
            "volume_ml": 0.24,
            "mean_hu": -400.0,
            "side": "right",
            "centroid_mm": [4.0, 15.0, 47.5],
            "truncated": False,
        },
        {
            "volume_ml": 0.04,
            "mean_hu": -500.0,
            "side": "outside_lungs",
            "centroid_mm": [-5.0, 5.0, 47.5],
            "truncated": False,
        },
    ]
    alone = list_regions(mask, None, None, None)["largest"][0]
    assert alone == {
        "volume_ml": None,
        "mean_hu": None,
        "side": None,
        "centroid_mm": None,
        "truncated": False,
    }


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [0, -1])
def test_a_region_on_any_face_of_the_scan_is_truncated(axis, end):
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    face = np.moveaxis(mask, axis, 0)
    face[end, 2:4, 2] = True
    regions = list_regions(mask, None, None, AFFINE)
    assert [region["truncated"] for region in regions["largest"]] == [True, False]
    assert regions["truncated_count"] == 1
    face[end] = False
    face[1 if end == 0 else -2, 2:4, 2] = True  # one voxel further in
    assert list_regions(mask, None, None, AFFINE)["truncated_count"] == 0


def test_a_region_beside_padding_is_truncated():
    mask = np.zeros((9, 9, 9), bool)
    mask[3:5, 4, 4] = True
    hu = np.full(mask.shape, -800.0)
    hu[:2] = -2048  # the scanner saw nothing there, two voxels away
    assert list_regions(mask, None, hu, AFFINE)["truncated_count"] == 0
    hu[2] = -2048
    assert list_regions(mask, None, hu, AFFINE)["truncated_count"] == 1
    hu[2] = -1024
    assert list_regions(mask, None, hu, AFFINE)["truncated_count"] == 0, "air is no padding"


def test_a_single_slice_cuts_everything():
    mask = np.zeros((9, 9, 1), bool)
    mask[4, 4, 0] = True
    assert list_regions(mask, None, None, AFFINE)["truncated_count"] == 1


def test_the_largest_are_listed_and_all_are_counted():
    mask = np.zeros((90, 5, 5), bool)
    for number in range(25):
        mask[3 * number + 1, 1 : 2 + number % 3, 2] = True
    regions = list_regions(mask, None, None, AFFINE)
    assert regions["count"] == 25 and len(regions["largest"]) == LISTED
    volumes = [region["volume_ml"] for region in regions["largest"]]
    assert volumes == sorted(volumes, reverse=True) and volumes[0] == 0.06
    assert list_regions(np.zeros((3, 3, 3), bool), None, None, AFFINE) == {
        "count": 0,
        "truncated_count": 0,
        "largest": [],
    }
