# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Rows of the table of what was tried and what was lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from bundle_tester import ROOT
from killing import Account

__all__ = ["print_table", "run_tests", "say"]


def run_tests(name: str, files: list[str], what: str, **environment: str) -> Account:
    """Run tests as one row of the account, and say each that has ended."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-o", "addopts=-v", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, said = [], ""
    for line in process.stdout or ():
        output.append(line)
        file = line.split("::")[0]
        if "::" in line and file != said:
            said = file
            say(f"{name}: {file}")
    code = process.wait()
    text = "".join(output)
    lost = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    if code and not lost:
        lost = [f"pytest ended with exit code {code}: {text[-500:]}"]
    if lost:
        print(text[-5000:])
    passed = (re.findall(r"(\d+) passed", text) or ["0"])[-1]
    return Account(name, f"{passed} {what}", lost, time.monotonic() - started)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def print_table(accounts: list[Account]) -> None:
    print(f"\n{'what':52}{'tried':75}{'lost':10}time")
    for account in accounts:
        lost = f"{len(account.lost)} !" if account.lost else "nothing"
        print(f"{account.name:52}{account.tried:75}{lost:10}{account.seconds:.0f} s")
    everything = [f"{account.name}: {line}" for account in accounts for line in account.lost]
    said = "\n".join(everything) if everything else "nothing"
    print(f"\nlost: {said}")
