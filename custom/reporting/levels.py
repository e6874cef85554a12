# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Heights in the lungs: what lies at each of them, and which heights of two scans belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from custom.reporting.quantify import LUNGS
from custom.reporting.zones import MAX_CUT

__all__ = ["LevelFrame", "LungLevels", "match_levels"]

_DIGITS = 6  # of a slice's volume in mL: a mm3 is 0.001 mL


@dataclass(frozen=True)
class LungLevels:
    """Volumes of lung and opacity on each slice of a scan, from below.

    Args:
        slice_mm: distance between slices.
        lung_ml: for ``left`` and ``right``, one value a slice.
        opacity_ml: for ``left``, ``right`` and ``outside_lungs``, one value a slice.
    """

    slice_mm: float
    lung_ml: Mapping[str, np.ndarray]
    opacity_ml: Mapping[str, np.ndarray]

    @classmethod
    def measure(cls, opacity: np.ndarray, lungs: np.ndarray | None, affine: np.ndarray) -> LungLevels:
        """Measure a scan's masks.

        Args:
            opacity: mask (I, J, K) in any axis order, nonzero is opacity.
            lungs: mask of the same shape, 1 left, 2 right, or None.
            affine: 4x4 voxel to patient matrix (RAS, mm).
        """
        orientation = nib.orientations.io_orientation(affine)
        axis = int(np.flatnonzero(orientation[:, 0] == 2)[0])
        voxel_ml = float(abs(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3])) / 1000)
        # One count of (lung, opacity) pairs a slice: 0 to 2 without opacity, 3 to 5 with it.
        counts = np.zeros((opacity.shape[axis], 6), np.int64)
        for k, found in enumerate(np.moveaxis(opacity, axis, 0)):
            pairs = np.uint8(3) * (found != 0)
            if lungs is not None:
                pairs += lungs.take(k, axis).astype(np.uint8)
            counts[k] = np.bincount(pairs.ravel(), minlength=6)
        if orientation[axis, 1] < 0:
            counts = counts[::-1]
        ml = np.round(counts * voxel_ml, _DIGITS)
        lung_ml = {side: ml[:, value] + ml[:, value + 3] for side, value in LUNGS.items()}
        opacity_ml = {side: ml[:, value + 3] for side, value in LUNGS.items()}
        opacity_ml["outside_lungs"] = ml[:, 3]
        return cls(float(nib.affines.voxel_sizes(affine)[axis]), lung_ml, opacity_ml)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LungLevels:
        """Take back what :meth:`to_json` gave."""
        return cls(
            float(content["slice_mm"]),
            *({key: np.array(value) for key, value in content[name].items()} for name in _VOLUMES),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        volumes = {name: {k: v.tolist() for k, v in getattr(self, name).items()} for name in _VOLUMES}
        return {"slice_mm": self.slice_mm, **volumes}

    @property
    def lung(self) -> np.ndarray:
        """mL of both lungs on each slice."""
        return self.lung_ml["left"] + self.lung_ml["right"]

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Height of the lungs' lower and upper end above the lower edge of the scan."""
        planes = np.flatnonzero(self.lung)
        return float(planes[0]) * self.slice_mm, float(planes[-1] + 1) * self.slice_mm

    def sees(self, end: str) -> bool:
        """Whether an end of both lungs is in the scan, as for zones: cut off by no more than ``MAX_CUT``.

        Args:
            end: "bottom" or "top".
        """
        at = 0 if end == "bottom" else -1
        lungs = [lung for lung in self.lung_ml.values() if lung.any()]
        return bool(lungs) and all(lung[at] <= MAX_CUT * lung.max() for lung in lungs)

    def within(self, low_mm: float, high_mm: float) -> dict[str, dict[str, float | None]]:
        """The volumes between two heights above the scan's lower edge; slices count as far as they reach in.

        Returns:
            ``opacity_volume_ml``, ``lung_volume_ml`` and ``opacity_percent_of_lung`` as a report has them,
            None where a lung is not in the mask.
        """
        edges = np.arange(len(self.lung) + 1) * self.slice_mm
        share = np.clip(np.minimum(edges[1:], high_mm) - np.maximum(edges[:-1], low_mm), 0, None)
        weights = share / self.slice_mm
        opacity = {side: float(ml @ weights) for side, ml in self.opacity_ml.items()}
        lung = {side: float(ml @ weights) for side, ml in self.lung_ml.items()}
        sides: dict[str, Any] = dict(opacity, total=sum(opacity.values()))
        held: dict[str, Any] = dict(lung, total=sum(lung.values()))
        percent: dict[str, Any] = {
            side: 100 * opacity[side] / lung[side] if lung[side] else None for side in lung
        }
        inside = sum(opacity[side] for side in lung)
        percent["total"] = 100 * inside / held["total"] if held["total"] else None
        absent = [side for side, ml in self.lung_ml.items() if not ml.any()]
        if absent:
            for values, unknown in ((sides, "outside_lungs"), (held, "total"), (percent, "total")):
                values.update(dict.fromkeys([*absent, unknown]))
        named = {"opacity_volume_ml": sides, "lung_volume_ml": held, "opacity_percent_of_lung": percent}
        return {
            name: {key: None if value is None else round(value, 3) for key, value in values.items()}
            for name, values in named.items()
        }


_VOLUMES = ("lung_ml", "opacity_ml")


@dataclass(frozen=True)
class LevelFrame:
    """Which heights of several scans belong together.

    Args:
        kind: "relative" (to each date's own height of the lungs), "from_top" or "from_bottom" (in mm from
            the end that all scans show), "none".
        length_mm: how far the shared part reaches from that end; None for the other kinds.
        said: one line for the reader.
    """

    kind: str
    length_mm: float | None
    said: str

    def place(self, levels: LungLevels, fraction: float) -> float:
        """Height in mm above the scan's lower edge.

        Args:
            levels: one of the scans.
            fraction: 0 is the lower, 1 the upper end of what the scans share.
        """
        low, high = levels.extent_mm
        if self.kind == "from_top" and self.length_mm is not None:
            low = high - self.length_mm
        elif self.kind == "from_bottom" and self.length_mm is not None:
            high = low + self.length_mm
        return low + fraction * (high - low)


def match_levels(scans: Sequence[LungLevels]) -> LevelFrame:
    """Find what part of the lungs all scans show.

    Where all show the lungs from end to end, heights are relative to the lungs of each date, which allows for
    another breath. Where some are cut off, heights are in mm from an end that all show.

    Args:
        scans: at least one.
    """
    if not all(scan.lung.any() for scan in scans):
        return LevelFrame("none", None, "levels are not matched: not every date has a lung mask")
    if all(len(scan.lung) == 1 for scan in scans):
        return LevelFrame(
            "none", None, "levels are not matched: each date has a single slice, of an unknown level"
        )
    whole = {end: all(scan.sees(end) for scan in scans) for end in ("top", "bottom")}
    if all(whole.values()):
        return LevelFrame(
            "relative", None, "levels are matched by their relative height within the lungs of each date"
        )
    shown = [scan.extent_mm[1] - scan.extent_mm[0] for scan in scans]
    for end, other, name in (("top", "bottom", "from_top"), ("bottom", "top", "from_bottom")):
        if whole[end]:
            length = min(shown)
            said = (
                f"not every scan shows the {other} of the lungs: levels are matched by their distance from "
                f"the {end}, and compared is the part that all show, {length:.0f} mm from there"
            )
            return LevelFrame(name, length, said)
    return LevelFrame(
        "none", None, "levels are not matched: there is no end of the lungs that all scans show"
    )
