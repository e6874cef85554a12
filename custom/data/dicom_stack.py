# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The geometry of a stack of DICOM slices: their order, their affine, and what makes it doubtful."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from custom.data.dicom_header import Instance

__all__ = ["name_slices", "stack_slices"]

_JITTER = 0.1  # a slice may lie off its place by this fraction of the slice distance or of a pixel ...
_ROUNDING = 0.06  # ... or by this many mm: positions are often written with one decimal
_SAME_PLACE = 0.01  # mm; no scanner reconstructs slices this close to each other
_GAP = 1.5  # times the usual slice distance
_MAX_TILT = 0.5  # degrees between the slices' normal and the direction they are stacked in
_MAX_TURN = 1e-3  # of a direction cosine, between the slices of a series
_RAS = np.diag([-1.0, -1.0, 1.0])  # DICOM's patient space is LPS


def stack_slices(instances: Sequence[Instance]) -> tuple[tuple[Instance, ...], np.ndarray]:
    """Sort slices by their position along their common normal and derive the affine of the stack.

    Args:
        instances: slices with position, orientation and pixel spacing (the same for all).

    Returns:
        The slices in ascending order along the normal (row direction x column direction), and the
        right-handed (4, 4) affine from (column, row, slice) to mm in RAS+. It puts the centres of the first
        and the last slice where their headers have them.

    Raises:
        ValueError: When slices share a place, are missing, unevenly spaced, turned or shifted against each
            other, or sheared by gantry tilt; or when a single slice has no thickness.
    """
    axes = np.array([i.orientation for i in instances], dtype=float).reshape(-1, 2, 3)
    lengths = np.linalg.norm(axes, axis=2)
    skewed = np.abs((axes[:, 0] * axes[:, 1]).sum(axis=1)) > _MAX_TURN
    odd = skewed | (np.abs(lengths - 1) > 0.01).any(axis=1)
    if odd.any():
        raise ValueError(
            f"ImageOrientationPatient is not two orthogonal unit vectors at {_odd(instances, odd)}"
        )
    turned = np.abs(axes - np.median(axes, axis=0)).max(axis=(1, 2)) > _MAX_TURN
    if turned.any():
        raise ValueError(f"slices are turned against each other: {_odd(instances, turned)}")
    row, column = axes[0] / lengths[0][:, None]
    normal = np.cross(row, column)

    positions = np.array([i.position for i in instances], dtype=float)
    order = np.argsort(positions @ normal, kind="stable")
    instances, positions = [instances[i] for i in order], positions[order]
    between_rows, between_columns = instances[0].pixel_spacing or (0.0, 0.0)
    if len(instances) == 1:
        thickness = instances[0].thickness or 0.0
        if thickness <= 0:
            raise ValueError("a single slice without SliceThickness: its third dimension is unknown")
        step = normal * thickness
    else:
        _check_distances(instances, positions @ normal)
        step = (positions[-1] - positions[0]) / (len(instances) - 1)
        _check_line(instances, positions, normal, min(between_rows, between_columns))
    affine = np.eye(4)
    affine[:3, :3] = _RAS @ np.column_stack([row * between_columns, column * between_rows, step])
    affine[:3, 3] = _RAS @ positions[0]
    return tuple(instances), affine + 0.0  # + 0.0 turns -0.0 into 0.0


def name_slices(instances: Iterable[Instance]) -> str:
    """Name a few slices by InstanceNumber, or by position where that is missing.

    Args:
        instances: the slices to name.
    """
    named = sorted(instances, key=lambda i: (i.number is None, i.number or 0))
    words = [f"(none) at {i.position}" if i.number is None else str(i.number) for i in named[:6]]
    return f"InstanceNumber {', '.join(words)}" + (f" and {len(named) - 6} more" if len(named) > 6 else "")


def _odd(instances: Sequence[Instance], chosen: np.ndarray) -> str:
    return name_slices(i for i, c in zip(instances, chosen, strict=True) if c)


def _check_distances(instances: Sequence[Instance], places: np.ndarray) -> None:
    """Refuse slices at one place, gaps and uneven distances; places in mm along the normal, ascending."""
    distances = np.diff(places)
    same = distances < _SAME_PLACE
    if same.any():
        shared = np.append(same, False) | np.insert(same, 0, False)
        raise ValueError(
            f"{shared.sum()} slices share their position with another, the first at "
            f"{places[shared.argmax()]:.2f} mm along the normal: {_odd(instances, shared)}; "
            "give each acquisition or reconstruction a series UID of its own"
        )
    usual = np.sort(distances)[(len(distances) - 1) // 2]
    gaps = np.flatnonzero(distances > _GAP * usual)
    if gaps.size:
        lost = np.rint(distances[gaps] / usual).astype(int) - 1
        where = [
            f"{n} between {places[g]:.2f} and {places[g + 1]:.2f} mm" for g, n in zip(gaps, lost, strict=True)
        ]
        more = f" and {gaps.size - 3} more gaps" if gaps.size > 3 else ""
        raise ValueError(
            f"slices are missing: {', '.join(where[:3])}{more} along the normal; copy all of them"
        )
    grid = np.linspace(places[0], places[-1], len(places))
    off = np.abs(places - grid) > max(_JITTER * usual, _ROUNDING)
    if off.any():
        span = f"{distances.min():.3f} to {distances.max():.3f} mm"
        raise ValueError(f"slice distances are uneven, {span}: {_odd(instances, off)}")


def _check_line(
    instances: Sequence[Instance], positions: np.ndarray, normal: np.ndarray, pixel: float
) -> None:
    """Refuse slices that are not stacked along their normal; positions in mm, pixel the smaller spacing."""
    whole = positions[-1] - positions[0]
    tilt = np.rad2deg(np.arccos(np.clip(whole @ normal / np.linalg.norm(whole), -1, 1)))
    if tilt > _MAX_TILT:
        raise ValueError(
            f"gantry tilt: slices are stacked {tilt:.1f} degrees off their normal; resample it first"
        )
    away = positions - positions[0] - np.outer(np.linspace(0, 1, len(positions)), whole)
    aside = np.linalg.norm(away - np.outer(away @ normal, normal), axis=1) > max(_JITTER * pixel, _ROUNDING)
    if aside.any():
        raise ValueError(f"slices are shifted sideways against the others: {_odd(instances, aside)}")
