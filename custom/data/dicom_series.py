# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Choosing the CT series of a study and reading it as a volume in Hounsfield units.

Whatever makes a series doubtful is refused: a volume in mL from a series that lacks a slice would be wrong
without anyone seeing it. Messages name series UIDs, series numbers, InstanceNumbers and positions, never
patients, descriptions or file names, so that they may be logged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydicom import dcmread

from custom.data.dicom import Series, Study
from custom.data.dicom_header import Instance
from custom.data.dicom_stack import name_slices, stack_slices
from custom.data.files import is_denied

__all__ = ["CTVolume", "choose_series", "is_sharp_kernel", "read_series"]

_PROJECTIONS = {"MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE"}
_SHARP_KERNEL = re.compile(
    r"LUNG|BONE|EDGE|SHARP|DETAIL|ULTRA|^[BHIQU][A-Z]*[5-9]\d|^FC[358]\d|^Y[A-D]$|^[DEL]$", re.IGNORECASE
)
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class CTVolume:
    """A CT series as a volume.

    Args:
        hu: int16 Hounsfield units, indexed (column, row, slice) as nibabel has it; padding outside the
            scanner's field of view is left as stored (-2048, -3024), values beyond int16 are at its limits.
        affine: (4, 4) from those indices to mm in RAS+ patient space, right-handed.
        series: the series, its instances in the order of the slices.
        notes: what a reader of the results should know of the series, one line each.
    """

    hu: np.ndarray
    affine: np.ndarray
    series: Series
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distances in mm between columns, rows and slices."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def sop_instance_uids(self) -> tuple[str, ...]:
        """SOP Instance UIDs in the order of the slices."""
        return tuple(instance.uid for instance in self.series.instances)

    @property
    def frame_of_reference_uid(self) -> str:
        """Frame of Reference UID, or ""."""
        return self.series.instances[0].frame_of_reference_uid


def choose_series(study: Study, series_uid: str | None = None) -> tuple[Series, str]:
    """Choose the series to read: the axial CT series with the most slices, or the one asked for.

    Projections (MIP), localizers, secondary captures, reports and other modalities are passed over. Among
    series with equally many slices the softer kernel is taken (sharp kernels add noise and overshoot at
    edges, which shifts HU thresholds), then the thinner slices, then the lower series number.

    Args:
        study: the study to choose from.
        series_uid: Series Instance UID to take whatever the others are.

    Returns:
        The series, and one line that says what was chosen, why, and what was passed over.

    Raises:
        ValueError: When the study has no series of that UID, or no axial CT series at all.
    """
    if series_uid is not None:
        for series in study.series:
            if series.uid == series_uid:
                return series, f"{series.label}: asked for by its UID"
        known = ", ".join(s.label for s in study.series)
        raise ValueError(f"study {study.uid} has no series {series_uid}; it has {known}")

    passed = [f"{s.label}, {why}" for s in study.series if (why := _unsuitable(s))]
    usable = sorted((s for s in study.series if not _unsuitable(s)), key=_preference)
    if not usable:
        raise ValueError(f"study {study.uid} has no axial CT series to read: {'; '.join(passed)}")
    best, others = usable[0], usable[1:]
    count = _count(len(best.instances), "slice")
    if not others:
        reason = f"{best.label}: the only axial CT series, {count}"
    elif len(others[0].instances) < len(best.instances):
        reason = f"{best.label}: the axial CT series with the most slices, {count}"
    else:
        names = ("softer kernel", "thinner slices", "lower series number", "lower UID")
        pairs = zip(names, _preference(best)[1:], _preference(others[0])[1:], strict=True)
        decisive = next(name for name, mine, its in pairs if mine != its)
        reason = f"{best.label}: {count}, as many as others, taken for its {decisive}"
    passed = [f"{s.label}, {_count(len(s.instances), 'slice')}" for s in others] + passed
    return best, reason + (f"; passed over: {'; '.join(passed)}" if passed else "")


def read_series(series: Series) -> CTVolume:
    """Read a CT series, its slices sorted by their position along their common normal.

    Args:
        series: as :func:`choose_series` returns it.

    Returns:
        The volume. The centres of the first and the last slice are where the headers put them; those between
        may be off a regular grid by a tenth of the slice distance (or 0.06 mm), which is what rounding of
        the stored positions makes.

    Raises:
        ValueError: In one line that names the culprits, when the series is not CT, misses slices or tags, has
            slices twice, mixes sizes, spacings or orientations, is sheared by gantry tilt, or has files that
            cannot be decoded.
    """
    try:
        _check_files(series)
        _check_headers(series.instances)
        instances, affine = stack_slices(series.instances)
        hu = _read_hounsfield(instances)
    except ValueError as error:
        raise ValueError(f"{series.label}: {error}") from None
    notes = [f"{_count(count, kind)} left out of the series" for kind, count in series.excluded]
    distance, thickness = float(np.linalg.norm(affine[:3, 2])), instances[0].thickness
    if thickness and distance > 1.5 * thickness:
        notes.append(
            f"slices of {thickness:g} mm every {distance:g} mm: the scan has gaps between its slices"
        )
    return CTVolume(hu, affine, replace(series, instances=instances), tuple(notes))


