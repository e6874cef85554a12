# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from custom.reporting.severity import LOBAR_MAX, LOBES, SIX_ZONE_MAX, score_lobe, score_zone, total_score


@pytest.mark.parametrize(
    ("percent", "score"),
    [(0, 0), (1e-9, 1), (24.999, 1), (25, 2), (49.999, 2), (50, 3), (74.999, 3), (75, 4), (100, 4)],
)
def test_six_zone_bands_of_ooi_2004(percent, score):
    assert score_zone(percent) == score


@pytest.mark.parametrize(
    ("percent", "score"),
    [
        (0, 0),
        (1e-9, 1),
        (4.999, 1),
        (5, 2),
        (25, 2),
        (26, 3),
        (49, 3),
        (50, 4),
        (75, 4),
        (75.001, 5),
        (100, 5),
    ],
)
def test_lobar_bands_of_pan_2020(percent, score):
    assert score_lobe(percent) == score


def test_totals_reach_from_nothing_to_everything():
    assert total_score(dict.fromkeys(range(6), score_zone(100))) == SIX_ZONE_MAX == 24
    assert total_score(dict.fromkeys(LOBES, score_lobe(100))) == LOBAR_MAX == 25
    assert total_score(dict.fromkeys(range(6), 0)) == 0
    assert total_score({"a": 4, "b": None}) is None, "a zone that is not known is not 0"
