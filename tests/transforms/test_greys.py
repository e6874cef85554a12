# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from custom.data.grey_match import REFERENCE_PEAKS, GreyMapping, count_greys, find_peaks
from custom.transforms import MatchGreysd
from custom.transforms.greys import GREY_MATCH


def slice_in(low: float, high: float) -> np.ndarray:
    """A slice of aerated lung, ground-glass, fat and soft tissue in a window, (1, 200, 200), 0 to 255."""
    rng = np.random.default_rng(0)
    parts = [(-870, 50, 20_000), (-600, 100, 4_000), (-100, 20, 4_000), (40, 25, 12_000)]
    hu = np.concatenate([rng.normal(mean, deviation, number) for mean, deviation, number in parts])
    grey = np.clip(np.rint((hu - low) * 255 / (high - low)), 0, 255)
    return grey.astype(np.float32).reshape(1, 200, 200)


@pytest.mark.parametrize("window", [(-1024, 2000), (-1350, 350), (-1000, 200)])
def test_slices_of_any_window_come_to_the_reference(window):
    image = slice_in(*window)
    lung, tissue = find_peaks(count_greys(image))
    matched = MatchGreysd("image")({"image": MetaTensor(torch.from_numpy(image))})["image"]
    assert matched.dtype == torch.float32 and matched.shape == image.shape
    assert matched.min() >= 0 and matched.max() <= 255
    assert matched.meta[GREY_MATCH] == f"lung {lung}, tissue {tissue}"
    peaks = find_peaks(count_greys(np.rint(matched.numpy())))
    assert np.abs(np.subtract(peaks, REFERENCE_PEAKS)).max() <= 2
    wanted = GreyMapping(lung, tissue)(image.astype(np.uint8))
    assert np.abs(matched.numpy() - wanted).max() <= 0.5, "the mapping of the unlabelled slices, unrounded"


def test_a_slice_without_two_peaks_stays_and_says_why():
    image = torch.full((1, 120, 120), 90.0)
    image[0, :60] = 93.0
    image[0, 0, 0] = 91.0
    kept = MatchGreysd("image")({"image": MetaTensor(image.clone())})["image"]
    assert torch.equal(kept.as_tensor(), image)
    assert kept.meta[GREY_MATCH].startswith("as it is: its ")
