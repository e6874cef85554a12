# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from report_checks import unexplained

from custom.data.phantom import Lesion, make_phantom
from custom.reporting import measure_opacity
from custom.reporting.quantify import unmeasured
from custom.reporting.severity import LOBES

AFFINE = np.array([[0, -2.0, 0, 5], [4.0, 0, 0, 6], [0, 0, 10.0, 7], [0, 0, 0, 1]])  # a voxel is 80 mm^3


def masks() -> tuple[np.ndarray, np.ndarray]:
    lungs = np.zeros((10, 10, 4), np.uint8)
    lungs[:, :5] = 1  # left, 200 voxels
    lungs[:, 5:, :2] = 2  # right, 100 voxels
    opacity = np.zeros_like(lungs)
    opacity[:5, 0, 0] = 1  # 5 voxels in the left lung
    opacity[:10, 9, 0] = 1  # 10 in the right
    opacity[0, 9, 3] = 1  # 1 outside
    return opacity, lungs


def test_volumes_and_percentages_by_hand():
    opacity, lungs = masks()
    measured = measure_opacity(opacity, AFFINE, lungs)
    assert measured["voxel_volume_ml"] == pytest.approx(0.08)
    assert measured["opacity_voxels"] == 16
    volumes = {"left": 0.4, "right": 0.8, "outside_lungs": 0.08, "total": 1.28}
    assert measured["opacity_volume_ml"] == pytest.approx(volumes)
    assert measured["lung_volume_ml"] == pytest.approx({"left": 16.0, "right": 8.0, "total": 24.0})
    assert measured["opacity_percent_of_lung"] == pytest.approx({"left": 2.5, "right": 10.0, "total": 5.0})
    assert unexplained(measured) == []


def test_ground_glass_and_consolidation_by_hand():
    opacity, lungs = masks()
    hu = np.full(opacity.shape, -800.0)
    hu[opacity > 0] = -500
    hu[:2, 0, 0] = -200  # two voxels of five in the left lung, just dense enough
    hu[2, 0, 0] = -201  # and one just not
    hu[0, 9, 3] = 40  # the one outside the lungs
    measured = measure_opacity(opacity, AFFINE, lungs, hu)
    assert measured["consolidation_from_hu"] == -200
    dense = {"left": 0.16, "right": 0.0, "outside_lungs": 0.08, "total": 0.24}
    light = {"left": 0.24, "right": 0.8, "outside_lungs": 0.0, "total": 1.04}
    assert measured["consolidation_volume_ml"] == pytest.approx(dense)
    assert measured["ground_glass_volume_ml"] == pytest.approx(light)
    assert measured["consolidation_percent_of_lung"] == {"left": 1.0, "right": 0.0, "total": 0.667}
    assert measured["ground_glass_percent_of_lung"] == {"left": 1.5, "right": 10.0, "total": 4.333}
    total = (2 * -200 - 201 + 12 * -500 + 40) / 16
    left = (2 * -200 - 201 - 1000) / 5
    means = {"left": left, "right": -500.0, "outside_lungs": 40.0, "total": total}
    assert measured["opacity_mean_hu"] == pytest.approx(means, abs=0.05)
    lung = {"left": (5 * left + 195 * -800) / 200, "right": (10 * -500 + 90 * -800) / 100}
    lung["total"] = (200 * lung["left"] + 100 * lung["right"]) / 300
    assert measured["lung_mean_hu"] == pytest.approx(lung, abs=0.05)
    assert unexplained(measured) == []


def zoned() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lungs = np.zeros((4, 6, 13), np.uint8)
    lungs[:, :3, 2:11] = 1
    lungs[:, 3:, 5:11] = 2  # the right lung is shorter
    opacity = np.zeros_like(lungs)
    opacity[0, 0, [2, 4, 5, 10]] = 1  # left: two lower, one middle, one upper; 36 voxels a third
    opacity[:, 3:, 7] = 1  # right, middle: 12 of 24 voxels
    opacity[:3, 3:, 9:11] = 1  # right, upper: 18 of 24
    opacity[:2, 3:, 5] = 1  # right, lower: 6 of 24
    return opacity, lungs, np.diag([-10.0, -10.0, 10.0, 1.0])


