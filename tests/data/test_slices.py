# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, LoadImaged, RandFlipd, RandGaussianNoised, ScaleIntensityRanged

from custom.data.cases import CaseDataset
from custom.data.content import ContentHasher, transform_key
from custom.data.slices import EpochSampler, SliceDataset

KEYS = ["image", "label"]


@pytest.fixture
def cases(tmp_path: Path) -> list[dict]:
    """Two volumes of 3 and 4 slices; the value of an image's voxel is 100 * case + slice."""
    made = []
    for case, depth in enumerate((3, 4)):
        image = np.broadcast_to(100 * case + np.arange(depth), (5, 6, depth)).astype(np.float32)
        label = np.zeros((5, 6, depth), dtype=np.uint8)
        label[1, 2, depth - 1] = 1
        entry = {"patient_id": str(case), "name": f"case{case}"}
        for key, array in (("image", image), ("label", label)):
            entry[key] = str(tmp_path / f"{key}{case}.nii.gz")
            nib.save(nib.Nifti1Image(array, np.eye(4)), entry[key])
        made.append(entry)
    return made


def read(maximum: float = 1000.0) -> list:
    scale = ScaleIntensityRanged("image", 0, maximum, 0, maximum)
    return [LoadImaged(KEYS, image_only=True, ensure_channel_first=True), scale]


def values(dataset: SliceDataset) -> list[float]:
    return [float(dataset[i]["image"].max()) for i in range(len(dataset))]


def test_slices_are_drawn_across_cases(cases, tmp_path):
    dataset = SliceDataset(cases, read(), [], tmp_path / "cache")
    assert values(dataset) == [0, 1, 2, 100, 101, 102, 103]
    assert dataset[0]["image"].shape == dataset[0]["label"].shape == (1, 5, 6)
    lesions = SliceDataset(cases, read(), [], tmp_path / "cache", select="lesion")
    assert values(lesions) == [2, 103]
    assert int(lesions[1]["label"].sum()) == 1


def test_a_case_that_is_named_twice_is_prepared_once_and_drawn_twice(cases, tmp_path, monkeypatch):
    prepared = []
    prepare = SliceDataset.prepare_case
    monkeypatch.setattr(
        SliceDataset, "prepare_case", lambda self, number: (prepared.append(number), prepare(self, number))
    )
    dataset = SliceDataset([*cases, cases[0]], read(), [], tmp_path / "cache")
    assert values(dataset) == [0, 1, 2, 100, 101, 102, 103, 0, 1, 2]
    assert len(prepared) == 2


def test_parts_by_slice_are_disjoint_and_complete(cases, tmp_path):
    parts = [
        values(SliceDataset(cases, read(), [], tmp_path / "cache", seed=4, part=part))
        for part in ((0, 0.7), (0.7, 1))
    ]
    assert [len(part) for part in parts] == [5, 2]
    assert sorted(parts[0] + parts[1]) == [0, 1, 2, 100, 101, 102, 103]
    with pytest.raises(ValueError, match="two rising fractions"):
        SliceDataset(cases, read(), [], tmp_path, part=(0.5, 0.2))


def test_no_slice_of_a_kind_is_an_error(cases, tmp_path):
    with pytest.raises(ValueError, match="none of the 2 cases has a slice of the kind 'lung'"):
        len(SliceDataset(cases, read(), [], tmp_path / "cache", select="lung"))
    with pytest.raises(ValueError, match="select must be"):
        SliceDataset(cases, read(), [], tmp_path, select="liver")


def test_a_case_is_prepared_once_and_again_when_file_or_transform_change(cases, tmp_path):
    cache = tmp_path / "cache"

    def folders() -> int:
        return sum(path.is_dir() for path in cache.iterdir())

    assert values(SliceDataset(cases, read(), [], cache))[:1] == [0] and folders() == 2
    assert values(SliceDataset(cases, read(), [], cache))[:1] == [0] and folders() == 2
    values(SliceDataset(cases, read(500.0), [], cache))
    assert folders() == 4  # another parameter of a transform
    nib.save(nib.Nifti1Image(np.full((5, 6, 3), 7, np.float32), np.eye(4)), cases[0]["image"])
    assert values(SliceDataset(cases, read(), [], cache))[:3] == [7, 7, 7]


def test_a_torn_cache_entry_is_made_again(cases, tmp_path):
    dataset = SliceDataset(cases, read(), [], tmp_path / "cache")
    assert len(dataset) == 7
    for folder in dataset._folders:
        (folder / "case.json").unlink()  # the index is written last: without it the entry does not count
    assert values(SliceDataset(cases, read(), [], tmp_path / "cache")) == [0, 1, 2, 100, 101, 102, 103]


