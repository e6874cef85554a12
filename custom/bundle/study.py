# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A study: which systems are compared, how each is trained, and by which rule its weights are chosen."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from custom.console import check_overrides

__all__ = ["SELECTIONS", "Study", "System", "read_study"]

SELECTIONS = {
    "last": "weights of the last epoch; the held-out fold is not looked at before it is scored",
    "inner_fold": "weights of the best validation on the next fold, which is left out of training too",
}
"""Rules by which a fold's weights are chosen. None lets the fold that is scored choose."""

_KEYS = {"_desc_", "title", "reference", "selection", "overlays", "overrides", "stages", "systems"}
_SYSTEM_KEYS = {"_desc_", "bundle", "overlays", "overrides", "start"}


@dataclass(frozen=True)
class System:
    """One row of the table, or one stage of training that comes before.

    Args:
        name: as it is printed.
        bundle: folder of the bundle.
        overlays: configs laid over train.json.
        overrides: keys of the configs.
        start: name of the stage whose weights training starts from, or None.
    """

    name: str
    bundle: Path
    overlays: tuple[Path, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None

    @property
    def folder(self) -> str:
        """Name for its folder."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower().replace("+", "plus")).strip("_")

    def configs(self, *names: str) -> list[Path]:
        return [self.bundle / "configs" / "train.json", *self.overlays] + [
            self.bundle / "configs" / f"{name}.json" for name in names
        ]


@dataclass(frozen=True)
class Study:
    """What :func:`read_study` reads.

    Args:
        title: heading of the report.
        reference: the system that the others are tested against.
        selection: one of :data:`SELECTIONS`.
        systems: the rows of the table.
        stages: trainings without folds that systems start from.
    """

    title: str
    reference: str
    selection: str
    systems: tuple[System, ...]
    stages: tuple[System, ...] = ()

    def only(self, names: Sequence[str]) -> Study:
        """The study of some of its systems, with the stages they start from.

        The reference stays where it is among them; else the first of them is.

        Raises:
            ValueError: When a name is none of its systems.
        """
        known = [system.name for system in self.systems]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"the study has no system '{unknown[0]}'; it has {'; '.join(known)}")
        systems = tuple(system for system in self.systems if system.name in names)
        starts = {system.start for system in systems}
        return replace(
            self,
            systems=systems,
            stages=tuple(stage for stage in self.stages if stage.name in starts),
            reference=self.reference if self.reference in names else systems[0].name,
        )


def read_study(path: str | os.PathLike, bundles: str | os.PathLike, settings: Sequence[str] = ()) -> Study:
    """Read and check the JSON file of a study.

    ::

        {"title": "...", "reference": "U-Net", "selection": "last",
         "overlays": ["train_slices"], "overrides": {"epochs": 40},
         "stages": {"nodules": {"bundle": "...", "overlays": ["pretrain"], "overrides": {...}}},
         "systems": {"U-Net": {"bundle": "covid_ct_scoatnet_segmentation", "overlays": ["baseline_unet"]}}}

    Overlays are names of a bundle's configs, or JSON files beside the study; those of the study come first
    and are not for stages. Overrides of a system win over those of the study, ``settings`` over both.

    Args:
        path: the JSON file.
        bundles: folder in which bundles are looked for by name.
        settings: ``KEY=VALUE`` for all systems and stages, ``NAME:KEY=VALUE`` for one; values are JSON where
            they can be, else strings.

    Raises:
        FileNotFoundError: When the file, a bundle or an overlay is not there.
        ValueError: When a key, name or value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"study {path} not found")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers and nesting without end included
        raise ValueError(f"study {path} is not valid JSON: {error}") from None
    _check_keys(path, "the study", content, _KEYS, ("title", "reference", "systems"))
    entries = {kind: content.get(kind, {}) for kind in ("stages", "systems")}
    for kind, named in entries.items():
        if not isinstance(named, Mapping):
            raise ValueError(f"study {path}: '{kind}' must map names to bundles")
    names = [name for named in entries.values() for name in named]
    if len({System(name, Path()).folder for name in names}) < len(names):
        raise ValueError(f"study {path}: names must differ in letters or digits: {', '.join(names)}")
    given = _parse_settings(settings, names)

    def make(name: str, entry: Any, stage: bool) -> System:
        _check_keys(path, f"'{name}'", entry, _SYSTEM_KEYS, ("bundle",))
        bundle = _find_bundle(entry["bundle"], Path(bundles), path)
        own = list(entry.get("overlays", []))
        overlays = own if stage else [*content.get("overlays", []), *own]
        overrides = {**content.get("overrides", {}), **entry.get("overrides", {})}
        overrides |= {**given.get(None, {}), **given.get(name, {})}
        system = System(
            name,
            bundle,
            tuple(_find_overlay(o, bundle, path) for o in overlays),
            overrides,
            entry.get("start"),
        )
        if system.start is not None and system.start not in entries["stages"]:
            raise ValueError(f"study {path}: '{name}' starts from '{system.start}', which is no stage")
        _check_overrides(path, system)
        return system

    systems = tuple(make(name, entry, False) for name, entry in entries["systems"].items())
    stages = tuple(make(name, entry, True) for name, entry in entries["stages"].items())
    selection = content.get("selection", "last")
    if selection not in SELECTIONS:
        raise ValueError(
            f"study {path}: unknown selection '{selection}'; choose from {', '.join(SELECTIONS)}"
        )
    if content["reference"] not in entries["systems"]:
        known = ", ".join(entries["systems"]) or "none"
        raise ValueError(f"study {path}: reference '{content['reference']}' is none of its systems: {known}")
    return Study(content["title"], content["reference"], selection, systems, stages)


