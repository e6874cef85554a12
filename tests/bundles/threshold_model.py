# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A bundle's inference with a network whose answer is known: opacity is what is brighter than a threshold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from bundle_tester import ROOT, Bundle

from custom.data.phantom import Lesion, Phantom, make_phantom

BUNDLE = Bundle("covid_ct_scoatnet_segmentation")
LESION_HU, LUNG_HU, TOP_HU = 3000.0, -850.0, 3000.0  # brighter than bone, so that nothing else is found
THRESHOLD_HU = (LESION_HU + LUNG_HU) / 2


def bright_phantom(
    lesions: tuple[Lesion, ...], shape: tuple[int, ...], spacing: tuple[float, ...], **options: Any
) -> Phantom:
    return make_phantom(shape=shape, spacing=spacing, seed=2, lesions=list(lesions), noise_hu=5.0, **options)


def lesion(centre: tuple, radii: tuple, side: str | None = None) -> Lesion:
    return Lesion("consolidation", centre=centre, radii=radii, side=side, exact=True, hu=LESION_HU)


def inference_overrides(folder: Path, scans: Path, size: int = 128) -> dict:
    """Overrides that make the inference config threshold halfway between lung and lesion."""
    folder.mkdir(parents=True, exist_ok=True)
    threshold = (THRESHOLD_HU + 1000) / (TOP_HU + 1000)
    # Soft enough that interpolation of the sigmoid is nearly that of the values.
    slope = 4.0
    weights = {"weight": torch.full((1, 1, 1, 1), slope), "bias": torch.tensor([-slope * threshold])}
    torch.save(weights, folder / "model.pt")
    return {
        "bundle_root": str(ROOT / "bundles" / BUNDLE.name),
        "dataset_dir": str(scans),
        "output_dir": str(folder / "output"),
        "ckpt_path": str(folder / "model.pt"),
        "network_def": {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
        "hu_window": [-1000, TOP_HU],
        "image_size": [size, size],
    }


def reports(folder: Path) -> dict[str, dict]:
    files = sorted((folder / "output").rglob("*_report.json"))
    return {report["study"]: report for report in (json.loads(f.read_text(encoding="utf-8")) for f in files)}
