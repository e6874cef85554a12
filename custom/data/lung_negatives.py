# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Slices of LIDC-IDRI without a nodule as 8-bit negatives: what a network must leave empty."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import Compose, Orientationd
from PIL import Image

from custom.console import describe_error
from custom.data.covid_checks import HU
from custom.data.covid_slices import UPRIGHT, SliceOptions
from custom.data.datalist import write_datalist
from custom.data.files import atomic_path, write_json
from custom.data.lidc_source import LidcSeries, LidcXml, find_readings, find_series
from custom.data.unlabelled import evenly_spaced
from custom.data.work import LeftOut, describe_left_out, part, work_through, write_left_out
from custom.transforms import CropLungd, LoadCTd, LungMaskd, ValidateHUd

__all__ = ["NegativeSummary", "prepare_negatives"]

VERSION = 2  # raise it when the slices would come out differently
DISTANCE_MM = 5.0  # between a slice and the nearest outline of any reader
MARGIN_MM = 5.0  # around the lungs, as the bundles crop volumes
DESCRIPTION = (
    "Slices of LIDC-IDRI at least {distance:g} mm away from every nodule of 3 mm or more that any reader "
    "outlined, with empty masks. The patients were screened or examined for lung nodules and may have other "
    "lung disease (emphysema, fibrosis, scars, nodules below 3 mm, now and then an infiltrate): empty means "
    "that COVID-19 opacities are not expected, not that the lung is healthy. HU {low:g} to {high:g}, cropped "
    "to the box of the scan's lungs and {margin:g} mm, its top and bottom slices included. The Cancer "
    "Imaging Archive, doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0. Armato et al., Medical Physics "
    "38:915-931, 2011"
)


