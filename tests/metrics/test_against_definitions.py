# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Every metric against an independent computation: plain Python (naive.py), scipy, scikit-image."""

from __future__ import annotations

import itertools
import json
import math

import naive
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ignite.engine import Engine
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage import measure

from custom import metrics
from custom.data.files import write_json
from custom.metrics import ScoredCase, count_regions, region_centers, score_case, summarize_scores
from custom.metrics.scores import METRICS

PLANE = [(5, 6), (7, 3), (1, 7), (6, 1), (1, 1)]
SPACE = [(4, 5, 3), (3, 4, 1), (1, 3, 4), (5, 1, 2), (2, 2, 2)]
# Dyadic, so that distances as far apart as the tolerance are so in every arithmetic.
SPACING, TOLERANCE = (0.75, 0.5, 2.5), 1.5


@st.composite
def masks(draw, shape: tuple[int, ...]) -> np.ndarray:
    """Random voxels, nothing, everything, one voxel, boxes at the border, voxels that touch at corners."""
    kind = draw(st.sampled_from(["random", "random", "empty", "full", "single", "box", "corners"]))
    if kind == "random":
        return draw(arrays(np.bool_, shape))
    mask = np.full(shape, kind == "full")
    if kind == "single":
        mask[tuple(draw(st.integers(0, n - 1)) for n in shape)] = True
    elif kind == "box":
        mask[tuple(slice(draw(st.integers(0, n - 1)), None) for n in shape)] = True
    elif kind == "corners":
        mask = np.indices(shape).sum(axis=0) % 2 == draw(st.integers(0, 1))
    return mask


@st.composite
def pairs(draw, shapes: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.sampled_from(shapes))
    return draw(masks(shape)), draw(masks(shape))


def agree(found: dict, expected: dict, tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, abs=tolerance)), name


def tensor(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(mask))[None, None]


# ---------------------------------------------------------------- one case


@settings(max_examples=250, deadline=None)
@given(pairs(PLANE + SPACE), st.booleans())
def test_a_row_agrees_with_the_definitions(pair, mapped):
    """All metrics of a case, from masks and from probabilities, with a grid that is not isotropic."""
    pred, truth = pair
    spacing = SPACING[: pred.ndim]
    given_ = np.where(pred, 0.875, 0.125).astype(np.float32) if mapped else pred
    row = score_case(ScoredCase("a", given_, truth, 0.01, spacing), surface_tolerance_mm=TOLERANCE).row
    expected = naive.all_scores(pred, truth, spacing, TOLERANCE)
    if mapped:
        expected["mae"] = sum(abs(p - t) for p, t in zip(given_.flat, truth.flat, strict=True)) / truth.size
    assert set(expected) == set(METRICS)
    agree(row, expected)
    volumes = {"true": truth, "predicted": pred, "false_positive": pred & ~truth}
    for name, mask in volumes.items():
        assert row[f"{name}_voxels"] == len(naive.voxels(mask))
        assert row[f"{name}_ml"] == pytest.approx(0.01 * len(naive.voxels(mask)))
    assert (row["empty_truth"], row["empty_prediction"]) == (not truth.any(), not pred.any())
    for kind, mask in (("predicted", pred), ("true", truth)):
        assert row[f"{kind}_regions"] == sum(len(naive.regions(s)) for s in naive.slices(mask))


METRIC_CLASSES = {
    "va": metrics.VolumeAccuracyMetric,
    "voe": metrics.VolumeOverlapErrorMetric,
    "rvd": metrics.RelativeVolumeDifferenceMetric,
    "rvd_signed": lambda: metrics.RelativeVolumeDifferenceMetric(signed=True),
    "rlp": metrics.RegionPrecisionMetric,
    "rlr": metrics.RegionRecallMetric,
    "rlr_overlap": lambda: metrics.RegionRecallMetric(mode="overlap"),
}


