# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from custom.data import choose_series, find_studies, make_phantom, read_series
from custom.data.phantom import Lesion
from custom.transforms import extract_lungs
from custom.transforms.lung_morphology import (
    bounding_box,
    close_ball,
    dilate_ball,
    dilate_box,
    fill_small_holes,
    open_box,
)
from custom.transforms.lung_separation import dividing_sheet

SMALL = {"shape": (96, 96, 36), "spacing": (3.6, 3.6, 8.5)}
ANISOTROPIC = {"shape": (190, 190, 22), "spacing": (1.8, 1.8, 14.0), "seed": 3}
ISOTROPIC = {"shape": (120, 104, 100), "spacing": (2.8, 3.2, 2.9), "seed": 2}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """The lower one of both lungs' Dice coefficients."""
    return min(2 * np.sum((a == v) & (b == v)) / (np.sum(a == v) + np.sum(b == v)) for v in (1, 2))


@pytest.fixture(scope="module")
def sick():
    phantom = make_phantom(**SMALL, seed=1)
    return phantom, extract_lungs(phantom.image, phantom.affine)


# ---------------------------------------------------------------------------- synthetic chests


@pytest.mark.parametrize(
    "recipe",
    [
        {**SMALL, "seed": 2, "lesions": ()},
        {**SMALL, "seed": 5, "burden": 0.8},
        {**SMALL, "seed": 4, "padding_value": -3024},
        {**ANISOTROPIC, "burden": 0.5},
        {**ISOTROPIC, "burden": 0.6},
        {"shape": (240, 240, 1), "spacing": (1.4, 1.4, 5.0), "seed": 1, "burden": 0.6},
    ],
    ids=["healthy", "heavy", "padding", "thick slices", "isotropic", "one slice"],
)
def test_both_lungs_are_found(recipe):
    phantom = make_phantom(**recipe)
    before = phantom.image.copy()
    lungs = extract_lungs(phantom.image, phantom.affine)
    assert lungs.shape == phantom.image.shape and lungs.dtype == np.uint8
    assert dice(lungs, phantom.lungs) > 0.95
    assert np.array_equal(phantom.image, before), "the scan must be left as it was"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("kind", "centre", "radii", "least"),
    [
        # As much again lies outside and is cut off. Without any air in it, its border is a guess.
        ("consolidation", (0.5, 1.0, 0.45), (45, 32, 40), 0.68),
        ("consolidation", (1.0, 0.6, 0.5), (30, 40, 40), 0.85),
        ("ground_glass", (0.5, 0.9, 0.4), (60, 50, 70), 0.85),
        ("nodule", (0.6, 0.5, 0.6), (14, 14, 14), 0.85),
    ],
    ids=["consolidation at the back", "consolidation at the side", "ground-glass", "mass"],
)
def test_disease_belongs_to_the_lung(kind, centre, radii, least, side):
    lesion = Lesion(kind, centre, radii, side=side, exact=False)
    phantom = make_phantom(shape=(104, 104, 60), spacing=(3.3, 3.3, 5.0), seed=6, lesions=(lesion,))
    ill = phantom.label > 0
    aerated = (phantom.image < -500) & (phantom.lungs > 0)
    lungs = extract_lungs(phantom.image, phantom.affine)
    assert ill.sum() > 100
    if kind == "consolidation":
        assert (aerated & ill).sum() < 0.1 * ill.sum(), "a threshold would lose it"
    assert np.mean(lungs[ill] == (1 if side == "left" else 2)) > least
    assert dice(lungs, phantom.lungs) > 0.95


