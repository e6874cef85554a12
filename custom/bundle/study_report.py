# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The report of a cross-validation: tables, box plots and a sheet of contours, with the protocol."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from PIL import Image

import custom
from custom.bundle.cross_validation import CrossValidation
from custom.bundle.study import SELECTIONS, System
from custom.data.datalist import load_cases
from custom.data.scans import is_nifti, read_scan
from custom.metrics import CaseScores
from custom.reporting.comparison import compare_systems, write_comparison
from custom.reporting.comparison_figures import SheetCase, choose_cases, draw_box_plots, draw_contour_sheet
from custom.reporting.figures import LUNG_WINDOW

__all__ = ["write_study_report"]


def write_study_report(
    cross_validation: CrossValidation, scores: Mapping[str, Sequence[CaseScores]], seed: int = 0
) -> Path:
    """Write the result of a cross-validation into ``comparison/`` of its output folder.

    Args:
        cross_validation: the runs, which are finished.
        scores: what its ``run`` returned.
        seed: seed of the bootstrap.

    Returns:
        The Markdown file.
    """
    study = cross_validation.study
    folder = cross_validation.output_dir / "comparison"
    comparison = compare_systems(scores, study.reference, seed)
    draw_box_plots(folder / "box_plots.png", scores)
    shown = choose_cases(scores)
    if shown:
        cases = [_sheet_case(cross_validation, scores, name) for name in shown]
        draw_contour_sheet(folder / "contour_sheet.png", cases, list(scores))
    write_comparison(folder, comparison, study.title, _protocol(cross_validation))
    return folder / "comparison.md"


def _protocol(cross_validation: CrossValidation) -> list[str]:
    study, data = cross_validation.study, cross_validation.data
    entries = [entry for entry in data["training"] if entry.get("fold") in cross_validation.folds]
    patients = {entry["patient_id"] for entry in entries}
    folds = ", ".join(str(fold) for fold in cross_validation.folds)
    common = {
        key: value
        for key, value in study.systems[0].overrides.items()
        if all(system.overrides.get(key) == value for system in study.systems)
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    lines = [
        f"Data: {data.get('name', 'unnamed')}, {len(entries)} cases with {len(patients)} patient "
        f"identifiers. {data.get('description', '')}".strip(),
        f"Cross-validation by patient over {len(cross_validation.listed)} folds of the data list; held out "
        f"and scored: fold {folds}. No patient identifier is in two folds.",
        f"Weights: {SELECTIONS[study.selection]}.",
        "Every prediction was brought back to its image's own grid and scored against the label as it is.",
        f"Settings of all systems that differ from the bundles' own: {_list_settings(common)}.",
    ]
    lines += [_describe(system, common, cross_validation) for system in (*study.systems, *study.stages)]
    lines.append(
        f"Software: covid-ct-bundles {custom.__version__}, MONAI {monai.__version__}, PyTorch "
        f"{torch.__version__}, Python {platform.python_version()}; {device}."
    )
    return lines


def _describe(system: System, common: Mapping[str, Any], cross_validation: CrossValidation) -> str:
    own = {key: value for key, value in system.overrides.items() if key not in common}
    stage = system in cross_validation.study.stages
    fold = None if stage else cross_validation.folds[0]
    weights = cross_validation.folder(system, fold) / "models" / "model.pt"
    text = f"{system.name}{' (stage before the folds)' if stage else ''}: bundle {system.bundle.name}"
    if system.overlays:
        text += f", overlays {', '.join(file.stem for file in system.overlays)}"
    if own:
        text += f", own settings {_list_settings(own)}"
    if system.start is not None:
        text += f", starting from {system.start}"
    return f"{text}; {_count_parameters(weights) / 1e6:.2f} million parameters."


def _list_settings(settings: Mapping[str, Any]) -> str:
    # Paths say nothing to others, and may say too much.
    shown = {k: Path(v).name if isinstance(v, str) and "/" in v else v for k, v in settings.items()}
    return ", ".join(f"{key} = {value}" for key, value in shown.items()) or "none"


def _count_parameters(weights: Path) -> int:
    state = torch.load(weights, map_location="cpu", weights_only=True)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for key, tensor in state.items() if not key.endswith(buffers))


def _sheet_case(
    cross_validation: CrossValidation, scores: Mapping[str, Sequence[CaseScores]], name: str
) -> SheetCase:
    rows = {s: next(case.row for case in cases if case.row["name"] == name) for s, cases in scores.items()}
    fold = next(iter(rows.values()))["fold"]
    data = cross_validation.data_list, cross_validation.dataset_dir
    case = next(c for c in load_cases(*data, fold=fold) if c["name"] == name)
    files = {"image": Path(case["image"]), "truth": Path(case["label"])}
    for system in cross_validation.study.systems:
        predictions = cross_validation.folder(system, fold) / "scores" / "predictions"
        (files[system.name],) = (f for f in predictions.iterdir() if f.name.split(".")[0] == name)
    arrays, affine = {}, None
    for key, file in files.items():
        arrays[key], affine = _read(file)
    if affine is not None:
        to_upright = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt("PLS")
        )
        arrays = {k: nib.orientations.apply_orientation(v, to_upright) for k, v in arrays.items()}
        level = int((arrays["truth"] > 0).sum(axis=(0, 1)).argmax())
        arrays = {key: array[..., level] for key, array in arrays.items()}
        arrays["image"] = np.clip(arrays["image"], *LUNG_WINDOW)
        name = f"{name}, slice {level + 1} from below"
    image, truth = arrays.pop("image"), arrays.pop("truth") > 0
    masks = {system: array > 0 for system, array in arrays.items()}
    return SheetCase(name, image, truth, masks, {system: row["dice"] for system, row in rows.items()})


def _read(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if is_nifti(file) or file.is_dir() or file.suffix.lower() == ".dcm":
        scan = read_scan(file)
        return scan.voxels, scan.affine
    with Image.open(file) as picture:
        return np.asarray(picture.convert("L"), dtype=np.float32), None
