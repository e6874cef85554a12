# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""How far apart two surfaces lie: 95 % Hausdorff distance and surface Dice from one set of distances."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance

__all__ = ["surface_scores"]


def surface_scores(
    pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance_mm: float
) -> dict[str, float]:
    """95 % Hausdorff distance and surface Dice of two masks.

    A mask's surface are its voxels with a neighbour across a face (in a picture: an edge) that is outside of
    it; what lies beyond the image's border is outside. Of each surface voxel of one mask the distance to the
    nearest surface voxel of the other is taken, both ways. HD95 is the greater of the two 95th percentiles,
    interpolated linearly; the surface Dice is the part of all distances up to the tolerance.

    Args:
        pred: (H, W) or (H, W, D), bool.
        truth: the same shape, bool.
        spacing: mm from voxel to voxel along each axis.
        tolerance_mm: distance up to which a surface counts as met.

    Returns:
        ``hd95_mm``, NaN where a mask is empty, and ``surface_dice``, 0 where only the prediction is empty and
        NaN where the truth is.

    Reference:
        Nikolov et al., Journal of Medical Internet Research 23(7):e26151, 2021, for the surface Dice; here
        surface voxels are counted, as MONAI does, not areas.
    """
    if not truth.any():
        return {"hd95_mm": math.nan, "surface_dice": math.nan}
    if not pred.any():
        return {"hd95_mm": math.nan, "surface_dice": 0.0}
    # MONAI makes float copies of what it is given: give it no more than the box that holds both.
    union = pred | truth
    spans = (np.flatnonzero(union.any(tuple({*range(union.ndim)} - {axis}))) for axis in range(union.ndim))
    box = tuple(slice(span[0], span[-1] + 1) for span in spans)
    a, b = (torch.from_numpy(np.ascontiguousarray(mask[box])) for mask in (pred, truth))
    with warnings.catch_warnings():  # MONAI warns of its own use of an argument it has deprecated
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
        found: Any = get_edge_surface_distance(a, b, spacing=[float(mm) for mm in spacing], symmetric=True)
    # Not torch.quantile, on which MONAI's Hausdorff distance relies: it refuses more than 2**24 distances,
    # which a noisy prediction of a whole CT has.
    both = [np.asarray(distances) for distances in found[1]]
    met = sum(np.count_nonzero(distances <= np.float32(tolerance_mm)) for distances in both)
    return {
        "hd95_mm": max(float(np.percentile(distances, 95)) for distances in both),
        "surface_dice": float(met / sum(map(len, both))),
    }
