# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from custom.data import EpochSampler, MultiScaleBatch


def batch(side: int = 352) -> dict:
    label = torch.zeros(2, 1, side, side)
    label[:, :, : side // 2] = 1
    return {"image": MetaTensor(torch.rand(2, 1, side, side)), "label": MetaTensor(label)}


def test_the_papers_sides_in_turn_and_labels_stay_binary():
    prepare = MultiScaleBatch(order="cycle")
    sides = []
    for _ in range(4):
        image, label = prepare(batch(), torch.device("cpu"))
        assert image.shape == label.shape and set(label.unique().tolist()) == {0.0, 1.0}
        assert float(label.mean()) == pytest.approx(0.5)
        sides.append(image.shape[-1])
    assert sides == [256, 352, 448, 256]


def test_random_scales_depend_on_torchs_generator_alone():
    prepare = MultiScaleBatch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [prepare(batch(64))[0].shape[-1] for _ in range(12)]
    torch.set_rng_state(state)
    assert [prepare(batch(64))[0].shape[-1] for _ in range(12)] == first
    assert set(first) == {32 * round(64 * scale / 32) for scale in (0.75, 1.0, 1.25)}


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="order must be"):
        MultiScaleBatch(order="all")
    with pytest.raises(ValueError, match="positive factors"):
        MultiScaleBatch(scales=[0.0])


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 7


def test_every_full_batch_is_drawn_so_many_times_in_a_row():
    sampler = EpochSampler(Numbers(), seed=1, passes=3, batch_size=2)
    sampler.set_epoch(4)
    keys = list(sampler)
    assert len(keys) == len(sampler) == 18
    once = list(EpochSampler(Numbers(), seed=1))
    batches = [keys[i : i + 2] for i in range(0, 18, 2)]
    assert batches[0] == batches[1] == batches[2] and batches[3] == batches[4] == batches[5]
    assert len({key for key in keys}) == 6 and len(once) == 7
    with pytest.raises(ValueError, match="passes over batches"):
        EpochSampler(Numbers(), passes=2, batch_size=8)
