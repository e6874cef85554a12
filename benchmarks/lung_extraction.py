# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Times our lung extraction beside the published steps it stands in for, and compares the two masks.

    python benchmarks/lung_extraction.py SCAN [SCAN ...] [--repeats 3]

SCAN is a folder with a DICOM study or a NIfTI file. Reading is not timed. Both run in this process, one after the
other; volumes are in mL, "ratio" is published time over our time and Dice is that of the two masks, both lungs
together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from skimage import measure

from custom.transforms.lung_extraction import extract_lungs

# Liao et al., "Evaluate the Malignancy of Pulmonary Nodules Using the 3-D Deep Leaky Noisy-OR Network", IEEE TNNLS
# 30(11), 2019: parameters of its lung extraction.
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
        if region.label in outer or not VOLUME_LITRES[0] < region.area * spacing.prod() / 1e6 < VOLUME_LITRES[1]:
            continue
        component = labels == region.label
        near = [
            distance[plane].min() for plane in component if plane.sum() * spacing[1] * spacing[2] > LARGE_AREA_MM2
        ]
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