@pytest.mark.parametrize("name", METRIC_CLASSES)
@settings(max_examples=60, deadline=None)
@given(pair=pairs(PLANE + SPACE))
def test_a_metric_class_agrees_with_the_definitions(name, pair):
    value = METRIC_CLASSES[name]()(tensor(pair[0]), tensor(pair[1])).item()
    assert (None if math.isnan(value) else pytest.approx(value, abs=1e-6)) == naive.all_scores(*pair)[name]


@settings(max_examples=60, deadline=None)
@given(pairs(SPACE))
def test_regions_of_volumes_agree_with_the_definitions(pair):
    """3-D regions, connected over corners too, and their 3-D centres."""
    expected = naive.region_scores([pair])
    found = {
        "rlp": metrics.RegionPrecisionMetric(spatial="volume"),
        "rlr": metrics.RegionRecallMetric(spatial="volume"),
        "rlr_overlap": metrics.RegionRecallMetric(mode="overlap", spatial="volume"),
    }
    values = {name: metric(tensor(pair[0]), tensor(pair[1])).item() for name, metric in found.items()}
    agree({name: None if math.isnan(v) else v for name, v in values.items()}, expected)
    assert count_regions(*pair) == naive.region_counts(*pair)
    centers = {naive.center(region) for region in naive.regions(pair[0])}
    assert {tuple(c) for c in region_centers(pair[0]).tolist()} == centers


# ---------------------------------------------------------------- sizes that plain Python cannot reach


@pytest.mark.parametrize("shape", [(33, 35), (101, 103), (255, 257), (511, 511), (21, 23, 25)])
@pytest.mark.parametrize("density", [0.08, 0.3, 0.45])
def test_labels_on_odd_sizes(shape, density):
    """Odd sizes are where cc3d 4.1.1 went wrong: against scikit-image, and the flood fill on the smallest."""
    rng = np.random.default_rng(round(100 * density))
    pred, truth = rng.random((2, *shape)) < density
    counts = count_regions(pred, truth)
    labels, n = measure.label(truth, connectivity=truth.ndim, return_num=True)
    assert counts.true == n
    assert counts.predicted == measure.label(pred, connectivity=pred.ndim, return_num=True)[1]
    assert counts.touched == len(np.unique(labels[pred & truth]))
    centers = region_centers(pred)
    hit = labels[tuple(centers.T)]
    assert (counts.confirmed, counts.found) == (np.count_nonzero(hit), len(np.unique(hit[hit > 0])))
    of_pred = measure.label(pred, connectivity=pred.ndim)
    assert len(np.unique(of_pred[tuple(centers.T)])) == counts.predicted, "one centre in each region"
    if shape == (33, 35):
        assert counts == naive.region_counts(pred, truth)


def scipy_surface_scores(pred, truth, spacing, tolerance, way):
    """Surfaces by erosion; distances by a k-d tree over them, or by a distance transform of the image."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, truth)]
    distances = []
    for one, other in (edges, edges[::-1]):
        if way == "tree":
            points = [np.argwhere(edge) * np.asarray(spacing) for edge in (one, other)]
            distances.append(cKDTree(points[1]).query(points[0])[0])
        else:
            distances.append(ndimage.distance_transform_edt(~other, sampling=spacing)[one])
    hd95 = max(naive.percentile(d.tolist(), 95) for d in distances)
    both = np.concatenate(distances)
    return {"hd95_mm": hd95, "surface_dice": np.count_nonzero(both <= tolerance + 1e-9) / len(both)}


@pytest.mark.parametrize("way", ["tree", "transform"])
@pytest.mark.parametrize(
    "shape, spacing",
    [((70, 61), (0.7, 0.9)), ((70, 61), (1, 5)), ((40, 37, 12), (0.7, 0.7, 5)), ((12, 30, 31), (8, 0.6, 1))],
)
def test_surfaces_of_blobs(shape, spacing, way):
    """Ragged masks, cut off by the image's border, one shifted against the other."""
    for seed in range(3):
        noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
        truth = noise > 0.6 * noise.std()
        pred = np.roll(noise, 2, axis=seed % len(shape)) > 0.3 * noise.std()
        assert truth[0].any() or truth[-1].any()
        row = score_case(ScoredCase("a", pred, truth, spacing=spacing), surface_tolerance_mm=1.05).row
        agree(row, scipy_surface_scores(pred, truth, spacing, 1.05, way), tolerance=1e-4)


