# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The numbers of a report: volumes of lung and opacity, attenuation, zones, severity, regions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from custom.reporting.regions import list_regions
from custom.reporting.severity import LOBAR_MAX, LOBES, SIX_ZONE_MAX, score_lobe, score_zone, total_score
from custom.reporting.zones import HALVES, ZONES, count_zones

__all__ = ["CONSOLIDATION_FROM_HU", "LUNGS", "measure_opacity", "unmeasured"]

LUNGS = {"left": 1, "right": 2}
"""Values of the lungs in a lung mask."""

CONSOLIDATION_FROM_HU = -200
"""Opacity of at least this many HU is consolidation, the rest of it ground-glass. Consolidation hides the
vessels, so it is nearly as dense as they are; ground-glass lets them be seen. -200 HU lies half-way between
soft tissue (about 50 HU) and common ground-glass (about -450 HU). Vessels within the mask count as
consolidation, too."""

_WHERE = ("outside_lungs", "left", "right")  # by the value of the lung mask
_CONSTANTS = {"consolidation_from_hu", "max_score", "lobar_max_score"}


class _Numbers:
    """Values by name, and for each that is None the reason under its dotted path.

    Args:
        absent: why nothing is known of a side, by the key it has in the values.
    """

    def __init__(self, absent: Mapping[str, str]) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.absent = absent

    def put(self, name: str, values: Mapping[str, Any], reason: str = "", otherwise: str = "") -> None:
        """Add values; where one is None, that is for ``reason``, its side's absence, or ``otherwise``."""
        self.values[name] = dict(values)
        unknown = [key for key, value in values.items() if value is None]
        if reason and len(unknown) == len(values):
            self.reasons[name] = reason
        else:
            for key in unknown:
                self.reasons[f"{name}.{key}"] = reason or self.absent.get(key) or otherwise


def measure_opacity(
    opacity: np.ndarray,
    affine: np.ndarray | None,
    lungs: np.ndarray | None = None,
    hu: np.ndarray | None = None,
    lobes: np.ndarray | None = None,
    no_lungs_reason: str = "no lung mask was made",
    no_volume_reason: str = "the image has no voxel size",
    no_lobes_reason: str = "no lobe mask was given",
) -> dict[str, Any]:
    """Measure opacity, by lung and zone where a lung mask is given; what is unknown is None, with a reason.

    A volume is a number of voxels times the volume of one, the absolute determinant of the affine. The
    percentage is 100 |opacity and lung| / |lung|. Where one lung is not in the mask, nothing is known of that
    side: there is no total of both lungs then, and none of what lies outside them.

    Args:
        opacity: mask (I, J[, K]), nonzero is opacity.
        affine: 4x4 voxel to patient matrix (RAS, mm); None where the voxel size is unknown.
        lungs: mask of the same shape with the values of :data:`LUNGS`, or None.
        hu: the scan in HU, of the same shape, or None.
        lobes: mask of the same shape with the values of :data:`custom.reporting.severity.LOBES`, or None.
        no_lungs_reason: why there is no lung mask.
        no_volume_reason: why there is no voxel size.
        no_lobes_reason: why there is no lobe mask.

    Returns:
        The measured fields of a report, which ``docs/report.md`` describes, and ``reasons``: for each None
        the reason, under its dotted path or that of a parent.

    Raises:
        ValueError: When the arrays differ in shape.
    """
    for name, array in (("lung mask", lungs), ("scan", hu), ("lobe mask", lobes)):
        if array is not None and array.shape != opacity.shape:
            raise ValueError(
                f"opacity {opacity.shape} and {name} {array.shape} differ in shape; they must share a grid"
            )
    found = _volume(opacity) != 0
    lungs, hu, lobes = (None if array is None else _volume(array) for array in (lungs, hu, lobes))
    voxel_ml = (
        None if affine is None else float(abs(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3])) / 1000)
    )
    no_lungs = no_lungs_reason if lungs is None else ""
    no_hu = "no scan in HU was given" if hu is None else ""
    no_volume = no_volume_reason if voxel_ml is None else ""

    def ml(voxels: Mapping[str, int | None]) -> dict[str, float | None]:
        known = {} if voxel_ml is None else {k: n * voxel_ml for k, n in voxels.items() if n is not None}
        return {key: round(known[key], 3) if key in known else None for key in voxels}

    lung_voxels: dict[str, int | None] = {
        side: None if lungs is None else int(np.count_nonzero(lungs == value)) or None
        for side, value in LUNGS.items()
    }
    out = _Numbers(_absent(lung_voxels, no_lungs))
    lung_voxels["total"] = None if out.absent else sum(n or 0 for n in lung_voxels.values())
    total = int(np.count_nonzero(found))
    side = np.zeros(total, np.uint8) if lungs is None else lungs[found]
    values = np.zeros(total) if hu is None else hu[found]
    dense = values >= CONSOLIDATION_FROM_HU
    voxels = {
        name: _by_side(side[chosen], out.absent)
        for name, chosen in (("opacity", slice(None)), ("ground_glass", ~dense), ("consolidation", dense))
    }
    if hu is None:
        for name in ("ground_glass", "consolidation"):
            voxels[name] = dict.fromkeys(voxels[name])

    out.values = {"voxel_volume_ml": voxel_ml, "opacity_voxels": total}
    if no_volume:
        out.reasons["voxel_volume_ml"] = no_volume
    out.put("opacity_volume_ml", ml(voxels["opacity"]), no_volume)
    out.put("lung_volume_ml", ml(lung_voxels), no_lungs or no_volume)
    out.put("opacity_percent_of_lung", _percent(voxels["opacity"], lung_voxels), no_lungs)
    out.values["consolidation_from_hu"] = CONSOLIDATION_FROM_HU
    for name in ("ground_glass", "consolidation"):
        out.put(f"{name}_volume_ml", ml(voxels[name]), no_hu or no_volume)
    for name in ("ground_glass", "consolidation"):
        out.put(f"{name}_percent_of_lung", _percent(voxels[name], lung_voxels), no_hu or no_lungs)
    means = _opacity_means(values, side, voxels["opacity"], known=hu is not None)
    out.put("opacity_mean_hu", means, no_hu, otherwise="there is no opacity")
    out.put("lung_mean_hu", _lung_means(hu, lungs, lung_voxels), no_hu or no_lungs)
    _put_zones(out, found, lungs, affine, no_lungs or no_volume, ml)
    _put_lobes(out, found, lobes, no_lobes_reason)
    out.values["regions"] = list_regions(found, lungs, hu, affine)
    if total and (no_lungs or no_hu or no_volume):
        out.reasons["regions.largest"] = no_lungs or no_hu or no_volume
    return {**out.values, "reasons": out.reasons}


