# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Permissions that hold for the superuser too, as whom tests run in containers."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

__all__ = ["as_ordinary_user", "read_only", "unreadable"]

# Linux's interface of capabilities, version 3: what lets the superuser pass over permissions.
_VERSION = 0x20080522
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Within the block permissions hold for this thread, and what it starts, as for any owner of files.

    The superuser gives up the right to pass over them, and takes it back at the end. Programs that are
    started have it again; processes that are only forked do not. On other systems than Linux the superuser's
    test is skipped.
    """
    if os.geteuid() != 0:
        yield
        return
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        before = _capabilities(libc)
    except (AttributeError, OSError):
        pytest.skip("permissions do not hold for the superuser of this system")
    less = (_Sets * 2)(*(_Sets(s.effective, s.permitted, s.inheritable) for s in before))
    less[0].effective &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    _call(libc.capset, less)
    try:
        yield
    finally:
        _call(libc.capset, before)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """An existing folder that nothing can be written into, for whoever runs the block."""
    with _mode(folder, 0o555), as_ordinary_user():
        assert not os.access(folder, os.W_OK, effective_ids=True)
        yield folder


@contextmanager
def unreadable(*files: Path) -> Iterator[None]:
    """Files that cannot be opened, for whoever runs the block."""
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(_mode(file, 0o000))
        stack.enter_context(as_ordinary_user())
        for file in files:
            with pytest.raises(PermissionError):
                file.open("rb")
        yield


@contextmanager
def _mode(path: Path, mode: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


def _capabilities(libc: ctypes.CDLL) -> ctypes.Array:
    sets = (_Sets * 2)()
    _call(libc.capget, sets)
    return sets


def _call(function, sets: ctypes.Array) -> None:
    if function(ctypes.byref(_Header(_VERSION, 0)), sets):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
