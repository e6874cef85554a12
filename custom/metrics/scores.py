# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Tables of scores: a row for each case, and means whose protocol is written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from custom.metrics.regions import count_regions
from custom.metrics.surface import surface_scores

__all__ = [
    "EMPTY_POLICY",
    "METRICS",
    "CaseScores",
    "ScoredCase",
    "score_case",
    "score_cases",
    "summarize_scores",
]

# What is counted on each slice; everything but the surface distances follows from these.
TP, FP, FN, TN, ERROR, PREDICTED, CONFIRMED, TRUE, FOUND, TOUCHED = range(10)

RATIOS = ("dice", "iou", "sensitivity", "specificity", "ppv", "voe", "rvd", "rvd_signed", "va") + (
    "rlp",
    "rlr",
    "rlr_overlap",
    "mae",
)
METRICS = (*RATIOS, "hd95_mm", "surface_dice")
"""Names of the metrics in a row."""

EMPTY_POLICY = (
    "undefined values are null, left out of means, and n is the number of values in a mean; with an empty "
    "truth Dice, IoU, VOE, RVD, VA, sensitivity, RLR, HD95 and surface Dice are undefined, with an empty "
    "prediction PPV, RLP and HD95"
)
_DEFINITIONS = (
    "regions are 2-D and 8-connected; rlr counts truths that hold the centre of a predicted region, "
    "rlr_overlap those that a prediction touches; mae is the mean of |prediction - truth|"
)
PER_CASE = (
    "per case: the voxels of a case are one set, its regions are summed over its slices; mean, sample "
    "standard deviation and n over cases; HD95 and surface Dice are of the 3-D surfaces in mm"
)
POOLED = (
    "pooled: voxels and regions of all cases are one set, cases with an empty truth included; large cases "
    "weigh more, and in RVD and VA over- and underestimates of different cases cancel"
)
PER_SLICE = (
    "per slice: every slice of every case is one set; mean, sample standard deviation and n over slices"
)
FALSE_POSITIVES = "volume that was predicted in cases whose truth is empty"