def is_sharp_kernel(kernel: str) -> bool:
    """Whether a reconstruction kernel is one that sharpens edges, by the names that makers give them.

    Args:
        kernel: Convolution Kernel.
    """
    return bool(_SHARP_KERNEL.search(kernel))


def _preference(series: Series) -> tuple:
    number = np.inf if series.number is None else series.number
    sharp = is_sharp_kernel(series.kernel)
    return -len(series.instances), sharp, series.thickness or np.inf, number, series.uid


def _unsuitable(series: Series) -> str:
    """Why a series cannot be the scan; empty where it can."""
    if series.modality != "CT":
        return f"modality {series.modality or 'missing'}"
    if not series.instances:
        return _no_images(series)
    if _PROJECTIONS & set(series.instances[0].image_type):
        return "a projection (MIP), whose values are not those of voxels"
    if series.orientation == "unknown":
        return "ImageOrientationPatient is missing"
    return "" if series.orientation == "axial" else f"{series.orientation}, not axial"


def _no_images(series: Series) -> str:
    return f"no CT slices, only {', '.join(_count(count, kind) for kind, count in series.excluded)}"


def _count(number: int, what: str) -> str:
    plural = "s" if number > 1 and what in ("slice", "localizer", "file") else ""
    return f"{number} {what}{plural}"


def _check_files(series: Series) -> None:
    if series.modality != "CT":
        raise ValueError(f"modality is {series.modality or 'missing'}, not CT")
    if series.unreadable:
        count = _count(len(series.unreadable), "file")
        if any(is_denied(file) for file in series.unreadable):
            raise ValueError(f"{count} beside it cannot be read: permission denied; ask for the right to")
        raise ValueError(
            f"{count} beside it cannot be read as DICOM (broken or empty); copy the series again"
        )
    if not series.instances:
        raise ValueError(_no_images(series))


def _check_headers(instances: Sequence[Instance]) -> None:
    needed: dict[str, Callable[[Instance], object]] = {
        "ImagePositionPatient": lambda i: i.position,
        "ImageOrientationPatient": lambda i: i.orientation,
        "PixelSpacing": lambda i: i.pixel_spacing and min(i.pixel_spacing) > 0,
        "Rows or Columns": lambda i: i.shape,
        "RescaleSlope or RescaleIntercept": lambda i: i.slope and i.intercept is not None,
    }
    for tag, value in needed.items():
        if lacking := [i for i in instances if not value(i)]:
            why = "; without it the values are not HU" if tag.startswith("Rescale") else ""
            raise ValueError(f"{tag} is missing or invalid at {name_slices(lacking)}{why}")
    if several := [i for i in instances if i.frames != 1 or i.samples != 1]:
        raise ValueError(f"not one grey-level frame per file at {name_slices(several)}")
    # US stands for unspecified; makers write HU in several ways (HU_MOD).
    if other := [i for i in instances if i.rescale_type not in ("", "US") and "HU" not in i.rescale_type]:
        raise ValueError(f"RescaleType is {other[0].rescale_type}, not HU, at {name_slices(other)}")
    _refuse_mixture(instances, "frames of reference", lambda i: i.frame_of_reference_uid)
    _refuse_mixture(instances, "image sizes", lambda i: "x".join(map(str, i.shape or ())))
    _refuse_mixture(instances, "pixel spacings", lambda i: tuple(round(v, 4) for v in i.pixel_spacing or ()))
    uids = Counter(i.uid for i in instances)
    if twice := [i for i in instances if uids[i.uid] > 1]:
        raise ValueError(f"the same images (SOP Instance UID) are there more than once: {name_slices(twice)}")


def _refuse_mixture(instances: Sequence[Instance], what: str, value: Callable[[Instance], Hashable]) -> None:
    counts = Counter(value(i) for i in instances).most_common()
    if len(counts) > 1:
        odd = name_slices(i for i in instances if value(i) != counts[0][0])
        several = ", ".join(f"{v} ({n})" for v, n in counts[:3])
        raise ValueError(f"slices have {len(counts)} {what}, {several}; the odd ones are {odd}")


def _read_hounsfield(instances: Sequence[Instance]) -> np.ndarray:
    """Decode each file once, straight into the volume; returns int16 (column, row, slice)."""
    rows, columns = instances[0].shape or (0, 0)
    hu = np.empty((len(instances), rows, columns), dtype=np.int16)
    for target, instance in zip(hu, instances, strict=True):
        try:
            stored = dcmread(instance.file).pixel_array
        except Exception as error:  # decoders raise what they like
            # The text of an OSError holds the file name.
            why = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ValueError(f"the pixels of {name_slices([instance])} cannot be decoded: {why}") from None
        if stored.shape != target.shape:
            raise ValueError(f"the pixels of {name_slices([instance])} do not fill {rows} x {columns}")
        slope, intercept = instance.slope or 0.0, instance.intercept or 0.0
        if slope == 1 and intercept.is_integer():
            values = stored.astype(np.int32) + int(intercept)
        else:
            values = np.rint(stored * slope + intercept)
        target[...] = np.clip(values, _INT16.min, _INT16.max)
    return hu.transpose(2, 1, 0)
