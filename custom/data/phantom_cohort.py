# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A cohort of synthetic patients with its data list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from custom.data.datalist import write_datalist
from custom.data.phantom import check_grid, describe, make_phantom

__all__ = ["write_cohort"]


def write_cohort(
    folder: str | os.PathLike,
    n_cases: int,
    seed: int = 0,
    shape: Sequence[int] = (128, 128, 48),
    spacing: Sequence[float] = (2.8, 2.8, 6.5),
    n_folds: int = 5,
    lesions: Sequence[str] = ("ground_glass", "consolidation", "nodule"),
    burden: float | None = None,
) -> Path:
    """Writes a cohort of synthetic chest CTs with a Decathlon-style datalist; what is already there is kept.

    Args:
        folder: where the files go.
        n_cases: number of patients.
        seed: the cohort; patient ``i`` has seed ``seed * 100_000 + i``.
        shape: voxels of every scan, (I, J, K).
        spacing: mm per voxel.
        n_folds: patient ``i`` belongs to fold ``i % n_folds``.
        lesions: kinds of lesions, as :func:`make_phantom` takes them.
        burden: extent of the lesions, drawn for each patient if None.

    Returns:
        The path of ``datalist.json``.

    Raises:
        ValueError: where the folder holds cases of another shape, spacing, seed or kind.
    """
    if n_cases < 1 or n_folds < 1:
        raise ValueError(f"write_cohort: n_cases and n_folds must be at least 1, got {n_cases} and {n_folds}")
    size, step = check_grid(shape, spacing)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training = []
    for i in range(n_cases):
        stem, case_seed = f"case_{i:03d}", seed * 100_000 + i
        names = {name: f"{stem}_{name}.nii.gz" for name in ("ct", "opacity", "classes", "lungs")}
        if all((folder / name).is_file() for name in names.values()):
            _check_same(folder / names["ct"], size, step, describe(case_seed, lesions, burden))
        else:
            make_phantom(size, step.tolist(), case_seed, lesions, burden).save(folder, stem)
        entry = {"image": names["ct"], "label": names["opacity"], "patient_id": stem, "fold": i % n_folds}
        training.append(entry)
    path = folder / "datalist.json"
    write_datalist(
        path, "synthetic chest CT", "Seeded synthetic chest CTs, no patient data", training=training
    )
    return path


def _check_same(path: Path, size: tuple[int, int, int], step: np.ndarray, description: str) -> None:
    header = nib.Nifti1Image.from_filename(path).header
    same = header.get_data_shape() == size and np.allclose(header.get_zooms(), step, rtol=1e-4)
    if not same or header["descrip"].item().decode() != description:
        raise ValueError(
            f"write_cohort: {path} was made with other settings; choose another folder or empty it"
        )
