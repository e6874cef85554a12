# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from monai.data import Dataset, MetaTensor, decollate_batch
from monai.data.utils import list_data_collate
from monai.transforms import Compose, CopyItemsd, Orientationd, Resized

from custom.console import CohortError
from custom.data import CohortLoader


def prepare(item: dict) -> dict:
    if item["number"] < 0:
        raise ValueError(f"{item['name']}.nii is broken")
    image = torch.full((1, 4, 5, 3), float(item["number"]))
    return {**item, "image": MetaTensor(image, meta={"study": item["name"]})}


def dataset(*numbers: int) -> Dataset:
    return Dataset([{"name": f"scan{n}", "number": n} for n in numbers], prepare)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_studies_come_in_order_and_failures_are_noted(num_workers):
    loader = CohortLoader(dataset(1, -2, 3, -4), num_workers)
    for _ in range(2):  # a second time it starts anew
        assert [batch["name"] for batch in loader] == [["scan1"], ["scan3"]]
        assert loader.failures == [
            {"name": "scan-2", "reason": "scan-2.nii is broken"},
            {"name": "scan-4", "reason": "scan-4.nii is broken"},
        ]
        assert loader.position == loader.total == 4


def test_a_share_and_what_is_no_users_error():
    loader = CohortLoader(dataset(1, -2, 3), sampler=[2, 1])
    assert [batch["name"] for batch in loader] == [["scan3"]] and loader.total == 2
    broken = CohortLoader(Dataset([{"name": "a"}], lambda item: item["number"]))
    with pytest.raises(RuntimeError) as caught:  # as MONAI wraps it
        list(broken)
    assert isinstance(caught.value.__cause__, KeyError)


def test_nothing_at_all_can_be_an_error():
    assert list(CohortLoader(dataset(-1, -2))) == []
    with pytest.raises(CohortError, match="2 of 2 studies failed: scan-1: ") as caught:
        list(CohortLoader(dataset(-1, -2), allow_empty=False))
    assert caught.value.exit_code == 2
    assert list(CohortLoader(dataset(), allow_empty=False)) == []


def test_a_batch_is_what_monai_would_make_of_it_without_a_copy():
    item = Compose(
        [
            CopyItemsd("image", names="scan"),
            Orientationd("image", axcodes="PLS", labels=None),
            Resized("image", spatial_size=[6, 6, -1]),
        ]
    )(prepare({"name": "a", "number": 2}))
    (batch,) = CohortLoader(Dataset([item]))
    expected = list_data_collate([item])
    assert batch.keys() == expected.keys() and batch["name"] == ["a"] and batch["number"] == 2
    for key in ("image", "scan"):
        assert torch.equal(batch[key].as_tensor(), expected[key].as_tensor())
        assert str(batch[key].meta) == str(expected[key].meta)
        assert batch[key].data_ptr() == item[key].data_ptr()
        (ours,), (theirs,) = (decollate_batch(b[key]) for b in (batch, expected))
        assert str(ours.applied_operations) == str(theirs.applied_operations) and len(ours.shape) == 4
        assert torch.equal(ours.affine, theirs.affine)


def test_a_study_is_let_go_before_the_next_is_prepared():
    held: list[weakref.ref] = []

    def watch(item: dict) -> dict:
        assert all(reference() is None for reference in held), "the one before is still in memory"
        array = np.zeros((1, 4, 5, 3), np.float32)
        held.append(weakref.ref(array))  # which lives as long as the tensor's memory
        return {**item, "image": MetaTensor(torch.from_numpy(array))}

    for batch in CohortLoader(Dataset([{"name": f"scan{n}"} for n in range(4)], watch)):
        del batch["image"]
        assert held[-1]() is None, "whoever lets go of a volume frees it"
        del batch
    assert len(held) == 4