def unmeasured(reason: str) -> dict[str, Any]:
    """The measured fields of a report of which nothing is known: every one None.

    Args:
        reason: why.
    """
    fields = measure_opacity(np.zeros((1, 1, 1), np.uint8), None)
    del fields["reasons"]

    def clear(value: Any) -> Any:
        if not isinstance(value, dict):
            return None
        return {key: inner if key in _CONSTANTS else clear(inner) for key, inner in value.items()}

    empty = clear(fields)
    return {**empty, "reasons": {name: reason for name in empty if name not in _CONSTANTS}}


def _volume(array: np.ndarray) -> np.ndarray:
    """(I, J, K), also of a plain slice."""
    return array if array.ndim == 3 else array[..., None]


def _absent(lung_voxels: Mapping[str, int | None], no_lungs: str) -> dict[str, str]:
    """Of what nothing is known because a lung is not in the mask, and why; empty where both are."""
    if no_lungs:
        return dict.fromkeys((*LUNGS, "outside_lungs", "total"), no_lungs)
    missing = [side for side, voxels in lung_voxels.items() if not voxels]
    if not missing:
        return {}
    what = f"the {missing[0]} lung was not" if len(missing) == 1 else "no lung was"
    return {
        **{
            side: f"no {side} lung was found: it is not there, holds no air, or is outside the scan"
            for side in missing
        },
        "outside_lungs": f"{what} found, so what lies outside the lungs is not known",
        "total": f"{what} found, so there is no total of both lungs",
    }


def _by_side(side: np.ndarray, absent: Mapping[str, str]) -> dict[str, int | None]:
    """Voxels by side; the total is that of the whole mask and always known."""
    counts = np.bincount(side, minlength=len(_WHERE))
    known = {name: None if name in absent else int(n) for name, n in zip(_WHERE, counts, strict=True)}
    return {**{name: known[name] for name in (*LUNGS, "outside_lungs")}, "total": len(side)}


