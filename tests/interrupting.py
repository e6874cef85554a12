# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Ctrl-C as a terminal sends it: to a command and all processes it has started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["interrupt_command", "interruption_faults"]

LINE = "interrupted; the same command continues from what is finished"


def interrupt_command(
    words: Sequence[str], ready: Callable[[], bool], delay: float = 0.0, timeout: float = 180.0
) -> tuple[int, str, str]:
    """Start a command, interrupt it some time after it is ready, and wait for its end.

    Args:
        words: the command.
        ready: whether it has come far enough.
        delay: seconds from then on.
        timeout: seconds until it must be ready, and again until it must have ended.

    Returns:
        Its exit code, standard output and standard error.
    """
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # or the signal would reach whoever runs this
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parent.parent,
        # A shell's background jobs ignore Ctrl-C, and what they start does, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + timeout
        while not ready() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out, err


def interruption_faults(code: int, out: str, err: str) -> list[str]:
    """What is wrong with the end of an interrupted command; [] when it is one line and exit code 130."""
    found = [] if code == 130 else [f"exit code {code} after Ctrl-C"]
    if "Traceback" in out + err or "Error" in out + err:
        found.append(f"a traceback after Ctrl-C: {(out + err)[-1500:]}")
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    if [line for line in lines if "interrupted" in line] != [LINE] or lines[-1] != LINE:
        found.append(f"not one line after Ctrl-C: {err[-500:]}")
    return found
