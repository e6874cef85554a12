# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Packs a bundle with the code it needs, so that it works where this repository is not."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import custom
from custom.bundle.archive import write_archive
from custom.bundle.config_code import read_json
from custom.bundle.manifest import MANIFEST, SETTINGS, WEIGHTS, is_part, is_work, walk
from custom.bundle.vendored import code_files, code_sha256
from custom.data.files import file_sha256

__all__ = ["CODE_PATH", "IMPORTS", "PackedBundle", "pack_bundle", "with_code_path"]

_NAME = re.compile(r"[A-Za-z0-9][\w-]*", re.ASCII)
_VENDORED = "@bundle_root + '/custom/bundle/vendored.py'"
CODE_PATH = (
    f"$runpy.run_path({_VENDORED})['use_vendored']() if os.path.isfile({_VENDORED}) else "
    "find_spec('custom') or sys.exit(print('error: ' + os.path.abspath(@bundle_root) + "
    "' is not the folder of this bundle; give it as --bundle_root', file=sys.stderr) or 2)"
)
IMPORTS = ("$import os", "$import sys", "$import runpy", "$from importlib.util import find_spec")


@dataclass(frozen=True)
class PackedBundle:
    """What was packed.

    Args:
        path: the zip.
        sha256: of the zip.
        files: number of files in it.
        weights_sha256: of the weights, None where the bundle has none.
        left_out: files beside the bundle that training and inference made.
    """

    path: Path
    sha256: str
    files: int
    weights_sha256: str | None
    left_out: tuple[str, ...]


def with_code_path(config: dict[str, Any]) -> dict[str, Any]:
    """A config that finds the code which its bundle carries, from any working directory.

    MONAI puts a bundle's folder on the path of modules only after ``initialize``, and imports what
    ``imports`` names before it evaluates anything else. Hence ``initialize`` starts with ``@code_path``,
    which runs :mod:`custom.bundle.vendored` by its path, and imports the package again: MONAI does not keep
    what ``initialize`` gave, so an import that failed the first time is done anew. ``network_def`` requires
    ``@code_path`` for programs that skip ``initialize``.

    Args:
        config: content of a config, which is not changed; one that has ``code_path`` is given back as it is.

    Raises:
        ValueError: When it has ``imports`` and no ``bundle_root``.
    """
    if "code_path" in config:
        return dict(config)
    if "imports" in config and "bundle_root" not in config:
        raise ValueError("a config with imports needs bundle_root")
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "imports":
            value = [*value, *(line for line in IMPORTS if line not in value)]
        elif key == "network_def" and "imports" in config and isinstance(value, dict):
            value = {"_requires_": "@code_path", **value}  # first: what follows may need the code
        elif key == "initialize" and isinstance(value, list) and "@code_path" not in value:
            value = ["@code_path", "$import custom", *value]
        changed[key] = value
        if key == "bundle_root":
            changed["code_path"] = CODE_PATH
    return changed


