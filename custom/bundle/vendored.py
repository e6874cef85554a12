# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The copy of this package that a packed bundle carries.

A packed bundle's configs run this file by its path, before the package can be imported: only the standard
library is used here, and what holds is this bundle's own file, whatever else is loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from pathlib import Path

__all__ = ["code_files", "code_sha256", "code_version", "describe_code", "use_vendored"]

PACKAGE = "custom"


def code_files(package: Path) -> list[Path]:
    """The files that make up the package, in a fixed order; what Python or a system leaves there is not.

    Args:
        package: folder of the package.
    """
    found = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    parts = {path: path.relative_to(package).parts for path in found}
    kept = {p: at for p, at in parts.items() if not any(n == "__pycache__" or n[0] == "." for n in at)}
    return sorted(kept, key=lambda path: kept[path])


def code_sha256(package: Path) -> str:
    """One hash of the names and contents of all files of the package.

    Args:
        package: folder of the package.
    """
    digest = hashlib.sha256()
    for path in code_files(package):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def code_version(package: Path) -> str:
    """The version that the package states, read and not run.

    Args:
        package: folder of the package.
    """
    try:
        text = (package / "__init__.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "of unknown version"
    found = re.search(r'^__version__ = "([\w.+-]{1,40})"$', text, re.MULTILINE)
    return found.group(1) if found else "of unknown version"


def describe_code(package: Path) -> str:
    """Name, version and the beginning of the hash of the package.

    Args:
        package: folder of the package.
    """
    return f"{PACKAGE} {code_version(package)} (SHA-256 {code_sha256(package)[:12]})"


def use_vendored() -> str:
    """Make this bundle's copy of the package the one that is imported.

    Another copy that is loaded already is accepted if its files are the same.

    Returns:
        Folder of the bundle.

    Raises:
        ImportError: When another version is loaded. Under ``python -m monai.bundle`` the process ends with
            that line and exit code 2 instead.
    """
    package = Path(__file__).resolve().parent.parent
    root = str(package.parent)
    if getattr(sys.modules.get(PACKAGE), "__file__", None) is None:  # not loaded, or a folder without code
        sys.modules.pop(PACKAGE, None)
        sys.path.insert(0, root)
    place = Path(str(importlib.import_module(PACKAGE).__file__)).resolve().parent
    ours = (place / "bundle" / "vendored.py").is_file()  # else it may be any file in any large folder
    if place == package or (ours and code_sha256(place) == code_sha256(package)):
        return root
    loaded = describe_code(place) if ours else f"another package named {PACKAGE}"
    line = (
        f"the bundle {package.parent.name} brings {describe_code(package)}, but {loaded} is already loaded "
        f"from {place}; run it in a process and an environment without that one, or pack all bundles at one "
        "version"
    )
    if Path(sys.argv[0] if sys.argv else "").parts[-3:-1] == ("monai", "bundle"):
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(line)
