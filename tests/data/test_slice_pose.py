# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from skimage.draw import ellipse

from custom.data.plain_slices import ORIENTATIONS, read_picture, turn, turn_back
from custom.data.scans import read_scan
from custom.data.slice_pose import SIDEWAYS_ORIENTATIONS, lie_sideways, measure_pose


def chest(lungs: bool = True) -> np.ndarray:
    """A body in air with two lungs beside each other, upright, (160, 240)."""
    picture = np.full((160, 240), 10, np.uint8)
    picture[ellipse(80, 120, 75, 115)] = 200
    for column in (70, 170):
        if lungs:
            picture[ellipse(85, column, 50, 35)] = 40
    return picture


def cropped() -> np.ndarray:
    return chest()[36:135, 36:205]


@pytest.mark.parametrize("picture", [chest(), cropped()], ids=["whole body", "cropped to the lungs"])
def test_lungs_lie_beside_each_other_or_not(picture):
    upright = measure_pose(picture)
    assert upright > 1
    for orientation in ORIENTATIONS:
        sign = -1 if orientation in SIDEWAYS_ORIENTATIONS else 1
        stored = np.ascontiguousarray(turn_back(picture, orientation))
        assert measure_pose(stored) == pytest.approx(sign * upright, abs=0.1), orientation


def test_what_cannot_be_judged():
    assert measure_pose(chest(lungs=False)) is None, "a body in air without lungs"
    assert measure_pose(np.full((50, 50), 200, np.uint8)) is None
    assert measure_pose(np.zeros((50, 50), np.uint8)) is None


def test_a_folder_is_judged_by_most_of_its_slices():
    assert lie_sideways([-1.0] * 5)
    assert lie_sideways([None, -1.0, -1.2, -1.1, 1.0, -0.9, None])
    assert not lie_sideways([-1.0] * 4 + [None]), "too few"
    assert not lie_sideways([-1.0, -1.0, 1.0, 1.0, 1.0, 0.9])
    assert not lie_sideways([]) and not lie_sideways([None] * 9)


def test_real_slices(ct_data):
    """COVID-SemiSeg stores its slices transposed, DICOM holds them upright."""
    files = sorted((ct_data / "covid_semiseg_train" / "images").iterdir())
    stored = [read_picture(file) for file in files]
    assert lie_sideways([measure_pose(picture) for picture in stored])
    upright = [np.ascontiguousarray(turn(picture, "transposed")) for picture in stored]
    assert not lie_sideways([measure_pose(picture) for picture in upright])
    voxels = read_scan(ct_data / "lidc" / "LIDC-IDRI-0001").voxels
    window = (np.clip((voxels + 1100) / 1400, 0, 1) * 255).astype(np.uint8)
    levels = range(0, window.shape[2], 8)
    # The scan's axes are those of NIfTI: its slices lie on their side.
    assert lie_sideways([measure_pose(np.ascontiguousarray(window[..., z])) for z in levels])
    assert not lie_sideways([measure_pose(np.ascontiguousarray(window[..., z].T)) for z in levels])
