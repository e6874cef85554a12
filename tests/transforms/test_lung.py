# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Resized

from custom.data import make_phantom
from custom.transforms import CropLungd, LungMaskd, NoLungError


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(shape=(64, 64, 20), spacing=(5.4, 5.4, 14.0), seed=4, lesions=())


def image(array: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.from_numpy(np.asarray(array, dtype=np.float32))[None], affine=affine)


def test_mask_lies_on_the_scan_and_tells_left_from_right(phantom):
    data = LungMaskd("image")({"image": image(phantom.image, phantom.affine)})
    mask = data["lung"]
    assert mask.shape == (1, 64, 64, 20) and mask.dtype == torch.uint8
    assert np.allclose(mask.affine, phantom.affine)
    for value, sign in ((1, -1), (2, 1)):  # RAS: the patient's left has negative x
        centre = nib.affines.apply_affine(phantom.affine, np.argwhere(mask[0].numpy() == value).mean(axis=0))
        assert np.sign(centre[0]) == sign


def test_a_given_mask_is_kept_and_a_wrong_one_refused(phantom):
    scan = image(phantom.image, phantom.affine)
    given = MetaTensor(torch.from_numpy(phantom.lungs)[None], affine=phantom.affine)
    assert LungMaskd("image")({"image": scan, "lung": given})["lung"] is given
    for wrong in (given * 3, given[:, 1:], given * 0):
        with pytest.raises(ValueError, match=r"1 \(left\) and 2 \(right\) are needed"):
            LungMaskd("image")({"image": scan, "lung": wrong})


def test_the_mask_bears_the_scans_name_and_trace(phantom):
    scan = image(phantom.image, phantom.affine)
    scan.meta["filename_or_obj"] = "somewhere/ct.nii.gz"
    turned = Orientationd("image", "RAS", labels=None)({"image": scan})
    mask = LungMaskd("image")(turned)["lung"]
    assert mask.meta["filename_or_obj"] == "somewhere/ct.nii.gz"
    assert len(mask.applied_operations) == 1, "so that Invertd can bring it back as the scan"


@pytest.mark.parametrize("wrong", ["two channels", "one plane", "no HU"])
def test_what_is_no_scan_is_refused(phantom, wrong):
    scan = image(phantom.image, phantom.affine)
    scan = {"two channels": torch.cat([scan, scan]), "one plane": scan[..., 5], "no HU": scan + 2000}[wrong]
    with pytest.raises(ValueError, match="rescale to HU" if wrong == "no HU" else "need one scan"):
        LungMaskd("image")({"image": scan})


def test_no_lung_is_an_error_of_its_own():
    body = np.full((40, 40, 5), -1000.0)
    body[8:32, 8:32] = 40.0
    with pytest.raises(NoLungError, match="no lung was found"):
        LungMaskd("image")({"image": image(body, np.diag([-8.0, -8.0, 8.0, 1.0]))})


def boxed() -> dict:
    """A mask whose box is known: rows 3-5, columns 4-9, slices 2-3, with voxels of 2 x 4 x 5 mm."""
    mask = torch.zeros(1, 12, 16, 8, dtype=torch.uint8)
    mask[0, 3:6, 4:10, 2:4] = 1
    affine = torch.diag(torch.tensor([-2.0, -4.0, 5.0, 1.0], dtype=torch.float64))
    return {
        "image": MetaTensor(torch.rand(1, 12, 16, 8), affine=affine),
        "lung": MetaTensor(mask, affine=affine),
    }


@pytest.mark.parametrize(
    ("margin", "shape"), [(0.0, (3, 6, 2)), (4.0, (7, 8, 4)), (5.0, (9, 10, 4)), (1000.0, (12, 16, 8))]
)
def test_the_margin_is_in_mm_and_ends_at_the_scans_edge(margin, shape):
    data = CropLungd(["image", "lung"], margin_mm=margin)(boxed())
    assert data["image"].shape == data["lung"].shape == (1, *shape)
    assert int((data["lung"] > 0).sum()) == 3 * 6 * 2


def test_inverse_restores_shape_affine_and_place():
    data = boxed()
    original = data["image"].clone()
    crop = CropLungd(["image"], margin_mm=0.0)
    cropped = crop(data)
    corner = cropped["image"].affine @ torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    assert torch.allclose(corner, original.affine @ torch.tensor([3.0, 4, 2, 1], dtype=torch.float64))
    back = crop.inverse(cropped)["image"]
    assert back.shape == original.shape and torch.allclose(back.affine, original.affine)
    assert torch.equal(back[0, 3:6, 4:10, 2:4], original[0, 3:6, 4:10, 2:4])
    assert int((back != 0).sum()) <= 3 * 6 * 2


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SPL", "PIR"])
def test_a_prediction_comes_back_through_crop_orientation_and_resize(codes):
    data = Orientationd(["image", "lung"], codes, labels=None)(boxed())
    start = data["image"].clone()
    chain = Compose(
        [
            CropLungd("image", margin_mm=4.0),
            Orientationd("image", "PLS", labels=None),
            Resized("image", (32, 32, -1), mode="trilinear"),
        ]
    )
    seen = chain(data)
    output = {"image": seen["image"], "pred": torch.ones_like(seen["image"])}
    pred = Invertd("pred", chain, "image", nearest_interp=True)(output)["pred"]
    assert pred.shape == start.shape and np.allclose(pred.affine, start.affine, atol=1e-5)
    assert set(pred.unique().tolist()) == {0.0, 1.0}
    inside = np.asarray(data["lung"])[0] > 0
    assert np.asarray(pred)[0][inside].all(), "the whole lung lies within what was predicted"
    assert int(pred.sum()) == 7 * 8 * 4


def test_what_lies_elsewhere_or_is_empty_is_refused():
    data = boxed()
    data["label"] = data["image"][:, 1:]
    with pytest.raises(ValueError, match="label is not on the grid of lung"):
        CropLungd(["image", "label"])(data)
    with pytest.raises(ValueError, match="put LungMaskd before CropLungd"):
        CropLungd("image")({"image": data["image"]})
    data["lung"] = data["lung"] * 0
    with pytest.raises(NoLungError, match="the lung mask is empty"):
        CropLungd("image")(data)
    with pytest.raises(ValueError, match="must not be negative"):
        CropLungd("image", margin_mm=-1.0)
