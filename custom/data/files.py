# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

__all__ = ["atomic_path", "write_json", "write_nifti"]


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it takes its place when the block ends well.

    The data is synced before the rename, so a crash or a full disk leaves the old file or the new one,
    never half of one. The temporary name keeps the suffixes, which writers choose their format by.

    Args:
        path: the file to appear; its folder is created.

    Raises:
        OSError: When the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:])
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files that only their owner may read; give what open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write JSON with four spaces, atomically; NaN and infinity are refused.

    Args:
        path: file to write.
        content: what to write.

    Raises:
        ValueError: When a number is not finite, since JSON has no such thing.
    """
    text = json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_nifti(
    path: str | os.PathLike, array: np.ndarray, affine: np.ndarray, description: str = ""
) -> None:
    """Write a volume as NIfTI, atomically, with its affine in both forms and millimetres as its unit.

    Args:
        path: file to write, .nii or .nii.gz.
        array: (I, J, K); a plain slice (I, J) becomes a volume of one.
        affine: 4x4 voxel to patient (RAS, mm).
        description: for the header, at most 79 letters.
    """
    image = nib.Nifti1Image(array if array.ndim == 3 else array[..., None], affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    with atomic_path(path) as temporary:
        nib.save(image, temporary)
