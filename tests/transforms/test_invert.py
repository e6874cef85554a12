# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    Invertd,
    Orientationd,
    Resized,
    ScaleIntensityRanged,
    Spacingd,
)

from custom.transforms import CropLungd, InvertToMaskd
from custom.transforms import invert as module

CODES = ["RAS", "LPS", "PLS", "SPL", "IAR", "ASL"]
CROP = CropLungd("image", mask_key="lung", margin_mm=5.0)
TURN = Orientationd("image", axcodes="PLS", labels=None)
SCALE = ScaleIntensityRanged("image", -1000, 400, 0, 1, clip=True)


def prepared(chain: Compose, codes: str = "RAS", shape: tuple[int, ...] = (20, 17, 23)) -> dict:
    generator = torch.Generator().manual_seed(sum(map(ord, codes)))
    affine = torch.tensor([[0.9, 0, 0, -40], [0, 1.3, 0, 5], [0, 0, 2.1, 7], [0, 0, 0, 1]]).double()
    item = {
        "image": MetaTensor(torch.rand(1, *shape, generator=generator) * 1000 - 900, affine=affine),
        "lung": MetaTensor(torch.zeros(1, *shape), affine=affine),
    }
    item["lung"][:, 3:-4, 5:-2, 2:-3] = 1
    turned = Orientationd(["image", "lung"], axcodes=codes, labels=None)(item)
    # As if it had been stored so: without a trace.
    return chain({key: MetaTensor(value.as_tensor(), affine=value.affine) for key, value in turned.items()})


def logits_of(item: dict, channels: int = 1) -> torch.Tensor:
    """Smooth enough that a threshold makes regions, and none of them at an edge of the grid alone."""
    shape = item["image"].shape[1:]
    noise = torch.randn(
        channels, *(max(2, n // 3) for n in shape), generator=torch.Generator().manual_seed(5)
    )
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    return 4 * torch.nn.functional.interpolate(noise[None], size=shape, mode=mode)[0]


def by_monai(item: dict, chain: Compose) -> dict:
    steps = [
        Activationsd("pred", sigmoid=True),
        Invertd("pred", chain, "image", nearest_interp=False),
        AsDiscreted("pred", threshold=0.5),
    ]
    return Compose(steps)({**item, "pred": item["pred"].clone()})


def check(item: dict, chain: Compose, channels: int = 1) -> MetaTensor:
    item["pred"] = logits_of(item, channels)
    expected = by_monai(item, chain)["pred"]
    found = InvertToMaskd("pred", chain)(item)["pred"]
    assert found.dtype == torch.uint8 and found.shape == expected.shape
    assert torch.equal(found.as_tensor().float(), expected.as_tensor()) and 0 < found.float().mean() < 1
    assert torch.equal(found.affine, expected.affine)
    assert found.applied_operations == expected.applied_operations == []
    return found


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("size", [(32, 28), (7, 9)])
def test_it_is_what_monais_three_steps_make(codes, size, monkeypatch):
    chain = Compose([CROP, TURN, SCALE, Resized("image", spatial_size=(*size, -1), mode="trilinear")])
    calls = []
    resize = module.Resize
    monkeypatch.setattr(module, "Resize", lambda **options: calls.append(options) or resize(**options))
    item = prepared(chain, codes)
    check(item, chain)
    assert len(calls) == -(-item["image"].shape[-1] // module._STEP), "a few slices at a time"


def test_several_channels_and_a_single_slice():
    chain = Compose([CROP, TURN, Resized("image", spatial_size=(30, 30, -1), mode="trilinear")])
    assert len(check(prepared(chain), chain, channels=3)) == 3
    whole = prepared(Compose([]))
    one = {key: MetaTensor(whole[key].as_tensor()[..., 5:6], affine=whole[key].affine) for key in whole}
    check(chain(one), chain)


@pytest.mark.parametrize(
    "chain",
    [
        Compose([CROP, TURN, Resized("image", spatial_size=(30, 30, 11), mode="trilinear")]),
        Compose(
            [
                TURN,
                Spacingd("image", (1.0, 1.0, 3.0)),
                Resized("image", spatial_size=(30, 30, -1), mode="area"),
            ]
        ),
        Compose([CROP, TURN]),
        Compose([SCALE]),
    ],
    ids=["depth resized too", "interpolated before", "not resized", "nothing to invert"],
)
def test_other_chains_are_inverted_as_a_whole(chain):
    check(prepared(chain), chain)


def test_plain_slices():
    chain = Compose([Resized("image", spatial_size=(32, 32), mode="bilinear")])
    item = chain({"image": MetaTensor(torch.rand(1, 20, 17))})
    assert check(item, chain).shape == (1, 20, 17)


def test_the_threshold_and_missing_keys():
    chain = Compose([CROP, TURN, Resized("image", spatial_size=(30, 30, -1), mode="trilinear")])
    item = prepared(chain)
    item["pred"] = torch.zeros(item["image"].shape)  # a probability of one half
    at, above = (InvertToMaskd("pred", chain, threshold=t)(item)["pred"] for t in (0.5, 0.51))
    cropped = CROP(prepared(Compose([])))["image"]
    assert int(at.sum()) == np.prod(cropped.shape), "the box of the lungs and nothing beside it"
    assert not above.any()
    for wrong in (0, 1, 50, True, "0.5"):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            InvertToMaskd("pred", chain, threshold=wrong)
    assert InvertToMaskd("other", chain, allow_missing_keys=True)(item).keys() == item.keys()
