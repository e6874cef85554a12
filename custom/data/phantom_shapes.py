# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Shapes and textures that the synthetic chest CT is made of; lengths in mm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

__all__ = [
    "Texture",
    "Tube",
    "correlated",
    "coverage",
    "ellipsoid",
    "grow_tree",
    "middle",
    "paint_tubes",
    "radial",
    "smooth_min",
]


@dataclass(frozen=True)
class Tube:
    """A tapering capsule from ``start`` to ``end`` (mm) with radii ``r0`` and ``r1`` (mm)."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    r0: float
    r1: float

    def distance(self, x, y, z):
        """Signed distance to the surface in mm."""
        a, d = self.start, [e - s for s, e in zip(self.start, self.end, strict=True)]
        px, py, pz = x - a[0], y - a[1], z - a[2]
        t = np.clip((px * d[0] + py * d[1] + pz * d[2]) / (d[0] ** 2 + d[1] ** 2 + d[2] ** 2 + 1e-9), 0, 1)
        gap = np.sqrt((px - t * d[0]) ** 2 + (py - t * d[1]) ** 2 + (pz - t * d[2]) ** 2)
        return gap - (self.r0 + (self.r1 - self.r0) * t)

    def near(self, z: float, margin: float) -> bool:
        """Whether the axial plane ``z`` passes within ``margin`` mm of the tube."""
        reach = max(self.r0, self.r1) + margin
        return min(self.start[2], self.end[2]) - reach <= z <= max(self.start[2], self.end[2]) + reach


def coverage(distance, width: float):
    """Share of a voxel of ``width`` mm that lies inside a surface ``distance`` mm away; half on it."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def radial(x, y, a, b, power: float = 2.0):
    """Distance along the ray from the centre to the superellipse ``|x/a|^p + |y/b|^p = 1``."""
    norm = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power) + 1e-6
    return np.sqrt(x * x + y * y) * (1 - 1 / norm) + (norm < 1e-3) * -np.minimum(a, b)


def middle(x) -> slice:
    """Rows of a plane that mediastinal tubes can reach (|x| < 80 mm), to save time; all of a list."""
    near = np.flatnonzero(np.abs(x) < 80) if np.ndim(x) == 2 else np.arange(len(x))
    return slice(int(near[0]), int(near[-1]) + 1) if len(near) else slice(0, 0)


def ellipsoid(x, y, z, centre, radii):
    k0 = np.sqrt(sum(((p - c) / r) ** 2 for p, c, r in zip((x, y, z), centre, radii, strict=True)))
    k1 = np.sqrt(sum(((p - c) / r**2) ** 2 for p, c, r in zip((x, y, z), centre, radii, strict=True)))
    return k0 * (k0 - 1) / (k1 + 1e-6)


def smooth_min(a, b, k: float):
    """Union of two distances with a fillet of about ``k`` mm."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - h * h * k * 0.25


def grow_tree(
    rng: np.random.Generator, root, targets, leaf_radius: float, exponent: float = 2.7
) -> list[Tube]:
    """A branching tree from ``root`` that reaches every target, thinning as it divides.

    The targets are halved along their longest extent again and again; each half gets a branch to its middle.
    A branch that feeds ``n`` targets has radius ``leaf_radius * n ** (1 / exponent)``, Murray's law with the
    exponent measured in lungs.

    Args:
        rng: source of the slight bends.
        root: start in mm, (3,).
        targets: end points in mm, (N, 3).
        leaf_radius: radius of the last branches in mm.
        exponent: exponent of the branching law.
    """
    tubes: list[Tube] = []
    stack = [
        (np.asarray(root, float), np.asarray(targets, float), leaf_radius * len(targets) ** (1 / exponent))
    ]
    while stack:
        start, points, parent_radius = stack.pop()
        middle = points.mean(0)
        alone = len(points) == 1
        end = middle if alone else start + (middle - start) * rng.uniform(0.35, 0.5)
        if not alone:
            end = end + rng.normal(0, 0.06, 3) * np.linalg.norm(end - start)
        radius = leaf_radius * len(points) ** (1 / exponent)
        tubes.append(
            Tube(tuple(start.tolist()), tuple(end.tolist()), min(parent_radius, radius * 1.2), radius)
        )
        if not alone:
            side = points[:, int(np.argmax(np.ptp(points, 0)))]
            cut = np.quantile(side, rng.uniform(0.35, 0.65))
            low = side <= cut
            if low.all() or not low.any():
                low = np.arange(len(points)) < len(points) // 2
            stack += [(end, points[low], radius), (end, points[~low], radius)]
    return tubes


class Texture:
    """Smooth noise with unit variance and a grain of ``grain`` mm, the same for every grid."""

    def __init__(self, rng: np.random.Generator, grain: float) -> None:
        self.grain, self.half = grain, int(np.ceil(230 / grain)) + 1
        field_ = gaussian_filter(rng.standard_normal((2 * self.half + 1,) * 3).astype(np.float32), 0.6)
        self.values = field_ / field_.std()

    def plane(self, x, y, z: float) -> np.ndarray:
        """Values on one axial plane, linear between the nodes, (I, J)."""
        out = self.values
        for axis, at in ((2, np.array([z])), (0, np.ravel(x)), (1, np.ravel(y))):
            node = np.clip(at / self.grain + self.half, 0, 2 * self.half - 1e-3)
            low = node.astype(int)
            share = (node - low).astype(np.float32).reshape([-1 if n == axis else 1 for n in range(3)])
            out = out.take(low, axis) * (1 - share) + out.take(low + 1, axis) * share
        return out[:, :, 0]


def correlated(rng: np.random.Generator, size: tuple[int, ...]):
    """Noise with unit variance, alike in neighbours as after a reconstruction kernel."""
    noise = gaussian_filter(rng.standard_normal(size).astype(np.float32), 0.6, mode="wrap")
    return noise / max(float(noise.std()), 1e-6) if noise.size > 16 else noise


def paint_tubes(tubes: list[Tube], size, step, factor) -> np.ndarray:
    """Share of each voxel that tubes fill, 0-255; thick slices are averaged over planes, uint8 (I, J, K)."""
    out = np.zeros(size, np.uint8)
    unit = np.asarray(step / factor, float)
    width = max(0.9, float(unit[:2].mean()))
    planes = max(1, round(unit[2] / 2.0))
    for tube in tubes:
        ends = np.array([tube.start, tube.end])
        reach = max(tube.r0, tube.r1) + np.array([width, width, unit[2]])
        middle = (np.array(size) - 1) / 2
        low = np.maximum(np.floor((ends.min(0) - reach) / unit + middle), 0).astype(int)
        high = np.minimum(np.ceil((ends.max(0) + reach) / unit + middle) + 1, size).astype(int)
        if (high <= low).any():
            continue
        x, y, z = ((np.arange(a, b) - m) * u for a, b, m, u in zip(low, high, middle, unit, strict=True))
        fine = (z[:, None] + ((np.arange(planes) + 0.5) / planes - 0.5) * unit[2]).ravel()
        gap = tube.distance(x[:, None, None], y[None, :, None], fine[None, None, :])
        # A vessel finer than a voxel fills only part of it.
        share = np.minimum(coverage(gap, width), 2 * (tube.r0 + tube.r1) / width)
        share = share.reshape(len(x), len(y), len(z), planes).mean(-1)
        window = out[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        np.maximum(window, np.rint(255 * share).astype(np.uint8), out=window)
    return out