@dataclass(frozen=True)
class NegativeSummary:
    """What :func:`prepare_negatives` did.

    Args:
        datalist: data list of the slices, all for training and in no fold.
        cases: one dictionary a series, as in its file ``cases/<name>.json``.
        reused: how many of them an earlier run had finished.
        left_out: everything else; also in ``skipped.json``.
    """

    datalist: Path
    cases: tuple[dict[str, Any], ...]
    reused: int
    left_out: tuple[LeftOut, ...]

    @property
    def failed(self) -> tuple[LeftOut, ...]:
        """What should have given slices and did not."""
        return tuple(one for one in self.left_out if one.failed)

    def __str__(self) -> str:
        count = sum(len(case["slices"]) for case in self.cases)
        patients = len({case["patient_id"] for case in self.cases})
        reused = f" ({self.reused} from an earlier run)" if self.reused else ""
        lines = [
            f"{count} slices of {len(self.cases)} series{reused}, {patients} patients: {self.datalist}",
            *describe_left_out(self.left_out),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    xml: LidcXml
    series: LidcSeries
    output: Path
    per_series: int
    window: tuple[float, float]

    @property
    def name(self) -> str:
        return f"{self.series.patient}_{hashlib.sha256(self.series.uid.encode()).hexdigest()[:8]}"

    @property
    def key(self) -> str:
        """Changes when the slices would come out differently."""
        files = sorted((os.path.basename(file), os.path.getsize(file)) for file in self.series.files)
        text = json.dumps([VERSION, self.per_series, self.window, self.xml.digest, files])
        return hashlib.sha256(text.encode()).hexdigest()


def prepare_negatives(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    xml_dir: str | os.PathLike | None = None,
    per_series: int = 20,
    window: tuple[float, float] = (-1100.0, 300.0),
    num_workers: int = 0,
) -> NegativeSummary:
    """Write slices without a nodule as upright 8-bit pictures with empty masks, and list them for training.

    A slice is taken where the lungs cover at least a quarter of the area they have on the scan's largest
    slice, and at least 5 mm along the body away from every outline. Each is cropped to its own lungs and 5 mm
    around them, as single published slices are.

    Args:
        source: folder with the DICOM files of LIDC-IDRI, in whatever sub-folders.
        output_dir: gets ``images/``, ``masks/``, ``cases/`` (one JSON a series), ``skipped.json`` and
            ``datalist.json``, whose entries are for training and in no fold: they are never validated on.
        xml_dir: folder with the XML files, defaults to ``source``; a series without one is left out, since
            nobody looked for nodules in it.
        per_series: slices of each series, evenly spaced among those that fit.
        window: HU that become 0 and 255.
        num_workers: processes; 0 and 1 use none besides this one.

    Raises:
        FileNotFoundError: When a folder does not exist or has no XML file.
        ValueError: When an option is wrong, or no series gives a slice.
    """
    if per_series < 1:
        raise ValueError(f"at least 1 slice per series is needed, got {per_series}")
    SliceOptions(window)  # refuses an empty window before anything is read
    output = Path(output_dir)
    readings, left_out = find_readings(source if xml_dir is None else xml_dir)
    jobs = []
    for uid, series in sorted(find_series(source, num_workers).items()):
        if series.modality != "CT":
            reason = f"its modality is {series.modality or 'missing'}"
            left_out.append(LeftOut(uid, "series that is no CT", reason, False))
        elif uid not in readings:
            left_out.append(LeftOut(uid, "CT without XML", "no XML file that can be used reads it", False))
        else:
            jobs.append(_Job(readings[uid], series, output, per_series, window))
    cases, failed = part(work_through(_prepare_series, jobs, num_workers, "LIDC-IDRI", "series"))
    cases.sort(key=lambda case: case["name"])
    left_out = write_left_out(output, [*left_out, *failed])
    if not cases:
        first = f"; the first is {left_out[0].what}: {left_out[0].reason}" if left_out else ""
        raise ValueError(f"no series under {source} gives a negative; left out: {len(left_out)}{first}")
    reused = sum(case.pop("reused") for case in cases)
    low, high = window
    write_datalist(
        output / "datalist.json",
        "LIDC-IDRI negatives",
        DESCRIPTION.format(distance=DISTANCE_MM, margin=MARGIN_MM, low=low, high=high),
        protocol="all slices are for training and in no fold",
        training=[
            {"image": f"images/{stem}.png", "label": f"masks/{stem}.png", "patient_id": case["patient_id"]}
            for case in cases
            for stem in case["slices"]
        ],
    )
    return NegativeSummary(output / "datalist.json", tuple(cases), reused, tuple(left_out))


def _prepare_series(job: _Job) -> dict[str, Any] | LeftOut:
    record = job.output / "cases" / f"{job.name}.json"
    key = job.key
    if (finished := _finished(record, job.output, key)) is not None:
        return finished
    prepare = Compose(
        [
            LoadCTd("image", ensure_channel_first=True, series_uid=job.series.uid),
            ValidateHUd("image"),
            LungMaskd("image"),
            Orientationd(["image", "lung"], axcodes=UPRIGHT, labels=None),
        ]
    )
    try:
        scan: Any = prepare({"image": job.series.files + job.series.unreadable})
    except Exception as error:  # MONAI wraps what a transform raises
        reason = describe_error(error)
        if reason is None:
            raise
        return LeftOut(job.series.uid, "failed", reason, True)
    whole = scan["image"]
    image = CropLungd("image", mask_key="lung", margin_mm=MARGIN_MM)(scan)["image"]  # as inference crops
    affine = np.asarray(image.affine, float)
    heights = affine[2, 3] + affine[2, 2] * np.arange(image.shape[3])
    below = round((affine[2, 3] - float(whole.affine[2, 3])) / affine[2, 2])  # slices that were cut off
    outlines = [c.z for a in job.xml.readings.annotations for c in a.contours]
    distance = np.abs(heights[:, None] - np.asarray(outlines)[None]).min(axis=1, initial=np.inf)
    fit = np.flatnonzero(distance >= DISTANCE_MM)
    if not len(fit):
        reason = f"no slice through the lungs is {DISTANCE_MM:g} mm away from every nodule"
        return LeftOut(job.series.uid, "CT with nodules everywhere", reason, False)
    to_grey = SliceOptions(job.window).to_grey
    stems = []
    for position in evenly_spaced(len(fit), job.per_series):
        k = int(fit[position])
        pixels = to_grey(np.asarray(image)[0, :, :, k], HU)
        stems.append(f"{job.name}_{k + below:04d}")
        # The mask comes last: where it exists, its image does too.
        for kind, written in (("images", pixels), ("masks", np.zeros_like(pixels))):
            with atomic_path(job.output / kind / f"{stems[-1]}.png") as temporary:
                Image.fromarray(np.ascontiguousarray(written)).save(temporary, format="PNG")
    case = {
        "name": job.name,
        "patient_id": job.series.patient,
        "series_uid": job.series.uid,
        "slices_that_fit": len(fit),
        "slices": stems,
    }
    write_json(record, case | {"key": key})
    return case | {"reused": False}


def _finished(record: Path, output: Path, key: str) -> dict[str, Any] | None:
    """The record of a series that an earlier run finished."""
    try:
        case = json.loads(record.read_text(encoding="utf-8"))
        if case.pop("key") != key:
            return None
        stems: Sequence[str] = case["slices"]
        files = [output / kind / f"{stem}.png" for stem in stems for kind in ("images", "masks")]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return case | {"reused": True} if all(file.is_file() for file in files) else None
