# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Files of scores: a table for spreadsheets, a JSON file that is read back, a summary for people."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from custom.data.files import atomic_path, write_json
from custom.metrics import CaseScores

__all__ = ["format_summary", "grid_geometry", "read_scores", "write_scores"]

SCHEMA_VERSION = "1.2"
SHOWN = {
    "dice": "Dice",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "iou": "IoU",
    "voe": "VOE",
    "rvd": "RVD",
    "va": "VA",
    "rlp": "RLP",
    "rlr": "RLR",
    "mae": "MAE",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "surface Dice",
}


def grid_geometry(affine: np.ndarray) -> dict[str, Any]:
    """What :class:`custom.metrics.ScoredCase` wants to know of a volume's grid.

    Args:
        affine: 4x4 voxel to patient matrix (RAS, mm).

    Returns:
        ``voxel_ml``, ``spacing`` and ``slice_axis``. Spacing is None for a sheared grid, as of a tilted
        gantry, along whose axes distances do not follow from it.
    """
    axes = np.asarray(affine, dtype=float)[:3, :3]
    spacing = nib.affines.voxel_sizes(affine)
    square = np.allclose(axes.T @ axes, np.diag(spacing**2), atol=1e-3 * spacing.min() ** 2)
    return {
        "voxel_ml": float(abs(np.linalg.det(axes)) / 1000),
        "spacing": tuple(spacing.tolist()) if square else None,
        "slice_axis": int(np.flatnonzero(nib.orientations.io_orientation(affine)[:, 0] == 2)[0]),
    }


def write_scores(
    output: str | os.PathLike,
    scores: Sequence[CaseScores],
    summary: Mapping[str, Any],
    settings: Mapping[str, Any],
    failures: Sequence[Mapping[str, str]] = (),
) -> tuple[Path, Path]:
    """Write OUTPUT.csv and OUTPUT.json, each whole or not at all.

    Args:
        output: path of both without suffix.
        scores: at least one case.
        summary: see :func:`custom.metrics.summarize_scores`.
        settings: what else decides the values, for the record.
        failures: name and reason of each case that could not be scored.

    Returns:
        The CSV and the JSON file.
    """
    output = Path(output)
    table, report = (output.with_name(output.name + suffix) for suffix in (".csv", ".json"))
    rows = [case.row for case in scores]
    with atomic_path(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(settings),
        "summary": dict(summary),
        "cases": rows,
        "slice_counts": [case.slices.tolist() for case in scores],
        "failures": [dict(failure) for failure in failures],
    }
    write_json(report, content)
    return table, report


def read_scores(path: str | os.PathLike) -> list[CaseScores]:
    """Read what :func:`write_scores` wrote.

    Args:
        path: the JSON file.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no file of scores.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = list(zip(content["cases"], content["slice_counts"], strict=True))
        return [CaseScores(dict(row), np.asarray(counts, dtype=np.float64)) for row, counts in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of scores ({error})") from None


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as a table for people.

    Args:
        summary: see :func:`custom.metrics.summarize_scores`.
    """
    slices, cases, pooled = (summary[key] for key in ("per_slice", "per_case", "pooled"))
    lines = [
        f"{summary['cases']} cases ({cases['empty_truths']} truths and {cases['empty_predictions']} "
        f"predictions empty), {summary['slices']} slices ({slices['empty_truths']} truths and "
        f"{slices['empty_predictions']} predictions empty)",
        "",
        f"{'':14}{'mean over slices':24}{'mean over cases':24}pooled",
    ]
    for key, label in SHOWN.items():
        means = (_format_mean(table["metrics"].get(key)) for table in (slices, cases))
        lines.append(f"{label:14}{''.join(f'{m:24}' for m in means)}{_number(pooled['metrics'].get(key))}")
    if cases["empty_truths"]:
        found = summary["false_positives"]["ml"]
        unit = "ml" if found["n"] else "voxels"
        found = summary["false_positives"][unit]
        lines.append(
            f"false positives in the {found['n']} cases with an empty truth: mean {_number(found['mean'])}, "
            f"greatest {_number(found['max'])} {'mL' if unit == 'ml' else 'voxels'}"
        )
    protocols = [slices["protocol"], cases["protocol"], pooled["protocol"], summary["empty_policy"]]
    return "\n".join([*lines, "", *protocols, summary["definitions"]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _format_mean(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "-"
    return f"{_number(values['mean'])} (n {values['n']})"
