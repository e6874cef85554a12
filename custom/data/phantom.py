# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Synthetic chest CT with exact lesion and lung masks, for demonstrations and tests without patient data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from custom.data.files import write_nifti
from custom.data.phantom_anatomy import Anatomy
from custom.data.phantom_shapes import Texture, Tube, correlated, coverage, grow_tree, paint_tubes

__all__ = ["LESION_CLASSES", "Lesion", "Phantom", "check_grid", "describe", "make_phantom"]

#: Values of the classes in :attr:`Phantom.label`.
LESION_CLASSES = {"ground_glass": 1, "consolidation": 2, "nodule": 3}
_LESION_HU = {"ground_glass": -450.0, "consolidation": 15.0, "nodule": 40.0}
#: Half width in mm of the edge, as the change from lung to lesion is slow in ground-glass only.
_LESION_EDGE = {"ground_glass": 3.0, "consolidation": 1.2, "nodule": 0.6}
_THORAX_MM = (340.0, 340.0, 300.0)


@dataclass(frozen=True)
class Lesion:
    """One lesion.

    Args:
        kind: "ground_glass", "consolidation" or "nodule".
        centre: RAS+ mm in the image's world; with ``side``, the fraction of that lung's bounding box instead,
            from (0, 0, 0) = medial, front, base to (1, 1, 1) = lateral, back, apex.
        radii: half axes along the patient's axes in mm.
        side: "left" or "right" where ``centre`` is a fraction.
        exact: an ellipsoid that must lie wholly in the lung, so that volume and centroid are known; otherwise
            an irregular outline, cut off at the pleura.
        hu: HU inside; by default typical of ``kind``.
    """

    kind: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    side: str | None = None
    exact: bool = True
    hu: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in LESION_CLASSES:
            raise ValueError(f"Lesion: kind {self.kind!r} is not one of {', '.join(LESION_CLASSES)}")
        if self.side not in (None, "left", "right"):
            raise ValueError(f"Lesion: side {self.side!r} must be 'left', 'right' or None")
        if len(self.centre) != 3 or len(self.radii) != 3 or min(self.radii) <= 0:
            raise ValueError(
                f"Lesion: need 3 centre values and 3 positive radii, got {self.centre}, {self.radii}"
            )

    @property
    def volume_ml(self) -> float:
        """Volume of the ellipsoid in mL."""
        return 4 / 3 * np.pi * float(np.prod(self.radii)) / 1000


