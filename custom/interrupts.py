# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Ctrl-C among several processes: a terminal sends it to all, and one of them answers."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["catch_up", "deaf_children", "let_one_process_answer"]


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started in this block leave Ctrl-C to this one, which gets it after the block at the latest.

    A terminal sends it to all its processes, and each would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    _hold_interrupt()
    try:
        yield
    finally:
        _allow_interrupt()


def _hold_interrupt() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _allow_interrupt() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _allow_interrupt()


@functools.cache  # such hooks cannot be taken back, so they are made once
def let_one_process_answer() -> None:
    """Make Ctrl-C, which a terminal sends to all its processes, the affair of this one.

    A data loader's worker that it ends prints a traceback, and so does this process, which waits for it.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_hold_interrupt, after_in_parent=_allow_interrupt, after_in_child=_ignore_interrupt
        )


def catch_up(lost: Any) -> None:
    """Raise again soon a KeyboardInterrupt that came where Python can only print and drop it.

    A data loader ends its workers in ``__del__``, and a training would go on after Ctrl-C there.
    """
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    later = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    later.daemon = True
    later.start()
