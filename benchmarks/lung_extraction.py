# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Times our lung extraction beside the published steps it stands in for, and compares the two masks.

    python benchmarks/lung_extraction.py SCAN [SCAN ...] [--repeats 3]

SCAN is a folder with DICOM studies or a NIfTI file. Reading is not timed. Both run in this process, one after
the other. Volumes are in mL; the ratio is the published steps' time over ours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from skimage import measure

from custom.data import choose_series, find_studies, read_series
from custom.transforms.lung_extraction import extract_lungs

# Parameters of Liao et al., "Evaluate the Malignancy of Pulmonary Nodules Using the 3-D Deep Leaky Noisy-OR
# Network", IEEE TNNLS 30(11), 2019.
THRESHOLD_HU = -600
MIN_AREA_MM2, MAX_ECCENTRICITY = 30, 0.99
VOLUME_LITRES = (0.68, 7.5)
LARGE_AREA_MM2, MAX_DISTANCE_MM = 6000, 62
MAX_EROSIONS, MAX_RATIO = 22, 4.8
KEPT_AREA = 0.95


def published_steps(hu: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The steps of Liao et al. 2019, one library call per step.

    Args:
        hu: slices from feet to head, (Z, Y, X).
        spacing: mm along Z, Y, X.

    Returns:
        0 background, 1 and 2 the two lungs in the order of their centroids along X.
    """
    air = _air(hu, spacing)
    mask, cut = np.zeros_like(air), 0
    while not mask.any() and cut < len(air):
        mask = _choose_lungs(air, spacing, cut)
        cut += 2
    if cut > 2:  # slices were dropped to detach the lungs from outer air: grow back into them
        mask = air & ndimage.binary_dilation(mask, iterations=cut)
    mask = ndimage.binary_fill_holes(mask)
    return _separate(mask, spacing)


def _air(hu: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    rows, columns = (np.arange(n) - (n - 1) / 2 for n in hu.shape[1:])
    outside = np.hypot(rows[:, None], columns[None]) > min(hu.shape[1:]) / 2
    air = np.zeros(hu.shape, bool)
    for k, plane in enumerate(hu.astype(np.float32)):
        if len(np.unique(plane[:10, :10])) == 1:
            plane[outside] = np.nan
        air[k] = ndimage.gaussian_filter(plane, 1, truncate=2) < THRESHOLD_HU
        labels = measure.label(air[k])
        good = [
            region.label
            for region in measure.regionprops(labels)
            if region.area * spacing[1] * spacing[2] > MIN_AREA_MM2 and region.eccentricity < MAX_ECCENTRICITY
        ]
        air[k] = np.isin(labels, good)
    return air


def _choose_lungs(air: np.ndarray, spacing: np.ndarray, cut: int) -> np.ndarray:
    labels = measure.label(air[: len(air) - cut], connectivity=1)
    middle = labels.shape[2] // 2
    outer = {labels[z, y, x] for z in (0, -1) for y in (0, -1) for x in (0, middle, -1)}
    rows, columns = ((np.arange(n) - n / 2) * s for n, s in zip(labels.shape[1:], spacing[1:], strict=True))
    distance = np.hypot(rows[:, None], columns[None])
    kept = []
    for region in measure.regionprops(labels):
        litres = region.area * spacing.prod() / 1e6
        if region.label in outer or not VOLUME_LITRES[0] < litres < VOLUME_LITRES[1]:
            continue
        planes = [labels[k] == region.label for k in range(len(labels))]
        near = [distance[p].min() for p in planes if p.sum() * spacing[1] * spacing[2] > LARGE_AREA_MM2]
        if near and np.mean(near) < MAX_DISTANCE_MM:
            kept.append(region.label)
    mask = np.zeros_like(air)
    mask[: len(air) - cut] = np.isin(labels, kept)
    return mask


def _separate(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    core = mask
    for _ in range(MAX_EROSIONS):
        labels = measure.label(core, connectivity=1)
        sizes = np.bincount(labels.ravel())[1:]
        largest = np.argsort(sizes)[::-1][:2] + 1
        if len(sizes) > 1 and sizes[largest[0] - 1] < MAX_RATIO * sizes[largest[1] - 1]:
            break
        core = ndimage.binary_erosion(core)
    else:
        return mask.astype(np.uint8)
    distances = [ndimage.distance_transform_edt(labels != n, sampling=spacing) for n in largest]
    lungs = np.zeros(mask.shape, np.uint8)
    nearer = distances[0] < distances[1]
    for value, part in enumerate((mask & nearer, mask & ~nearer), start=1):
        lungs[_fill_slices(part)] = value
    centroids = [np.mean(np.nonzero((lungs == value).any((0, 1)))) for value in (1, 2)]
    return lungs if centroids[0] < centroids[1] else np.array([0, 2, 1], np.uint8)[lungs]


def _fill_slices(mask: np.ndarray) -> np.ndarray:
    out = np.zeros_like(mask)
    for k, plane in enumerate(mask):
        labels = measure.label(plane)
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        order = np.argsort(sizes)[::-1]
        enough = np.searchsorted(np.cumsum(sizes[order]), KEPT_AREA * sizes.sum()) + 1
        out[k] = ndimage.binary_fill_holes(np.isin(labels, order[:enough][sizes[order[:enough]] > 0]))
    return out


def read_scans(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, HU (I, J, K) and affine of each scan."""
    if path.is_file():
        image = nib.load(path)
        yield path.name, np.asanyarray(image.dataobj), image.affine
        return
    for study in find_studies(path):
        volume = read_series(choose_series(study)[0])
        yield path.name, volume.hu, volume.affine


def run_published(hu: np.ndarray, affine: np.ndarray) -> Callable[[], np.ndarray]:
    """The published steps on slices laid out as they expect them; labels as ours, (I, J, K)."""
    start, ours = nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt("SPL")
    there = nib.orientations.ornt_transform(start, ours)
    back = nib.orientations.ornt_transform(ours, start)
    spacing = np.empty(3)
    spacing[there[:, 0].astype(int)] = nib.affines.voxel_sizes(affine)
    slices = np.ascontiguousarray(nib.orientations.apply_orientation(hu, there))

    def run() -> np.ndarray:
        lungs = published_steps(slices, spacing)  # X grows to the left, so 1 is the right lung
        return nib.orientations.apply_orientation(np.array([0, 2, 1], np.uint8)[lungs], back)

    return run


def clock(function: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Shortest time in seconds, and the result."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scans", nargs="+", type=Path, metavar="SCAN", help="DICOM folder or NIfTI file")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours; the published steps run once")
    args = parser.parse_args()
    print("scan                  voxels          ours  published  ratio  | left: ours published Dice | right")
    for path in args.scans:
        for name, hu, affine in read_scans(path):
            ml = nib.affines.voxel_sizes(affine).prod() / 1000
            ours_s, ours = clock(lambda hu=hu, affine=affine: extract_lungs(hu, affine), args.repeats)
            published_s, published = clock(run_published(hu, affine), 1)
            sides = []
            for value in (1, 2):
                a, b = ours == value, published == value
                dice = 2 * np.count_nonzero(a & b) / max(1, a.sum() + b.sum())
                sides.append(f"{a.sum() * ml:5.0f} {b.sum() * ml:5.0f} {dice:.3f}")
            size = "x".join(map(str, hu.shape))
            times = f"{ours_s:5.2f} s  {published_s:6.2f} s  {published_s / ours_s:5.1f}"
            print(f"{name[:20]:20}  {size:12}  {times}  | {' | '.join(sides)}", flush=True)


if __name__ == "__main__":
    main()