def test_surface_scores_hold_more_distances_than_torch_can_sort(monkeypatch):
    """A noisy prediction of a whole CT has more than 2**24 surface voxels, where torch.quantile gives up."""
    many = torch.linspace(0, 100, 2**24 + 1)
    monkeypatch.setattr(
        "custom.metrics.surface.get_edge_surface_distance", lambda *args, **kwargs: (None, (many, many), None)
    )
    mask = np.ones((2, 2), bool)
    row = score_case(ScoredCase("a", mask, mask, spacing=(1, 1)), surface_tolerance_mm=25).row
    assert row["hd95_mm"] == pytest.approx(95, abs=1e-4)
    assert row["surface_dice"] == pytest.approx(0.25, abs=1e-6)


def test_volumes_are_counted_exactly():
    """In float32 a sum of ones stops at 2**24: one voxel too few must still show."""
    truth = torch.ones(1, 1, 4097, 4097, dtype=torch.bool)
    pred = truth.clone()
    pred[..., 0, 0] = False
    n = truth.numel()
    assert n > 2**24
    assert metrics.RelativeVolumeDifferenceMetric(signed=True)(pred, truth).item() == pytest.approx(-1 / n)
    row = score_case(ScoredCase("a", pred[0, 0].numpy(), truth[0, 0].numpy())).row
    assert (row["predicted_voxels"], row["true_voxels"]) == (n - 1, n)
    assert row["rvd"] == pytest.approx(1 / n) and row["sensitivity"] == (n - 1) / n


# ---------------------------------------------------------------- many cases


@st.composite
def cohorts(draw) -> list[tuple[np.ndarray, np.ndarray]]:
    shapes = draw(st.sampled_from([PLANE[:3], SPACE[:3]]))
    return draw(st.lists(pairs(shapes), min_size=1, max_size=4))


def everything_as_slices(cohort):
    return [
        pair for pred, truth in cohort for pair in zip(naive.slices(pred), naive.slices(truth), strict=True)
    ]


def pooled_by_hand(cohort) -> dict:
    """All voxels of all cases in one row, and the regions of all slices."""
    rows = [np.concatenate([mask.ravel() for mask in masks])[None] for masks in zip(*cohort, strict=True)]
    return naive.overlap(*rows) | naive.region_scores(everything_as_slices(cohort))


@settings(max_examples=120, deadline=None)
@given(cohorts())
@example([(np.zeros((3, 3), bool), np.zeros((3, 3), bool))])
@example([(np.zeros((3, 3), bool), np.ones((3, 3), bool)), (np.ones((3, 3), bool), np.zeros((3, 3), bool))])
def test_a_summary_agrees_with_the_definitions(cohort):
    scores = [
        score_case(ScoredCase(str(i), pred, truth, 0.5, SPACING[: pred.ndim]), 0.5, TOLERANCE)
        for i, (pred, truth) in enumerate(cohort)
    ]
    summary = summarize_scores(scores)
    rows = [naive.all_scores(p, t, SPACING[: p.ndim], TOLERANCE) for p, t in cohort]
    slices = [naive.all_scores(p, t) for p, t in everything_as_slices(cohort)]
    for part, expected in (("per_case", rows), ("per_slice", slices)):
        for name, found in summary[part]["metrics"].items():
            values = [row[name] for row in expected]
            mean, n = naive.mean(values)
            assert found["n"] == n, (part, name)
            assert found["mean"] == (None if mean is None else pytest.approx(mean, abs=1e-6)), (part, name)
            if n > 1:
                spread = math.sqrt(sum((v - mean) ** 2 for v in values if v is not None) / (n - 1))
                assert found["std"] == pytest.approx(spread, abs=1e-5), (part, name)
            else:
                assert found["std"] is None
        assert summary[part]["empty_truths"] == sum(row["sensitivity"] is None for row in expected)
    agree(summary["pooled"]["metrics"], pooled_by_hand(cohort))
    assert set(summary["pooled"]["metrics"]) == set(METRICS) - set(naive.SURFACE)
    healthy = [len(naive.voxels(pred)) for pred, truth in cohort if not truth.any()]
    assert summary["false_positives"]["voxels"]["mean"] == (
        pytest.approx(sum(healthy) / len(healthy)) if healthy else None
    )
    assert summary["false_positives"]["ml"]["max"] == (0.5 * max(healthy) if healthy else None)


