# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Kill, starve and feed rubbish to every entry point, and account for what was lost.

make test-reliability                                   all of it, under half an hour on two idle CPU cores
python tests/reliability/run.py --only kills --seed 7   a part, with the same random moments as another time

The exit code is 0 when nothing was lost. It needs up to 6 GB in the folder for temporary files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # weights are promised to be equal at the same number of threads
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(folder) for folder in (tests.parent, tests, tests / "bundles", tests / "reliability")]
    from suite import main

    sys.exit(main(__doc__))
