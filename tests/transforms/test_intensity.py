# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from custom.transforms import NormalizeSlicesd


def test_a_slice_is_the_same_alone_and_in_a_volume():
    torch.manual_seed(0)
    volume = MetaTensor(torch.rand(1, 6, 7, 3) * torch.tensor([1.0, 10.0, 100.0]), affine=torch.eye(4) * 2)
    normalize = NormalizeSlicesd("image")
    result = normalize({"image": volume})["image"]
    assert isinstance(result, MetaTensor) and torch.equal(result.affine, volume.affine)
    for k in range(3):
        alone = normalize({"image": volume[..., k]})["image"]
        assert torch.allclose(result[..., k].as_tensor(), alone.as_tensor(), atol=1e-6)
        assert float(alone.mean()) == pytest.approx(0, abs=1e-5)
        assert float(alone.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_a_constant_slice_becomes_zero_and_other_shapes_are_refused():
    assert not NormalizeSlicesd("image")({"image": torch.full((1, 4, 4), 7.0)})["image"].any()
    with pytest.raises(ValueError, match="found shape"):
        NormalizeSlicesd("image")({"image": torch.zeros(4, 4)})