def _check_keys(path: Path, where: str, content: Any, known: set[str], needed: Sequence[str]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"study {path}: {where} must be an object, found {type(content).__name__}")
    unknown = [key for key in content if key not in known]
    missing = [key for key in needed if not content.get(key)]
    if unknown or missing:
        what = f"unknown key '{unknown[0]}'" if unknown else f"'{missing[0]}' is missing"
        raise ValueError(f"study {path}: {what} in {where}; its keys are {', '.join(sorted(known))}")


def _find_bundle(name: str, bundles: Path, study: Path) -> Path:
    for folder in (bundles / name, study.parent / name):
        if (folder / "configs" / "train.json").is_file():
            return folder.resolve()
    raise FileNotFoundError(f"study {study}: bundle '{name}' not found in {bundles} or beside the study")


def _find_overlay(name: str, bundle: Path, study: Path) -> Path:
    file = study.parent / name if name.endswith(".json") else bundle / "configs" / f"{name}.json"
    if not file.is_file():
        raise FileNotFoundError(f"study {study}: overlay '{name}' not found: {file}")
    return file.resolve()


def _parse_settings(settings: Sequence[str], names: Sequence[str]) -> dict[str | None, dict[str, Any]]:
    parsed: dict[str | None, dict[str, Any]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        name: str | None = next(
            (n for n in names if key.startswith(f"{n}:") and key[len(n) + 1] != ":"), None
        )
        key = key if name is None else key[len(name) + 1 :]
        if not equals or not key:
            raise ValueError(f"'{setting}' is no KEY=VALUE or NAME:KEY=VALUE; names are {', '.join(names)}")
        try:
            parsed.setdefault(name, {})[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed.setdefault(name, {})[key] = value
    return parsed


def _check_overrides(path: Path, system: System) -> None:
    words = ["--config_file", str([str(file) for file in system.configs()])]
    for key in system.overrides:
        words += [f"--{key}", ""]
    try:
        check_overrides(words)
    except ValueError as error:
        raise ValueError(f"study {path}: '{system.name}': {error}") from None
