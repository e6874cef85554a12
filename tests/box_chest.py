# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A chest of boxes, whose volumes can be worked out by hand, and its report and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from custom.reporting.pictures import StudyPictures, take_pictures
from custom.reporting.quantify import measure_opacity
from custom.reporting.report import build_report

WIDTH, DEPTH, HEIGHT = 200, 160, 280  # mm, of the whole chest
LUNGS = {"left": (110, 190), "right": (10, 90)}  # mm from the patient's right side
LUNG_Y, LUNG_Z = (20, 140), (40, 240)  # mm from the front, and from below
LUNG_ML = 80 * 120 * 200 / 1000  # of each
MODEL = {"bundle": "a_bundle", "software_version": "1.2.3", "weights_sha256": "ab" * 32}
KEY = "patient-0123456789ab"


@dataclass(frozen=True)
class Box:
    """Opacity of ``width`` x 50 mm from front to back, between two heights in mm."""

    side: str
    width: int
    low: int
    high: int
    hu: float = -450.0

    @property
    def ml(self) -> float:
        return self.width * 50 * (self.high - self.low) / 1000


@dataclass(frozen=True)
class Chest:
    """Arrays in axis order LPS."""

    hu: np.ndarray
    opacity: np.ndarray
    lungs: np.ndarray
    affine: np.ndarray

    def turned(self, axcodes: str) -> Chest:
        """The same chest in another axis order."""
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(self.affine), nib.orientations.axcodes2ornt(axcodes)
        )
        arrays = (nib.orientations.apply_orientation(a, turn) for a in (self.hu, self.opacity, self.lungs))
        return Chest(*arrays, self.affine @ nib.orientations.inv_ornt_aff(turn, self.hu.shape))


def make_chest(
    boxes: tuple[Box, ...] = (),
    spacing: tuple[float, float, float] = (5, 5, 10),
    low: int = 0,
    high: int = HEIGHT,
    without: str = "",
) -> Chest:
    """Draw the chest between two heights; all lengths must be multiples of the spacing."""
    x, y, z = (
        np.arange(round(size / mm)) * mm + mm / 2 + start
        for size, mm, start in zip((WIDTH, DEPTH, high - low), spacing, (0, 0, low), strict=True)
    )

    def inside(at: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
        return (at > limits[0]) & (at < limits[1])

    def block(xs: tuple, ys: tuple, zs: tuple) -> np.ndarray:
        return inside(x, xs)[:, None, None] & inside(y, ys)[None, :, None] & inside(z, zs)[None, None, :]

    hu = np.full((len(x), len(y), len(z)), 40.0, np.float32)
    hu[:, y < 10] = -1000  # the room
    lungs, opacity = np.zeros(hu.shape, np.uint8), np.zeros(hu.shape, np.uint8)
    for side, value in (("left", 1), ("right", 2)):
        if side != without:
            part = block(LUNGS[side], LUNG_Y, LUNG_Z)
            lungs[part], hu[part] = value, -850
    for box in boxes:
        start = LUNGS[box.side][0] + 20
        part = block((start, start + box.width), (40, 90), (box.low, box.high))
        opacity[part], hu[part] = 1, box.hu
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (100, 80, low)
    return Chest(hu, opacity, lungs, affine)


def report_chest(
    chest: Chest, date: str | None = "20200301", name: str = "", lungs: bool = True, **source: Any
) -> tuple[dict[str, Any], StudyPictures]:
    """The report and pictures of a chest, as those of a DICOM study of one patient."""
    mask = chest.lungs if lungs else None
    thickness = float(nib.affines.voxel_sizes(chest.affine)[2])
    study = {
        "source": "dicom",
        "files": ["/nowhere"],
        "study_uid": "1.2.3",
        "series_uid": "1.2.3.4",
        "series_number": 3,
        "study_date": date,
        "study_time": "1015",
        "manufacturer": "Maker",
        "model": "M1",
        "kernel": "STANDARD",
        "contrast_agent": "NONE",
        "patient_position": "HFS",
        "slice_thickness": thickness,
        "series_choice": "series 3: the only axial CT series",
        "notes": [],
    } | source
    name = name or f"study-{date}"
    files = {kind: f"{name}_{kind}.nii.gz" for kind in ("opacity", "lungs")} | {"page": f"{name}_page.html"}
    missing = dict.fromkeys(("overview", "seg", "sr"), "not made")
    measured = measure_opacity(chest.opacity, chest.affine, mask, chest.hu)
    report = build_report(
        name, MODEL, study, chest.affine, chest.hu.shape, mask, measured, files, missing | {"lungs": ""}, None
    )
    report["source"]["patient_key"] = KEY
    report["reasons"].pop("source.patient_key")
    return report, take_pictures(chest.hu, chest.opacity, mask, chest.affine)