def _percent(part: Mapping[str, int | None], whole: Mapping[str, int | None]) -> dict[str, float | None]:
    """Percentage of each lung, and of both together, for which what lies outside them does not count."""
    inside = {side: part[side] for side in LUNGS}
    both = [n for n in inside.values() if n is not None]
    inside["total"] = sum(both) if len(both) == len(LUNGS) else None
    return {
        side: None if n is None or not (all_of_it := whole[side]) else round(100 * n / all_of_it, 3)
        for side, n in inside.items()
    }


def _opacity_means(
    values: np.ndarray, side: np.ndarray, voxels: Mapping[str, int | None], known: bool
) -> dict[str, float | None]:
    sums = dict(zip(_WHERE, np.bincount(side, values, minlength=len(_WHERE)), strict=True))
    sums["total"] = values.sum(dtype=np.float64)
    return {key: round(float(sums[key] / n), 1) if known and n else None for key, n in voxels.items()}


def _lung_means(
    hu: np.ndarray | None, lungs: np.ndarray | None, voxels: Mapping[str, int | None]
) -> dict[str, float | None]:
    sums = dict.fromkeys(voxels, 0.0)
    if hu is not None and lungs is not None:
        sums |= {side: float(hu[lungs == value].sum(dtype=np.float64)) for side, value in LUNGS.items()}
        sums["total"] = sums["left"] + sums["right"]
    return {key: round(sums[key] / n, 1) if n and hu is not None else None for key, n in voxels.items()}


def _put_zones(
    out: _Numbers,
    found: np.ndarray,
    lungs: np.ndarray | None,
    affine: np.ndarray | None,
    unknown: str,
    ml: Any,
) -> None:
    """Volumes and percentages of the parts of each lung, and the score over the six zones."""
    zones: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, int | None]] = {}
    why: dict[str, str] = {}
    for side, value in LUNGS.items():
        if unknown or side in out.absent or lungs is None or affine is None:
            counts, reasons = dict.fromkeys((*ZONES, *HALVES)), {"": unknown or out.absent[side]}
        else:
            counts, reasons = count_zones(lungs == value, found, affine)
        out.reasons |= {f"zones.{side}.{zone}".rstrip("."): reason for zone, reason in reasons.items()}
        why |= {
            f"{side}.{zone}".rstrip("."): reason for zone, reason in reasons.items() if zone not in HALVES
        }
        percent = {name: None if n is None else 100 * n.opacity / n.lung for name, n in counts.items()}
        volumes = {
            name: ml(n._asdict() if n else {"lung": None, "opacity": None}) for name, n in counts.items()
        }
        zones[side] = {
            name: {
                "lung_volume_ml": volumes[name]["lung"],
                "opacity_volume_ml": volumes[name]["opacity"],
                "opacity_percent_of_zone": None if share is None else round(share, 3),
            }
            for name, share in percent.items()
        }
        scores[side] = {name: None if (p := percent[name]) is None else score_zone(p) for name in ZONES}
    flat = {f"{side}.{zone}": score for side, one in scores.items() for zone, score in one.items()}
    out.values |= {
        "zones": zones,
        "severity": {"score": total_score(flat), "max_score": SIX_ZONE_MAX, "zones": scores},
    }
    if why:
        out.reasons["severity.score"] = "; ".join(dict.fromkeys(why.values()))
        out.reasons |= {f"severity.zones.{where}": reason for where, reason in why.items()}


def _put_lobes(out: _Numbers, found: np.ndarray, lobes: np.ndarray | None, no_lobes: str) -> None:
    scores: dict[str, int | None] = dict.fromkeys(LOBES)
    absent = {}
    for name, value in LOBES.items() if lobes is not None else ():
        lobe = lobes == value
        if size := np.count_nonzero(lobe):
            scores[name] = score_lobe(100 * np.count_nonzero(found & lobe) / size)
        else:
            absent[name] = f"the lobe mask has no {name.replace('_', ' ')} lobe"
    severity = out.values["severity"]
    severity |= {"lobar_score": total_score(scores), "lobar_max_score": LOBAR_MAX, "lobes": scores}
    if lobes is None:
        out.reasons |= {"severity.lobar_score": no_lobes, "severity.lobes": no_lobes}
    elif absent:
        out.reasons["severity.lobar_score"] = "; ".join(absent.values())
        out.reasons |= {f"severity.lobes.{name}": reason for name, reason in absent.items()}
