# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from custom.metrics import RegionPrecisionMetric, RegionRecallMetric, count_regions, region_centers


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    return ndimage.label(mask, structure=np.ones((3,) * mask.ndim))


def brute_center(region: np.ndarray, structure: np.ndarray | None = None) -> tuple[int, ...]:
    """Eq. (10) as a double loop over the region and its edge; the first of equals wins."""
    edge = [tuple(p) for p in np.argwhere(region & ~ndimage.binary_erosion(region, structure)).tolist()]
    best, center = math.inf, None
    for pixel in map(tuple, np.argwhere(region).tolist()):
        greatest = max(sum((p - q) ** 2 for p, q in zip(pixel, v, strict=True)) for v in edge)
        if greatest < best:
            best, center = greatest, pixel
    return center


def brute_counts(pred: np.ndarray, truth: np.ndarray) -> tuple[int, ...]:
    (a, n_a), (b, n_b) = label(pred), label(truth)
    at = [b[brute_center(a == k)] for k in range(1, n_a + 1)]
    touched = set(b[(a > 0) & (b > 0)].tolist())
    return n_a, sum(k > 0 for k in at), n_b, len({k for k in at if k}), len(touched)


def centers_of(mask: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(c) for c in region_centers(mask).tolist()}


@settings(max_examples=60, deadline=None)
@given(arrays(np.bool_, st.sampled_from([(7, 9), (7, 7), (1, 6), (6, 1), (1, 1), (4, 3, 5), (3, 1, 4)])))
def test_centers_are_those_of_the_double_loop(mask):
    labels, n = label(mask)
    assert centers_of(mask) == {brute_center(labels == k) for k in range(1, n + 1)}


