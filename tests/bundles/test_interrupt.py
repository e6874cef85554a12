# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during a training with workers: one line, and the same command goes on."""

from __future__ import annotations

import random

import torch
from bundle_tester import Bundle, bundle_command

from tests.interrupting import interrupt_command, interruption_faults

BUNDLE = Bundle(
    "covid_ct_attention_unet_segmentation",
    reduced={"image_size": [32, 32], "network_def::channels": [2, 2, 2, 2, 2], "batch_size": 4},
)


def test_an_interrupted_training_says_so_in_one_line_and_goes_on(cohort, tmp_path):
    """At any moment after the first checkpoint: in a step, in validation, waiting for data, in a write."""
    paths = {**BUNDLE.training_paths(tmp_path, cohort), "num_workers": 2, "val_interval": 2}
    latest = tmp_path / "models" / "checkpoint_latest.pt"
    words = bundle_command(BUNDLE, ("train",), {**paths, "epochs": 100_000})
    delay = random.uniform(0, 1)
    ended = interrupt_command(words, latest.is_file, delay)
    assert not interruption_faults(*ended), f"after {delay} s"
    done = torch.load(latest, weights_only=True)["epoch"]
    BUNDLE.workflow("train", ("train",), {**paths, "num_workers": 0, "epochs": done + 1}).run()
    assert torch.load(latest, weights_only=True)["epoch"] == done + 1
    assert not list(tmp_path.rglob(".partial-*"))