@dataclass(frozen=True)
class ScoredCase:
    """What is to be compared.

    Args:
        name: name of the case.
        pred: prediction, (H, W) or (H, W, D): a mask, or probabilities from 0 to 1.
        truth: mask of the same shape, nonzero is foreground.
        voxel_ml: volume of a voxel in mL; None where unknown, as of a picture.
        spacing: mm from voxel to voxel along each axis; None where unknown.
        slice_axis: axis of a volume along which its axial slices lie.
    """

    name: str
    pred: np.ndarray
    truth: np.ndarray
    voxel_ml: float | None = None
    spacing: Sequence[float] | None = None
    slice_axis: int = -1


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case, small however large the case.

    Args:
        row: ``name``, the number of slices and voxels, whether truth and prediction are empty, the values of
            :data:`METRICS`, the numbers of regions and the volumes; None where undefined or unknown.
        slices: what was counted on each slice, (D, 10), for :func:`summarize_scores`.
    """

    row: dict[str, Any]
    slices: np.ndarray


def score_cases(
    cases: Iterable[ScoredCase], threshold: float = 0.5, surface_tolerance_mm: float = 3.0
) -> Iterator[CaseScores]:
    """Score one case after the other; no more than one is held.

    Args:
        cases: the cases, best made as they are asked for.
        threshold: see :func:`score_case`.
        surface_tolerance_mm: see :func:`score_case`.
    """
    for case in cases:
        yield score_case(case, threshold, surface_tolerance_mm)


def score_case(case: ScoredCase, threshold: float = 0.5, surface_tolerance_mm: float = 3.0) -> CaseScores:
    """Score one case.

    Args:
        case: the case.
        threshold: probability from which on a voxel counts as predicted, above 0 and at most 1.
        surface_tolerance_mm: distance up to which a surface counts as met in the surface Dice; 3 mm is what
            Ma et al. (Medical Physics 48(3), 2021) use for COVID-19 infections.

    Raises:
        ValueError: when the shapes differ, the prediction is no mask or probability, the truth holds NaN, or
            a number is out of its range, as a spacing of 0.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be above 0 and at most 1, got {threshold}")
    if not 0 <= surface_tolerance_mm < math.inf:
        raise ValueError(f"the surface tolerance must be 0 mm or more, got {surface_tolerance_mm}")
    _check_case(case)
    pred, truth = np.asarray(case.pred), np.asarray(case.truth) != 0
    if pred.dtype.kind != "f":  # unsigned numbers would wrap around in the absolute error
        pred = pred != 0
    mask = pred if pred.dtype == bool else pred >= threshold
    stacks = [
        a[..., None] if a.ndim == 2 else np.moveaxis(a, case.slice_axis, -1) for a in (pred, mask, truth)
    ]
    slices = np.stack([_count(*(s[:, :, k] for s in stacks)) for k in range(stacks[0].shape[-1])])
    counts = slices.sum(axis=0)

    surface = dict.fromkeys(("hd95_mm", "surface_dice"), math.nan)
    if case.spacing is not None:
        surface = surface_scores(mask, truth, case.spacing, surface_tolerance_mm)
    volumes = {
        "predicted": counts[TP] + counts[FP],
        "true": counts[TP] + counts[FN],
        "false_positive": counts[FP],
    }
    row = {
        "name": case.name,
        "slices": len(slices),
        "voxels": int(truth.size),
        "empty_truth": not volumes["true"],
        "empty_prediction": not volumes["predicted"],
        **{key: _plain(value) for key, value in (_ratios(counts) | surface).items()},
        "predicted_regions": int(counts[PREDICTED]),
        "true_regions": int(counts[TRUE]),
        **{f"{kind}_voxels": int(count) for kind, count in volumes.items()},
        **{
            f"{kind}_ml": None if case.voxel_ml is None else float(count * case.voxel_ml)
            for kind, count in volumes.items()
        },
    }
    return CaseScores(row, slices)