def test_zones_and_their_score_by_hand_whatever_the_axis_order():
    opacity, lungs, affine = zoned()
    for codes in ("LPS", "RAI", "SPL", "AIR"):
        change = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        )
        turned = [nib.Nifti1Image(array, affine).as_reoriented(change) for array in (opacity, lungs)]
        masks_ = [np.asarray(image.dataobj) for image in turned]
        measured = measure_opacity(masks_[0], turned[0].affine, masks_[1])
        left, right = measured["zones"]["left"], measured["zones"]["right"]
        assert [left[zone]["opacity_volume_ml"] for zone in ("upper", "middle", "lower")] == [1.0, 1.0, 2.0]
        assert {left[zone]["lung_volume_ml"] for zone in ("upper", "middle", "lower")} == {36.0}
        assert left["lower"]["opacity_percent_of_zone"] == 5.556
        percent = [right[zone]["opacity_percent_of_zone"] for zone in ("upper", "middle", "lower")]
        assert percent == [75.0, 50.0, 25.0]
        severity = measured["severity"]
        assert severity["zones"] == {
            "left": {"upper": 1, "middle": 1, "lower": 1},
            "right": {"upper": 4, "middle": 3, "lower": 2},
        }
        assert severity["score"] == 12 and severity["max_score"] == 24
        assert unexplained(measured) == []


def test_the_lobar_score_needs_lobes():
    opacity, lungs, affine = zoned()
    measured = measure_opacity(opacity, affine, lungs)
    assert measured["severity"]["lobar_score"] is None
    assert measured["reasons"]["severity.lobar_score"] == "no lobe mask was given"
    lobes = np.zeros_like(lungs)
    for value in LOBES.values():
        lobes[0, value, :] = value  # 13 voxels each
    opacity[:] = 0
    opacity[0, LOBES["left_upper"], :1] = 1  # 7.7 %
    opacity[0, LOBES["right_lower"], :] = 1  # all of it
    severity = measure_opacity(opacity, affine, lungs, lobes=lobes)["severity"]
    expected = {"left_upper": 2, "left_lower": 0, "right_upper": 0, "right_middle": 0, "right_lower": 5}
    assert severity["lobes"] == expected and severity["lobar_score"] == 7
    lobes[lobes == LOBES["right_middle"]] = 0
    measured = measure_opacity(opacity, affine, lungs, lobes=lobes)
    assert measured["severity"]["lobar_score"] is None and measured["severity"]["lobes"]["right_lower"] == 5
    assert measured["reasons"]["severity.lobar_score"] == "the lobe mask has no right middle lobe"
    assert unexplained(measured) == []


def test_what_is_unknown_is_null_with_a_reason():
    opacity, lungs = masks()
    measured = measure_opacity(opacity, None, None)
    assert set(measured["opacity_volume_ml"].values()) == {None} and measured["opacity_voxels"] == 16
    assert set(measured["lung_volume_ml"].values()) == {None}
    assert measured["reasons"]["voxel_volume_ml"] == "the image has no voxel size"
    assert measured["reasons"]["lung_volume_ml"] == "no lung mask was made"
    assert measured["severity"]["score"] is None
    assert unexplained(measured) == []
    for given in ({"lungs": lungs}, {"hu": np.zeros(opacity.shape)}, {}):
        for affine in (AFFINE, None):
            measured = measure_opacity(opacity, affine, **given)
            assert unexplained(measured) == []
            known = measured["opacity_volume_ml"]["total"]
            assert (known is None) == (affine is None), "the volume of a mask needs no lungs"


