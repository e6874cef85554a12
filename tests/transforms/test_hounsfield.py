# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd

from custom.data.dicom_writer import write_dicom_series
from custom.data.scans import list_scans
from custom.transforms.hounsfield import ValidateHU, ValidateHUd, ValidateHUDict
from custom.transforms.load import LoadCTd

AFFINE = np.diag([-0.7, -0.7, 2.5, 1.0])
SHAPE = (1, 32, 32, 8)


def make_chest(seed=0):
    """Air around a block of soft tissue with lung and a little bone in it; noise of 20 HU."""
    hu = np.full(SHAPE, -1000.0)
    hu[:, 4:28, 4:28] = 40
    hu[:, 8:24, 8:24] = -850
    hu[:, 5:7, 14:18] = 900
    noise = np.random.default_rng(seed).normal(0, 20, SHAPE)
    return np.rint(hu + noise).clip(-1024, 3071).astype(np.float32)


def refusal(image):
    with pytest.raises(ValueError) as caught:
        ValidateHU()(image)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "kind", [np.asarray, torch.as_tensor, MetaTensor], ids=["numpy", "torch", "MetaTensor"]
)
def test_accepts_a_chest_and_returns_it_unchanged(kind):
    image = kind(make_chest())
    valid = ValidateHU()(image)
    assert type(valid) is type(image) and valid.dtype == image.dtype
    np.testing.assert_array_equal(np.asarray(valid), make_chest())


def test_clips_padding_and_leaves_high_values():
    chest = make_chest()
    chest[:, :2] = -3024
    chest[:, 2:4] = -2048
    chest[0, 16, 16, 4] = 32767
    before = chest.copy()
    valid = ValidateHU()(chest)
    np.testing.assert_array_equal(chest, before)  # the input is left as it was
    assert (valid[:, :4] == -1024).all() and valid[0, 16, 16, 4] == 32767
    np.testing.assert_array_equal(valid[:, 4:], chest[:, 4:])
    assert ValidateHU(minimum=-900)(chest).min() == -900


def test_meta_data_and_inverse_survive():
    image = MetaTensor(torch.as_tensor(make_chest()), affine=torch.as_tensor(AFFINE), meta={"study": "x"})
    turn = Orientationd("image", axcodes="PLS", labels=None)
    item = Compose([turn, ValidateHUd("image")])({"image": image})
    np.testing.assert_array_equal(turn.inverse(item)["image"].numpy(), make_chest())
    assert item["image"].meta["study"] == "x"


def test_integers_stay_integers():
    valid = ValidateHU()(torch.as_tensor(make_chest()).short())
    assert valid.dtype == torch.int16


def test_one_slice():
    assert ValidateHU()(make_chest()[..., :1]).shape == (1, 32, 32, 1)


REFUSED = {
    "8-bit": (lambda hu: ((hu + 1024) / 4095 * 255).round().clip(0, 255), "8-bit"),
    "lung window in 8 bits": (lambda hu: ((hu + 1350) / 1500 * 255).round().clip(0, 255), "8-bit"),
    "scaled to [0, 1]": (lambda hu: ((hu + 1250) / 1500).clip(0, 1), r"\[0, 1\]"),
    "not rescaled": (lambda hu: hu + 1024, "rescale slope and intercept"),
    "not rescaled, signed padding": (
        lambda hu: np.where(np.arange(32)[:, None] < 4, -2000, hu + 1024),
        "rescale",
    ),
    "not rescaled, padding like air": (
        lambda hu: np.where(np.arange(32)[:, None] < 4, -1024, hu + 1024),
        "rescale",
    ),
    "rescaled twice": (lambda hu: hu - 1024, "no soft tissue"),
    "z-scores": (lambda hu: (hu - hu.mean()) / hu.std(), "windowed, scaled"),
    "soft tissue window": (lambda hu: hu.clip(-160, 240), "windowed"),
    "MR": (lambda hu: np.abs(hu + 850) * 1.5, "no CT"),
    "PET": (lambda hu: (hu + 1024) / 300, "8-bit|no CT"),
    "all air": (lambda hu: hu * 0 - 1000 + np.arange(8) % 3, "all air"),
    "all tissue": (lambda hu: hu * 0 + 40 + np.arange(8) % 3, "no air|8-bit"),
    "only padding": (lambda hu: hu * 0 - 3024 + np.arange(8) % 3, "no air"),
    "constant": (lambda hu: hu * 0, "all voxels are 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_is_not_hu(name):
    change, pattern = REFUSED[name]
    text = refusal(change(make_chest()).astype(np.float32))
    assert re.search(pattern, text), text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_nan_and_infinity(value):
    chest = make_chest()
    chest[0, 3, 3, :3] = value
    assert refusal(chest) == f"3 of {chest.size} voxels are NaN or infinite"


@pytest.mark.parametrize(
    "shape", [(32, 32, 8), (2, 32, 32, 8), (1, 1, 32, 32, 8), (1, 32, 32), (1, 0, 32, 8)]
)
def test_refuses_other_shapes(shape):
    assert str(shape) in refusal(np.zeros(shape, np.float32))


def test_dictionary_names_the_file_but_not_those_of_a_patient(tmp_path):
    assert ValidateHUDict is ValidateHUd
    assert ValidateHUd("image", allow_missing_keys=True)({}) == {}
    windowed = make_chest()[0].clip(-160, 240)
    path = tmp_path / "windowed.nii.gz"
    nib.save(nib.Nifti1Image(windowed, AFFINE), path)
    write_dicom_series(tmp_path / "Doe Jane", windowed.astype(np.int16), AFFINE)
    chain = [LoadCTd("image", ensure_channel_first=True), ValidateHUd("image")]

    def check(source):
        item = chain[0]({"image": source})
        with pytest.raises(ValueError, match="not HU") as caught:
            chain[1](item)
        return str(caught.value)

    assert check(path).startswith(f"{path}: ")
    assert check(tmp_path / "Doe Jane").startswith("series 1.") and "Doe" not in check(tmp_path / "Doe Jane")
    with pytest.raises(ValueError, match="'image': all voxels are 0"):
        ValidateHUd("image")({"image": torch.zeros(SHAPE)})


@pytest.mark.skipif("CT_DATA" not in os.environ, reason="CT_DATA does not name a folder of real scans")
@pytest.mark.parametrize(
    "folder, count", [("lidc", 2), ("ct_lung_dicom", 1), ("covid_hu_slices", 10), ("nifti_small", 2)]
)
def test_accepts_real_scans(folder, count):
    items = list_scans(Path(os.environ["CT_DATA"]) / folder)
    assert len(items) == count
    chain = Compose([LoadCTd("image", ensure_channel_first=True), ValidateHUd("image")])
    for item in items:
        assert chain(item)["image"].min() >= -1024
