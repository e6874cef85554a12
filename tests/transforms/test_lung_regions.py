# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage

from custom.transforms import KeepLungRegionsd, lung_regions
from custom.transforms.lung_regions import REMOVED

SPACING = (2.0, 2.0, 5.0)


def scan(halves=(1, 2)) -> dict:
    """Lungs of 6 x 6 x 4 voxels each, a region in the left one, one beside it, one in the neck, two below."""
    affine = torch.tensor(np.diag([*SPACING, 1.0]))
    lungs, mask = np.zeros((1, 30, 20, 16), np.uint8), np.zeros((1, 30, 20, 16), np.uint8)
    for value, start in ((1, 4), (2, 20)):
        if value in halves:
            lungs[0, start : start + 6, 6:12, 6:10] = value
    mask[0, 5:7, 7:9, 7:9] = 1  # 8 voxels within
    mask[0, 9:18, 8, 8] = 1  # begins within the lung and reaches 8 voxels, 16 mm, beyond it
    mask[0, 5, 14, 7] = 1  # 2 voxels are between: three steps, 6 mm away
    mask[0, 15, 8, 14:16] = 1
    mask[0, 5:7, 5:9, 0:2] = 1  # 16 voxels, 5 slices below
    return {
        "pred": MetaTensor(torch.from_numpy(mask), affine=affine),
        "lung": MetaTensor(torch.from_numpy(lungs), affine=affine),
    }


def test_regions_away_from_the_lungs_go_and_are_counted():
    data = scan()
    before = data["pred"].clone()
    kept = KeepLungRegionsd("pred", reach_mm=5)(data)["pred"]
    assert int(before.sum()) == 8 + 9 + 1 + 2 + 16
    assert int(kept.sum()) == 8 + 9, "what touches the lungs stays whole"
    assert torch.equal(data["pred"], before), "the item that was given stays as it was"
    assert kept.dtype == before.dtype and torch.equal(kept.affine, before.affine)
    assert kept.meta[REMOVED] == {"regions": 3, "voxels": 19, "reach_mm": 5}


def test_the_reach_counts_in_millimetres():
    assert int(KeepLungRegionsd("pred", reach_mm=6)(scan())["pred"].sum()) == 18
    assert int(KeepLungRegionsd("pred", reach_mm=25)(scan())["pred"].sum()) == 36
    assert REMOVED not in KeepLungRegionsd("pred", reach_mm=25)(scan())["pred"].meta


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_the_way_axes_run_does_not_matter(axis):
    data = scan()
    turned = {key: MetaTensor(torch.flip(v.as_tensor(), [axis]), affine=v.affine) for key, v in data.items()}
    kept = KeepLungRegionsd("pred")(data)["pred"].as_tensor()
    assert torch.equal(torch.flip(KeepLungRegionsd("pred")(turned)["pred"].as_tensor(), [axis]), kept)


@pytest.mark.parametrize("halves", [(), (1,), (2,)])
def test_without_both_lungs_all_is_kept(halves):
    data = scan(halves)
    assert torch.equal(KeepLungRegionsd("pred")(data)["pred"], data["pred"])


def test_none_or_no_lung_mask_or_nothing_found_changes_nothing():
    data = scan()
    assert KeepLungRegionsd("pred", reach_mm=None)(data)["pred"] is data["pred"]
    assert KeepLungRegionsd("pred")({"pred": data["pred"]})["pred"] is data["pred"]
    empty = {**data, "pred": data["pred"] * 0}
    assert int(KeepLungRegionsd("pred")(empty)["pred"].sum()) == 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="reach_mm must not be negative, found -1"):
        KeepLungRegionsd("pred", reach_mm=-1)
    data = scan()
    with pytest.raises(ValueError, match=r"pred is not on the grid of lung: \(1, 30, 20, 8\)"):
        KeepLungRegionsd("pred")({**data, "pred": data["pred"][..., ::2]})


@pytest.mark.parametrize("depth", [1, 2, 4, 5, 9, 13])
@pytest.mark.parametrize("seed", range(4))
def test_a_few_planes_at_a_time_give_what_the_whole_gives(monkeypatch, depth, seed):
    rng = np.random.default_rng(seed)
    mask = (rng.random((12, 11, depth)) < 0.07).astype(np.uint8)
    mask[5, 5] = 1  # goes through all parts
    lungs = np.zeros_like(mask)
    lungs[0, 0, 0], lungs[11, 10, -1] = 1, 2
    monkeypatch.setattr(lung_regions, "_STEP", 4)
    kept = KeepLungRegionsd("pred", reach_mm=2.0)(
        {"pred": MetaTensor(mask[None], affine=np.eye(4)), "lung": torch.from_numpy(lungs[None])}
    )["pred"]
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    box = np.ones((5, 5, 5)) if depth > 1 else np.ones((5, 5, 1))
    near = set(np.unique(labels[ndimage.binary_dilation(lungs > 0, box)])) - {0}
    assert np.array_equal(kept.numpy()[0] > 0, np.isin(labels, list(near)))
    told = kept.meta[REMOVED]
    assert told["regions"] == count - len(near)
    assert told["voxels"] == int(mask.sum() - kept.sum())
