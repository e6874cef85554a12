# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from custom.metrics import CaseScores, ScoredCase, score_case
from custom.reporting.comparison_figures import (
    COLOURS,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    SheetCase,
    choose_cases,
    draw_box_plots,
    draw_contour_sheet,
)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(picture: np.ndarray, colour: str, tolerance: int = 6) -> int:
    """How many pixels have a colour."""
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    return int((np.abs(picture - wanted).max(axis=-1) <= tolerance).sum())


def score(dice: dict[str, list[float | None]]) -> dict[str, list[CaseScores]]:
    """Real scores of the given Dice, in hundredths: of 50 voxels each, 50 x Dice are shared.

    None is an empty truth with one false voxel.
    """
    scores: dict[str, list[CaseScores]] = {}
    for system, values in dice.items():
        scores[system] = []
        for i, value in enumerate(values):
            pred, truth = np.zeros((2, 10, 15), bool)
            if value is None:
                pred[0, 0] = True
            else:
                truth.flat[:50] = True
                start = 50 - round(50 * value)
                pred.flat[start : start + 50] = True
            scores[system].append(score_case(ScoredCase(f"case {i}", pred, truth)))
            assert scores[system][-1].row["dice"] == (None if value is None else pytest.approx(value))
    return scores


def test_cases_are_chosen_evenly_from_the_worst_to_the_best():
    """Mean Dice of case i: .9 .1 .5 - .3 .7 .2; without the empty one the order is 1 6 4 2 5 0."""
    scores = score(
        {
            "a": [0.9, 0.0, 0.6, None, 0.3, 0.8, 0.2],
            "b": [0.9, 0.2, 0.4, None, 0.3, 0.6, 0.2],
        }
    )
    order = [f"case {i}" for i in (1, 6, 4, 2, 5, 0)]
    assert choose_cases(scores, 6) == choose_cases(scores, 50) == order
    assert choose_cases(scores, 2) == [order[0], order[-1]]
    assert choose_cases(scores, 1) == [order[2]], "the middle"
    three = choose_cases(scores, 3)
    assert (three[0], three[2]) == (order[0], order[-1]) and three[1] in order[2:4]
    turned = {name: scores[name][::-1] for name in ("b", "a")}
    assert choose_cases(turned, 3) == three
    assert choose_cases(score({"a": [None, None]})) == []
    equal = score({"a": [0.5] * 4})
    assert choose_cases(equal, 4) == ["case 0", "case 1", "case 2", "case 3"], "ties go by name"
    with pytest.raises(ValueError, match="count=0"):
        choose_cases(scores, 0)
    with pytest.raises(ValueError, match="'b' has no scores of 'case 0'"):
        choose_cases({"a": scores["a"], "b": scores["b"][1:]})


