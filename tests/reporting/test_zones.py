# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from custom.reporting.zones import HALVES, ZONES, ZoneCount, count_zones, cut_ends

LPI = np.diag([-1.0, -1.0, -1.0, 1.0])  # the first index grows to the left, then posterior, then inferior
EVERY_ORDER = [
    codes for order in itertools.permutations(("LR", "PA", "SI")) for codes in itertools.product(*order)
]


def lung() -> tuple[np.ndarray, np.ndarray]:
    """A lung of 2 x 6 x 9 voxels, planes 1 to 9 from above, and opacity in some of them."""
    mask = np.zeros((4, 8, 12), bool)
    mask[1:3, 1:7, 1:10] = True
    opacity = np.zeros_like(mask)
    opacity[1, 1:3, 1] = True  # two voxels: uppermost plane, in front
    opacity[1, 6, 5] = True  # one in the middle, at the back
    opacity[1:3, 4:7, 9] = True  # six in the lowest plane, at the back
    opacity[0, 0, 0] = True  # outside
    return mask, opacity


@pytest.mark.parametrize("codes", EVERY_ORDER, ids="".join)
def test_thirds_and_halves_by_hand_in_every_axis_order(codes):
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(LPI), nib.orientations.axcodes2ornt(codes)
    )
    turned = [nib.Nifti1Image(array.astype(np.uint8), LPI).as_reoriented(change) for array in lung()]
    mask, opacity = (np.asarray(image.dataobj) > 0 for image in turned)
    counts, reasons = count_zones(mask, opacity, turned[0].affine)
    assert reasons == {}
    assert counts == {
        "upper": ZoneCount(36, 2),
        "middle": ZoneCount(36, 1),
        "lower": ZoneCount(36, 6),
        "ventral": ZoneCount(54, 2),
        "dorsal": ZoneCount(54, 7),
    }
    assert tuple(counts) == (*ZONES, *HALVES)


def test_parts_add_up_where_the_height_is_no_multiple_of_three():
    mask, opacity = lung()
    for height in range(3, 9):
        part = mask.copy()
        part[..., 1 + height :] = False
        counts, _ = count_zones(part, opacity, LPI)
        for names in (ZONES, HALVES):
            assert sum(counts[name].lung for name in names) == part.sum()
            assert sum(counts[name].opacity for name in names) == (part & opacity).sum()
        thirds = [counts[name].lung for name in ZONES]
        assert max(thirds) - min(thirds) <= 12, "as equal as whole planes can be"


def test_a_lung_that_the_scan_cuts_off_has_no_thirds():
    mask, opacity = lung()
    assert cut_ends(mask, LPI) == {"bottom": 0.0, "top": 0.0}
    above = mask[..., 4:], opacity[..., 4:]  # its upper part is missing
    assert cut_ends(above[0], LPI) == {"bottom": 0.0, "top": 1.0}
    counts, reasons = count_zones(*above, LPI)
    assert [counts[zone] for zone in ZONES] == [None] * 3 and "cuts off the top" in reasons["upper"]
    assert counts["ventral"].lung + counts["dorsal"].lung == above[0].sum()
    below = mask[..., :6].copy()
    below[:, :, 5] = False
    below[1, 1:4, 5] = True  # three of twelve voxels: a quarter, still whole
    assert cut_ends(below, LPI)["bottom"] == 0.25
    assert count_zones(below, opacity[..., :6], LPI)[1] == {}
    below[1, 4, 5] = True  # a third
    counts, reasons = count_zones(below, opacity[..., :6], LPI)
    assert counts["lower"] is None and "33 %" in reasons["lower"] and "bottom" in reasons["lower"]


def test_few_slices_have_no_thirds():
    mask, opacity = lung()
    mask[..., 3:] = False
    counts, reasons = count_zones(mask, opacity, LPI)
    assert counts["upper"] is None and "fewer than 3 slices" in reasons["upper"]
    mask[...] = False
    mask[1, 1, 1:4] = True  # one voxel deep: there are no two halves of it
    counts, reasons = count_zones(mask, opacity, LPI)
    assert counts["upper"] == ZoneCount(1, 1)
    assert set(reasons) == {"dorsal"} and counts["dorsal"] is None and counts["ventral"] == ZoneCount(3, 1)