@dataclass(frozen=True)
class Phantom:
    """A synthetic chest CT.

    Args:
        image: HU, int16 (I, J, K).
        label: 0 background, 1 ground-glass, 2 consolidation, 3 nodule, uint8 (I, J, K).
        lungs: 0 background, 1 left, 2 right, lesions included, uint8 (I, J, K).
        affine: voxel index to RAS+ mm, (4, 4).
        lesions: what was drawn, centres in RAS+ mm.
        description: seed, for the header of the files, at most 79 letters.
    """

    image: np.ndarray
    label: np.ndarray
    lungs: np.ndarray
    affine: np.ndarray
    lesions: tuple[Lesion, ...] = ()
    description: str = "synthetic chest CT"

    def save(self, folder: str | os.PathLike, stem: str) -> dict[str, Path]:
        """Writes ``{stem}_ct``, ``_opacity`` (0/1), ``_classes`` and ``_lungs`` as NIfTI, each atomically.

        Returns:
            The paths, with keys "ct", "opacity", "classes" and "lungs".
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The scan comes last: where it exists, its masks do too.
        arrays = {
            "opacity": (self.label > 0).astype(np.uint8),
            "classes": self.label,
            "lungs": self.lungs,
            "ct": self.image,
        }
        paths = {}
        for name, array in arrays.items():
            paths[name] = folder / f"{stem}_{name}.nii.gz"
            write_nifti(paths[name], array, self.affine, self.description)
        return paths


def make_phantom(
    shape: Sequence[int] = (128, 128, 48),
    spacing: Sequence[float] = (2.8, 2.8, 6.5),
    seed: int = 0,
    lesions: Sequence[str | Lesion] = ("ground_glass", "consolidation", "nodule"),
    burden: float | None = None,
    scale: float | None = None,
    noise_hu: float = 15.0,
    padding_value: int | None = None,
) -> Phantom:
    """Draws a synthetic patient and samples it on a grid centred on the thorax.

    The array's axes grow to the patient's left, to posterior and to superior (axcodes "LPS"), as in NIfTI
    from DICOM. Anatomy and lesions are defined in mm and depend on ``seed`` only, the noise also on the grid.

    Args:
        shape: voxels (I, J, K); K may be 1.
        spacing: mm per voxel along each axis.
        seed: the patient.
        lesions: kinds to draw at random, at least one of each, or :class:`Lesion` objects; empty for healthy
            lungs.
        burden: extent of the random lesions from 0 (few, small) to 1 (many, large); None draws it.
        scale: size of the anatomy, 1 for an adult; a grid smaller than the thorax then shows a part of it. If
            None, the anatomy shrinks to such a grid in plane, and along the body as well unless that would
            flatten it to less than 0.6 (one slice is never flattened).
        noise_hu: standard deviation of the noise in HU.
        padding_value: HU outside the scanner's circular field of view, as many scanners store it (-2048), or
            None for a square field of view.

    Raises:
        ValueError: for an impossible grid or kind, or an exact lesion that is not wholly inside the lungs.
    """
    size, step = check_grid(shape, spacing)
    factor = _scale(size, step, scale)
    rng = np.random.default_rng([seed, 2])
    anatomy = Anatomy(seed)
    candidates = _points_in_lungs(anatomy, rng)
    vessels, bronchi = _trees(anatomy, rng, candidates)
    placed = _place(lesions, anatomy, candidates, np.random.default_rng([seed, 3]), burden, factor)

    x, y, z = (((np.arange(n) - (n - 1) / 2) * s).astype(np.float32) for n, s in zip(size, step, strict=True))
    x, y = x[:, None], y[None, :]
    ax, ay = x / factor[0], y / factor[1]
    width = max(0.9, float(step[0] + step[1]) / 2) / factor[0]
    blur = width * float(factor[0])
    vessel_share = paint_tubes(vessels, size, step, factor)
    airway_share = paint_tubes(bronchi, size, step, factor)
    bronchial_wall = paint_tubes(
        [Tube(t.start, t.end, 0.5 + 1.15 * t.r0, 0.5 + 1.15 * t.r1) for t in bronchi], size, step, factor
    )
    texture, outline = Texture(rng, 9.0), Texture(np.random.default_rng([seed, 4]), 13.0)
    noise = np.random.default_rng([seed, 5])

    image, label, lungs = np.empty(size, np.int16), np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    # A thick slice is the mean of thin planes, the middle one of which decides the masks.
    planes = 2 * int(np.clip(round(step[2] / 7), 0, 2)) + 1
    offsets = (np.arange(planes) - planes // 2) * step[2] / planes
    for k in range(size[2]):
        total = np.zeros(size[:2], np.float32)
        for n, offset in enumerate(offsets):
            height = float(z[k] + offset)
            az = height / float(factor[2])
            hu = anatomy.tissue(ax, ay, az, width)
            edge = anatomy.lung(ax, ay, az)
            grain = texture.plane(ax, ay, az)
            lung_hu = -868 + 50 * np.clip(ay / 85, -1, 1) + 16 * grain
            inside = edge < 0
            classes = np.zeros(size[:2], np.uint8)
            bumps = outline.plane(ax, ay, az)
            for lesion in placed:
                window = _window(lesion, x, y, height, blur)
                if window is None:
                    continue
                gap = _lesion_distance(lesion, x[window[0]], y[:, window[1]], height, bumps[window])
                share = coverage(gap, 2 * _LESION_EDGE[lesion.kind] * float(factor[0]) + blur / 2)
                value = _LESION_HU[lesion.kind] if lesion.hu is None else lesion.hu
                lung_hu[window] += share * (value + 35 * grain[window] * (not lesion.exact) - lung_hu[window])
                classes[window][(gap < 0) & inside[window]] = LESION_CLASSES[lesion.kind]
            hu += coverage(edge, width) * (lung_hu - hu)
            # Vessels vanish in what is as dense; bronchi stay as air bronchograms; nodules push them aside.
            # Both trees bridge the few mm between the lung and the great vessels and main bronchi.
            near = (edge < 9) / np.float32(255)
            hollow = near * (classes != LESION_CLASSES["nodule"])
            hu += near * vessel_share[:, :, k] * np.maximum(38 - hu, 0)
            hu += hollow * bronchial_wall[:, :, k] * np.maximum(-150 - hu, 0)
            hu += hollow * airway_share[:, :, k] * (-960 - hu)
            total += hu + np.where(hu > -300, 5, 0) * grain
            if n == planes // 2:
                label[:, :, k] = classes
                lungs[:, :, k] = np.where(inside, np.where(ax > 0, 1, 2), 0)
        total = total / planes + noise_hu * correlated(noise, size[:2])
        image[:, :, k] = np.clip(np.rint(total), -1024, 3071)
    if padding_value is not None:
        image[x * x + y * y > (min(size[0] * step[0], size[1] * step[1]) / 2) ** 2] = padding_value
    affine = np.diag([-step[0], -step[1], step[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
    ras = tuple(replace(p, centre=(-p.centre[0], -p.centre[1], p.centre[2])) for p in placed)
    return Phantom(image, label, lungs, affine, ras, describe(seed, lesions, burden))


def describe(seed: int, lesions: Sequence[str | Lesion], burden: float | None) -> str:
    """What tells two patients apart, short enough for a header (79 letters)."""
    what = hashlib.sha256(repr((list(lesions), burden)).encode()).hexdigest()[:8]
    return f"synthetic chest CT, seed {seed}, lesions {what}"


def check_grid(shape: Sequence[int], spacing: Sequence[float]) -> tuple[tuple[int, int, int], np.ndarray]:
    size, step = tuple(int(n) for n in shape), np.asarray(spacing, float)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"make_phantom: shape must be 3 positive integers, got {tuple(shape)}")
    if step.shape != (3,) or not np.isfinite(step).all() or step.min() <= 0:
        raise ValueError(f"make_phantom: spacing must be 3 positive numbers in mm, got {tuple(spacing)}")
    return (size[0], size[1], size[2]), step


def _scale(size: tuple[int, int, int], step: np.ndarray, scale: float | None) -> np.ndarray:
    if scale is not None:
        if not scale > 0:
            raise ValueError(f"make_phantom: scale must be positive, got {scale}")
        return np.full(3, float(scale), np.float32)
    share = np.array(size) * step / _THORAX_MM
    plane = min(1.0, share[0], share[1])
    along = plane if size[2] == 1 else float(np.clip(share[2], 0.6 * plane, plane))
    return np.array([plane, plane, along], np.float32)


def _points_in_lungs(anatomy: Anatomy, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Points spread evenly through each lung: x, y, z and depth below the pleura (negative) in mm, (N, 4)."""
    points = rng.uniform((-130, -95, -130), (130, 95, 120), (12000, 3)).astype(np.float32)
    depth = anatomy.lung(points[:, 0], points[:, 1], points[:, 2])
    inside = np.column_stack([points, depth])[depth < 0]
    return {"left": inside[inside[:, 0] > 0], "right": inside[inside[:, 0] < 0]}


