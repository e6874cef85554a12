# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from custom.transforms import CheckSameGridd


def image(shape=(1, 4, 5, 6), offset=0.0, name="ct.nii") -> MetaTensor:
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 3] = offset
    return MetaTensor(torch.zeros(shape), affine=affine, meta={"filename_or_obj": name})


def test_a_mask_on_the_images_grid_passes():
    data = {"image": image(), "label": image((3, 4, 5, 6), 0.01), "name": "a"}
    assert CheckSameGridd(["image", "label"])(data).keys() == data.keys()


def test_a_mask_elsewhere_is_refused_by_name():
    check = CheckSameGridd(["image", "label"])
    with pytest.raises(
        ValueError, match=r"image ct.nii and label seg.nii differ in size: \(4, 5, 6\) and \(4, 5, 5\)"
    ):
        check({"image": image(), "label": image((1, 4, 5, 5), name="seg.nii")})
    with pytest.raises(ValueError, match="label seg.nii lie in different places"):
        check({"image": image(), "label": image(offset=3.0, name="seg.nii")})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mask_that_is_not_finite_is_refused(value):
    label = image(name="seg.nii")
    label[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="label seg.nii holds NaN or infinity"):
        CheckSameGridd(["image", "label"])({"image": image(), "label": label})