def faded(colour: str) -> str:
    """A colour as a box shows it, which lets 35 % of the white paper through."""
    mixed = 0.65 * np.array(to_rgb(colour)) + 0.35
    return "#" + "".join(f"{round(255 * value):02x}" for value in mixed)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_box_plots_have_a_box_for_each_system_in_each_panel(tmp_path, n):
    rng = np.random.default_rng(0)
    values = {f"system {k}": [*(rng.integers(10, 40, 9) / 50), None] for k in range(n)}
    metrics = ("dice", "iou", "sensitivity", "ppv", "voe", "mae")
    draw_box_plots(tmp_path / "box.png", score(values), metrics)
    picture = pixels(tmp_path / "box.png")
    height, width = picture.shape[:2]
    assert width == 1740 and height == int(((0.34 * n + 0.85) * 2 + 0.5) * 150)
    for colour in COLOURS[:n]:
        found = np.abs(picture - np.round(np.array(to_rgb(faded(colour))) * 255)).max(axis=-1) <= 6
        assert found[: height // 2].any() and found[height // 2 :].any(), "in both rows"
    for colour in COLOURS[n:7]:  # the eighth is grey, as points and text may be
        assert count(picture, faded(colour)) == 0
    assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all(), "nothing is cut off"


def test_a_box_spans_the_quartiles(tmp_path):
    """Dice .2 .4 .6 .8: quartiles .35 and .65; from cap to cap it is twice as far."""
    draw_box_plots(tmp_path / "box.png", score({"a": [0.2, 0.4, 0.6, 0.8]}), ("dice",))
    picture = pixels(tmp_path / "box.png")
    box = np.abs(picture - np.round(np.array(to_rgb(faded(COLOURS[0]))) * 255)).max(axis=-1) <= 6
    rows, columns = np.nonzero(box)
    dark = (picture[rows.min() : rows.max()] < 60).all(axis=-1)
    whiskers = np.flatnonzero(dark.sum(axis=0) >= 10)  # caps, median and edges of the box, all upright
    assert (np.ptp(columns) + 4) / np.ptp(whiskers) == pytest.approx(0.5, abs=0.03)


def test_box_plots_of_metrics_without_values(tmp_path):
    scores = score({"a": [0.5, 0.6], "b": [0.7, 0.7]})
    draw_box_plots(tmp_path / "six.png", scores)
    assert pixels(tmp_path / "six.png").shape[1] == 1740, "three panels a row"
    draw_box_plots(tmp_path / "box.png", scores, ("hd95_mm", "dice"))
    assert count(pixels(tmp_path / "box.png"), faded(COLOURS[0])) > 100
    with pytest.raises(ValueError, match=r"unknown metrics \['DSC'\]; give some of dice, iou"):
        draw_box_plots(tmp_path / "bad.png", scores, ("dice", "DSC"))
    with pytest.raises(ValueError, match="'b' has no scores of 'case 0'"):
        draw_box_plots(tmp_path / "bad.png", {"a": scores["a"], "b": scores["b"][1:]})
    assert not (tmp_path / "bad.png").exists()


def sheet_case(name: str, systems: list[str], truth: bool = True, predicted: bool = True) -> SheetCase:
    image = np.random.default_rng(0).random((60, 80))
    mask, other = np.zeros((2, 60, 80), bool)
    mask[10:40, 10:40] = truth
    other[0:40, 50:80] = predicted  # reaches two edges of the image
    dice = dict.fromkeys(systems, 0.0 if truth else None)
    return SheetCase(name, image, mask, dict.fromkeys(systems, other), dice)


@pytest.mark.parametrize("n_systems", [2, 8])
@pytest.mark.parametrize("n_cases", [1, 8])
def test_a_sheet_has_contours_in_two_colours(tmp_path, n_systems, n_cases):
    systems = [f"a system with a long name {k}" for k in range(n_systems)]
    cases = [sheet_case(f"case_with_a_name_that_is_far_too_long_{i}", systems) for i in range(n_cases)]
    draw_contour_sheet(tmp_path / "sheet.png", cases, systems)
    picture = pixels(tmp_path / "sheet.png")
    height, width = picture.shape[:2]
    assert 1500 < width < 3500 and height > n_cases * 250
    left = width * 0.45 / (n_systems + 1)  # within the first column, which is the plain image
    assert count(picture[: height - 220, : int(left)], TRUTH_COLOUR) == 0
    for colour in (TRUTH_COLOUR, PREDICTION_COLOUR):
        assert count(picture, colour) > 100 * n_cases * n_systems
    edge = 20  # a tenth of an inch all around is white
    assert (picture[:edge] == 255).all() and (picture[-edge:] == 255).all()
    assert (picture[:, :edge] == 255).all() and (picture[:, -edge:] == 255).all()


def test_the_truth_is_seen_where_the_prediction_coincides(tmp_path):
    case = sheet_case("a", ["x", "y"])
    same = SheetCase("a", case.image, case.truth, {"x": case.truth, "y": case.truth}, {"x": 1.0, "y": 1.0})
    draw_contour_sheet(tmp_path / "sheet.png", [same], ["x", "y"], "By hand.")
    picture = pixels(tmp_path / "sheet.png")[:-140]  # without the legend
    assert count(picture, TRUTH_COLOUR) > 100 and count(picture, PREDICTION_COLOUR) > 100


@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize("predicted", [False, True])
def test_empty_masks_have_no_contour(tmp_path, truth, predicted):
    draw_contour_sheet(tmp_path / "sheet.png", [sheet_case("a", ["x"], truth, predicted)], ["x"], "By hand.")
    picture = pixels(tmp_path / "sheet.png")[:-140]  # without the legend
    assert (count(picture, TRUTH_COLOUR) > 100) == truth
    assert (count(picture, PREDICTION_COLOUR) > 100) == predicted


def test_user_errors(tmp_path):
    case, path = sheet_case("a", ["x"]), tmp_path / "sheet.png"
    with pytest.raises(ValueError, match="1 to 8 cases and one system or more, got 9 and 1"):
        draw_contour_sheet(path, [case] * 9, ["x"])
    with pytest.raises(ValueError, match="got 0 and 1"):
        draw_contour_sheet(path, [], ["x"])
    with pytest.raises(ValueError, match="got 1 and 0"):
        draw_contour_sheet(path, [case], [])
    with pytest.raises(ValueError, match="case 'a' has no prediction or no Dice of y"):
        draw_contour_sheet(path, [case], ["x", "y"])
    odd = SheetCase("a", case.image[1:], case.truth, case.predictions, case.dice)
    with pytest.raises(
        ValueError, match=r"case 'a': image \(59, 80\) and masks \(60, 80\) must have the same"
    ):
        draw_contour_sheet(path, [odd], ["x"])
    assert not path.exists()