def pack_bundle(
    folder: str | os.PathLike, output: str | os.PathLike | None, requirements: Sequence[str]
) -> PackedBundle:
    """Write a zip with the bundle, the package ``custom``, a manifest of hashes, requirements and a README.

    Equal input gives equal bytes. Check the bundle with :func:`custom.bundle.verify_bundle` before.

    Args:
        folder: the bundle.
        output: the zip, defaults to ``<name>_v<version>.zip`` in the working directory.
        requirements: packages that ``custom`` needs, as pip takes them.

    Raises:
        FileNotFoundError: When the folder is no bundle.
        ValueError: When it holds a file that does not belong, or code of another version.
    """
    folder = Path(folder).resolve()
    if not (folder / "configs" / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} is no bundle: it has no configs/metadata.json")
    if not _NAME.fullmatch(folder.name):
        raise ValueError(f"the folder's name {folder.name!r} must consist of letters, digits, _ and -")
    package = Path(custom.__file__).parent
    if (folder / "custom").exists() and code_sha256(folder / "custom") != code_sha256(package):
        raise ValueError(
            f"{folder} brings code of another version than this {custom.__version__}; pack it with the "
            "release it comes from, or remove its folder custom to pack it with this one"
        )
    files: dict[str, bytes | Path] = {}
    left_out = []
    for name, path in walk(folder):
        if is_work(name):
            left_out.append(name)
        elif path.is_symlink() or not path.is_file() or not is_part(name, packed=True):
            raise ValueError(f"{path} does not belong in a bundle; remove it")
        elif is_part(name, packed=False):
            files[name] = _packed_config(path) if name.startswith("configs/") else path
    for path in code_files(package):
        files[f"custom/{path.relative_to(package).as_posix()}"] = path

    version = read_json(folder / "configs" / "metadata.json").get("version")
    if not isinstance(version, str) or not re.fullmatch(r"[\w.+-]+", version, re.ASCII):
        raise ValueError(f"{folder / 'configs' / 'metadata.json'} has no version")
    weights = file_sha256(folder / WEIGHTS) if WEIGHTS in files else None
    code = {"version": custom.__version__, "sha256": code_sha256(package)}
    files["requirements.txt"] = "".join(f"{line}\n" for line in requirements).encode()
    files["README.md"] = _readme(folder.name, version, code, weights, SETTINGS in files).encode()
    files = {name: files[name] for name in sorted(files)}
    hashes = {name: _sha256(source) for name, source in files.items()}
    manifest = {
        "schema_version": "1.0",
        "bundle": folder.name,
        "version": version,
        "custom": code,
        "weights": {"path": WEIGHTS, "sha256": weights} if weights else None,
        "weights_reason": None if weights else "packed without weights",
        "files": hashes,
    }
    files[MANIFEST] = _json(manifest)
    target = Path(output) if output is not None else Path(f"{folder.name}_v{version}.zip")
    written = write_archive(target, folder.name, files)
    changed = [name for name, digest in hashes.items() if written[name] != digest]
    if changed:
        target.unlink()
        raise ValueError(f"{folder / changed[0]} changed while it was packed; nothing was kept, pack again")
    return PackedBundle(target, file_sha256(target), len(files), weights, tuple(left_out))


def _packed_config(path: Path) -> bytes | Path:
    if path.suffix != ".json":
        return path
    try:
        return _json(with_code_path(read_json(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()


def _sha256(source: bytes | Path) -> str:
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else file_sha256(source)


def _readme(name: str, version: str, code: dict[str, str], weights: str | None, settings: bool) -> str:
    told = f", and `{SETTINGS}` the settings they were trained with" if settings else ""
    held = (
        f"`{WEIGHTS}` holds the weights, SHA-256 `{weights}`{told}."
        if weights
        else f"It has no weights: train it first, or put them at `{WEIGHTS}`."
    )
    return f"""# {name} {version}

A MONAI bundle with all the code it needs. {held}

**Research use only. Not a medical device.** What it does is described in `docs/README.md`.

The folder `custom` is the package of covid-ct-bundles {code["version"]}, SHA-256 `{code["sha256"][:12]}`;
in one process all bundles must bring the same. `{MANIFEST}` lists the SHA-256 of every file. A bundle is a
program: run it only if you trust where it comes from. `scripts/verify_bundle.py` of the repository checks it
before.

## Install

Python 3.10 to 3.13. `configs/metadata.json` names the versions that it was tested with.

```
python -m pip install -r requirements.txt
```

## Run

In this folder. DATA is a folder with CT scans, masks and `datalist.json`; SCANS is one with CT scans.

```
python -m monai.bundle run training --config_file configs/train.json \\
    --logging_file configs/logging.conf --dataset_dir DATA --fold 0
python -m monai.bundle run --config_file "['configs/train.json','configs/evaluate.json']" \\
    --logging_file configs/logging.conf --dataset_dir DATA --fold 0
python -m monai.bundle run --config_file configs/inference.json \\
    --logging_file configs/logging.conf --dataset_dir SCANS --output_dir RESULTS
```

From another folder give the configs with their paths, and this folder as `--bundle_root`.

## What packing changed

`configs/*.json` are those of the repository, but for the key `code_path`, the first lines of `initialize` and
`_requires_` in `network_def`: they make `custom` found from any working directory.
"""