def summarize_scores(scores: Iterable[CaseScores]) -> dict[str, Any]:
    """Means over cases and slices and pooled values, each with its protocol in words.

    Args:
        scores: scores of all cases.

    Returns:
        ``cases``, ``slices``, ``empty_policy``, ``definitions`` and:

        - ``per_case`` and ``per_slice``: ``protocol``, ``empty_truths`` and ``empty_predictions``, how many
          there are, and ``metrics`` with ``mean``, ``std`` and ``n`` of each;
        - ``pooled``: ``protocol`` and ``metrics``;
        - ``false_positives``: ``protocol``, and mean and greatest volume over cases with an empty truth in
          voxels and mL.

        What is undefined is None; every value can be written as JSON.

    Raises:
        ValueError: when there is no case.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("there is no case to summarize")
    rows = [case.row for case in scores]
    slices = np.concatenate([case.slices for case in scores])
    healthy = [row for row in rows if row["empty_truth"]]
    return {
        "cases": len(rows),
        "slices": len(slices),
        "empty_policy": EMPTY_POLICY,
        "definitions": _DEFINITIONS,
        "per_case": {
            "protocol": PER_CASE,
            "empty_truths": len(healthy),
            "empty_predictions": sum(row["empty_prediction"] for row in rows),
            "metrics": {key: _describe([row[key] for row in rows]) for key in METRICS},
        },
        "pooled": {
            "protocol": POOLED,
            "metrics": {key: _plain(value) for key, value in _ratios(slices.sum(axis=0)).items()},
        },
        "per_slice": {
            "protocol": PER_SLICE,
            "empty_truths": int(np.count_nonzero(slices[:, TP] + slices[:, FN] == 0)),
            "empty_predictions": int(np.count_nonzero(slices[:, TP] + slices[:, FP] == 0)),
            "metrics": {key: _describe(values) for key, values in _ratios(slices).items()},
        },
        "false_positives": {
            "protocol": FALSE_POSITIVES,
            **{
                unit: _describe([row[f"false_positive_{unit}"] for row in healthy], greatest=True)
                for unit in ("voxels", "ml")
            },
        },
    }


def _check_case(case: ScoredCase) -> None:
    """Refuse what has no scores: a NaN that got by would count as a lesion, or reach a file of scores."""
    pred, truth = np.asarray(case.pred), np.asarray(case.truth)
    if pred.shape != truth.shape or pred.ndim not in (2, 3) or pred.size == 0:
        raise ValueError(
            f"{case.name}: prediction {pred.shape} and truth {truth.shape} must have the same (H, W[, D])"
        )
    if pred.dtype != bool and not (pred.min() >= 0 and pred.max() <= 1):  # in this form NaN is refused too
        raise ValueError(
            f"{case.name}: a prediction is a mask or holds probabilities from 0 to 1, "
            f"here are values from {pred.min()} to {pred.max()}"
        )
    if truth.dtype.kind == "f" and np.isnan(truth).any():
        raise ValueError(f"{case.name}: the truth holds NaN; a truth is a mask of zeros and other numbers")
    if case.voxel_ml is not None and not 0 < case.voxel_ml < math.inf:
        raise ValueError(f"{case.name}: voxel_ml must be above 0 mL, got {case.voxel_ml}")
    if case.spacing is not None and (
        len(case.spacing) != pred.ndim or not all(0 < mm < math.inf for mm in case.spacing)
    ):
        raise ValueError(
            f"{case.name}: spacing must be {pred.ndim} numbers above 0 mm, one for each axis, "
            f"got {tuple(case.spacing)}"
        )
    if pred.ndim == 3 and not -3 <= case.slice_axis < 3:
        raise ValueError(f"{case.name}: slice_axis must be 0, 1 or 2, got {case.slice_axis}")


def _count(pred: np.ndarray, mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """What there is to count on one slice, in the order of the constants above."""
    tp = np.count_nonzero(mask & truth)
    fp, fn = np.count_nonzero(mask) - tp, np.count_nonzero(truth) - tp
    error = fp + fn if pred.dtype == bool else np.abs(pred - truth.astype(pred.dtype)).sum(dtype=np.float64)
    regions = count_regions(mask, truth) if tp + fp + fn else (0,) * 5
    return np.array([tp, fp, fn, truth.size - tp - fp - fn, error, *regions], dtype=np.float64)


def _ratios(counts: np.ndarray) -> dict[str, Any]:
    """Metrics of counts (..., 10), NaN where undefined."""
    tp, fp, fn, tn, error, predicted, confirmed, true, found, touched = np.moveaxis(counts, -1, 0)
    a, b = tp + fp, tp + fn
    with np.errstate(divide="ignore", invalid="ignore"):
        # Whatever a mean over cases with lesions may not depend on is undefined where there are none.
        ill = np.where(b > 0, 1.0, np.nan)
        iou = ill * tp / (tp + fp + fn)
        return {
            "dice": ill * 2 * tp / (a + b),
            "iou": iou,
            "sensitivity": ill * tp / b,
            "specificity": tn / (tn + fp),
            "ppv": tp / a,
            "voe": 1 - iou,
            "rvd": ill * np.abs(a - b) / b,
            "rvd_signed": ill * (a - b) / b,
            "va": ill * (1 - 2 * np.abs(a - b) / (a + b)),
            "rlp": confirmed / predicted,
            "rlr": found / true,
            "rlr_overlap": touched / true,
            "mae": error / (tp + fp + fn + tn),
        }


def _plain(value: Any) -> float | None:
    """A number that JSON can hold."""
    return None if value is None or not math.isfinite(value) else float(value)


def _describe(values: Any, greatest: bool = False) -> dict[str, Any]:
    known = np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    known = known[~np.isnan(known)]
    out: dict[str, Any] = {
        "mean": float(known.mean()) if len(known) else None,
        "std": float(known.std(ddof=1)) if len(known) > 1 else None,
    }
    if greatest:
        out["max"] = float(known.max()) if len(known) else None
    return out | {"n": len(known)}
