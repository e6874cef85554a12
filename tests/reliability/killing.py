# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Commands that are killed over and over at random, and started again, until their result is there."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wholeness import differences, leftovers, torn_files

from custom.data.files import file_sha256

__all__ = ["Account", "Command", "kill_at_random", "run_command"]


@dataclass
class Account:
    """What was tried, and what was lost.

    Args:
        name: of the row.
        tried: in a few words.
        lost: one line for each loss.
        seconds: how long it took.
    """

    name: str
    tried: str = ""
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Command:
    """A command line of this repository, run in a copy of this process.

    The copy has torch and MONAI imported already, which is most of a short command's time; all else is as if
    it were started anew.

    Args:
        module: run as ``python -m``, or a script's path.
        words: its arguments.
    """

    module: str
    words: Sequence[str]

    def start(self, log: Path) -> int:
        """Start it; returns the process id."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.argv = [self.module, *self.words]
            try:
                if self.module.endswith(".py"):
                    runpy.run_path(self.module, run_name="__main__")
                else:
                    runpy.run_module(self.module, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:
                try:
                    sys.excepthook(type(error), error, error.__traceback__)
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 1
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
        raise AssertionError


def run_command(command: Command, log: Path) -> tuple[int, float]:
    """Run it to its end; returns its exit code and the seconds it took."""
    started = time.monotonic()
    _, status = os.waitpid(command.start(log), 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def kill_at_random(
    name: str,
    make: Callable[[Path], Command],
    folder: Path,
    kills: int,
    chance: random.Random,
    checkpoints: bool = False,
    progress: Callable[[str], None] = print,
) -> Account:
    """Kill a command at random moments and start it again, and compare with a run that was left alone.

    A quarter of the kills wait for a file being written and come then. Where there are checkpoints, after a
    quarter of the kills the latest is cut off or has a bit turned over, as a failing disk does it.

    Args:
        name: of the account.
        make: makes the command that writes to a folder.
        folder: for the runs.
        kills: how many.
        chance: decides when.
        checkpoints: whether the command writes ``checkpoint_latest.pt``.
        progress: gets a line now and then.
    """
    account, started = Account(name), time.monotonic()
    whole, log = folder / "whole", folder / "log.txt"
    folder.mkdir(parents=True)
    code, length = run_command(make(whole), log)
    if code:
        account.lost.append(f"it does not even run undisturbed: exit code {code}; {_tail(log)}")
        return account
    done = writing = finished = left = 0
    damaged: set[str] = set()  # a run that is killed early leaves the damaged file as it was
    while done < kills:
        run = folder / f"run_{finished}"
        while True:
            # The last run is let through to its end when enough have been killed.
            pid = make(run).start(log)
            at_a_write = chance.random() < 0.25
            died, status = _wait(pid, chance.uniform(0, length), run if at_a_write else None)
            if not died:
                break
            done, writing = done + 1, writing + at_a_write
            account.lost += torn_files(run, damaged)
            torn = _tear_a_checkpoint(run, chance) if checkpoints and chance.random() < 0.25 else None
            if torn is not None:
                damaged.add(file_sha256(torn))
            progress(
                f"{name}: kill {done} of {kills}{' in a write' if at_a_write else ''}"
                f"{', then a checkpoint damaged' if torn else ''}"
            )
            if done == kills:
                code, _ = run_command(make(run), log)
                status = code
                break
        if status:
            account.lost.append(f"started again it ends with exit code {status}; {_tail(log)}")
            break
        finished += 1
        account.lost += differences(whole, run)
        left += len(leftovers(run))
        shutil.rmtree(run)  # checkpoints of all runs together would fill a disk
        progress(f"{name}: run to its end, {'equal' if not account.lost else 'NOT EQUAL'}")
    account.tried = f"{done} kills ({writing} in a write"
    account.tried += f", {len(damaged)} checkpoints damaged)" if checkpoints else ")"
    account.tried += f", {finished} finished; {left} hidden leftovers"
    account.seconds = time.monotonic() - started
    return account


def _tail(log: Path) -> str:
    return f"its last words: {log.read_text(encoding='utf-8', errors='replace')[-1500:]}"


def _wait(pid: int, seconds: float, watched: Path | None) -> tuple[bool, int]:
    """Kill a process after some time, or at the first write after it; False and the status if it ended."""
    end = time.monotonic() + seconds
    before = set(leftovers(watched)) if watched else set()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return False, os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end and (watched is None or set(leftovers(watched)) - before):
            break
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return True, 0


def _tear_a_checkpoint(run: Path, chance: random.Random) -> Path | None:
    """Damage one latest checkpoint that has another before it, and is still needed; returns it."""
    manifest = run / "manifest.json"  # of a transfer, with the stages that are finished and not read again
    finished = json.loads(manifest.read_text(encoding="utf-8"))["stages"] if manifest.is_file() else {}
    found = [
        file
        for file in sorted(run.rglob("checkpoint_latest.pt"))
        if file.with_name("checkpoint_previous.pt").is_file() and file.parent.parent.name not in finished
    ]
    if not found:
        return None
    content = bytearray(found[-1].read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content) // 4, len(content) // 2)] ^= 1 << chance.randrange(8)
    found[-1].write_bytes(content)
    return found[-1]
