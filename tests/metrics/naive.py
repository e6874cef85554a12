# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The metrics once more, straight from their definitions and in plain Python: slow, and written otherwise.

Masks become sets of index tuples; regions come from a flood fill, centres from all distances of a region to
its edge, surface distances from all pairs. None stands for undefined.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

Voxels = set[tuple[int, ...]]
OVERLAP = ("dice", "iou", "sensitivity", "specificity", "ppv", "voe", "rvd", "rvd_signed", "va")
REGIONS = ("rlp", "rlr", "rlr_overlap")
SURFACE = ("hd95_mm", "surface_dice")


def voxels(mask: np.ndarray) -> Voxels:
    return {index for index in np.ndindex(mask.shape) if mask[index]}


def overlap(pred: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Voxel by voxel; the policy for empty masks is the table in ``custom.metrics``."""
    tp = fp = fn = tn = 0
    for index in np.ndindex(truth.shape):
        if pred[index] and truth[index]:
            tp += 1
        elif pred[index]:
            fp += 1
        elif truth[index]:
            fn += 1
        else:
            tn += 1
    scores: dict[str, float | None] = dict.fromkeys(OVERLAP)
    scores["mae"] = (fp + fn) / (tp + fp + fn + tn)
    if tn + fp:
        scores["specificity"] = tn / (tn + fp)
    if tp + fp:
        scores["ppv"] = tp / (tp + fp)
    if tp + fn:
        scores["dice"] = 2 * tp / (2 * tp + fp + fn)
        scores["iou"] = tp / (tp + fp + fn)
        scores["voe"] = (fp + fn) / (tp + fp + fn)
        scores["sensitivity"] = tp / (tp + fn)
        scores["rvd"] = abs(fp - fn) / (tp + fn)
        scores["rvd_signed"] = (fp - fn) / (tp + fn)
        scores["va"] = 1 - 2 * abs(fp - fn) / (2 * tp + fp + fn)
    return scores


def regions(mask: np.ndarray) -> list[Voxels]:
    """Flood fill over all neighbours, those across a corner too."""
    steps = [step for step in itertools.product((-1, 0, 1), repeat=mask.ndim) if any(step)]
    left, found = voxels(mask), []
    while left:
        front = [left.pop()]
        region = set(front)
        while front:
            here = front.pop()
            for step in steps:
                there = tuple(i + j for i, j in zip(here, step, strict=True))
                if there in left:
                    left.remove(there)
                    region.add(there)
                    front.append(there)
        found.append(region)
    return found


def surface(mask: Voxels) -> Voxels:
    """Voxels with a neighbour across a face outside the mask, the image's border being outside."""

    def faces(index: tuple[int, ...]):
        for axis, step in itertools.product(range(len(index)), (-1, 1)):
            yield index[:axis] + (index[axis] + step,) + index[axis + 1 :]

    return {index for index in mask if any(face not in mask for face in faces(index))}


def center(region: Voxels) -> tuple[int, ...]:
    """Eq. (10) of SCOAT-Net; of equals the first in the order of the array."""
    edge = surface(region)

    def reach(u: tuple[int, ...]) -> int:
        return max(sum((i - j) ** 2 for i, j in zip(u, v, strict=True)) for v in edge)

    return min(sorted(region), key=reach)


def region_counts(pred: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int, int]:
    """N_a, N_p, N_b, N_t by centres, N_t by overlap."""
    predicted, true = regions(pred), regions(truth)
    centers = [center(region) for region in predicted]
    everywhere = set().union(*predicted)
    confirmed = sum(any(c in t for t in true) for c in centers)
    found = sum(any(c in t for c in centers) for t in true)
    touched = sum(not t.isdisjoint(everywhere) for t in true)
    return len(predicted), confirmed, len(true), found, touched


def region_scores(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    """Counts summed over the parts of a case, which are its slices, or itself."""
    n_a, n_p, n_b, n_t, touched = (
        sum(c) for c in zip(*(region_counts(*pair) for pair in pairs), strict=True)
    )
    return {
        "rlp": n_p / n_a if n_a else None,
        "rlr": n_t / n_b if n_b else None,
        "rlr_overlap": touched / n_b if n_b else None,
    }


def slices(mask: np.ndarray) -> list[np.ndarray]:
    return [mask] if mask.ndim == 2 else [mask[:, :, k] for k in range(mask.shape[2])]


def percentile(values: list[float], q: float) -> float:
    """The value at q percent of the way from the least to the greatest, between two neighbours by share."""
    values = sorted(values)
    place = q / 100 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def surface_scores(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> dict[str, float | None]:
    a, b = surface(voxels(pred)), surface(voxels(truth))
    if not b:
        return {"hd95_mm": None, "surface_dice": None}
    if not a:
        return {"hd95_mm": None, "surface_dice": 0.0}

    def mm(u: tuple[int, ...], v: tuple[int, ...]) -> float:
        return math.sqrt(sum(((i - j) * s) ** 2 for i, j, s in zip(u, v, spacing, strict=True)))

    there = [min(mm(u, v) for v in b) for u in a]
    back = [min(mm(u, v) for u in a) for v in b]
    return {
        "hd95_mm": max(percentile(there, 95), percentile(back, 95)),
        "surface_dice": sum(d <= tolerance for d in there + back) / (len(a) + len(b)),
    }


def all_scores(
    pred: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] | None = None, tolerance: float = 3.0
) -> dict[str, float | None]:
    """Every metric of one case, regions counted slice by slice."""
    scores = overlap(pred, truth) | region_scores(list(zip(slices(pred), slices(truth), strict=True)))
    if spacing is None:
        return scores | dict.fromkeys(SURFACE)
    return scores | surface_scores(pred, truth, spacing, tolerance)


def mean(values: list[float | None]) -> tuple[float | None, int]:
    """Mean of the values that are defined, and how many they are."""
    known = [value for value in values if value is not None]
    return (sum(known) / len(known) if known else None), len(known)
