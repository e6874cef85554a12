# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Metrics that MONAI does not have, their handlers for an engine, and tables of scores.

One policy for empty masks holds everywhere. A value that is undefined is NaN (null in JSON, an empty cell in
CSV), is left out of means, and every mean comes with the number n of values it is of. Where the truth is
empty there is nothing to overlap with, so that metrics that need it are NaN whatever was predicted; like this
the mean Dice of two systems is over the same cases. MONAI's DiceMetric, MeanIoU and ConfusionMatrixMetric do
the same by default. What was wrongly found there shows in PPV and RLP, in the specificity and in the
false-positive volume.

======================================== ============= ================ ==========
metric                                   truth empty   prediction empty both empty
======================================== ============= ================ ==========
Dice, IoU, sensitivity, RLR              NaN           0                NaN
surface Dice                             NaN           0                NaN
VOE, RVD                                 NaN           1                NaN
RVD signed, VA                           NaN           -1               NaN
PPV, RLP                                 0             NaN              NaN
specificity                              TN / (TN+FP)  1                1
HD95                                     NaN           NaN              NaN
mean absolute error, volumes             as ever       as ever          as ever
======================================== ============= ================ ==========

The specificity is NaN where the truth fills the image. "Truth empty" is with something predicted,
"prediction empty" with something there.
"""

from __future__ import annotations

from custom.metrics.handlers import (
    RegionPrecision,
    RegionRecall,
    RelativeVolumeDifference,
    VolumeAccuracy,
    VolumeOverlapError,
)
from custom.metrics.regions import (
    RegionCounts,
    RegionPrecisionMetric,
    RegionRecallMetric,
    count_regions,
    region_centers,
)
from custom.metrics.scores import CaseScores, ScoredCase, score_case, score_cases, summarize_scores
from custom.metrics.volume import (
    RelativeVolumeDifferenceMetric,
    VolumeAccuracyMetric,
    VolumeOverlapErrorMetric,
)

__all__ = [
    "CaseScores",
    "RegionCounts",
    "RegionPrecision",
    "RegionPrecisionMetric",
    "RegionRecall",
    "RegionRecallMetric",
    "RelativeVolumeDifference",
    "RelativeVolumeDifferenceMetric",
    "ScoredCase",
    "VolumeAccuracy",
    "VolumeAccuracyMetric",
    "VolumeOverlapError",
    "VolumeOverlapErrorMetric",
    "count_regions",
    "region_centers",
    "score_case",
    "score_cases",
    "summarize_scores",
]
