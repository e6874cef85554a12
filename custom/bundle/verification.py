# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Checks a bundle, folder or zip, before anything of it runs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema

import custom
from custom.bundle.archive import check_archive, extract_archive
from custom.bundle.config_code import check_code, check_logging, check_targets, read_json, shown
from custom.bundle.config_keys import check_keys
from custom.bundle.loading import load_safely
from custom.bundle.manifest import (
    MANIFEST,
    REQUIRED,
    REQUIRED_PACKED,
    SETTINGS,
    WEIGHTS,
    is_part,
    is_work,
    walk,
)
from custom.bundle.network_check import check_network, check_values
from custom.bundle.settings import read_settings
from custom.bundle.standards import Standards, package_name
from custom.bundle.vendored import code_sha256, code_version
from custom.data.files import file_sha256

__all__ = ["Verification", "code_findings", "verify_bundle"]

_BASES = ("train", "evaluate", "inference", "metadata")
_FURTHER_METADATA = {"name", "optional_packages_version"}  # in use at MONAI's zoo, not in its schema


@dataclass
class Verification:
    """What was found.

    Args:
        findings: one line each.
        unknown: expressions and targets that would have to be known.
        summary: one line about the bundle.
    """

    findings: list[str] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    summary: str = ""


def verify_bundle(path: str | os.PathLike, standards: Standards) -> Verification:
    """Check a bundle's files, configs, metadata, network, weights and hashes.

    Nothing of the bundle runs before all of its code is found to be known: the configs' expressions and
    targets are on the list, and the package ``custom`` that it carries is the one that this check is part of.
    Only then are targets resolved and the network built, from the package that is running.

    Args:
        path: a bundle's folder, in work or unpacked, or a zip.
        standards: what the bundle is held against.

    Returns:
        The findings; none if all is right.

    Raises:
        FileNotFoundError: When there is no such folder or file.
    """
    path = Path(path)
    if path.is_dir():
        return _Check(path.resolve(), standards, zipped=False).run()
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; it should be a bundle, a folder or a zip")
    if findings := check_archive(path):
        return Verification(findings)
    with tempfile.TemporaryDirectory(prefix="verify-bundle-") as temporary:
        try:
            folder = extract_archive(path, Path(temporary))
        except ValueError as error:
            return Verification([str(error)])
        return _Check(folder, standards, zipped=True).run()


def code_findings(folder: str | os.PathLike, standards: Standards) -> list[str]:
    """What speaks against running a bundle's configs; nothing of them runs.

    For a server, which takes the configs alone and has the code itself: all else is left aside.

    Args:
        folder: of the bundle, in work or unpacked.
        standards: what it is held against.

    Returns:
        One line for each finding; none if all that the configs run is known.
    """
    check = _Check(Path(folder).resolve(), standards, zipped=False)
    check.leave_out_what_is_no_file("configs")
    check.check_configs()
    if not check.result.findings:
        for name, content in check.contents.items():
            check.result.findings += [f"{name}: {finding}" for finding in check_targets(content)]
    return check.result.findings


