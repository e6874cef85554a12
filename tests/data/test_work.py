# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

from custom.data.work import work_through
from tests.interrupting import interrupt_command, interruption_faults

PROGRAM = """
import sys, time
from pathlib import Path
import custom
from custom.data.work import work_through
if __name__ == "__main__":
    custom.console.start()
    for _ in work_through(time.sleep, [0, 0, 3600, 3600], 2, "working", "item"):
        Path(sys.argv[1]).touch()
"""


def test_an_interrupt_does_not_wait_for_the_workers_and_they_are_silent(tmp_path):
    ready = tmp_path / "ready"
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, '.')\n{PROGRAM}", str(ready)]
    assert not interruption_faults(*interrupt_command(words, ready.exists))


def test_results_are_those_of_a_plain_loop():
    for workers in (0, 2):
        assert sorted(work_through(abs, [-1, 2, -3], workers, "", "")) == [1, 2, 3]
