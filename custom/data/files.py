# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

__all__ = [
    "atomic_folder",
    "atomic_path",
    "file_sha256",
    "is_denied",
    "refuse_denied",
    "write_json",
    "write_nifti",
]


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, read block by block.

    Args:
        path: the file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_denied(path: str | os.PathLike) -> bool:
    """Whether a file or folder is there and its permissions keep this user from reading it.

    Args:
        path: the file or folder.
    """
    try:
        # Tried, since access control lists and network file systems have rules of their own; without waiting,
        # as a pipe would have it.
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def refuse_denied(paths: Iterable[str | os.PathLike]) -> None:
    """Raise for the first of these files and folders that this user may not read.

    Args:
        paths: where to look.

    Raises:
        PermissionError: With the path.
    """
    for path in paths:
        if is_denied(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))


@contextmanager
def atomic_path(path: str | os.PathLike, keep: str | os.PathLike | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it takes its place when the block ends well.

    The data is synced before the rename, so a crash or a full disk leaves the old file or the new one,
    never half of one. The temporary name keeps the suffixes, which writers choose their format by.

    Args:
        path: the file to appear; its folder is created.
        keep: where the file goes that is replaced, once the new one is safe on the disk.

    Raises:
        OSError: In one line with the path, when it cannot be written, or not as a whole.
    """
    path = Path(path)
    _make_folder(path.parent)
    suffix = "".join(path.suffixes[-2:])
    with _writing(path):
        handle, name = tempfile.mkstemp(prefix=".partial-", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _writing(path):
            yield temporary
            _sync(temporary)
        # mkstemp makes files that only their owner may read; give what open() would have given.
        temporary.chmod(0o666 & ~_umask())
        if keep is not None and path.is_file():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill; it takes its place when the block ends well.

    Args:
        path: the folder to appear; one that is there is replaced.

    Raises:
        OSError: In one line with the path, when it cannot be written, or not as a whole.
    """
    path = Path(path)
    _make_folder(path.parent)
    with _writing(path):
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
    try:
        with _writing(path):
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
        _sync_folder(temporary)
        temporary.chmod(0o777 & ~_umask())
        _take_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _take_place(temporary: Path, path: Path) -> None:
    """Rename a folder to where another one may be, or appear at any moment from another process."""
    while True:
        if path.exists():
            # Out of the way first: removing takes longer than renaming, and whoever reads finds one of them.
            with suppress(FileNotFoundError):  # another process was faster
                path.rename(temporary / "replaced")
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary / "replaced", ignore_errors=True)
        else:
            break
    shutil.rmtree(path / "replaced", ignore_errors=True)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # "File exists" says little to somebody who asked for a folder.
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says what could not be written; the libraries that write say no more than that something failed."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of its file writer out of a full disk.
        found = error if isinstance(error, OSError) else error.__context__
        if isinstance(found, OSError) and found.errno is not None:
            raise OSError(found.errno, os.strerror(found.errno), str(path)) from None
        if isinstance(found, OSError) or "inline_container" in str(error):
            raise OSError(f"{path} cannot be written as a whole ({error}); is the disk full?") from None
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    # The rename itself is in the folder. Some network file systems do not sync folders; the files are whole
    # there all the same.
    try:
        _sync(path)
    except OSError:
        pass


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
