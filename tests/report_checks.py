# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What must hold for every report: nothing unexplained in the JSON, nothing wrong in the DICOM objects."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from pydicom import Dataset, dcmread

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def unexplained(report: dict[str, Any]) -> list[str]:
    """Dotted paths of nulls for which neither they nor a parent have a reason."""

    def nulls(value: Any, path: str) -> Iterator[str]:
        if value is None:
            yield path
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from nulls(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            for inner in value:
                yield from nulls(inner, path)

    def explained(path: str) -> bool:
        parts = path.split(".")
        return any(report["reasons"].get(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    content = {key: value for key, value in report.items() if key not in ("reasons", "model")}
    if report.get("status") == "segmented":
        del content["reason"]
    return [path for path in nulls(content, "") if not explained(path)]


def check_dicom(file: Path) -> None:
    """dciodvfy knows the object and has nothing that it calls an error."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not installed")
    done = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert {"Segmentation", "Comprehensive3DSR"} & set(lines), "it says what object it has checked"
    assert [line for line in lines if line.startswith("Error")] == []


def read_segment(file: Path, label: str) -> tuple[np.ndarray, np.ndarray]:
    """A segment as highdicom reads it back: mask (I, J, K) and affine to RAS mm."""
    segmentation = hd.seg.segread(file)
    number = {item.SegmentLabel: item.SegmentNumber for item in segmentation.SegmentSequence}[label]
    volume = segmentation.get_volume(segment_numbers=[number], allow_missing_positions=True)
    return np.asarray(volume.array)[..., 0] > 0, LPS_TO_RAS @ volume.affine


def centre(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of mass in RAS mm."""
    return nib.affines.apply_affine(affine, np.argwhere(mask).mean(axis=0))


def millilitres(mask: np.ndarray, affine: np.ndarray) -> float:
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def read_measurements(file: Path) -> dict[tuple[str, str], float]:
    """The numbers of a Structured Report by (tracking identifier, name of the concept)."""
    found: dict[tuple[str, str], float] = {}

    def concept(item: Dataset) -> str:
        return str(item.ConceptNameCodeSequence[0].CodeMeaning)

    def walk(items: Any) -> None:
        tracked = [str(item.TextValue) for item in items if concept(item) == "Tracking Identifier"]
        for item in items:
            if item.ValueType == "NUM":
                value = item.MeasuredValueSequence[0]
                unit = str(value.MeasurementUnitsCodeSequence[0].CodeValue)
                found[tracked[0], f"{concept(item)} {unit}"] = float(value.NumericValue)
            elif "ContentSequence" in item:
                walk(item.ContentSequence)

    walk(dcmread(file).ContentSequence)
    return found
