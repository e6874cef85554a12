# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from custom.data.grey_match import REFERENCE_PEAKS, GreyMapping, count_greys, find_peaks, match_peaks
from custom.data.plain_slices import read_picture


def chest(parts, seed=0):
    """HU of pixels: (mean, standard deviation, number) of each material."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, sd, number) for mean, sd, number in parts])


def show(hu, low, high):
    return np.clip(np.rint((hu - low) * 255 / (high - low)), 0, 255).astype(np.uint8)


LUNG, DISEASE, FAT, TISSUE, BONE = -870, -600, -100, 40, 500
CHEST = [(LUNG, 50, 40_000), (-500, 200, 4_000), (FAT, 20, 9_000), (TISSUE, 25, 30_000), (BONE, 150, 5_000)]


def test_two_windows_of_one_chest_look_alike_after_matching():
    hu = chest(CHEST)
    wanted = show(hu, -1120, 280)  # in which lung is at 46 and tissue at 211
    for window in ((-1024, 2000), (-1000, 400), (-1350, 350)):
        pixels = show(hu, *window)
        mapping = match_peaks(count_greys(pixels))
        seen = (pixels > 0) & (pixels < 255)  # what a window cut off cannot come back
        error = np.abs(mapping(pixels).astype(int) - wanted)[seen]
        assert error.max() <= 6, window  # levels: one or two in each peak, and rounding
        assert np.median(error) <= 2, window


def test_the_mapping_is_linear_and_cut_off():
    mapping = GreyMapping(lung=20, tissue=103, reference=(45, 211))  # two output levels per level
    assert (mapping.scale, mapping.offset) == (2.0, 5.0)
    pixels = np.array([[0, 20, 103], [125, 126, 255]], np.uint8)
    assert mapping(pixels).tolist() == [[5, 45, 211], [255, 255, 255]]
    assert GreyMapping(65, 211, (45, 211))(np.array([0, 65], np.uint8)).tolist() == [0, 45]


def test_disease_does_not_pass_for_aerated_lung_nor_fat_for_soft_tissue():
    ill = [(LUNG, 40, 20_000), (DISEASE, 60, 35_000), (FAT, 15, 25_000), (TISSUE, 15, 20_000)]
    lung, tissue = find_peaks(count_greys(show(chest(ill), -1120, 280)))
    assert abs(lung - 46) <= 2 and abs(tissue - 211) <= 2


def test_what_is_cut_off_is_no_peak():
    hu = chest([*CHEST, (3000, 1, 60_000), (-2000, 1, 60_000)])  # most pixels white, or black
    lung, tissue = find_peaks(count_greys(show(hu, -1120, 280)))
    assert abs(lung - 46) <= 1 and abs(tissue - 211) <= 1


@pytest.mark.parametrize(
    ("hu", "reason"),
    [
        (chest([(TISSUE, 30, 50_000)]), "no peak of|do not stand apart|grey values apart"),
        (chest([(LUNG, 40, 40_000), (2000, 1, 40_000)]), "no peak of soft tissue"),
        (chest([(-3000, 1, 40_000), (TISSUE, 40, 40_000)]), "no peak of aerated lung"),
        (chest([(LUNG, 1, 99)]), "99 pixels of"),
        (np.repeat([-3000.0, 3000.0], 20_000), "40000 pixels of 2 grey values are no chest CT"),
        (np.linspace(-1119, 279, 100_000), "no peak of|do not stand apart"),
        (chest([(-350, 12, 30_000), (-260, 12, 30_000)]), "less than 20 grey values apart"),
    ],
)
def test_without_two_peaks_it_is_refused(hu, reason):
    with pytest.raises(ValueError, match=reason):
        match_peaks(count_greys(show(hu, -1120, 280)))


def test_a_wrong_histogram_is_refused():
    with pytest.raises(ValueError, match=r"256 grey values is needed, got shape \(10,\)"):
        find_peaks(np.ones(10))


def test_the_reference_is_that_of_the_real_slices(ct_data):
    files = sorted((ct_data / "covid_semiseg_train" / "images").iterdir())
    assert len(files) == 50
    assert find_peaks(sum(count_greys(read_picture(file)) for file in files)) == REFERENCE_PEAKS
