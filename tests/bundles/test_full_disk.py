# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A full disk in the midst of a training."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from bundle_tester import Bundle

from custom.console import describe_error

BUNDLE = Bundle(
    "covid_ct_attention_unet_segmentation",
    reduced={"image_size": [32, 32], "network_def::channels": [4, 4, 8, 8, 8], "batch_size": 4},
)


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
