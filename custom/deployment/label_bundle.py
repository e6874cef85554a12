# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Copies of bundles for MONAI Label, checked before the server sees them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import custom
from custom.bundle.loading import describe_misfit, read_weights
from custom.bundle.network_check import build_network
from custom.bundle.settings import read_settings, settings_file
from custom.bundle.vendored import code_sha256, describe_code
from custom.data.files import file_sha256, write_json

__all__ = ["DeployedBundle", "check_weights", "deploy_bundle", "parse_setting"]

CONFIGS = ("inference.json", "train.json")
WEIGHTS = Path("models") / "model.pt"
RECORD = "deployed.json"


@dataclass(frozen=True)
class DeployedBundle:
    """What was deployed.

    Args:
        folder: the copy.
        settings: the settings that its configs have.
        weights: one line on which weights it has.
    """

    folder: Path
    settings: frozenset[str]
    weights: str


def parse_setting(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE``; the value is JSON where it is any, else text.

    Args:
        text: for example ``image_size=[256,256]`` or ``network_def::channels=[8,16,32,64,128]``.

    Raises:
        ValueError: When there is no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set needs KEY=VALUE, for example image_size=[256,256]; found '{text}'")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def deploy_bundle(
    source: str | os.PathLike,
    models: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> DeployedBundle:
    """Copy a bundle to where MONAI Label looks for models; the bundle itself is never written to.

    Configs are copied anew each time, with the settings beside the weights written into both: training in the
    server goes on from the served weights, so it needs them as inference does. Weights that were trained in
    the copy are kept until ``fresh`` asks for the bundle's own again.

    Args:
        source: folder of the bundle, from the repository or from an unpacked zip. Its configs are code that
            runs: hold them against what is known first, by :func:`custom.bundle.verification.code_findings`.
        models: the server's folder of models; the copy goes to ``models/<name of source>``.
        weights: the weights file, defaults to the bundle's ``models/model.pt``.
        settings: keys of the configs to change in the copy; one that a bundle does not have is left aside.
            They come before those beside the weights.
        fresh: take the bundle's weights even if others were trained in the copy.

    Raises:
        FileNotFoundError: When the folder is no bundle or has no weights.
        ValueError: When the weights do not fit, or the bundle brings components of another version.
    """
    source = Path(source).expanduser().resolve()
    for name in (*CONFIGS, "metadata.json"):
        if not (source / "configs" / name).is_file():
            raise FileNotFoundError(f"{source} is no bundle to serve: it has no configs/{name}")
    _check_version(source)
    file = Path(weights).expanduser() if weights is not None else source / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(
            f"{source.name} has no weights: {file} not found; train it first, or name a file by --weights"
        )
    configs, used = _adapt(source, settings or {}, read_settings(file))
    check_weights(configs["inference.json"], file)

    target = Path(models) / source.name
    trained = None if fresh else _trained_here(target)
    if trained:
        configs, used = _adapt(source, settings or {}, read_settings(target / WEIGHTS))
        check_weights(configs["inference.json"], target / WEIGHTS)
    shutil.rmtree(target / "configs", ignore_errors=True)
    shutil.copytree(source / "configs", target / "configs")
    for name, config in configs.items():
        write_json(target / "configs" / name, config)
    if trained:
        line = f"weights trained here, SHA-256 {trained[:12]} (--fresh takes the bundle's own again)"
        return DeployedBundle(target, used, line)
    # MONAI Label takes the file with the shortest name, so there must be no other.
    shutil.rmtree(target / "models", ignore_errors=True)
    (target / "models").mkdir()
    shutil.copyfile(file, target / WEIGHTS)
    if settings_file(file).is_file():
        shutil.copyfile(settings_file(file), settings_file(target / WEIGHTS))
    digest = file_sha256(file)
    write_json(target / RECORD, {"source": str(source), "weights": str(file), "weights_sha256": digest})
    return DeployedBundle(target, used, f"weights {file}, SHA-256 {digest[:12]}")


def check_weights(config: Mapping[str, Any], file: str | os.PathLike) -> None:
    """Compare every tensor of a weights file with the network that a config defines.

    MONAI Label itself loads what fits and only warns of the rest.

    Args:
        config: content of an inference config.
        file: the weights.

    Raises:
        ValueError: When the file holds no weights, or not exactly those of the network.
    """
    weights, network = read_weights(file), build_network(config)
    if misfit := describe_misfit(weights, network):
        raise ValueError(
            f"{file} does not fit this {type(network).__name__}: {misfit}; give the weights of this bundle, "
            "and by --set what was changed for their training"
        )


def _adapt(
    source: Path, settings: Mapping[str, Any], trained_with: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
    configs = {name: json.loads((source / "configs" / name).read_text(encoding="utf-8")) for name in CONFIGS}
    for key, value in trained_with.items():
        for config in configs.values():
            _change(config, key, value)
    used = {key for key, value in settings.items() for c in configs.values() if _change(c, key, value)}
    # The panel would offer the two numbers of a window as alternatives, and the choice would change nothing.
    configs["inference.json"].pop("displayable_configs", None)
    configs["inference.json"].get("report", {}).pop("settings", None)  # which refers to it
    # Every round starts from model.pt; the last round's checkpoint would say that all its epochs are done.
    configs["train.json"]["resume"] = False
    return configs, frozenset(used)


def _change(config: dict[str, Any], key: str, value: Any) -> bool:
    """Set a key that exists, ``a::b`` within ``a``; returns whether it did."""
    *path, last = re.split(r"::|#", key)
    place: Any = config
    for part in path:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        return False
    place[last] = value
    return True


def _check_version(source: Path) -> None:
    theirs, ours = source / "custom", Path(custom.__file__).parent
    if theirs.is_dir() and code_sha256(theirs) != code_sha256(ours):
        raise ValueError(
            f"{source.name} brings {describe_code(theirs)}, this server has {describe_code(ours)}; "
            "all bundles of a server share one: take the bundle of this release"
        )


def _trained_here(target: Path) -> str | None:
    """The hash of weights that are not those that were deployed."""
    if not (target / RECORD).is_file() or not (target / WEIGHTS).is_file():
        return None
    deployed = json.loads((target / RECORD).read_text(encoding="utf-8"))["weights_sha256"]
    found = file_sha256(target / WEIGHTS)
    return None if found == deployed else found
