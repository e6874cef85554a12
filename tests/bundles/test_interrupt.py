# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and a full disk, in the midst of a training."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from bundle_tester import ROOT, Bundle, bundle_command

from custom.console import describe_error

BUNDLE = Bundle(
    "covid_ct_attention_unet_segmentation",
    reduced={"image_size": [32, 32], "network_def::channels": [4, 4, 8, 8, 8], "batch_size": 4},
)


def listen_to_interrupts() -> None:
    # A shell that starts jobs in the background makes them deaf, and that would be inherited.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_in_one_line_and_leaves_a_checkpoint(cohort, tmp_path):
    paths = {**BUNDLE.training_paths(tmp_path, cohort), "epochs": 1000, "num_workers": 1}
    process = subprocess.Popen(
        bundle_command(BUNDLE, ("train",), paths),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
    )
    checkpoint = tmp_path / "models" / "checkpoint_latest.pt"
    while not checkpoint.is_file() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    last = errors.rstrip().splitlines()[-1]
    assert last == "interrupted; the same command continues from what is finished"
    assert "Traceback" not in errors and "KeyboardInterrupt" not in errors
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert not [file for file in (tmp_path / "models").iterdir() if file.name.startswith(".partial-")]
    again = BUNDLE.workflow("train", ("train",), {**paths, "epochs": epoch + 1, "num_workers": 0})
    again.run()
    assert torch.load(checkpoint, weights_only=True)["epoch"] == epoch + 1


def test_a_full_disk_is_named_and_takes_nothing_away(cohort, tmp_path):
    paths = BUNDLE.training_paths(tmp_path, cohort)
    BUNDLE.workflow("train", ("train",), {**paths, "epochs": 1}).run()
    before = {file: file.read_bytes() for file in sorted((tmp_path / "models").iterdir())}
    more = BUNDLE.workflow("train", ("train",), {**paths, "epochs": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a file's, which stops writes as well
    try:
        with pytest.raises(Exception) as caught:  # noqa: B017 - what the user sees is checked
            more.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = describe_error(caught.value)
    assert line is not None and Path(line.rsplit(": ", 1)[1]).parent == tmp_path / "models"
    assert line.startswith("File too large: ")
    assert {file: file.read_bytes() for file in sorted((tmp_path / "models").iterdir())} == before
    BUNDLE.workflow("train", ("train",), {**paths, "epochs": 2}).run()
    assert torch.load(tmp_path / "models" / "checkpoint_latest.pt", weights_only=True)["epoch"] == 2
