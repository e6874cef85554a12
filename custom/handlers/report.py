# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writes what a study's prediction means: mask, numbers, picture."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events

import custom
from custom.data.files import atomic_path, write_json
from custom.reporting.figures import AttentionView, draw_overview, shown_voxel
from custom.reporting.quantify import measure_opacity

__all__ = ["StudyReport"]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = "1.0"
AFFINE_TOLERANCE_MM = 1e-2


class StudyReport:
    """Writes, for every study an evaluator has segmented, into ``output_dir/<name>/``:

    - ``<name>_opacity.nii.gz``: the mask on the scan's own grid, its affine equal to the scan's;
    - ``<name>_overview.png``: three planes with contours, and attention maps where the network has them;
    - ``<name>_report.json``: volumes in mL, null plus a reason where unknown. It is written last, so
      where it stands, the study is complete.

    The batch must hold ``scan`` (the image as loaded, HU) and ``name``; the output ``pred`` is the mask
    after inversion of every spatial step and ``image`` what the network saw.

    Args:
        output_dir: folder for the studies' folders.
        network: its ``attention_maps`` are drawn, if it has that method.
        bundle: name of the bundle, for the report.
        weights: weights file, whose hash goes into the report.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        network: torch.nn.Module | None = None,
        bundle: str = "",
        weights: str | os.PathLike | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.bundle = bundle
        self.weights = None if weights is None else Path(weights)
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

    def write(self, study: dict[str, Any], output: dict[str, Any]) -> None:
        """Write one study's files.

        Args:
            study: item of the decollated batch.
            output: item of the decollated output.

        Raises:
            ValueError: When the mask is not on the scan's grid.
        """
        name = study["name"]
        scan, mask = study["scan"], output["pred"]
        affine = _same_grid(scan, mask, name)
        hu = np.asarray(scan.cpu())[0]
        opacity = (np.asarray(mask.cpu())[0] > 0).astype(np.uint8)
        folder = self.output_dir / name

        mask_file = folder / f"{name}_opacity.nii.gz"
        nifti = nib.Nifti1Image(opacity if opacity.ndim == 3 else opacity[..., None], affine)
        nifti.set_qform(affine, code=1)
        nifti.set_sform(affine, code=1)
        nifti.header.set_xyzt_units("mm")
        with atomic_path(mask_file) as temporary:
            nib.save(nifti, temporary)

        measured = measure_opacity(opacity, affine)
        total = measured["opacity_volume_ml"]["total"]
        lines = [
            f"opacity {total:.1f} mL" if total is not None else f"opacity {measured['opacity_voxels']} voxels"
        ]
        attention = self._attention(output["image"], opacity, affine)
        draw_overview(folder / f"{name}_overview.png", hu, opacity, affine, name, lines, attention=attention)
        report = {
            "schema_version": SCHEMA_VERSION,
            "study": name,
            "mask_file": mask_file.name,
            "model": self._describe_model(),
            "grid": {"shape": list(opacity.shape), "affine": np.asarray(affine).tolist()},
            **measured,
            "notice": "Research use only. Not a medical device.",
        }
        write_json(folder / f"{name}_report.json", report)
        logger.info(f"{name}: {', '.join(lines)}; written to {folder}")

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

    def _attention(
        self, image: torch.Tensor, opacity: np.ndarray, affine: np.ndarray
    ) -> AttentionView | None:
        """The network's maps on the slice that the overview shows: one slice's forward pass."""
        maps_of = getattr(self.network, "attention_maps", None)
        if maps_of is None or self.network is None:
            return None
        seen = image.as_tensor() if hasattr(image, "as_tensor") else image
        if seen.ndim == 4:
            # From the scan's voxel through patient space to the slice of the network's own grid.
            point = affine @ [*_peak(opacity), 1.0]
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


def _peak(opacity: np.ndarray) -> tuple[int, ...]:
    volume = opacity if opacity.ndim == 3 else opacity[..., None]
    return shown_voxel(volume)


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
