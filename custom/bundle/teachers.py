# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Trained networks of a bundle that predict plain slices together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd

import custom
from custom.bundle.loading import describe_misfit, read_weights
from custom.bundle.settings import read_settings
from custom.data.files import file_sha256
from custom.data.plain_slices import read_picture

__all__ = ["Teachers"]


class Teachers:
    """One or several trainings of one bundle: the mean of their probabilities, and of mirrored slices'.

    Each is built from the bundle's train.json with overlays; slices are prepared, and probabilities brought
    back to the slices' size, by the transforms that the bundle validates with.

    Args:
        bundle: folder of the bundle.
        weights: weights files, in float32 or half precision. Settings beside them (``model.json``) are taken
            over, as far as the configs have them.
        overlays: names of the bundle's configs, or JSON files, laid over train.json in turn; ``train_slices``
            makes it read plain slices.
        overrides: keys of the configs that the trainings were made with, such as ``image_size``; they win
            over settings beside the weights.
        unseen_fold: the fold that none of them was trained on; None where they were trained on all. Weights
            in a folder of a cross-validation must agree.
        device: where they run.

    Raises:
        FileNotFoundError: When a file does not exist.
        ValueError: When weights do not fit, or were trained with another fold held out.
    """

    def __init__(
        self,
        bundle: str | os.PathLike,
        weights: Sequence[str | os.PathLike],
        overlays: Sequence[str] = ("train_slices",),
        overrides: Mapping[str, Any] | None = None,
        unseen_fold: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if not weights:
            raise ValueError("at least one weights file is needed")
        folder = Path(bundle).resolve()
        files = [_find_config(folder, name) for name in ("train", *overlays)]
        self.device = torch.device(device)
        self.unseen_fold = unseen_fold
        self.description: dict[str, Any] = {
            "bundle": folder.name,
            "configs": {file.name: file_sha256(file) for file in files},
            "overrides": dict(overrides or {}),
            "unseen_fold": unseen_fold,
            "version": custom.__version__,
            "weights": [],
        }
        self._members = []
        for path in map(Path, weights):
            held_out = _held_out(path)
            if held_out not in (None, unseen_fold):
                seen = "all folds" if unseen_fold is None else f"all folds but {unseen_fold}"
                raise ValueError(
                    f"{path} was trained with fold {held_out} held out, not on {seen}; give --unseen-fold "
                    f"{held_out} and weights of that fold alone"
                )
            settings = read_settings(path)
            self._members.append(_load(path, files, settings, overrides or {}, self.device))
            self.description["weights"].append(
                {
                    "file": path.name,
                    "sha256": file_sha256(path),
                    "settings": settings,
                    "held_out_fold": held_out,
                }
            )

    def predict(self, image: str | os.PathLike) -> np.ndarray:
        """
        Args:
            image: an upright 8-bit slice.

        Returns:
            The mean probability, (H, W) float32 in 0 to 1, at the slice's own size.

        Raises:
            ValueError: When the slice cannot be read, or the network gives anything but one logit a pixel.
        """
        total: Any = 0.0
        for network, prepare, invert in self._members:
            # The configs' transforms want a label beside the image; nothing looks at it here.
            case: Any = prepare({"image": os.fspath(image), "label": os.fspath(image)})
            plain = case["image"].as_tensor()[None].to(self.device)
            # A slice and its mirror are one batch, always: the result does not depend on the other slices.
            with torch.inference_mode():
                logits = network(torch.cat([plain, plain.flip(-1)]))
            if not isinstance(logits, torch.Tensor) or logits.shape != (2, 1, *plain.shape[2:]):
                raise ValueError(f"{type(network).__name__} does not give one logit a pixel")
            both = torch.sigmoid(logits.float()).cpu()
            mean = (both[0] + both[1].flip(-1)) / 2
            case["pred"] = MetaTensor(mean)
            total = total + np.asarray(invert(case)["pred"])[0]
        probability = np.clip(np.asarray(total, np.float32) / len(self._members), 0, 1)
        if probability.shape != (size := read_picture(Path(image)).shape):
            raise ValueError(
                f"{image} has {size} pixels, its prediction {probability.shape}; do the overlays read plain "
                "slices, as train_slices does?"
            )
        return probability


def _load(
    path: Path,
    files: Sequence[Path],
    settings: Mapping[str, Any],
    overrides: Mapping[str, Any],
    device: torch.device,
) -> tuple[torch.nn.Module, Compose, Invertd]:
    """A network with its weights, its preparation of slices, and the way back."""
    weights = read_weights(path)
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    known = parser.get()
    if unknown := [key for key in overrides if key.split("#")[0].split("::")[0] not in known]:
        raise ValueError(f"'{unknown[0]}' is no key of {', '.join(file.name for file in files)}")
    parser.update({key: value for key, value in settings.items() if key in known})
    parser.update(dict(overrides))
    network = parser.get_parsed_content("network_def")
    if misfit := describe_misfit(weights, network):
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}: {misfit}; give the settings that it was "
            "trained with"
        )
    network.load_state_dict(weights)  # into float32, whatever the file has
    prepare = parser.get_parsed_content("validate#preprocessing")
    invert = Invertd("pred", transform=prepare, orig_keys="image", nearest_interp=False)
    return network.eval().to(device), prepare, invert


def _find_config(folder: Path, name: str) -> Path:
    file = Path(name) if name.endswith(".json") else folder / "configs" / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; overlays are configs of {folder.name} or JSON files")
    return file.resolve()


def _held_out(weights: Path) -> int | None:
    """The fold that a cross-validation held out, where the weights are still in its folder."""
    file = weights.resolve().parent.parent / "settings.json"
    try:
        fold = json.loads(file.read_text(encoding="utf-8")).get("fold")
    except (OSError, ValueError, AttributeError):
        return None
    return fold if isinstance(fold, int) else None
