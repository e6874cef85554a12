# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from custom.data.confidence import EMPTY, POSITIVE, ConfidenceRules

RULES = ConfidenceRules(min_certainty=0.85, min_stability=0.6)


def slice_with(*parts, background=0.02):
    """A 10x10 slice: (number of pixels, probability)."""
    flat = np.full(100, background)
    start = 0
    for number, probability in parts:
        flat[start : start + number] = probability
        start += number
    return flat.reshape(10, 10)


def test_numbers_by_hand():
    verdict = RULES.judge(slice_with((10, 0.9), (5, 0.8), (5, 0.6), (4, 0.3)))
    assert verdict.area == pytest.approx(0.20)
    assert verdict.certainty == pytest.approx((10 * 0.9 + 5 * 0.8 + 5 * 0.6) / 20)  # 0.8: the 0.3 is outside
    assert verdict.stability == pytest.approx(15 / 24)  # 15 pixels from 0.75, 24 from 0.25
    assert verdict.highest == pytest.approx(0.9)
    assert verdict.kind == "uncertain"
    # max(p, 1 - p) by its definition, over the region
    p = slice_with((10, 0.9), (5, 0.8), (5, 0.6))
    assert RULES.judge(p).certainty == pytest.approx(np.maximum(p, 1 - p)[p >= 0.5].mean())


@pytest.mark.parametrize(
    ("probability", "kind"),
    [
        (slice_with((20, 0.95)), POSITIVE),
        (slice_with((20, 0.95), (20, 0.4)), "unstable"),  # a doubtful region beside a certain one
        (slice_with((20, 0.84)), "uncertain"),
        (slice_with(), EMPTY),
        (slice_with((1, 0.31)), "empty, but a pixel is doubtful"),
        (slice_with((1, 0.29)), EMPTY),
        (np.pad([[0.99]], ((0, 39), (0, 39))), "a speck"),  # 1 of 1600 pixels
        (slice_with(background=1.0), POSITIVE),
        (slice_with(background=0.0), EMPTY),
    ],
)
def test_what_becomes_of_a_slice(probability, kind):
    assert RULES.judge(probability).kind == kind


def test_rules_are_what_is_asked_for():
    p = slice_with((20, 0.84), (20, 0.4))
    assert ConfidenceRules(min_certainty=0.8, min_stability=0.5).judge(p).kind == POSITIVE
    assert ConfidenceRules(min_area=0.3, min_certainty=0, min_stability=0).judge(p).kind == "a speck"
    for wrong in ({"keep_empty": 1.1}, {"min_area": -0.1}, {"min_certainty": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be from 0 to 1"):
            ConfidenceRules(**wrong)
