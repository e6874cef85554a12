# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Severity scores that radiologists give by eye, from measured percentages."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LOBAR_MAX", "LOBES", "SIX_ZONE_MAX", "score_lobe", "score_zone", "total_score"]

SIX_ZONE_MAX = 24
LOBAR_MAX = 25

LOBES = {"left_upper": 1, "left_lower": 2, "right_upper": 3, "right_middle": 4, "right_lower": 5}
"""Values of the lobes in a lobe mask."""


def score_zone(percent: float) -> int:
    """Score of one of six lung zones by the percentage of it that is opacity.

    0: none, 1: less than 25 %, 2: 25 % to less than 50 %, 3: 50 % to less than 75 %, 4: 75 % or more. The sum
    over upper, middle and lower zones of both lungs is 0 to 24.

    The publication divides the lungs at the carina and at the inferior pulmonary veins and the percentage is
    a reader's estimate; here zones are thirds of each lung's height and the percentage is that of voxels. So
    the slightest opacity scores 1, where a reader may not have seen it.

    Args:
        percent: 0 to 100.

    Reference:
        Ooi GC et al. Severe acute respiratory syndrome: temporal lung changes at thin-section CT in 30
        patients. Radiology 230(3):836-844, 2004. doi:10.1148/radiol.2303030853
    """
    return 0 if percent <= 0 else 1 + sum(bool(percent >= bound) for bound in (25, 50, 75))


def score_lobe(percent: float) -> int:
    """Score of one of five lobes by the percentage of it that is opacity.

    0: none, 1: less than 5 %, 2: 5 to 25 %, 3: 26 to 49 %, 4: 50 to 75 %, 5: more than 75 %; the sum over the
    lobes is 0 to 25. Between 25 and 26 % and between 49 and 50 %, which a reader does not tell apart and the
    publication leaves open, the score is 3.

    Args:
        percent: 0 to 100.

    Reference:
        Pan F et al. Time course of lung changes at chest CT during recovery from coronavirus disease 2019
        (COVID-19). Radiology 295(3):715-721, 2020. doi:10.1148/radiol.2020200370
    """
    if percent <= 0:
        return 0
    return 1 + sum(map(bool, (percent >= 5, percent > 25, percent >= 50, percent > 75)))


def total_score(scores: Mapping[str, int | None]) -> int | None:
    """The sum of the scores, None unless all are known.

    Args:
        scores: by zone or lobe.
    """
    known = [score for score in scores.values() if score is not None]
    return sum(known) if len(known) == len(scores) else None
