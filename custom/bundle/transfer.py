# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Transfer in stages: ImageNet, then lung nodules, then COVID-19, as one run that can be resumed."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ConfigWorkflow

import custom
from custom.data.files import atomic_path, file_sha256, write_json

__all__ = ["MODES", "TransferPipeline"]

logger = logging.getLogger(__name__)

MODES = ("none", "imagenet", "two-stage")
"""Rows of Table 4 of the nCoVSegNet paper: no transfer, one stage, two stages."""

COVID, NODULES = "covid", "nodules"


class TransferPipeline:
    """Trains a bundle by stages of transfer, each a nested run of the bundle's own configs.

    - ``"none"``: COVID-19 training from random weights;
    - ``"imagenet"``: COVID-19 training, the backbone starting from ImageNet;
    - ``"two-stage"``: training on nodules (train.json under pretrain.json), the backbone starting from
      ImageNet if weights are given, then COVID-19 training from its result.

    A finished stage is known by its entry in ``manifest.json`` and the hash of its weights, and is not run
    again; an interrupted one goes on from its checkpoint. The manifest records each stage's configs, data
    lists, overrides, versions, seed, score and the hash of its weights. With several modes a table compares
    them; each mode's COVID-19 stage has the same data, folds, budget and seed.

    Args:
        bundle_root: folder of the bundle.
        output_dir: gets a folder for each stage, ``manifest.json`` and ``transfer.csv``.
        covid_dir: data set of the last stage, with ``datalist.json``.
        nodules_dir: data set of the nodule stage; needed for ``"two-stage"``.
        imagenet_weights: file or URL for the backbone; needed for ``"imagenet"``.
        modes: which of :data:`MODES`.
        overlays: configs laid over train.json in both stages, e.g. ``["network_small"]``.
        covid_overlays: configs laid over train.json in the COVID-19 stage only, e.g. ``["train_slices"]``.
        overrides: keys of the configs, for both stages.
        nodules_overrides: keys for the nodule stage.
        covid_overrides: keys for the COVID-19 stage.

    Raises:
        ValueError: When a mode is unknown or lacks what it needs.

    Reference:
        Liu et al., nCoVSegNet, MedIA 74:102205, 2021, section 3.4 and Table 4.
    """

    def __init__(
        self,
        bundle_root: str | os.PathLike,
        output_dir: str | os.PathLike,
        covid_dir: str | os.PathLike,
        nodules_dir: str | os.PathLike | None = None,
        imagenet_weights: str | None = None,
        modes: Sequence[str] = ("two-stage",),
        overlays: Sequence[str] = (),
        covid_overlays: Sequence[str] = (),
        overrides: Mapping[str, Any] | None = None,
        nodules_overrides: Mapping[str, Any] | None = None,
        covid_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        unknown = [mode for mode in modes if mode not in MODES]
        if unknown or not modes:
            raise ValueError(f"unknown transfer mode {unknown or modes}; choose from {', '.join(MODES)}")
        if "two-stage" in modes and nodules_dir is None:
            raise ValueError(
                "two-stage transfer needs nodules_dir, a data set made by scripts/prepare_lidc.py"
            )
        if "imagenet" in modes and imagenet_weights is None:
            raise ValueError(
                "transfer from ImageNet needs imagenet_weights, a file or URL of ResNet-50 weights"
            )
        self.configs = Path(bundle_root) / "configs"
        self.bundle_root = str(bundle_root)
        self.output_dir = Path(output_dir)
        self.data = {COVID: covid_dir, NODULES: nodules_dir}
        self.imagenet_weights = imagenet_weights
        self.modes = list(modes)
        self.overlays = {COVID: [*overlays, *covid_overlays], NODULES: [*overlays, "pretrain"]}
        self.overrides = {
            COVID: {**(overrides or {}), **(covid_overrides or {})},
            NODULES: {**(overrides or {}), **(nodules_overrides or {})},
        }

    @property
    def manifest_file(self) -> Path:
        return self.output_dir / "manifest.json"

    def run(self) -> dict[str, Any]:
        """Run what is not finished yet.

        Returns:
            The manifest.

        Raises:
            ValueError: When a stage that was finished had other settings.
        """
        for mode in self.modes:
            start: dict[str, Any] = {}
            if mode != "none" and self.imagenet_weights is not None:
                start["imagenet_weights"] = self.imagenet_weights
            if mode == "two-stage":
                weights = self._stage("nodules", NODULES, start)
                start = {"pretrained_weights": str(weights)}
            self._stage(f"covid_{mode}", COVID, start)
        manifest = self._manifest()
        self._write_table(manifest)
        return manifest

    def _stage(self, name: str, kind: str, start: Mapping[str, Any]) -> Path:
        folder = self.output_dir / name
        weights = folder / "models" / "model.pt"
        files = [self.configs / f"{part}.json" for part in ("train", *self.overlays[kind])]
        overrides = {**self.overrides[kind], **start}
        settings = {
            "configs": {file.name: _sha256(file) for file in files},
            "data_list_sha256": _sha256(Path(str(self.data[kind])) / "datalist.json"),
            "start": _describe_start(start),
            "overrides": self.overrides[kind],
        }
        done = self._manifest()["stages"].get(name)
        if done is not None and weights.is_file() and _sha256(weights) == done["weights_sha256"]:
            if done["settings"] != settings:
                changed = [key for key in settings if settings[key] != done["settings"].get(key)]
                raise ValueError(
                    f"stage {name} in {folder} was finished with other settings ({', '.join(changed)}); "
                    "give another output_dir, or remove that folder to train it again"
                )
            logger.info(f"stage {name} is finished: {weights}")
            return weights
        logger.info(
            f"stage {name}: {', '.join(file.name for file in files)}, starting from {settings['start']}"
        )
        workflow = ConfigWorkflow(
            workflow_type="train",
            config_file=[str(file) for file in files],
            meta_file=str(self.configs / "metadata.json"),
            logging_file=None,
            bundle_root=self.bundle_root,
            dataset_dir=str(self.data[kind]),
            output_dir=str(folder / "eval"),
            ckpt_dir=str(folder / "models"),
            cache_dir=str(self.output_dir / "cache"),
            **overrides,
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        self._record(name, folder, settings, int(workflow.parser.get_parsed_content("seed")))
        return weights

    def _record(self, name: str, folder: Path, settings: Mapping[str, Any], seed: int) -> None:
        checkpoint = torch.load(
            folder / "models" / "checkpoint_latest.pt", map_location="cpu", weights_only=True
        )
        imagenet = folder / "models" / "imagenet.json"
        manifest = self._manifest()
        manifest["stages"][name] = {
            "settings": settings,
            "seed": seed,
            "epochs": checkpoint["epoch"],
            "best_validation_dice": checkpoint["best_metric"],
            "best_epoch": checkpoint["best_metric_epoch"],
            "weights": str((folder / "models" / "model.pt").relative_to(self.output_dir)),
            "weights_sha256": _sha256(folder / "models" / "model.pt"),
            "imagenet": json.loads(imagenet.read_text(encoding="utf-8")) if imagenet.is_file() else None,
            "versions": {
                "covid-ct-bundles": custom.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "monai": monai.__version__,
                "numpy": np.__version__,
            },
        }
        write_json(self.manifest_file, manifest)

    def _manifest(self) -> dict[str, Any]:
        if not self.manifest_file.is_file():
            return {"schema_version": "1.0", "stages": {}}
        return dict(json.loads(self.manifest_file.read_text(encoding="utf-8")))

    def _write_table(self, manifest: Mapping[str, Any]) -> None:
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["transfer", "validation_dice", "best_epoch", "epochs", "seed", "weights_sha256"])
        for mode in self.modes:
            stage = manifest["stages"][f"covid_{mode}"]
            table.writerow(
                [
                    mode,
                    f"{stage['best_validation_dice']:.4f}",
                    stage["best_epoch"],
                    stage["epochs"],
                    stage["seed"],
                    stage["weights_sha256"],
                ]
            )
        with atomic_path(self.output_dir / "transfer.csv") as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")
        logger.info("validation Dice by transfer (same data, folds, budget and seed):\n" + text.getvalue())


def _describe_start(start: Mapping[str, Any]) -> str:
    if "pretrained_weights" in start:
        return f"nodule stage {_sha256(Path(start['pretrained_weights']))}"
    source = start.get("imagenet_weights")
    if source is None:
        return "random weights"
    return f"ImageNet {_sha256(Path(source)) if os.path.isfile(source) else source}"


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    return file_sha256(path)