@settings(max_examples=40, deadline=None)
@given(cohort=cohorts(), placed=st.booleans())
def test_nothing_of_a_cohort_is_nan_in_json(tmp_path_factory, cohort, placed):
    scores = [
        score_case(
            ScoredCase(str(i), p, t, 0.5 if placed or i else None, SPACING[: p.ndim] if placed or i else None)
        )
        for i, (p, t) in enumerate(cohort)
    ]
    file = tmp_path_factory.getbasetemp() / "scores.json"
    rows, summary = [case.row for case in scores], summarize_scores(scores)
    write_json(file, {"cases": rows, "summary": summary})

    def refuse(word: str):
        raise AssertionError(f"{word} in JSON")

    assert json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)["cases"] == rows


# ---------------------------------------------------------------- what must hold for any masks


@settings(max_examples=100, deadline=None)
@given(pairs(PLANE + SPACE))
def test_prediction_and_truth_change_places(pair):
    if not (pair[0].any() and pair[1].any()):
        return  # the policy for empty masks knows which of the two is the truth
    spacing = SPACING[: pair[0].ndim]
    one, other = (
        score_case(ScoredCase("a", *p, spacing=spacing), surface_tolerance_mm=TOLERANCE).row
        for p in (pair, pair[::-1])
    )
    for name in ("dice", "iou", "voe", "va", "mae", "hd95_mm", "surface_dice"):
        assert one[name] == pytest.approx(other[name]), name
    assert one["ppv"] == pytest.approx(other["sensitivity"])
    assert one["voe"] == pytest.approx(1 - one["dice"] / (2 - one["dice"]))
    assert one["dice"] <= (one["sensitivity"] + one["ppv"]) / 2 + 1e-12
    assert abs(one["rvd_signed"]) == one["rvd"]


@settings(max_examples=60, deadline=None)
@given(pairs(SPACE), st.data())
def test_an_image_may_be_turned_and_mirrored(pair, data):
    """Not RLP and RLR: of two centres as good as each other the first in the array counts."""
    order = data.draw(st.permutations(range(3)))
    flipped = [axis for axis in range(3) if data.draw(st.booleans())]
    turned = [np.flip(mask, flipped).transpose(order) for mask in pair]
    straight = score_case(ScoredCase("a", *pair, spacing=SPACING), surface_tolerance_mm=TOLERANCE)
    moved = score_case(
        ScoredCase("a", *turned, spacing=[SPACING[axis] for axis in order], slice_axis=order.index(2)),
        surface_tolerance_mm=TOLERANCE,
    )
    same = {name: value for name, value in straight.row.items() if name not in ("rlp", "rlr")}
    for name, value in same.items():
        assert moved.row[name] == (pytest.approx(value) if isinstance(value, float) else value), name