@pytest.mark.parametrize("seed", range(6))
def test_centers_of_large_ragged_regions(seed):
    """All distances at once, with scipy: to every pixel of the edge, and to the corners of its hull."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((90, 80)), 1 + seed % 3)
    mask = noise > (-0.3 if seed < 3 else 0.2) * noise.std()
    labels, n = label(mask)
    found = centers_of(mask)
    assert len(found) == n
    for k in range(1, n + 1):
        pixels = np.argwhere(labels == k)
        edge = np.argwhere((labels == k) & ~ndimage.binary_erosion(labels == k))
        greatest = cdist(pixels, edge, "sqeuclidean").max(axis=1)
        assert tuple(pixels[greatest.argmin()]) in found
        if len(pixels) > 20:
            corners = edge[ConvexHull(edge).vertices]
            assert np.array_equal(cdist(pixels, corners, "sqeuclidean").max(axis=1), greatest)


def test_a_volume_against_all_distances():
    noise = ndimage.gaussian_filter(np.random.default_rng(5).standard_normal((20, 18, 16)), 1.2)
    mask = noise > 0.15
    labels, n = label(mask)
    expected = set()
    for k in range(1, n + 1):
        pixels = np.argwhere(labels == k)
        expected.add(tuple(pixels[cdist(pixels, pixels, "sqeuclidean").max(axis=1).argmin()].tolist()))
    assert centers_of(mask) == expected


def test_centers_worked_out_by_hand():
    mask = np.zeros((30, 40), bool)
    mask[2, 2] = True  # one pixel
    mask[5, 5:7] = True  # two: both as far from the other, the first counts
    mask[8:11, 8:13] = True  # 3 x 5: its middle
    mask[20, 3:10] = True  # a line: its middle
    assert centers_of(mask) == {(2, 2), (5, 5), (9, 10), (20, 6)}
    corner = np.zeros((9, 9), bool)  # an L: the corner pixel is sqrt(16+0) from both ends, others farther
    corner[:5, 0] = corner[4, :5] = True
    assert centers_of(corner) == {brute_center(corner)} == {(4, 0)}


def test_the_center_of_a_ring_lies_on_the_ring():
    distance = np.hypot(*(np.indices((61, 61)) - 30))
    ring = (distance <= 25) & (distance >= 18)
    (center,) = centers_of(ring)
    assert ring[center] and not ring[30, 30]
    assert distance[center] == pytest.approx(18, abs=0.5)
    assert center == brute_center(ring)
    # The truth fills the hole: a centroid would have been a hit.
    assert count_regions(ring, distance < 17) == (1, 0, 1, 0, 0)


def test_the_kind_of_edge_does_not_matter():
    mask = np.random.default_rng(1).random((12, 12)) < 0.7
    labels, n = label(mask)
    for k in range(1, n + 1):
        square = brute_center(labels == k, np.ones((3, 3)))
        assert square == brute_center(labels == k)
        assert square in centers_of(mask)


def test_pixels_that_touch_at_a_corner_are_one_region():
    diagonal = np.eye(5, dtype=bool)
    assert centers_of(diagonal) == {(2, 2)}
    cube = np.zeros((3, 3, 3), bool)
    cube[0, 0, 0] = cube[1, 1, 1] = cube[2, 2, 2] = True
    assert centers_of(cube) == {(1, 1, 1)}
    gap = np.zeros((1, 5), bool)
    gap[0, [0, 2]] = True
    assert len(region_centers(gap)) == 2


def test_empty_and_full():
    assert region_centers(np.zeros((4, 5), bool)).shape == (0, 2)
    assert centers_of(np.ones((5, 7), bool)) == {(2, 3)}
    assert count_regions(np.zeros((4, 5)), np.zeros((4, 5))) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.uint8, np.int64, np.bool_])
def test_masks_of_any_type_of_number(kind):
    """scipy labels no float16, the type of half-precision predictions."""
    mask = np.zeros((5, 6), kind)
    mask[1:4, 2] = 1
    assert count_regions(mask, mask) == (1, 1, 1, 1, 1)
    assert centers_of(mask) == {(2, 2)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_counts_are_those_of_the_double_loop(data):
    shape = data.draw(st.sampled_from([(6, 8), (4, 4, 3)]))
    pred, truth = (data.draw(arrays(np.bool_, shape)) for _ in range(2))
    counts = count_regions(pred, truth)
    assert counts == brute_counts(pred, truth)
    assert counts.confirmed <= counts.predicted and counts.found <= counts.touched <= counts.true
    assert counts.found <= counts.confirmed


def test_one_truth_hit_twice_counts_once():
    truth = np.zeros((9, 9), bool)
    truth[1:8, 1:8] = True
    truth[:, 4] = True
    pred = np.zeros((9, 9), bool)
    pred[2, 2] = pred[6, 6] = pred[2, 6] = True
    assert count_regions(pred, truth) == (3, 3, 1, 1, 1)
    # A region over two truths: its centre is in neither, it touches both.
    truth = np.zeros((3, 9), bool)
    truth[1, :3] = truth[1, 6:] = True
    pred = np.zeros((3, 9), bool)
    pred[1, 1:8] = True
    assert count_regions(pred, truth) == (1, 0, 2, 0, 2)


@pytest.mark.parametrize("spatial", ["slice", "volume"])
@pytest.mark.parametrize("density", [0.02, 0.15, 0.5])
def test_metrics_are_ratios_of_sums_over_the_slices(spatial, density):
    rng = np.random.default_rng(round(100 * density))
    pred, truth = (rng.random((2, 1, 9, 8, 5)) < density for _ in range(2))
    precision = RegionPrecisionMetric(spatial=spatial)(torch.from_numpy(pred), torch.from_numpy(truth))
    recall, touch = (
        RegionRecallMetric(mode, spatial=spatial)(torch.from_numpy(pred), torch.from_numpy(truth))
        for mode in ("center", "overlap")
    )
    for case in range(2):
        p, t = pred[case, 0], truth[case, 0]
        parts = [(p[..., k], t[..., k]) for k in range(5)] if spatial == "slice" else [(p, t)]
        n_a, n_p, n_b, n_t, n_o = np.sum([brute_counts(*part) for part in parts], axis=0)
        expected = [n_p / n_a, n_t / n_b, n_o / n_b]
        assert [m[case, 0].item() for m in (precision, recall, touch)] == pytest.approx(expected)


def test_predicting_everything():
    """One region on each slice, whose centre is in the truth only where the truth covers the middle."""
    truth = torch.zeros(1, 1, 9, 9, 2)
    truth[..., 3:6, 3:6, 0] = 1
    truth[..., 0, 0, 0] = truth[..., 0, 0, 1] = 1
    everything = torch.ones_like(truth)
    assert RegionPrecisionMetric()(everything, truth).item() == 1 / 2
    assert RegionRecallMetric()(everything, truth).item() == pytest.approx(1 / 3)
    assert RegionRecallMetric(mode="overlap")(everything, truth).item() == 1


def test_slices_and_volume_differ_where_a_lesion_spans_slices():
    truth = torch.zeros(1, 1, 6, 6, 4)
    truth[..., 2:4, 2:4, :] = 1
    pred = truth.clone()
    pred[..., 0] = 0
    assert RegionRecallMetric()(pred, truth).item() == 3 / 4
    assert RegionRecallMetric(spatial="volume")(pred, truth).item() == 1


def test_user_errors():
    with pytest.raises(ValueError, match="differ in shape"):
        count_regions(np.zeros((3, 3)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="a slice"):
        region_centers(np.zeros(3))
    with pytest.raises(ValueError, match="mode must be one of center, overlap, got 'centre'"):
        RegionRecallMetric(mode="centre")
    with pytest.raises(ValueError, match="spatial must be one of"):
        RegionPrecisionMetric(spatial="3d")
    with pytest.raises(ValueError, match="takes"):
        RegionPrecisionMetric(spatial="volume")(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
