# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from custom.reporting.figures import AttentionView, _planes, draw_overview, shown_voxel


def volume() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scan in LPS with a lesion on the patient's left, anterior and superior."""
    scan = np.full((20, 24, 10), -800.0)
    mask = np.zeros(scan.shape, np.uint8)
    mask[15:18, 3:6, 7:9] = 1
    return scan, mask, np.diag([-2.0, -2.0, 5.0, 1.0])


@pytest.mark.parametrize(
    "codes", list(itertools.product("LR", "AP", "SI"))[:4] + [("S", "L", "P"), ("A", "I", "R")]
)
def test_planes_are_upright_whatever_the_axis_order(codes):
    scan, mask, affine = volume()
    image = nib.Nifti1Image(mask, affine)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(change)
    other = np.asarray(turned.dataobj)
    axial, coronal, sagittal = _planes(np.zeros(other.shape), other, None, turned.affine)
    rows, columns = np.nonzero(axial.opacity)  # anterior is up, the patient's left is right
    assert axial.opacity.shape == (24, 20) and rows.max() < 12 and columns.min() > 10
    rows, columns = np.nonzero(coronal.opacity)  # the head is up
    assert coronal.opacity.shape == (10, 20) and rows.max() < 5 and columns.min() > 10
    rows, columns = np.nonzero(sagittal.opacity)
    assert sagittal.opacity.shape == (10, 24) and rows.max() < 5 and columns.max() < 12
    assert axial.aspect == pytest.approx(1.0) and coronal.aspect == pytest.approx(2.5)


def test_the_shown_voxel_is_the_densest_or_the_middle():
    _, mask, _ = volume()
    mask[0, 0, 2] = 1
    mask[16, 4, 7] = 1
    assert shown_voxel(mask)[2] in (7, 8)
    assert shown_voxel(np.zeros((5, 7, 9))) == (2, 3, 4)
    lungs = np.zeros_like(mask)
    assert shown_voxel(mask, lungs) == shown_voxel(mask), "no opacity in the lungs: show what there is"
    lungs[0] = 1
    assert shown_voxel(mask, lungs) == (0, 0, 2), "opacity in the lungs goes first"


@pytest.mark.parametrize("empty", [False, True])
def test_a_picture_is_written_for_volumes_single_slices_and_plain_slices(tmp_path, empty):
    scan, mask, affine = volume()
    if empty:
        mask[:] = 0
    attention = AttentionView(np.zeros((16, 16)), {"x1_1": np.ones((8, 8))})
    cases = {
        "volume": (scan, mask, affine, attention),
        "one": (scan[..., 7:8], mask[..., 7:8], affine, None),
        "plain": (scan[..., 7], mask[..., 7], None, attention),
    }
    for name, (image, opacity, where, seen) in cases.items():
        draw_overview(tmp_path / f"{name}.png", image, opacity, where, name, ["1 mL"], attention=seen)
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        red = (picture[..., 0] > 200) & (picture[..., 1] < 100) & (picture[..., 2] < 100)
        assert red.any() != empty, "the contour is red"
    with pytest.raises(ValueError, match="must share a grid"):
        draw_overview(tmp_path / "x.png", scan, mask[1:], affine, "x")
    assert not (tmp_path / "x.png").exists()