def test_trachea_bronchi_and_stomach_gas_are_out(sick):
    phantom, lungs = sick
    # Air away from the lungs in the middle of the body: trachea, main bronchi, stomach.
    middle = np.zeros(phantom.image.shape, bool)
    wide, deep = phantom.image.shape[:2]
    middle[wide // 4 : -wide // 4, deep // 3 : -deep // 3] = True
    gas = middle & (phantom.image < -900) & ~ndimage.binary_dilation(phantom.lungs > 0, iterations=1)
    assert gas.sum() > 20
    assert (lungs[gas] > 0).mean() < 0.02


def test_left_is_the_patients_left(sick):
    phantom, lungs = sick
    for value, sign in ((1, -1), (2, 1)):  # RAS: the patient's left has negative x
        places = nib.affines.apply_affine(phantom.affine, np.argwhere(lungs == value))
        assert np.mean(np.sign(places[:, 0]) == sign) > 0.99


@pytest.mark.parametrize("codes", ["RAS", "SPL", "PIR", "ASL"])
def test_the_order_of_axes_does_not_matter(sick, codes):
    phantom, lungs = sick
    there = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(phantom.affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = nib.orientations.apply_orientation(phantom.image, there)
    affine = phantom.affine @ nib.orientations.inv_ornt_aff(there, phantom.image.shape)
    assert "".join(nib.aff2axcodes(affine)) == codes
    expected = nib.orientations.apply_orientation(lungs, there)
    assert np.array_equal(extract_lungs(turned, affine), expected)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
def test_the_type_of_numbers_and_their_order_in_memory_do_not_matter(sick, kind):
    phantom, lungs = sick
    assert np.array_equal(extract_lungs(np.asfortranarray(phantom.image.astype(kind)), phantom.affine), lungs)


def test_couch_at_the_back_at_the_front_or_none(sick):
    phantom, lungs = sick  # axes L, P, S
    labels, _ = ndimage.label(phantom.image > -500)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = labels == sizes.argmax()
    for k in range(body.shape[2]):
        body[:, :, k] = ndimage.binary_fill_holes(body[:, :, k])
    body = ndimage.binary_dilation(body, np.ones((3, 3, 1)))
    rest = np.where(body, -1000, phantom.image)
    assert (rest > -300).any(), "the phantom lies on a couch"
    alone = np.where(body, phantom.image, -1000)
    prone = np.where(body, phantom.image, rest[:, ::-1])
    for scan in (alone, prone):
        assert dice(extract_lungs(scan, phantom.affine), lungs) > 0.99


def test_parts_of_a_scan_agree_with_the_whole():
    phantom = make_phantom(**ISOTROPIC, burden=0.3)
    whole = extract_lungs(phantom.image, phantom.affine)
    middle = whole.shape[2] // 2
    for part in (np.s_[:, :, :middle], np.s_[:, :, middle:], np.s_[22:-22, 25:-25, 20:60]):
        affine = phantom.affine.copy()  # where the part begins does not matter
        assert dice(extract_lungs(phantom.image[part], affine), whole[part]) > 0.95


# ---------------------------------------------------------------------------- no lung, wrong input


def body_of_tissue(shape=(80, 80, 12)) -> np.ndarray:
    x, y = np.meshgrid(*(np.arange(n) - n / 2 for n in shape[:2]), indexing="ij")
    inside = (x / 34) ** 2 + (y / 26) ** 2 < 1
    return np.repeat(np.where(inside, 40, -1000)[:, :, None], shape[2], 2).astype(np.int16)


def test_nothing_is_found_where_no_lung_is():
    affine = np.diag([-4.0, -4.0, 5.0, 1.0])
    belly = body_of_tissue()
    with_gas = belly.copy()
    with_gas[30:42, 22:34, 2:10] = -1000
    for scan in (
        np.full((30, 30, 5), -1000),
        np.full((30, 30, 5), -700),
        belly,
        with_gas,
        with_gas[:, :, 5:6],
    ):
        lungs = extract_lungs(scan, affine)
        assert lungs.shape == scan.shape and not lungs.any()


def test_what_cannot_be_a_scan_is_refused():
    scan, affine = body_of_tissue(), np.diag([-4.0, -4.0, 5.0, 1.0])
    with pytest.raises(ValueError, match="shape"):
        extract_lungs(scan[:, :, 0], affine)
    with pytest.raises(ValueError, match="rescale to HU"):
        extract_lungs(scan + 1024, affine)
    with pytest.raises(ValueError, match="lowest value is nan"):
        extract_lungs(np.where(scan < 0, np.nan, scan), affine)
    for wrong in (np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="invertible 4 x 4 affine"):
            extract_lungs(scan, wrong)


# ---------------------------------------------------------------------------- building blocks


@pytest.mark.parametrize("spacing", [(2.5, 2.1, 2.1), (8.0, 2.6, 2.6), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("radius", [4.0, 6.2])  # no multiple of a voxel, where rounding decides
def test_ball_morphology_equals_distance_transforms(spacing, radius):
    rng = np.random.default_rng(0)
    mask = np.zeros((16, 24, 26), bool)
    mask[5:11, 8:16, 8:18] = rng.random((6, 8, 10)) < 0.1  # far enough from the edges
    spacing = np.array(spacing)
    grown = ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius
    assert np.array_equal(dilate_ball(mask, radius, spacing), grown)
    if spacing[0] > 1:  # here the closing stays off the edges as well
        closed = ndimage.distance_transform_edt(np.pad(grown, 9), sampling=spacing)[9:-9, 9:-9, 9:-9] > radius
        assert np.array_equal(close_ball(mask, radius, spacing), closed)


def test_closing_takes_what_the_edge_cuts_to_go_on():
    mask = np.zeros((1, 40, 40), bool)
    mask[:, 10:30, :20] = True
    assert np.array_equal(close_ball(mask, 6.0, np.ones(3)), mask)
    mask[:, 18:22, :12] = False  # a groove from the edge inwards, narrower than the ball
    assert close_ball(mask, 6.0, np.ones(3))[:, 10:30, :20].all()


def test_box_morphology():
    mask = np.zeros((7, 20, 20), bool)
    mask[3, 9, 9] = True
    grown = dilate_box(mask, 5.0, np.array([10.0, 2.0, 1.0]))  # reaches 1, 2 (2.5 rounds to even), 5 voxels
    expected = np.zeros_like(mask)
    expected[2:5, 7:12, 4:15] = True
    assert np.array_equal(grown, expected)
    assert np.array_equal(open_box(grown), grown) and not open_box(mask).any()
    assert open_box(grown[2:4]).any(), "two slices are opened in plane"
    assert bounding_box(mask, margin=2) == (slice(1, 6), slice(7, 12), slice(7, 12))
    assert bounding_box(mask, margin=9) == (slice(0, 7), slice(0, 19), slice(0, 19))


def test_only_small_enclosed_holes_are_filled():
    mask = np.ones((2, 30, 30), bool)
    mask[:, :2] = mask[:, -2:] = mask[:, :, :2] = mask[:, :, -2:] = False
    mask[0, 5:8, 5:9] = False  # 12 voxels
    mask[0, 12:24, 12:24] = False  # 144 voxels
    mask[1, 0:10, 15] = False  # open to the outside
    expected = mask.copy()
    expected[0, 5:8, 5:9] = True
    assert np.array_equal(fill_small_holes(mask, 100.0, np.ones(3)), expected)


def test_the_sheet_follows_a_thin_membrane_between_touching_lungs():
    hu = np.full((3, 40, 60), 40.0, np.float32)
    hu[:, 5:35, 8:52] = -850
    membrane = 28 + np.arange(40) // 8  # oblique, off the midline
    for y in range(40):
        hu[:, y, membrane[y]] = np.maximum(hu[:, y, membrane[y]], -650)
    sheet = dividing_sheet(hu, midline=30, spacing=np.array([2.5, 2.5, 2.5]))
    assert np.abs(sheet[:, 6:34] - membrane[6:34]).max() <= 1


# ---------------------------------------------------------------------------- real scans

CT_DATA = os.environ.get("CT_DATA")
real = pytest.mark.skipif(not CT_DATA, reason="CT_DATA is not set: no real scans")


def read(folder: str) -> list:
    return [read_series(choose_series(study)[0]) for study in find_studies(Path(CT_DATA) / folder)]


def volumes(lungs: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """mL of the left and the right lung."""
    return np.array([np.sum(lungs == v) for v in (1, 2)]) * nib.affines.voxel_sizes(affine).prod() / 1000


@real
@pytest.mark.parametrize(
    ("scan", "published"), [("LIDC-IDRI-0001", (1662, 1911)), ("LIDC-IDRI-0003", (2951, 2662))]
)
def test_real_healthy_lungs_agree_with_the_published_steps(scan, published):
    """Volumes in mL that the published steps give; benchmarks/lung_extraction.py runs them."""
    (volume,) = read(f"lidc/{scan}")
    found = volumes(extract_lungs(volume.hu, volume.affine), volume.affine)
    assert found == pytest.approx(published, rel=0.05)
    assert found.sum() == pytest.approx(sum(published), rel=0.05)


@real
def test_a_real_lung_keeps_its_mass():
    (volume,) = read("ct_lung_dicom")
    lungs = extract_lungs(volume.hu, volume.affine)
    left, right = volumes(lungs, volume.affine)
    assert 1423 < left < 1.1 * 1423 and 1.05 * 1013 < right < 1.15 * 1013, "the published steps lose the mass"
    dense = [np.sum((volume.hu > -200) & (lungs == value)) for value in (1, 2)]
    assert dense[1] > 1.5 * dense[0], "the mass is in the right lung"


@real
@pytest.mark.parametrize(
    ("patient", "least_cm2"),
    [("A002304", (45, 102)), ("A046441", (42, 76)), ("A048383", (94, 83)), ("A056642", (60, 94))],
)
def test_real_slices_of_sick_lungs(patient, least_cm2):
    """The areas of masks that were looked at, less 3 to 5 %."""
    slices = read(f"covid_hu_slices/{patient}")
    assert len(slices) == 2
    for volume in slices:
        lungs = extract_lungs(volume.hu, volume.affine)
        area = nib.affines.voxel_sizes(volume.affine)[:2].prod() / 100
        for value, least in zip((1, 2), least_cm2, strict=True):
            assert np.sum(lungs == value) * area > least


@real
def test_real_slices_of_a_belly_have_no_lung():
    for volume in read("covid_hu_slices/A027284"):
        assert not extract_lungs(volume.hu, volume.affine).any()


@real
@pytest.mark.parametrize(
    ("name", "expected"), [("chest_crop", (993, 853)), ("lung_bases_3mm", (36, 64))], ids=["crop", "bases"]
)
def test_real_lungs_cut_by_the_edge_of_the_scan(name, expected):
    image = nib.load(Path(CT_DATA) / "nifti_small" / f"{name}.nii.gz")
    lungs = extract_lungs(np.asarray(image.dataobj), image.affine)
    assert volumes(lungs, image.affine) == pytest.approx(expected, rel=0.05)
