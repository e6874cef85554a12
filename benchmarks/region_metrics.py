# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Times the centre of a region, eq. (10) of SCOAT-Net, beside the double loop that the equation reads like.

    python benchmarks/region_metrics.py [--repeats 5] [--naive-seconds 10]

Both run in this process on the same masks: one slice of 512x512 with one region of about 50,000 pixels, which
is a disk, a ring, or a ragged lesion whose edge is long. The double loop runs until its time is over and is
extrapolated from the part of the region's pixels that it has done, which the column "done" gives. That both
find the same centre is checked on the same shapes at a quarter of the side, where the loop runs to its end.
The last lines time RLP and RLR of a whole volume.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from skimage.measure import label

from custom.metrics import RegionPrecisionMetric, RegionRecallMetric, region_centers

AREA = 50_000
SIDE = 512


def disk(side: int) -> np.ndarray:
    radius = math.sqrt(AREA / math.pi) * side / SIDE
    return np.hypot(*(np.indices((side, side)) - side / 2)) < radius


def ring(side: int) -> np.ndarray:
    outer = 200 * side / SIDE
    inner = math.sqrt(outer**2 - AREA / math.pi * (side / SIDE) ** 2)
    distance = np.hypot(*(np.indices((side, side)) - side / 2))
    return (distance < outer) & (distance >= inner)


def ragged(side: int) -> np.ndarray:
    """The largest connected piece of smoothed noise, cut at the level that gives it about the right area."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((side, side)), 1.5)
    noise[np.hypot(*(np.indices((side, side)) - side / 2)) > 0.42 * side] = -np.inf
    wanted = AREA * (side / SIDE) ** 2
    best = np.zeros((side, side), bool)
    for level in np.quantile(noise[np.isfinite(noise)], np.linspace(0.2, 0.6, 41)):
        labels = label(noise > level, connectivity=2)
        piece = labels == np.bincount(labels.ravel())[1:].argmax() + 1
        if abs(piece.sum() - wanted) < abs(best.sum() - wanted):
            best = piece
    return best


def naive_center(mask: np.ndarray, seconds: float = math.inf) -> tuple[tuple[int, int], float, float, int]:
    """Eq. (10) read aloud: for every pixel of the region the greatest distance to every pixel of its edge.

    Returns:
        The centre among the pixels done, the time in seconds, the part of the pixels that was done, and the
        number of edge pixels.
    """
    pixels = [tuple(p) for p in np.argwhere(mask).tolist()]
    edge = [tuple(p) for p in np.argwhere(mask & ~ndimage.binary_erosion(mask)).tolist()]
    best, center, done = math.inf, pixels[0], 0
    begin = time.perf_counter()
    for row, column in pixels:
        greatest = 0
        for y, x in edge:
            distance = (row - y) ** 2 + (column - x) ** 2
            if distance > greatest:
                greatest = distance
        if greatest < best:
            best, center = greatest, (row, column)
        done += 1
        if time.perf_counter() - begin > seconds:
            break
    return center, time.perf_counter() - begin, done / len(pixels), len(edge)


def clock(function: Callable[[], object], repeats: int) -> float:
    """Shortest time in seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours, the shortest counts")
    parser.add_argument(
        "--naive-seconds", type=float, default=10, help="time for the double loop on each shape"
    )
    args = parser.parse_args()
    print("shape    pixels   edge      ours   double loop  done     ratio  same centre (at a quarter)")
    for shape in (disk, ring, ragged):
        mask, small = shape(SIDE), shape(SIDE // 4)
        ours = clock(lambda mask=mask: region_centers(mask), args.repeats)
        _, seconds, part, edge = naive_center(mask, args.naive_seconds)
        same = tuple(region_centers(small)[0].tolist()) == naive_center(small)[0]
        print(
            f"{shape.__name__:8} {mask.sum():6} {edge:6} {1000 * ours:6.1f} ms {seconds / part:9.1f} s "
            f"{100 * part:6.1f} % {seconds / part / ours:8.0f}  {'yes' if same else 'NO'}",
            flush=True,
        )
    rng = np.random.default_rng(1)
    field = ndimage.gaussian_filter(rng.standard_normal((SIDE, SIDE, 100)).astype(np.float32), (6, 6, 2))
    truth = torch.from_numpy(field > 1.5 * field.std())[None, None]
    pred = torch.roll(truth, (3, 3), (2, 3))
    for name, metric in (
        ("RLP, slices", RegionPrecisionMetric()),
        ("RLR, slices", RegionRecallMetric()),
        ("RLP, volume", RegionPrecisionMetric(spatial="volume")),
    ):
        seconds = clock(lambda metric=metric: metric(pred, truth), 1)
        print(f"{name}: {seconds:.2f} s for {SIDE}x{SIDE}x100 voxels, {float(truth.sum()):.0f} foreground")


if __name__ == "__main__":
    main()