@pytest.mark.parametrize("side", ["left", "right"])
def test_with_one_lung_absent_there_is_no_total_and_no_score(side):
    opacity, lungs, affine = zoned()
    other = {"left": "right", "right": "left"}[side]
    whole = measure_opacity(opacity, affine, lungs, np.full(opacity.shape, -500.0))
    lungs[lungs == (1 if side == "left" else 2)] = 0
    measured = measure_opacity(opacity, affine, lungs, np.full(opacity.shape, -500.0))
    for field in (
        "lung_volume_ml",
        "opacity_percent_of_lung",
        "ground_glass_percent_of_lung",
        "lung_mean_hu",
    ):
        assert measured[field] == {side: None, other: whole[field][other], "total": None}, field
        assert f"no {side} lung was found" in measured["reasons"][f"{field}.{side}"]
    volume = measured["opacity_volume_ml"]
    assert volume[side] is None and volume["outside_lungs"] is None
    assert volume[other] == whole["opacity_volume_ml"][other]
    assert volume["total"] == whole["opacity_volume_ml"]["total"], "the mask's volume needs no lungs"
    assert (
        measured["severity"]["score"] is None and f"no {side} lung" in measured["reasons"]["severity.score"]
    )
    assert measured["severity"]["zones"][other] == whole["severity"]["zones"][other]
    assert set(measured["severity"]["zones"][side].values()) == {None}
    assert unexplained(measured) == []


def test_an_empty_lung_mask_is_no_lung_of_no_size():
    opacity, lungs = masks()
    measured = measure_opacity(opacity, AFFINE, np.zeros_like(lungs))
    assert set(measured["lung_volume_ml"].values()) == {None}
    assert (
        measured["reasons"]["lung_volume_ml.total"] == "no lung was found, so there is no total of both lungs"
    )
    assert unexplained(measured) == []


def test_an_empty_mask_is_zero_and_not_null():
    opacity, lungs, affine = zoned()
    measured = measure_opacity(np.zeros_like(opacity), affine, lungs, np.full(opacity.shape, -800.0))
    assert measured["opacity_volume_ml"] == {"left": 0.0, "right": 0.0, "outside_lungs": 0.0, "total": 0.0}
    assert measured["consolidation_volume_ml"]["total"] == measured["ground_glass_volume_ml"]["total"] == 0.0
    assert measured["opacity_percent_of_lung"]["total"] == 0.0
    assert measured["severity"]["score"] == 0 and measured["regions"]["count"] == 0
    assert measured["opacity_mean_hu"]["total"] is None, "nothing has no density"
    assert measured["reasons"]["opacity_mean_hu.total"] == "there is no opacity"
    assert unexplained(measured) == []


def test_nothing_measured_has_the_same_fields_all_null():
    opacity, lungs = masks()
    whole, nothing = measure_opacity(opacity, AFFINE, lungs), unmeasured("it was too dark")
    assert list(whole) == list(nothing)

    def leaves(value):
        return (
            [leaf for inner in value.values() for leaf in leaves(inner)]
            if isinstance(value, dict)
            else [value]
        )

    reasons = nothing.pop("reasons")
    assert set(reasons.values()) == {"it was too dark"}
    assert {leaf for leaf in leaves(nothing) if leaf is not None} == {-200, 24, 25}, "constants alone"
    assert nothing["zones"]["left"]["upper"].keys() == whole["zones"]["left"]["upper"].keys()
    assert unexplained({**nothing, "reasons": reasons}) == []


def test_arrays_on_different_grids_are_refused():
    opacity, lungs = masks()
    with pytest.raises(ValueError, match="must share a grid"):
        measure_opacity(opacity, AFFINE, lungs[:, :, 1:])
    with pytest.raises(ValueError, match="scan .* differ in shape"):
        measure_opacity(opacity, AFFINE, lungs, hu=np.zeros((2, 2, 2)))


def test_a_lesion_in_the_left_upper_zone_is_reported_left_and_upper():
    small = Lesion("consolidation", centre=(0.5, 0.6, 0.82), radii=(10, 10, 10), side="left")
    phantom = make_phantom(shape=(64, 64, 30), spacing=(5.4, 5.4, 9.0), seed=2, lesions=[small])
    measured = measure_opacity(phantom.label > 0, phantom.affine, phantom.lungs, phantom.image)
    zones, volume = measured["zones"], measured["opacity_volume_ml"]
    assert volume["left"] == volume["total"] == zones["left"]["upper"]["opacity_volume_ml"] > 0
    assert {zones["right"][name]["opacity_volume_ml"] for name in zones["right"]} == {0.0}
    assert measured["severity"]["zones"]["left"] == {"upper": 1, "middle": 0, "lower": 0}
    assert measured["regions"]["count"] == 1 and measured["regions"]["truncated_count"] == 0
