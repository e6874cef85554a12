# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import (
    ConfusionMatrixMetric,
    DiceMetric,
    HausdorffDistanceMetric,
    MeanIoU,
    SurfaceDiceMetric,
)

from custom.metrics import (
    RegionPrecisionMetric,
    RegionRecallMetric,
    RelativeVolumeDifferenceMetric,
    ScoredCase,
    VolumeAccuracyMetric,
    VolumeOverlapErrorMetric,
    score_case,
    score_cases,
    summarize_scores,
)
from custom.metrics.scores import METRICS

MONAI_OR_OURS = {
    "dice": DiceMetric(),
    "iou": MeanIoU(),
    "voe": VolumeOverlapErrorMetric(),
    "rvd": RelativeVolumeDifferenceMetric(),
    "rvd_signed": RelativeVolumeDifferenceMetric(signed=True),
    "va": VolumeAccuracyMetric(),
    "rlp": RegionPrecisionMetric(),
    "rlr": RegionRecallMetric(),
    "rlr_overlap": RegionRecallMetric(mode="overlap"),
}
CONFUSION = {
    name: ConfusionMatrixMetric(metric_name=monai_name, reduction="none")
    for name, monai_name in {
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "ppv": "precision",
    }.items()
}


def from_metric_classes(pred: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    y_pred, y = (torch.from_numpy(m)[None, None].float() for m in (pred, truth))
    values = {name: metric(y_pred, y).item() for name, metric in MONAI_OR_OURS.items()}
    for name, metric in CONFUSION.items():
        metric.reset()
        metric(y_pred, y)
        values[name] = metric.aggregate()[0].item()
    return {name: None if math.isnan(value) else value for name, value in values.items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_are_what_the_metrics_say(data):
    """MONAI's metrics and ours, with masks that are often empty or full: values and what is undefined."""
    shape = data.draw(st.sampled_from([(5, 6), (4, 5, 3)]))
    kind = st.one_of(arrays(np.bool_, shape), st.booleans().map(lambda v: np.full(shape, v)))
    pred, truth = data.draw(kind), data.draw(kind)
    row = score_case(ScoredCase("a", pred, truth)).row
    for name, value in from_metric_classes(pred, truth).items():
        assert row[name] == (value if value is None else pytest.approx(value, abs=1e-6)), name
    assert row["mae"] == pytest.approx(np.mean(pred != truth))


@pytest.mark.parametrize("seed", range(4))
def test_surface_scores_are_those_of_monai(seed):
    rng = np.random.default_rng(seed)
    pred, truth = rng.random((2, 12, 11, 7)) < 0.03
    spacing = (0.7, 0.8, 2.5)
    row = score_case(ScoredCase("a", pred, truth, 0.001, spacing), surface_tolerance_mm=2.0).row
    y_pred, y = (torch.from_numpy(m)[None, None].float() for m in (pred, truth))
    hausdorff = HausdorffDistanceMetric(include_background=True, percentile=95)(y_pred, y, spacing=spacing)
    surface = SurfaceDiceMetric([2.0], include_background=True)(y_pred, y, spacing=spacing)
    assert row["hd95_mm"] == pytest.approx(hausdorff.item())
    assert row["surface_dice"] == pytest.approx(surface.item())


def test_surface_scores_by_hand():
    """Two voxels at opposite ends of a row of 9, 2 mm apart each: 16 mm."""
    pred, truth = np.zeros((9, 3, 3), bool), np.zeros((9, 3, 3), bool)
    pred[0, 1, 1] = truth[8, 1, 1] = True
    case = ScoredCase("a", pred, truth, spacing=(2, 1, 1))
    assert score_case(case).row["hd95_mm"] == pytest.approx(16)
    assert score_case(case, surface_tolerance_mm=15).row["surface_dice"] == 0
    assert score_case(case, surface_tolerance_mm=16).row["surface_dice"] == 1
    assert score_case(ScoredCase("a", pred, truth)).row["hd95_mm"] is None


def masks() -> list[tuple[np.ndarray, np.ndarray]]:
    """Four cases (4, 5, 2): partly found, nothing found, healthy and clean, healthy with 3 false voxels."""
    pred, truth = np.zeros((4, 4, 5, 2), bool), np.zeros((4, 4, 5, 2), bool)
    truth[0, 0, :4, 0] = pred[0, 0, 2:5, 0] = True  # |a| = 3, |b| = 4, |a and b| = 2
    truth[1, 1, 1, 1] = True
    pred[3, 2, :3, 1] = True
    return list(zip(pred, truth, strict=True))


def test_a_cohort_worked_out_by_hand():
    scores = [score_case(ScoredCase(str(i), p, t, 0.5)) for i, (p, t) in enumerate(masks())]
    dice = [case.row["dice"] for case in scores]
    assert dice == [pytest.approx(4 / 7), 0, None, None]
    assert [case.row["ppv"] for case in scores] == [pytest.approx(2 / 3), None, None, 0]
    assert [case.row["specificity"] for case in scores] == pytest.approx([35 / 36, 1, 1, 37 / 40])
    first = scores[0].row
    assert (first["predicted_ml"], first["true_ml"], first["false_positive_ml"]) == (1.5, 2.0, 0.5)
    assert (first["predicted_regions"], first["true_regions"], first["rlp"], first["rlr"]) == (1, 1, 1, 1)

    summary = summarize_scores(scores)
    assert (summary["cases"], summary["slices"]) == (4, 8)
    case = summary["per_case"]
    assert (case["empty_truths"], case["empty_predictions"]) == (2, 2)
    assert case["metrics"]["dice"] == {
        "mean": pytest.approx(2 / 7),
        "std": pytest.approx(4 / 7 / math.sqrt(2)),
        "n": 2,
    }
    assert case["metrics"]["rlp"] == {"mean": 0.5, "std": pytest.approx(math.sqrt(0.5)), "n": 2}
    assert case["metrics"]["hd95_mm"] == {"mean": None, "std": None, "n": 0}

    slices = summary["per_slice"]
    assert (slices["empty_truths"], slices["empty_predictions"]) == (6, 6)
    assert slices["metrics"]["dice"]["n"] == 2
    assert slices["metrics"]["specificity"]["mean"] == pytest.approx((15 / 16 + 17 / 20 + 6) / 8)
    assert slices["metrics"]["mae"]["mean"] == pytest.approx((3 + 1 + 3) / 20 / 8)

    # TP 2, FP 1 + 3, FN 2 + 1: the false positives of the healthy case count here.
    pooled = summary["pooled"]["metrics"]
    assert pooled["dice"] == pytest.approx(4 / (4 + 4 + 3))
    assert pooled["sensitivity"] == pytest.approx(2 / 5)
    assert pooled["ppv"] == pytest.approx(2 / 6)
    assert pooled["specificity"] == pytest.approx(1 - 4 / 155)
    assert pooled["rvd_signed"] == pytest.approx(1 / 5)
    assert pooled["rlp"] == pytest.approx(1 / 2)
    assert pooled["rlr"] == pytest.approx(1 / 2)
    assert summary["false_positives"]["ml"] == {
        "mean": 0.75,
        "std": pytest.approx(1.5 / math.sqrt(2)),
        "max": 1.5,
        "n": 2,
    }


@pytest.mark.parametrize("system", ["nothing", "everything", "truth"])
def test_systems_of_which_theory_knows_the_scores(system):
    rng = np.random.default_rng(7)
    truths = [np.zeros((8, 9, 3), bool), *(rng.random((3, 8, 9, 3)) < 0.2)]
    predict = {"nothing": np.zeros_like, "everything": np.ones_like, "truth": np.copy}[system]
    summary = summarize_scores(
        score_cases(ScoredCase(str(i), predict(t), t, 0.01, (1, 1, 5)) for i, t in enumerate(truths))
    )
    mean = {key: value["mean"] for key, value in summary["per_case"]["metrics"].items()}
    n = {key: value["n"] for key, value in summary["per_case"]["metrics"].items()}
    assert n["dice"] == n["voe"] == n["sensitivity"] == n["surface_dice"] == 3
    assert n["specificity"] == n["mae"] == 4
    share = np.mean([t.mean() for t in truths])
    if system == "nothing":
        for key in ("dice", "iou", "sensitivity", "rlr", "rlr_overlap", "surface_dice"):
            assert mean[key] == 0, key
        assert (mean["voe"], mean["rvd"], mean["va"], mean["specificity"]) == (1, 1, -1, 1)
        assert mean["mae"] == pytest.approx(share)
        assert [n[key] for key in ("ppv", "rlp", "hd95_mm")] == [0, 0, 0]
        assert mean["ppv"] is None
        assert summary["false_positives"]["voxels"]["max"] == 0
    elif system == "everything":
        shares = np.array([t.mean() for t in truths[1:]])
        assert (mean["sensitivity"], mean["specificity"], mean["rlr_overlap"]) == (1, 0, 1)
        assert mean["dice"] == pytest.approx(np.mean(2 * shares / (1 + shares)))
        assert mean["ppv"] == pytest.approx(share)  # with the 0 of the healthy case
        assert mean["rvd"] == pytest.approx(np.mean(1 / shares - 1))
        assert mean["mae"] == pytest.approx(1 - share)
        assert summary["false_positives"]["ml"]["max"] == pytest.approx(8 * 9 * 3 * 0.01)
    else:
        for key in ("dice", "iou", "sensitivity", "specificity", "ppv", "va", "rlr", "surface_dice"):
            assert mean[key] == 1, key
        assert (mean["voe"], mean["rvd"], mean["mae"], mean["hd95_mm"]) == (0, 0, 0, 0)


def test_probabilities():
    truth = np.array([[0, 1], [1, 0]], bool)
    soft = np.array([[0.25, 0.5], [0.125, 0.75]], np.float32)
    row = score_case(ScoredCase("a", soft, truth)).row
    assert row["mae"] == pytest.approx((0.25 + 0.5 + 0.875 + 0.75) / 4)
    assert row["predicted_voxels"] == 2  # 0.5 itself counts
    assert row["dice"] == pytest.approx(0.5)
    assert score_case(ScoredCase("a", soft, truth), threshold=0.6).row["dice"] == 0
    numbers = score_case(ScoredCase("a", truth.astype(np.uint8), ~truth)).row
    assert numbers["mae"] == 1  # in unsigned arithmetic 0 - 1 would be 255


def test_slices_lie_along_the_given_axis():
    rng = np.random.default_rng(0)
    pred, truth = rng.random((2, 6, 7, 4)) < 0.3
    straight = score_case(ScoredCase("a", pred, truth))
    turned = score_case(ScoredCase("a", np.moveaxis(pred, 2, 0), np.moveaxis(truth, 2, 0), slice_axis=0))
    assert turned.row == straight.row and np.array_equal(turned.slices, straight.slices)
    one = [score_case(ScoredCase("a", pred[..., k], truth[..., k])) for k in range(4)]
    assert np.array_equal(np.concatenate([s.slices for s in one]), straight.slices)
    assert summarize_scores(one)["per_slice"] == summarize_scores([straight])["per_slice"]


def test_everything_can_be_written_as_json():
    scores = [score_case(ScoredCase(str(i), p, t)) for i, (p, t) in enumerate(masks())]
    for subset in (scores, scores[2:3]):
        summary = summarize_scores(subset)
        json.dumps([summary, [case.row for case in subset]], allow_nan=False)
        assert set(summary["per_case"]["metrics"]) == set(METRICS)
    assert summary["pooled"]["metrics"]["dice"] is None
    for part in ("per_case", "per_slice", "pooled", "false_positives"):
        assert summary[part]["protocol"]


def test_no_more_than_one_case_is_in_memory():
    shape = (64, 64, 32)

    def cases():
        for i in range(12):
            yield ScoredCase(str(i), np.full(shape, i / 12), np.zeros(shape, bool))

    next(score_cases(cases()))
    peaks = []
    for n in (1, 12):
        tracemalloc.start()
        scores = [s for s, _ in zip(score_cases(cases()), range(n), strict=False)]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(scores) == n
    assert peaks[1] < peaks[0] + 2.5 * np.prod(shape) * 8  # twelve cases would be over 11 times as much


def test_user_errors():
    mask = np.zeros((4, 4), bool)
    with pytest.raises(ValueError, match=r"a: prediction \(4, 4\) and truth \(4, 3\)"):
        score_case(ScoredCase("a", mask, mask[:, :3]))
    for bad in (np.full((4, 4), 255, np.uint8), np.full((4, 4), -0.1), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="a: a prediction is a mask or holds probabilities"):
            score_case(ScoredCase("a", bad, mask))
    with pytest.raises(ValueError, match="threshold"):
        score_case(ScoredCase("a", mask, mask), threshold=0)
    with pytest.raises(ValueError, match="no case"):
        summarize_scores([])


@pytest.mark.parametrize("truth_is_empty", [False, True])
@pytest.mark.parametrize(
    "given_, message",
    [
        ({"truth": np.full((4, 4), np.nan)}, "a: the truth holds NaN"),  # it would all be lesion
        ({"voxel_ml": math.nan}, "a: voxel_ml must be above 0 mL, got nan"),  # it would be NaN in JSON
        ({"voxel_ml": 0.0}, "a: voxel_ml must be above 0 mL"),
        (
            {"spacing": (1.0, 0.0)},
            r"a: spacing must be 2 numbers above 0 mm, one for each axis, got \(1.0, 0",
        ),
        ({"spacing": (1.0, -1.0)}, "a: spacing must be"),
        ({"spacing": (1.0, math.inf)}, "a: spacing must be"),
        ({"spacing": (1.0, 1.0, 5.0)}, "a: spacing must be"),
    ],
)
def test_numbers_that_would_spoil_the_scores(given_, message, truth_is_empty):
    """They are refused whatever the masks hold, not only where a distance is to be measured."""
    mask = np.full((4, 4), not truth_is_empty)
    with pytest.raises(ValueError, match=message):
        score_case(ScoredCase(**{"name": "a", "pred": mask, "truth": mask, **given_}))


def test_a_tolerance_and_an_axis_that_cannot_be():
    mask = np.zeros((4, 4, 2), bool)
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="the surface tolerance must be 0 mm or more"):
            score_case(ScoredCase("a", mask, mask), surface_tolerance_mm=tolerance)
    with pytest.raises(ValueError, match="a: slice_axis must be 0, 1 or 2, got 3"):
        score_case(ScoredCase("a", mask, mask, slice_axis=3))
