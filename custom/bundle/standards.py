# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What bundles are held against: known code, the schema of the metadata, the packages that they need."""

from __future__ import annotations

import configparser
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom.bundle.packing import CODE_PATH, IMPORTS

__all__ = ["Standards", "package_name"]

KNOWN_CODE = Path("scripts") / "known_code.txt"
SCHEMA = Path("scripts") / "meta_schema_20240725.json"  # MONAI's, Apache-2.0, so that no network is needed
SETUP = Path("setup.cfg")

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)((==|>=|<=|!=|~=|<|>)[0-9][0-9A-Za-z.*]*,?)*")


@dataclass(frozen=True)
class Standards:
    """What this release knows.

    Args:
        known: expressions and targets of configs that are known to be harmless.
        schema: JSON schema of metadata.json.
        requirements: packages that ``custom`` needs, as pip takes them.
    """

    known: frozenset[str]
    schema: Mapping[str, Any]
    requirements: tuple[str, ...]

    @classmethod
    def of_repository(cls, root: str | os.PathLike, allowed: Sequence[str | os.PathLike] = ()) -> Standards:
        """Read them from the repository.

        Args:
            root: folder of the repository.
            allowed: files with further expressions and targets, in the form of ``scripts/known_code.txt``.

        Raises:
            OSError: When a file cannot be read.
            ValueError: When setup.cfg names a requirement by more than its name and versions.
        """
        root = Path(root)
        setup = configparser.ConfigParser()
        setup.read_string((root / SETUP).read_text(encoding="utf-8"))
        requirements = tuple(setup["options"]["install_requires"].split())
        for line in requirements:
            package_name(line)
        known = {CODE_PATH, *IMPORTS}
        for path in (root / KNOWN_CODE, *map(Path, allowed)):
            known.update(_listed(path.read_text(encoding="utf-8").splitlines()))
        schema = json.loads((root / SCHEMA).read_text(encoding="utf-8"))
        return cls(frozenset(known), schema, requirements)


def _listed(lines: Iterable[str]) -> Iterable[str]:
    return (line for line in lines if line and not line.startswith("#"))


def package_name(requirement: str) -> str:
    """Name of the package in a requirement, lower case and with hyphens.

    Args:
        requirement: name and versions; anything else that pip takes (an address, an option) is refused.

    Raises:
        ValueError: When it is more than a name and versions.
    """
    found = _REQUIREMENT.fullmatch(requirement)
    if found is None:
        raise ValueError(f"{ascii(requirement[:100])} is not the name of a package with versions")
    return re.sub(r"[-_.]+", "-", found.group(1)).lower()
