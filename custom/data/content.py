# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Keys that change when a case's files change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.transforms import Compose

from custom.data.files import file_sha256, write_json

__all__ = ["ContentHasher", "transform_key"]

FILE_KEYS = ("image", "label", "lung")
MEMO = "content.json"


class ContentHasher:
    """Keys for cases: the content of their files, and whatever else is given.

    Hashing hundreds of gigabytes at every start would be work done twice, so a file's digest is
    remembered with its size and modification time and computed again only when one of them changed.

    Args:
        cache_dir: folder in which the digests are remembered.
    """

    def __init__(self, cache_dir: str | os.PathLike) -> None:
        self.memo = Path(cache_dir) / MEMO
        self.changed = False
        try:
            self.known: dict[str, list] = json.loads(self.memo.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or not to be read: digests are computed anew
            self.known = {}

    def key(self, case: Mapping[str, Any], *parts: str) -> str:
        """64 hexadecimal digits for one case.

        Args:
            case: dictionary whose ``image``, ``label`` and ``lung`` are files, folders or lists of files.
            parts: further strings the key depends on.

        Raises:
            OSError: When a file cannot be read.
        """
        key = hashlib.sha256("\0".join(parts).encode())
        for role, path in _files(case):
            key.update(f"\0{role}\0{self._digest(path)}".encode())
        return key.hexdigest()

    def save(self) -> None:
        """Remember the digests computed since the last time."""
        if self.changed:
            write_json(self.memo, self.known)
            self.changed = False

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        entry = self.known.get(str(path))
        if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            self.known[str(path)] = entry = [stat.st_size, stat.st_mtime_ns, file_sha256(path)]
            self.changed = True
        return str(entry[2])


def _files(case: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    for key in FILE_KEYS:
        value = case.get(key)
        for path in [value] if isinstance(value, (str, os.PathLike)) else value or ():
            path = Path(path)
            if path.is_dir():
                yield from ((key, file) for file in sorted(path.rglob("*")) if file.is_file())
            else:
                yield key, path


# What a transform gathers while it works, which says nothing about what it does.
_WORKING_STATE = {"R", "_tracing", "filenames"}


def transform_key(transform: Compose) -> str:
    """A string that changes when a deterministic transform or one of its parameters does.

    It is made of the class names and attributes of the transforms, so it is the same in every process and
    before and after use. (MONAI's pickle_hashing differs once a LoadImage has read a file.)

    Args:
        transform: what prepares a case.

    Raises:
        ValueError: When a transform holds something without a lasting identity, such as a lambda.
    """
    described = [_describe(part) for part in transform.flatten().transforms]
    return hashlib.sha256(json.dumps([monai.__version__, described], sort_keys=True).encode()).hexdigest()


def _describe(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value) if isinstance(value, Enum) else value
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, (torch.dtype, torch.device, np.dtype, os.PathLike, Enum)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_describe(item), sort_keys=True) for item in value)
    named = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    if "<lambda>" in name or "<locals>" in name:
        raise ValueError(
            f"a transform holds {name}, which a cache key cannot tell from others; name a module's function"
        )
    if named is value:
        return name
    return [name, {k: _describe(v) for k, v in sorted(vars(value).items()) if k not in _WORKING_STATE}]