class _Check:
    """One check of one folder."""

    def __init__(self, folder: Path, standards: Standards, zipped: bool) -> None:
        self.folder, self.standards, self.zipped = folder, standards, zipped
        self.files = dict(walk(folder))
        self.packed = zipped or MANIFEST in self.files or (folder / "custom").exists()
        self.result = Verification()
        self.contents: dict[str, Any] = {}  # of the JSON files, by their names in the bundle
        self.hashes: dict[str, str] = {}
        self.can_run = True  # nothing speaks against running the bundle's configs

    def say(self, where: str, what: str) -> None:
        self.result.findings.append(f"{where}: {what}")

    def sha256(self, name: str) -> str:
        if name not in self.hashes:
            self.hashes[name] = file_sha256(self.files[name])
        return self.hashes[name]

    def run(self) -> Verification:
        self.check_files()
        self.check_carried_code()
        self.check_manifest()
        self.check_configs()
        self.check_weights()
        if "configs/metadata.json" in self.contents:
            self.check_metadata(self.contents["configs/metadata.json"])
        configs = self.configs()
        if self.can_run and all(base in configs for base in _BASES):
            self.check_what_runs(configs)
        version = configs.get("metadata", {}).get("version")
        carried = f"custom {code_version(self.folder / 'custom')}" if self.packed else "not packed"
        weights = f"weights {self.sha256(WEIGHTS)[:12]}" if WEIGHTS in self.files else "without weights"
        self.result.summary = f"{self.folder.name} {shown(version)[1:-1]}, {carried}, {weights}"
        return self.result

    def check_what_runs(self, configs: dict[str, Any]) -> None:
        found = [(name, f) for name, content in self.contents.items() for f in check_targets(content)]
        for name, finding in found:
            self.say(name, finding)
        if not found:
            self.result.findings += check_network(configs, configs["metadata"], self.folder)

    def check_files(self) -> None:
        for name in (*REQUIRED, *(REQUIRED_PACKED if self.packed else ())):
            if name not in self.files:
                self.say(name, "is missing")
        self.leave_out_what_is_no_file()
        compiled = 0
        for name in self.files:
            if is_part(name, self.packed):
                continue
            elif "__pycache__" in name and self.packed and not self.zipped:
                compiled += 1
            elif self.zipped or not is_work(name):
                self.say(shown(name)[1:-1], "does not belong in a bundle")
        if compiled:
            self.say(
                "custom/", f"has {compiled} compiled files, which cannot be checked; remove every __pycache__"
            )

    def leave_out_what_is_no_file(self, start: str = "") -> None:
        for name, path in list(self.files.items()):
            if name.startswith(start) and (path.is_symlink() or not path.is_file()):
                self.say(shown(name)[1:-1], "is not a plain file; it is not read")
                del self.files[name]

    def check_carried_code(self) -> None:
        carried, own = self.folder / "custom", Path(custom.__file__).parent
        if not carried.is_dir() or code_sha256(carried) == code_sha256(own):
            return
        self.can_run = False
        self.say(
            "custom/",
            f"is version {code_version(carried)} ({code_sha256(carried)[:12]}) and not the version "
            f"{custom.__version__} ({code_sha256(own)[:12]}) of this check, which cannot judge it; "
            "check with the release that packed it",
        )

    def check_manifest(self) -> None:
        manifest = self.read(MANIFEST) if MANIFEST in self.files else None
        if manifest is None:
            return
        listed = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(listed, dict):
            self.say(MANIFEST, "lists no files")
            return
        for name in listed:
            if name not in self.files:
                self.say(shown(name)[1:-1], "is missing, the manifest lists it")
        for name in self.files:
            if name == MANIFEST or not is_part(name, packed=True):
                continue
            if name not in listed:
                self.say(name, "is not in the manifest")
            elif self.sha256(name) != listed[name]:
                was = str(listed[name])[:12]
                self.say(name, f"is not what was packed: SHA-256 {self.sha256(name)[:12]}, not {was!a}")
        carried = self.folder / "custom"
        if manifest.get("custom") != {"version": code_version(carried), "sha256": code_sha256(carried)}:
            self.say(MANIFEST, f"names other code than {code_version(carried)}, which is in custom/")

    def read(self, name: str) -> Any:
        try:
            self.contents[name] = read_json(self.files[name])
        except ValueError as error:
            self.say(name, str(error))
            self.can_run = False
            return None
        for finding, unknown in check_code(self.contents[name], self.standards.known):
            self.say(name, finding)
            self.can_run = False
            self.result.unknown.update([unknown] if unknown else [])
        return self.contents[name]

    def check_configs(self) -> None:
        for name in self.files:
            if name.startswith("configs/") and name.endswith(".json"):
                content = self.read(name)
                if content is not None and not isinstance(content, dict):
                    self.say(name, "is no object of keys and values")
                    del self.contents[name]
        if "configs/logging.conf" in self.files:
            for finding in check_logging(self.files["configs/logging.conf"]):
                self.say("configs/logging.conf", finding)
        configs = self.configs()
        if all(base in configs for base in _BASES):
            del configs["metadata"]
            for name, finding in check_keys(configs):
                self.say(f"configs/{name}.json", finding)
                self.can_run = False

    def configs(self) -> dict[str, Any]:
        """The content of each config by its name without suffix."""
        return {Path(name).stem: c for name, c in self.contents.items() if name.startswith("configs/")}

    def check_weights(self) -> None:
        if SETTINGS in self.files:
            try:
                read_settings(self.folder / WEIGHTS)
            except ValueError as error:
                self.say(SETTINGS, str(error).removeprefix(f"{self.files[SETTINGS]}: "))
            if WEIGHTS not in self.files:
                self.say(SETTINGS, f"tells of weights, and there is no {WEIGHTS}")
        for name, path in self.files.items():
            if name == WEIGHTS:
                for finding in check_values(path):
                    self.say(name, finding)
            elif path.suffix == ".pt" and is_work(name):
                try:
                    load_safely(path)
                except ValueError as error:
                    self.say(name, str(error).removeprefix(str(path)).strip())

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        where = "configs/metadata.json"
        for error in jsonschema.Draft201909Validator(self.standards.schema).iter_errors(metadata):
            at = "::".join(str(part) for part in error.absolute_path)
            self.say(where, f"{at + ': ' if at else ''}{shown(error.message)[1:-1]}")
        for key in sorted(set(metadata) - set(self.standards.schema["properties"]) - _FURTHER_METADATA):
            self.say(where, f"unknown key {shown(key)}")
        changelog = metadata.get("changelog")
        version = metadata.get("version")
        if not isinstance(changelog, dict) or not isinstance(version, str) or version not in changelog:
            self.say(where, f"changelog does not name version {shown(version)}")
        self.check_requirements(metadata.get("required_packages_version"))

    def check_requirements(self, versions: Any) -> None:
        needed = {package_name(line) for line in self.standards.requirements}
        named = {name.lower() for name in versions} if isinstance(versions, dict) else set()
        for name in sorted(needed - named - {"monai", "numpy", "torch"}):
            self.say("configs/metadata.json", f"required_packages_version does not name {name}")
        if "requirements.txt" in self.files:
            # A line of this file can make pip run a package's code.
            for line in self.files["requirements.txt"].read_bytes().decode("ascii", "replace").splitlines():
                if line not in self.standards.requirements:
                    self.say("requirements.txt", f"{shown(line)} is no requirement of this release")