def _trees(anatomy: Anatomy, rng: np.random.Generator, candidates) -> tuple[list[Tube], list[Tube]]:
    vessels: list[Tube] = []
    bronchi: list[Tube] = []
    for side, points in candidates.items():
        deep = points[points[:, 3] < -3][:, :3]
        artery, vein, bronchus = anatomy.roots[side]
        vessels += grow_tree(rng, artery, deep[:300], 0.75)
        vessels += grow_tree(rng, vein, deep[300:520], 0.75)
        bronchi += grow_tree(rng, bronchus, points[points[:, 3] < -25][-24:, :3], 0.7, exponent=1.75)
    return vessels, bronchi


def _place(lesions, anatomy, candidates, rng, burden, factor) -> list[Lesion]:
    """Lesions in the grid's own mm (left, posterior, superior), in the order in which they are painted."""
    placed: list[Lesion] = []
    severity = float(rng.uniform(0.05, 1.0) ** 1.5) if burden is None else float(burden)
    if not 0 <= severity <= 1:
        raise ValueError(f"make_phantom: burden must lie between 0 and 1, got {burden}")
    for lesion in lesions:
        if isinstance(lesion, Lesion):
            centre = np.asarray(lesion.centre, float) * (-1, -1, 1)
            if lesion.side is not None:
                points = candidates[lesion.side][:, :3] * ((1, 1, 1) if lesion.side == "left" else (-1, 1, 1))
                low, high = points.min(0), points.max(0)
                centre = low + np.asarray(lesion.centre) * (high - low)
                centre = centre * ((1, 1, 1) if lesion.side == "left" else (-1, 1, 1)) * factor
            placed.append(replace(lesion, centre=tuple(centre.tolist()), side=None))
            if lesion.exact:
                _check_inside(placed[-1], anatomy, factor)
        elif lesion in LESION_CLASSES:
            placed += _draw(lesion, severity, candidates, rng, factor)
        else:
            raise ValueError(
                f"make_phantom: lesion {lesion!r} is not one of {', '.join(LESION_CLASSES)} or a Lesion"
            )
    return sorted(placed, key=lambda one: LESION_CLASSES[one.kind])


