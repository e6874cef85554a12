# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""One mask per lung nodule from the outlines that several radiologists drew in LIDC-IDRI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from skimage.measure import grid_points_in_poly

from custom.data.dicom_series import CTVolume
from custom.data.lidc import LidcAnnotation

__all__ = ["LidcNodule", "cluster_annotations", "draw_nodules", "find_nodules"]

MAX_READERS = 4  # LIDC-IDRI's protocol: four radiologists read each CT
_SHRINK = 0.9
_MIN_TOLERANCE = 0.1  # mm; outlines closer than this will not come apart
_OFF_SLICE = 0.25  # an outline may lie off its slice by this fraction of the slice distance
_STRICTLY_INSIDE = 1  # scikit-image labels corners 2 and points on an edge 3


@dataclass(frozen=True)
class LidcNodule:
    """One nodule.

    Args:
        origin: index (column, row, slice) in the volume of the mask's first voxel.
        mask: the consensus, bool (I, J, K), indexed (column, row, slice); it may be empty.
        annotations: the outlines it was made of.
    """

    origin: tuple[int, int, int]
    mask: np.ndarray
    annotations: tuple[LidcAnnotation, ...]

    @property
    def voxels(self) -> int:
        """Number of voxels of the consensus."""
        return int(self.mask.sum())

    @property
    def readers(self) -> tuple[int, ...]:
        """The radiologists who outlined it."""
        return tuple(sorted({annotation.reader for annotation in self.annotations}))

    @property
    def slices(self) -> tuple[int, ...]:
        """The slices on which the consensus has voxels, counted from 0."""
        return tuple(int(k) + self.origin[2] for k in np.flatnonzero(self.mask.any(axis=(0, 1))))


def find_nodules(
    annotations: Iterable[LidcAnnotation],
    volume: CTVolume,
    four_readers: bool = False,
    tolerance: float | None = None,
) -> tuple[LidcNodule, ...]:
    """Find which annotations mean the same nodule and take the voxels that half of them agree on.

    By default a voxel belongs to the nodule when at least half of the nodule's annotations have it: 2 of 4, 2
    of 3, 1 of 2, 1 of 1. With ``four_readers`` at least two of the four radiologists must have it, whether
    or not the others saw the nodule at all. Where annotations of neighbouring nodules touch and cannot be
    told apart, each radiologist's are joined first and have one vote.

    Args:
        annotations: of this volume's series, as :func:`custom.data.lidc.read_annotations` returns them.
        volume: the CT.
        four_readers: count against the four radiologists of the protocol.
        tolerance: distance in mm up to which outlines count as one nodule's, defaults to the slice thickness.

    Returns:
        The nodules from the most inferior to the most superior; nodules without a common voxel included.

    Raises:
        ValueError: When the CT is not axial, or an outline reaches out of the image, lies on no slice or on
            another slice than the one it names.

    Reference:
        Hancock and Magnan, Lung nodule malignancy classification using only radiologist-quantified image
        features as inputs to statistical learning algorithms, Journal of Medical Imaging 3(4):044504, 2016.
    """
    if volume.series.orientation != "axial":
        raise ValueError(f"the series is {volume.series.orientation}, LIDC-IDRI's outlines need axial slices")
    if tolerance is None:
        tolerance = volume.series.thickness or volume.spacing[2]
    locate = _SliceFinder(volume)
    clusters = cluster_annotations(tuple(annotations), volume.spacing[:2], tolerance)
    return tuple(_consensus(cluster, locate, four_readers) for cluster in clusters)


def draw_nodules(nodules: Iterable[LidcNodule], shape: Sequence[int]) -> np.ndarray:
    """Draw the nodules into one mask.

    Args:
        nodules: as :func:`find_nodules` returns them.
        shape: the volume's (columns, rows, slices).

    Returns:
        0 or 1, uint8 of ``shape``.
    """
    mask = np.zeros(tuple(shape), np.uint8)
    for nodule in nodules:
        window = tuple(slice(o, o + n) for o, n in zip(nodule.origin, nodule.mask.shape, strict=True))
        mask[window] |= nodule.mask
    return mask