@settings(max_examples=60, deadline=None)
@given(pairs(PLANE + SPACE), st.data())
def test_background_around_an_image_changes_specificity_and_error_only(pair, data):
    margins = [(data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for _ in pair[0].shape]
    spacing = SPACING[: pair[0].ndim]
    bare, padded = (
        score_case(ScoredCase("a", *p, spacing=spacing), surface_tolerance_mm=TOLERANCE).row
        for p in (pair, [np.pad(mask, margins) for mask in pair])
    )
    for name in set(METRICS) - {"specificity", "mae"}:
        assert padded[name] == (None if bare[name] is None else pytest.approx(bare[name])), name


# ---------------------------------------------------------------- systems whose scores theory knows


def truths(dims: int) -> list[np.ndarray]:
    """Healthy, sparse, dense, one voxel, all ill."""
    rng = np.random.default_rng(11)
    shape = (9, 8, 4)[:dims]
    single = np.zeros(shape, bool)
    single[(2,) * dims] = True
    sparse, dense = (rng.random(shape) < share for share in (0.1, 0.6))
    return [np.zeros(shape, bool), sparse, dense, single, np.ones(shape, bool)]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("part", ["per_case", "per_slice", "pooled"])
@pytest.mark.parametrize("system", ["nothing", "everything", "truth"])
def test_a_system_that_predicts(system, part, dims):
    predict = {"nothing": np.zeros_like, "everything": np.ones_like, "truth": np.copy}[system]
    cases = truths(dims)
    scores = [score_case(ScoredCase(str(i), predict(t), t, 0.01)) for i, t in enumerate(cases)]
    found = summarize_scores(scores)[part]["metrics"]
    if part == "pooled":
        found = {name: (value, int(value is not None)) for name, value in found.items()}
        units = [np.concatenate(cases, axis=-1)]
    else:
        found = {name: (values["mean"], values["n"]) for name, values in found.items()}
        units = cases if part == "per_case" else [s for case in cases for s in naive.slices(case)]
    shares = np.array([unit.mean() for unit in units])
    ill, well = shares[shares > 0], np.count_nonzero(shares < 1)
    n = {name: value[1] for name, value in found.items()}
    mean = {name: value[0] for name, value in found.items() if name not in naive.SURFACE}
    for name in ("dice", "iou", "sensitivity", "voe", "rvd", "rvd_signed", "va", "rlr", "rlr_overlap"):
        assert n[name] == len(ill), name
    assert (n["specificity"], n["mae"]) == (well, len(units))
    assert n["ppv"] == n["rlp"] == {"nothing": 0, "everything": len(units), "truth": len(ill)}[system]
    if system == "nothing":
        zero = dict.fromkeys(("dice", "iou", "sensitivity", "rlr", "rlr_overlap"), 0)
        one = {"voe": 1, "rvd": 1, "specificity": 1, "rvd_signed": -1, "va": -1}
        expected = {**zero, **one, "ppv": None, "rlp": None, "mae": shares.mean()}
    elif system == "truth":
        one = ("dice", "iou", "sensitivity", "specificity", "ppv", "va", "rlp", "rlr", "rlr_overlap")
        expected = {**dict.fromkeys(one, 1), **dict.fromkeys(("voe", "rvd", "rvd_signed", "mae"), 0)}
    else:
        expected = {
            "dice": (2 * ill / (1 + ill)).mean(),
            "iou": ill.mean(),
            "voe": 1 - ill.mean(),
            "rvd": (1 / ill - 1).mean(),
            "rvd_signed": (1 / ill - 1).mean(),
            "va": (1 - 2 * (1 - ill) / (1 + ill)).mean(),
            "ppv": shares.mean(),
            "mae": 1 - shares.mean(),
            "sensitivity": 1,
            "rlr_overlap": 1,
            "specificity": 0,
        }
        # One region a slice, its centre the first of the middle pixels, (4, 3): found is what covers that.
        cut = [naive.slices(np.array(unit)) for unit in (units if part != "pooled" else cases)]
        cut = [sum(cut, [])] if part == "pooled" else cut
        hits = [sum(bool(s[4, 3]) for s in slices) for slices in cut]
        regions = [sum(len(naive.regions(s)) for s in slices) for slices in cut]
        expected["rlp"] = np.mean([hit / len(slices) for hit, slices in zip(hits, cut, strict=True)])
        expected["rlr"] = np.mean([hit / n_b for hit, n_b in zip(hits, regions, strict=True) if n_b])
    assert set(expected) == set(mean)
    agree(mean, expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("system", ["nothing", "everything", "truth"])
def test_surfaces_of_a_system_that_predicts(system, dims):
    """Everything: the surface is the image's border, and the distances can be told by hand."""
    shape, spacing = (7, 9, 5)[:dims], (0.5, 0.75, 2.5)[:dims]
    truth = np.zeros(shape, bool)
    truth[tuple(n // 2 for n in shape)] = True
    predict = {"nothing": np.zeros_like, "everything": np.ones_like, "truth": np.copy}[system]
    row = score_case(ScoredCase("a", predict(truth), truth, spacing=spacing), surface_tolerance_mm=0.5).row
    if system == "nothing":
        assert (row["hd95_mm"], row["surface_dice"]) == (None, 0)
    elif system == "truth":
        assert (row["hd95_mm"], row["surface_dice"]) == (0, 1)
    else:
        border = [
            index
            for index in itertools.product(*(range(n) for n in shape))
            if any(i in (0, n - 1) for i, n in zip(index, shape, strict=True))
        ]
        distances = [
            math.dist([i * s for i, s in zip(index, spacing, strict=True)],
                      [n // 2 * s for n, s in zip(shape, spacing, strict=True)])
            for index in border
        ]  # fmt: skip
        assert row["hd95_mm"] == pytest.approx(naive.percentile(distances, 95))
        assert row["surface_dice"] == 0, "the border is more than 0.5 mm from the middle"


# ---------------------------------------------------------------- handlers


@pytest.mark.parametrize(
    "handler, options, name",
    [
        (metrics.VolumeAccuracy, {}, "va"),
        (metrics.VolumeOverlapError, {}, "voe"),
        (metrics.RelativeVolumeDifference, {}, "rvd"),
        (metrics.RelativeVolumeDifference, {"signed": True}, "rvd_signed"),
        (metrics.RegionPrecision, {}, "rlp"),
        (metrics.RegionPrecision, {"spatial": "volume"}, "rlp"),
        (metrics.RegionRecall, {}, "rlr"),
        (metrics.RegionRecall, {"spatial": "volume"}, "rlr"),
        (metrics.RegionRecall, {"mode": "overlap"}, "rlr_overlap"),
        (metrics.RegionRecall, {"mode": "overlap", "spatial": "volume"}, "rlr_overlap"),
    ],
)
def test_a_handler_agrees_with_the_definitions(handler, options, name):
    """Cases of different sizes, one a step as an evaluator has them; some healthy, some not found."""
    rng = np.random.default_rng(4)
    shapes = [(6, 5, 3), (4, 7, 2), (5, 5, 4), (6, 5, 3), (3, 3, 1), (4, 4, 2)]
    cases = [tuple(rng.random((2, *shape)) < 0.25) for shape in shapes]
    cases[1] = (cases[1][0], np.zeros_like(cases[1][1]))
    cases[2] = (np.zeros_like(cases[2][0]), cases[2][1])
    cases[5] = (np.zeros_like(cases[5][0]), np.zeros_like(cases[5][1]))
    if options.get("spatial") == "volume":
        values = [naive.region_scores([case])[name] for case in cases]
    else:
        values = [naive.all_scores(*case)[name] for case in cases]

    engine = Engine(lambda engine, case: [torch.from_numpy(mask)[None].float() for mask in case])
    transform = lambda output: ([output[0]], [output[1]])  # noqa: E731
    handler(output_transform=transform, **options).attach(engine, "value")
    engine.run(cases)
    mean, n = naive.mean(values)
    assert 0 < n < len(cases)
    assert engine.state.metrics["value"] == pytest.approx(mean, abs=1e-6)
    details = engine.state.metric_details["value"].flatten().tolist()
    assert details == pytest.approx([math.nan if v is None else v for v in values], abs=1e-6, nan_ok=True)
    engine.run(cases[5:])  # none of the cases has a value
    assert math.isnan(engine.state.metrics["value"])
