# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writes what a study's prediction means: mask, numbers, picture."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

import custom
from custom.console import CohortError
from custom.data.cohort import CohortLoader
from custom.data.files import write_json, write_nifti
from custom.reporting.figures import AttentionView, draw_overview, shown_voxel
from custom.reporting.quantify import measure_opacity
from custom.transforms.load import study_info

__all__ = ["StudyReport"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = "1.0"
AFFINE_TOLERANCE_MM = 1e-2


class StudyReport:
    """Writes, for every study an evaluator has segmented, into ``output_dir/<name>/``:

    - ``<name>_opacity.nii.gz``: the mask on the scan's own grid, its affine equal to the scan's;
    - ``<name>_lungs.nii.gz``: the lung mask (1 left, 2 right), where preprocessing made one;
    - ``<name>_overview.png``: three planes with contours, and attention maps where the network has them;
    - ``<name>_report.json``: volumes in mL, null plus a reason where unknown. It is written last, so
      where it stands, the study is complete.

    The batch must hold ``scan`` (the image as loaded, HU), ``name`` and may hold ``lung``; the output
    ``pred`` is the mask after inversion of every spatial step and ``image`` what the network saw. A study
    that could not be prepared gets a report with nulls and the reason, and no mask.

    Args:
        output_dir: folder for the studies' folders.
        network: its ``attention_maps`` are drawn, if it has that method.
        bundle: name of the bundle, for the report.
        weights: weights file, whose hash goes into the report.
        cohort: the loader of the studies, which knows those that failed.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        network: torch.nn.Module | None = None,
        bundle: str = "",
        weights: str | os.PathLike | None = None,
        cohort: CohortLoader | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.bundle = bundle
        self.weights = None if weights is None else Path(weights)
        self.cohort = cohort
        self._model: dict[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator; its postprocessing must invert and threshold ``pred``.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """
        Args:
            engine: the evaluator after an iteration.

        Raises:
            ValueError: When a mask is not on its scan's grid.
        """
        for study, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.write(study, output)

    def finish(self) -> None:
        """Report the studies that failed, after all others are done.

        Raises:
            CohortError: When there are any.
        """
        failures = [] if self.cohort is None else self.cohort.failures
        for failure in failures:
            self._write_failure(failure["name"], failure["reason"])
        if self.cohort is not None and failures:
            raise CohortError(failures, self.cohort.total)

    def write(self, study: dict[str, Any], output: dict[str, Any]) -> None:
        """Write one study's files.

        Args:
            study: item of the decollated batch.
            output: item of the decollated output.

        Raises:
            ValueError: When the mask is not on the scan's grid.
        """
        name = study["name"]
        affine = _same_grid(study["scan"], output["pred"], name)
        hu = np.asarray(study["scan"].cpu())[0]
        opacity = (np.asarray(output["pred"].cpu())[0] > 0).astype(np.uint8)
        lungs = np.asarray(study["lung"].cpu())[0].astype(np.uint8) if "lung" in study else None
        folder = self.output_dir / name

        masks = {"opacity": opacity, "lungs": lungs}
        files = {kind: f"{name}_{kind}.nii.gz" for kind, mask in masks.items() if mask is not None}
        for kind, file in files.items():
            write_nifti(folder / file, masks[kind], affine)
        measured = measure_opacity(opacity, affine, lungs)
        lines = _headline(measured)
        attention = self._attention(output["image"], shown_voxel(_volume(opacity), _volume(lungs)), affine)
        picture = f"{name}_overview.png"
        draw_overview(folder / picture, hu, opacity, affine, name, lines, lungs=lungs, attention=attention)
        source = study_info(study["scan"]) if "study" in study["scan"].meta else {}
        write_json(
            folder / f"{name}_report.json",
            {
                **self._head(name),
                "status": "segmented",
                "files": {**files, "overview": picture},
                "series_choice": source.get("series_choice"),
                "grid": {"shape": list(opacity.shape), "affine": affine.tolist()},
                **measured,
            },
        )
        logger.info(f"{name}: {', '.join(lines)}; written to {folder}")

    def _write_failure(self, name: str, reason: str) -> None:
        folder = self.output_dir / name
        if folder.is_dir():  # results of an earlier run must not pass for this one's
            for stale in folder.glob(f"{name}_*"):
                stale.unlink()
        nothing = measure_opacity(np.zeros((0, 0, 0), np.uint8), None, None, reason, reason)
        nothing["opacity_voxels"] = None
        write_json(
            folder / f"{name}_report.json",
            {**self._head(name), "status": "failed", "reason": reason, **nothing},
        )

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "study": name,
            "notice": "Research use only. Not a medical device.",
            "model": self._describe_model(),
        }

    def _describe_model(self) -> dict[str, Any]:
        if self._model is None:
            digest = None
            if self.weights is not None and self.weights.is_file():
                digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
            self._model = {
                "bundle": self.bundle,
                "software_version": custom.__version__,
                "weights_sha256": digest,
            }
        return self._model

    def _attention(self, image: Any, voxel: tuple[int, ...], affine: np.ndarray) -> AttentionView | None:
        """The network's maps on the slice that the overview shows: one slice's forward pass."""
        maps_of = getattr(self.network, "attention_maps", None)
        if maps_of is None or self.network is None:
            return None
        seen = image.as_tensor() if hasattr(image, "as_tensor") else image
        if seen.ndim == 4:
            # From the scan's voxel through patient space to the slice of the network's own grid.
            point = affine @ [*voxel, 1.0]
            depth = round(float((np.linalg.inv(np.asarray(image.affine, dtype=float)) @ point)[2]))
            seen = seen[..., min(max(depth, 0), seen.shape[-1] - 1)]
        training = self.network.training
        self.network.eval()
        device = next(self.network.parameters()).device
        with torch.no_grad():
            maps = maps_of(seen[None].to(device), getattr(self.network, "shown_attention_maps", None))
        self.network.train(training)
        return AttentionView(
            seen[0].cpu().numpy(), {key: value[0, 0].float().cpu().numpy() for key, value in maps.items()}
        )


def _headline(measured: dict[str, Any]) -> list[str]:
    volume, percent = measured["opacity_volume_ml"], measured["opacity_percent_of_lung"]["total"]
    if volume["total"] is None:
        return [f"opacity {measured['opacity_voxels']} voxels"]
    lines = [f"opacity {volume['total']:.1f} mL"]
    if percent is not None:
        lines.append(
            f"{percent:.1f} % of lung (left {volume['left']:.1f} mL, right {volume['right']:.1f} mL)"
        )
    if volume["outside_lungs"]:
        lines.append(f"{volume['outside_lungs']:.1f} mL outside the lung mask")
    return lines


def _volume(mask: Any) -> Any:
    """(H, W, D), also of a plain slice; None stays None."""
    return mask if mask is None or mask.ndim == 3 else mask[..., None]


def _same_grid(scan: Any, mask: Any, name: str) -> np.ndarray:
    """The scan's affine, after checking that the mask has come back to the scan's grid."""
    if scan.shape[1:] != mask.shape[1:]:
        raise ValueError(
            f"{name}: the mask has {tuple(mask.shape[1:])} voxels and the scan {tuple(scan.shape[1:])}; "
            "postprocessing must invert every spatial step of preprocessing"
        )
    affine = np.asarray(scan.affine.cpu(), dtype=float)
    back = np.asarray(mask.affine.cpu(), dtype=float)
    if not np.allclose(affine, back, atol=AFFINE_TOLERANCE_MM):
        raise ValueError(
            f"{name}: mask and scan differ in their affines; postprocessing must invert every spatial step"
        )
    return affine