def test_image_and_label_of_different_shape_are_refused(cases, tmp_path):
    cases[1]["label"] = cases[0]["label"]
    with pytest.raises(
        ValueError, match=r"label0.nii.gz differ after preparation: \(5, 6, 4\) and \(5, 6, 3\)"
    ):
        len(SliceDataset(cases, read(), [], tmp_path / "cache"))
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".partial")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(cases, tmp_path, num_workers):
    augment = [RandFlipd(KEYS, prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=1.0)]

    def epoch(seed: int, number: int, workers: int) -> torch.Tensor:
        dataset = SliceDataset(cases, read(), augment, tmp_path / "cache", seed=seed)
        sampler = EpochSampler(dataset, seed=seed)
        sampler.set_epoch(number)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers)
        return torch.cat([batch["image"].as_tensor() for batch in loader])

    np.random.seed(num_workers)  # what else has drawn random numbers must not matter
    torch.manual_seed(num_workers)
    assert torch.equal(epoch(0, 3, num_workers), epoch(0, 3, 0))
    assert not torch.equal(epoch(0, 3, 0), epoch(0, 4, 0))
    assert not torch.equal(epoch(0, 3, 0), epoch(1, 3, 0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_preparation_draws_nothing_at_random(cases, tmp_path, num_workers):
    """Weights that are made afterwards must not depend on what had been prepared before."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert len(SliceDataset(cases, read(), [], tmp_path / "cache", num_workers=num_workers)) == 7
    assert torch.equal(torch.rand(1), expected)


def test_an_epoch_draws_every_slice_once(cases, tmp_path):
    dataset = SliceDataset(cases, read(), [], tmp_path / "cache")
    sampler = EpochSampler(dataset, seed=5)
    sampler.set_epoch(2)
    drawn = list(sampler)
    assert {epoch for epoch, _ in drawn} == {2}
    assert sorted(index for _, index in drawn) == list(range(7))


def test_an_epoch_with_repeats_draws_what_as_many_epochs_would(cases, tmp_path):
    dataset = SliceDataset(cases, read(), [], tmp_path / "cache")
    once, three = EpochSampler(dataset, seed=5), EpochSampler(dataset, seed=5, repeats=3)
    three.set_epoch(2)
    drawn = list(three)
    expected = []
    for epoch in (6, 7, 8):
        once.set_epoch(epoch)
        expected += list(once)
    assert drawn == expected and len(drawn) == len(three) == 21
    assert three.epoch == 2 and list(three) == drawn
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        EpochSampler(dataset, repeats=0)


def test_a_lambda_cannot_be_part_of_a_key():
    from monai.transforms import Lambdad

    with pytest.raises(ValueError, match="cannot tell from others"):
        transform_key(Compose([Lambdad("image", lambda x: x)]))
    assert transform_key(Compose([Lambdad("image", np.abs)])) != transform_key(
        Compose([Lambdad("image", np.sqrt)])
    )


def test_a_changed_file_changes_the_key_even_at_equal_size(tmp_path):
    file = tmp_path / "image.nii"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    first = ContentHasher(tmp_path)
    before = first.key({"image": str(file)})
    first.save()
    assert ContentHasher(tmp_path).key({"image": str(file)}) == before
    file.write_bytes(b"two")
    os.utime(file, ns=(2, 2))
    assert ContentHasher(tmp_path).key({"image": str(file)}) != before
    assert ContentHasher(tmp_path).key({"image": str(file)}, "other") != before


def test_whole_cases_are_prepared_once_and_can_be_inverted(cases, tmp_path, caplog):
    from monai.transforms import Orientationd, Resized

    prepare = Compose([*read(), Orientationd("image", "PLS", labels=None), Resized("image", (8, 8, -1))])
    cache = tmp_path / "cases"
    first = CaseDataset(cases, prepare, cache)[1]
    stamp = {p: p.stat().st_mtime_ns for p in cache.glob("*.pt")}
    again = CaseDataset(cases, prepare, cache)[1]
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*.pt")} == stamp
    assert torch.equal(first["image"], again["image"])
    assert np.allclose(again["image"].affine, first["image"].affine)
    other = Compose([*read(), Orientationd("image", "PLS", labels=None), Resized("image", (8, 8, -1))])
    back = other.inverse({"image": again["image"]})["image"]  # as another process would
    assert back.shape == (1, 5, 6, 4) and np.allclose(back.affine, np.eye(4))
    next(iter(stamp)).write_bytes(b"torn")
    assert torch.equal(CaseDataset(cases, prepare, cache)[1]["image"], first["image"])
    assert "prepared again" in caplog.text
