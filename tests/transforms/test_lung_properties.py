# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whatever the scan's grid and the lungs' box: the inverse puts every voxel back where it was."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Resized

from custom.transforms import CropLungd
from tests.fuzzing import fuzzed

AXCODES = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "SI"))
    for codes in itertools.product(*order)
]


@st.composite
def scans(draw: st.DrawFn, smallest: int = 1) -> tuple[MetaTensor, MetaTensor]:
    """A scan whose voxels all differ, in any axis order, and a lung mask with one box or more."""
    shape = draw(st.tuples(*[st.integers(smallest, 9)] * 3))
    codes = draw(st.sampled_from(AXCODES))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(codes))
    )
    spacing = draw(st.tuples(*[st.floats(0.5, 9.0)] * 3))
    affine = np.diag([*spacing, 1.0]) @ nib.orientations.inv_ornt_aff(turn, shape)
    affine[:3, 3] += draw(st.tuples(*[st.floats(-300, 300)] * 3))
    values = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(1, *shape)
    mask = torch.zeros(1, *shape, dtype=torch.uint8)
    for _ in range(draw(st.integers(1, 2))):
        corner = [draw(st.integers(0, n - 1)) for n in shape]
        far = [draw(st.integers(c, n - 1)) for c, n in zip(corner, shape, strict=True)]
        mask[(0, *(slice(c, f + 1) for c, f in zip(corner, far, strict=True)))] = draw(
            st.sampled_from([1, 2])
        )
    place = torch.as_tensor(affine)
    return MetaTensor(values, affine=place), MetaTensor(mask, affine=place)


@given(scans(), st.floats(0, 30), st.sampled_from(AXCODES))
@fuzzed()
def test_crop_and_orientation_come_back_exactly(scan, margin, codes):
    image, mask = scan
    chain = Compose(
        [
            CropLungd(["image", "lung"], mask_key="lung", margin_mm=margin),
            Orientationd(["image", "lung"], axcodes=codes, labels=None),
        ]
    )
    out = chain({"image": image.clone(), "lung": mask.clone()})
    assert (out["lung"] > 0).sum() == (mask > 0).sum(), "no lung is cut off"
    back = chain.inverse(out)
    for key, given_one in (("image", image), ("lung", mask)):
        assert back[key].shape == given_one.shape
        assert np.allclose(back[key].affine, given_one.affine, atol=1e-6)
        inside = back[key] != 0
        assert torch.equal(back[key][inside].as_tensor(), given_one[inside].as_tensor())
    assert (back["image"][mask > 0] > 0).all() and torch.equal(back["lung"].as_tensor(), mask.as_tensor())
    # What the margin adds is what it says, and no more than a voxel's rounding beyond it.
    sizes = np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        lung, kept = (np.flatnonzero(np.asarray(m[0] != 0).any(axis=others)) for m in (mask, back["image"]))
        steps = int(np.ceil(margin / sizes[axis]))
        assert kept[0] == max(lung[0] - steps, 0)
        assert kept[-1] == min(lung[-1] + steps, image.shape[1 + axis] - 1)


@given(scans(smallest=2), st.integers(1, 3))
@fuzzed(40)
def test_a_mask_comes_back_through_an_enlarged_grid(scan, factor):
    """By the nearest neighbour, on a grid an odd number of times as fine, nothing changes at all."""
    image, mask = scan
    crop = Compose(
        [
            CropLungd(["image", "lung"], mask_key="lung", margin_mm=0.0),
            Orientationd(["image", "lung"], axcodes="PLS", labels=None),
        ]
    )
    small = crop({"image": image.clone(), "lung": mask.clone()})
    size = [(2 * factor + 1) * n for n in small["lung"].shape[1:3]]
    chain = Compose([*crop.transforms, Resized("lung", spatial_size=[*size, -1], mode="nearest")])
    back = chain.inverse(chain({"image": image.clone(), "lung": mask.clone()}))
    assert torch.equal(back["lung"].as_tensor().to(torch.uint8), mask.as_tensor())
    assert np.allclose(back["lung"].affine, mask.affine, atol=1e-6)
