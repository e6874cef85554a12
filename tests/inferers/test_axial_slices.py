# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from custom.inferers import AxialSliceInferer
from custom.networks import SCOATNet


def shift(batch: torch.Tensor) -> torch.Tensor:
    """Two channels, one of which tells the slices apart."""
    return torch.cat([batch, batch.mean(dim=(2, 3), keepdim=True).expand_as(batch)], dim=1)


def test_every_slice_comes_back_to_its_place():
    volume = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 1, 3, 4, 5)
    result = AxialSliceInferer(batch_size=3)(volume, shift)
    assert result.shape == (2, 2, 3, 4, 5)
    assert torch.equal(result[:, :1], volume)
    for b in range(2):
        for d in range(5):
            assert torch.allclose(result[b, 1, :, :, d], volume[b, 0, :, :, d].mean())


def test_batches_are_full_but_the_last():
    sizes = []

    def spy(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch

    AxialSliceInferer(batch_size=4)(torch.zeros(2, 1, 8, 8, 5), spy)
    assert sizes == [4, 4, 2]


def test_the_result_is_the_same_for_every_batch_size():
    torch.manual_seed(0)
    network = SCOATNet(channels=(4, 8, 8, 8, 8)).eval()
    volume = torch.rand(1, 1, 32, 32, 7)
    with torch.no_grad():
        results = [AxialSliceInferer(batch_size=n)(volume, network) for n in (1, 3, 7, 16)]
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-5)
        assert torch.equal(result > 0, results[0] > 0)


def test_flipped_slices_are_averaged_in_their_place():
    ramp = torch.arange(4.0)  # a network that adds the column number, whichever way the slice lies

    volume = torch.rand(1, 1, 3, 4, 2)
    result = AxialSliceInferer(flip=True)(volume, lambda batch: batch + ramp)
    assert torch.allclose(result, volume + 1.5)
    mirrored = AxialSliceInferer(flip=True)(volume.flip(3), lambda batch: batch * ramp)
    assert torch.allclose(mirrored.flip(3), AxialSliceInferer(flip=True)(volume, lambda b: b * ramp))


def test_a_plain_slice_passes_through_and_meta_data_stays():
    image = MetaTensor(torch.rand(2, 1, 8, 8), affine=torch.diag(torch.tensor([2.0, 2.0, 3.0, 1.0])))
    result = AxialSliceInferer()(image, lambda x: x * 2)
    assert isinstance(result, MetaTensor) and torch.equal(result.affine, image.affine)
    assert torch.equal(result.as_tensor(), image.as_tensor() * 2)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        AxialSliceInferer(batch_size=0)
    with pytest.raises(ValueError, match="found shape"):
        AxialSliceInferer()(torch.zeros(1, 8, 8), shift)
    with pytest.raises(ValueError, match="no slices"):
        AxialSliceInferer()(torch.zeros(1, 1, 8, 8, 0), shift)
