# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whether files are whole, and whether two results are the same to the last bit."""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from custom.data.files import file_sha256

__all__ = ["differences", "leftovers", "torn_files"]

# Names and times that differ from run to run by design.
UNLIKE = ("tensorboard", "content.json", "log.txt", "lock")


def visible_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def torn_files(folder: Path, damaged: Collection[str] = ()) -> list[str]:
    """Files below a folder that can be seen and not be read, but for those of these SHA-256."""
    torn = [file for file in visible_files(folder) if not _is_whole(file)]
    return [f"{file.relative_to(folder)} is torn" for file in torn if file_sha256(file) not in damaged]


def leftovers(folder: Path) -> list[Path]:
    """What killed writers left behind; it is hidden and taken for nothing."""
    return [path for path in folder.rglob(".partial-*") if path.exists()]


def _is_whole(file: Path) -> bool:
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".pt":
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        elif file.suffix == ".gz":
            gzip.decompress(file.read_bytes())
        elif file.suffix == ".npy":
            np.load(file)
        elif file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()
    except Exception:
        return False
    return True


def differences(whole: Path, killed: Path) -> list[str]:
    """How the results below two folders differ: their files' names and contents.

    Checkpoints and weights are compared tensor by tensor, the state of optimiser, schedule, early stopping
    and random generators included.
    """
    found = []
    one, other = (
        {
            str(file.relative_to(folder)): file
            for file in visible_files(folder)
            if not any(word in str(file.relative_to(folder)) for word in UNLIKE)
        }
        for folder in (whole, killed)
    )
    found += [f"{name} is missing" for name in one.keys() - other.keys()]
    found += [f"{name} is there besides" for name in other.keys() - one.keys()]
    for name in sorted(one.keys() & other.keys()):
        if name.endswith(".pt") and "/cache/" not in f"/{name}":
            try:
                contents = [torch.load(files[name], weights_only=True) for files in (one, other)]
            except Exception as error:  # whatever the bytes of a torn file happen to mean
                found.append(f"{name} cannot be read: {error}")
                continue
            found += [f"{name}: {where} differs" for where in _unequal(*contents)]
        elif name.endswith(".pt"):
            continue  # prepared cases hold the paths they were made from
        elif _digest(one[name], whole) != _digest(other[name], killed):
            found.append(f"{name} differs")
    return found


def _digest(file: Path, folder: Path) -> str:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return hashlib.sha256(content.replace(str(folder).encode(), b"")).hexdigest()


def _unequal(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [where]
        return [line for key in one for line in _unequal(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [where]
        pairs = zip(one, other, strict=True)
        return [line for i, (a, b) in enumerate(pairs) for line in _unequal(a, b, f"{where}/{i}")]
    return [] if one == other or (one != one and other != other) else [where]