def _draw(kind: str, severity: float, candidates, rng, factor) -> list[Lesion]:
    count = {"ground_glass": 1 + round(13 * severity), "consolidation": 1 + round(4 * severity), "nodule": 1}[
        kind
    ]
    if kind == "nodule":
        count += int(rng.integers(0, 3))
    drawn = []
    for _ in range(count):
        points = candidates["left" if rng.random() < 0.47 else "right"]
        if kind == "nodule":
            radii = np.full(3, rng.uniform(2.5, 12.5)) * rng.uniform(0.93, 1.07, 3)
            pool = points[points[:, 3] < -float(radii.max()) * 1.15]
            pool = pool if len(pool) else points
            weight = np.ones(len(pool))
        else:
            large = {"ground_glass": (10, 22 + 24 * severity), "consolidation": (8, 14 + 14 * severity)}[kind]
            radii = rng.uniform(*large) * rng.uniform(0.75, 1.25, 3)
            pool = points[points[:, 3] > -18]
            # Peripheral, dorsal and basal, as COVID-19 pneumonia prefers.
            weight = np.exp(pool[:, 1] / 45 - pool[:, 2] / 120)
        centre = pool[rng.choice(len(pool), p=weight / weight.sum()), :3].astype(float) * factor
        hu = float(np.round({"ground_glass": rng.uniform(-580, -330), "consolidation": rng.uniform(-40, 45),
                             "nodule": rng.uniform(10, 60)}[kind]))  # fmt: skip
        drawn.append(Lesion(kind, tuple(centre.tolist()), tuple((radii * factor).tolist()), None, False, hu))
    return drawn


def _window(lesion: Lesion, x, y, z: float, blur: float) -> tuple[slice, slice] | None:
    """The part of an axial plane that a lesion can reach, None where it does not meet the plane."""
    parts = []
    for axis, at in enumerate((x.ravel(), y.ravel(), np.array([z]))):
        reach = 2 * lesion.radii[axis] + 2 * blur + 8
        near = np.flatnonzero(np.abs(at - lesion.centre[axis]) <= reach)
        if not len(near):
            return None
        parts.append(slice(int(near[0]), int(near[-1]) + 1))
    return parts[0], parts[1]


def _lesion_distance(lesion: Lesion, x, y, z: float, bumps):
    """Signed distance in mm to a lesion's outline, which ``bumps`` dent unless it is exact."""
    p = [(c - o) / r for c, o, r in zip((x, y, z), lesion.centre, lesion.radii, strict=True)]
    norm = np.sqrt(p[0] ** 2 + p[1] ** 2 + p[2] ** 2)
    if not lesion.exact:
        norm = norm + (0.07 if lesion.kind == "nodule" else 0.3) * np.clip(bumps, -2.5, 2.5)
    return (norm - 1) * min(lesion.radii)


def _check_inside(lesion: Lesion, anatomy: Anatomy, factor) -> None:
    """Refuses an exact lesion that crosses the pleura, from points of the ellipsoid, whatever the grid."""
    turns = np.arange(600)
    height, angle = 1 - 2 * (turns + 0.5) / 600, turns * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - height**2)
    sphere = np.column_stack([ring * np.cos(angle), ring * np.sin(angle), height])
    points = np.concatenate([sphere * share for share in (1.0, 0.6, 0.2)]) * lesion.radii + lesion.centre
    at = (points / factor).astype(np.float32)
    if (anatomy.lung(at[:, 0], at[:, 1], at[:, 2]) > 0).any():
        left, back, up = (round(c, 1) for c in lesion.centre)
        raise ValueError(
            f"make_phantom: the exact {lesion.kind} with centre ({-left}, {-back}, {up}) RAS mm and radii "
            f"{tuple(lesion.radii)} mm reaches out of the lungs; move it, shrink it or set exact=False"
        )
