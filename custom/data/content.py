# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Keys that change when a case's files change."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai.data import pickle_hashing
from monai.transforms import Compose

from custom.data.files import write_json

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
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            self.known[str(path)] = entry = [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
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


def transform_key(transform: Compose) -> str:
    """A string that changes when a deterministic transform or one of its parameters does.

    Args:
        transform: what prepares a case.

    Raises:
        ValueError: When a transform holds something without a lasting identity, such as a lambda.
    """
    try:
        return str(pickle_hashing(transform.flatten().transforms).decode())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"a transform cannot be part of a cache key ({error}); "
            "name a function of a module instead of a lambda"
        ) from error
