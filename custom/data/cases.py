# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whole cases, each prepared once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Compose, reset_ops_id
from monai.utils import enums
from torch.utils.data import Dataset

from custom.data.content import ContentHasher, transform_key
from custom.data.files import atomic_path

__all__ = ["CaseDataset"]

logger = logging.getLogger(__name__)

# MONAI keeps numpy arrays and its own enumerations in an image's metadata and in the trace of its transforms.
# Rebuilding these runs no code of the file's, so they are safe to add to what weights_only admits.
_SAFE = [
    np.ones(1).__reduce__()[0],  # _reconstruct, which has moved between numpy versions
    np.float64(1).__reduce__()[0],  # scalar
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"},
    *(kind for kind in vars(enums).values() if isinstance(kind, type) and issubclass(kind, Enum)),
]


class CaseDataset(Dataset):
    """Cases after deterministic transforms, with the trace that inverts them, kept on disk.

    Like MONAI's PersistentDataset, but the key is the content of the files and the transforms, writing is
    atomic, and reading is ``weights_only`` (PersistentDataset recomputes every volume then, because NIfTI
    metadata holds numpy arrays).

    Args:
        data: cases with ``image`` and further paths.
        transform: deterministic transforms.
        cache_dir: folder for prepared cases.
    """

    def __init__(
        self, data: Sequence[Mapping[str, Any]], transform: Callable, cache_dir: str | os.PathLike
    ) -> None:
        self.data = list(data)
        self.transform = transform if isinstance(transform, Compose) else Compose(transform)
        self.cache_dir = Path(cache_dir)
        self._hasher = ContentHasher(cache_dir)
        self._transform_key = transform_key(self.transform)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        case = self.data[index]
        key = self._hasher.key(case, str(case.get("name", "")), self._transform_key)
        self._hasher.save()
        path = self.cache_dir / f"{key}.pt"
        if path.is_file():
            try:
                with torch.serialization.safe_globals(_SAFE):
                    return torch.load(path, weights_only=True)
            except Exception as error:  # torn files raise whatever their bytes happen to mean
                logger.warning(f"{path} cannot be read ({type(error).__name__}); the case is prepared again")
        prepared = self.transform(dict(case))
        # The trace names the transforms by their address in this process; another one must invert it too.
        reset_ops_id(prepared)
        with atomic_path(path) as temporary:
            torch.save(prepared, temporary)
        return prepared