def cluster_annotations(
    annotations: Sequence[LidcAnnotation], pixel_spacing: Sequence[float], tolerance: float
) -> list[tuple[LidcAnnotation, ...]]:
    """Group annotations of the same nodule: those whose outlines come as close as a tolerance, in chains.

    The tolerance shrinks by a tenth until no group has more annotations than there are readers, or until it
    is below 0.1 mm, where outlines touch.

    Args:
        annotations: of one series.
        pixel_spacing: mm between columns and between rows.
        tolerance: mm.

    Returns:
        The groups, in ascending order of the mean height of their annotations.
    """
    if not annotations:
        return []
    points = [_outline_mm(annotation, pixel_spacing) for annotation in annotations]
    trees = [KDTree(p) for p in points]
    distance = np.zeros((len(points), len(points)))
    for i, tree in enumerate(trees):
        for j in range(i):
            # Farther points get an infinite distance, at the cost of looking no farther than that.
            near = tree.query(points[j], distance_upper_bound=np.nextafter(tolerance, np.inf))[0]
            distance[i, j] = distance[j, i] = near.min()
    while True:
        number, group = connected_components(distance <= tolerance, directed=False)
        if np.bincount(group).max() <= MAX_READERS or tolerance * _SHRINK < _MIN_TOLERANCE:
            break
        tolerance *= _SHRINK
    clusters = [
        tuple(a for a, g in zip(annotations, group, strict=True) if g == wanted) for wanted in range(number)
    ]
    return sorted(clusters, key=lambda cluster: float(np.mean([_height(a) for a in cluster])))


def _outline_mm(annotation: LidcAnnotation, pixel_spacing: Sequence[float]) -> np.ndarray:
    """The points of the inclusions in mm, (N, 3)."""
    rows = [
        np.column_stack([c.points * np.asarray(pixel_spacing), np.full(len(c.points), c.z)])
        for c in annotation.contours
        if c.inclusion
    ]
    return np.concatenate(rows)


def _height(annotation: LidcAnnotation) -> float:
    return float(np.mean([contour.z for contour in annotation.contours if contour.inclusion]))


class _SliceFinder:
    """Finds the slice of an outline."""

    def __init__(self, volume: CTVolume) -> None:
        self.shape = volume.hu.shape
        instances = volume.series.instances
        self.heights = np.array([i.position[2] for i in instances if i.position is not None])
        self.index = {i.uid: k for k, i in enumerate(instances)}
        self.allowed = _OFF_SLICE * volume.spacing[2]

    def __call__(self, z: float, sop_uid: str) -> int:
        k = int(np.abs(self.heights - z).argmin())
        if abs(self.heights[k] - z) > self.allowed:
            low, high = self.heights.min(), self.heights.max()
            raise ValueError(
                f"an outline lies at z {z:g} mm, where there is no slice; "
                f"the slices reach from {low:g} to {high:g} mm"
            )
        if self.index.get(sop_uid, k) != k:
            raise ValueError(
                f"an outline at z {z:g} mm names the image of another slice, at "
                f"{self.heights[self.index[sop_uid]]:g} mm; it is not clear which one it is on"
            )
        return k

    def check(self, points: np.ndarray, z: float) -> None:
        columns, rows = self.shape[:2]
        if (points < 0).any() or (points >= (columns, rows)).any():
            x, y = points[((points < 0) | (points >= (columns, rows))).any(axis=1)][0]
            raise ValueError(
                f"an outline at z {z:g} mm has the point ({x}, {y}) outside the image of {columns} x {rows}"
            )


def _interior(points: np.ndarray, origin: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels strictly inside a polygon, bool (I, J); the outline's own pixels are outside of it."""
    return grid_points_in_poly(shape, points - origin, binarize=False) == _STRICTLY_INSIDE


def _draw(annotation: LidcAnnotation, locate: _SliceFinder, low: np.ndarray, shape: np.ndarray) -> np.ndarray:
    mask = np.zeros(tuple(shape), bool)
    # A slice may have several outlines, and what is excluded from one is excluded from all.
    for contour in sorted(annotation.contours, key=lambda c: not c.inclusion):
        inside = _interior(contour.points, low[:2], (int(shape[0]), int(shape[1])))
        plane = mask[:, :, locate(contour.z, contour.sop_uid) - low[2]]
        plane[inside] = contour.inclusion
    return mask


def _consensus(cluster: tuple[LidcAnnotation, ...], locate: _SliceFinder, four_readers: bool) -> LidcNodule:
    corners = []
    for contour in (c for a in cluster for c in a.contours):
        locate.check(contour.points, contour.z)
        k = locate(contour.z, contour.sop_uid)
        corners += [(*contour.points.min(axis=0), k), (*contour.points.max(axis=0), k)]
    low = np.min(corners, axis=0)
    shape = np.max(corners, axis=0) - low + 1
    votes: list[np.ndarray] = [_draw(annotation, locate, low, shape) for annotation in cluster]
    if four_readers or len(cluster) > MAX_READERS:
        readers = sorted({a.reader for a in cluster})
        votes = [
            np.any([v for v, a in zip(votes, cluster, strict=True) if a.reader == r], axis=0) for r in readers
        ]
    needed = MAX_READERS / 2 if four_readers else len(votes) / 2
    mask = np.sum(votes, axis=0) >= needed
    return LidcNodule((int(low[0]), int(low[1]), int(low[2])), mask, cluster)
