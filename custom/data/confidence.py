# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Which predictions are certain enough to be trained on as if they were masks."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

__all__ = ["EMPTY", "POSITIVE", "ConfidenceRules", "Verdict"]

POSITIVE = "positive"
EMPTY = "empty"
THRESHOLD = 0.5  # as everywhere in the bundles
STABLE_BETWEEN = (0.25, 0.75)


@dataclass(frozen=True)
class Verdict:
    """What :class:`ConfidenceRules` say of one slice.

    Args:
        kind: :data:`POSITIVE`, :data:`EMPTY`, or why the slice is dropped.
        area: predicted part of the slice, 0 to 1.
        certainty: mean of max(p, 1 - p) over the predicted region; 1 - the highest p where there is none.
        stability: intersection over union of the regions above 0.25 and 0.75; 1 where both are empty.
        highest: the highest probability.
    """

    kind: str
    area: float
    certainty: float
    stability: float
    highest: float


@dataclass(frozen=True)
class ConfidenceRules:
    """Rules by which a slice's prediction is trusted.

    A slice with a predicted region (p of at least 0.5) is kept when the region is no speck, when the network
    is sure of it on average, and when it is about the same region at lower and higher thresholds, which also
    tells of doubtful pixels outside of it. A slice without one is kept as a negative when no pixel is
    doubtful, and of those only a share: there are many, and they are alike.

    The defaults suit small networks trained for minutes, whose held-out slices have certainties of 0.77 to
    0.87 and stabilities of 0.27 to 0.58; networks trained longer are surer, and allow higher ones.

    Args:
        min_area: least predicted part of the slice; smaller is a speck.
        min_certainty: least mean of max(p, 1 - p) over the predicted region.
        min_stability: least intersection over union of the regions above 0.25 and 0.75.
        empty_below: highest probability that a slice without a predicted region may have.
        keep_empty: share of the certainly empty slices that is kept, evenly spaced.
        keep_positive: share of the slices that pass with a predicted region, the most certain first: how sure
            a network is depends on its training, the order of the slices does so less.

    Raises:
        ValueError: When a value is not from 0 to 1.
    """

    min_area: float = 0.001
    min_certainty: float = 0.75
    min_stability: float = 0.35
    empty_below: float = 0.3
    keep_empty: float = 0.5
    keep_positive: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= (value := getattr(self, field.name)) <= 1:
                raise ValueError(f"{field.name} must be from 0 to 1, got {value:g}")

    def judge(self, probability: np.ndarray) -> Verdict:
        """
        Args:
            probability: (H, W), 0 to 1.

        Returns:
            What becomes of the slice.
        """
        p = np.asarray(probability, np.float64)
        region = p >= THRESHOLD
        loose, strict = (int((p >= level).sum()) for level in STABLE_BETWEEN)
        area, highest = float(region.mean()), float(p.max())
        # Inside the region max(p, 1 - p) is p.
        certainty = float(p[region].mean()) if region.any() else 1 - highest
        stability = strict / loose if loose else 1.0  # one region is within the other
        if not region.any():
            kind = EMPTY if highest < self.empty_below else "empty, but a pixel is doubtful"
        elif area < self.min_area:
            kind = "a speck"
        elif certainty < self.min_certainty:
            kind = "uncertain"
        elif stability < self.min_stability:
            kind = "unstable"
        else:
            kind = POSITIVE
        return Verdict(kind, area, certainty, stability, highest)
