# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread a process, the real data where it is, and a small synthetic cohort."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would the processes that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def ct_data() -> Path:
    """The folder of real CT data, or a skip with the reason."""
    folder = os.environ.get("CT_DATA")
    if not folder:
        pytest.skip("CT_DATA is not set: it names the folder of real CT data")
    if not Path(folder).is_dir():
        pytest.fail(f"CT_DATA names {folder}, which is no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six small synthetic chest CTs, opacity masks and datalist.json with three folds."""
    from custom.data.phantom_cohort import write_cohort

    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 6, seed=3, shape=(48, 48, 6), spacing=(7.2, 7.2, 45.0), n_folds=3)
    return folder
