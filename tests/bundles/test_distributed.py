# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Two gloo processes on CPU, started by torchrun, do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_tester import ROOT, Bundle, bundle_command, run_bundle

BUNDLES = [
    Bundle(
        "covid_ct_scoatnet_segmentation",
        reduced={"image_size": [32, 32], "network_def::channels": [8, 8, 8, 8, 8], "batch_size": 2},
    ),
    Bundle(
        "covid_ct_attention_unet_segmentation",
        reduced={"image_size": [32, 32], "network_def::channels": [4, 4, 8, 8, 8], "batch_size": 2},
    ),
]


def torchrun(bundle: Bundle, names: tuple[str, ...], overrides: dict) -> subprocess.CompletedProcess:
    command = bundle_command(bundle, names, overrides)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        launcher + command[1:],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_two_processes_train_one_model_and_score_it_as_one_does(bundle, cohort, tmp_path):
    paths = bundle.training_paths(tmp_path, cohort)
    done = torchrun(bundle, ("train", "multi_gpu_train"), {**paths, "epochs": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "models" / "checkpoint_latest.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    # Each process draws its half of an epoch's slices.
    slices = len(list((tmp_path / "cache" / "slices").glob("*/image.npy")))
    assert slices == 4 and not any(key.startswith("module.") for key in checkpoint["network"])

    done = torchrun(bundle, ("train", "evaluate", "multi_gpu_evaluate"), paths)
    assert done.returncode == 0, done.stderr[-3000:]
    two = scores(tmp_path / "eval")
    single = {**paths, "output_dir": str(tmp_path / "single")}
    assert run_bundle(bundle, ("train", "evaluate"), single).returncode == 0
    one = scores(tmp_path / "single")
    assert [row["name"] for row in two["cases"]] == [row["name"] for row in one["cases"]]
    for row, same in zip(two["cases"], one["cases"], strict=True):
        assert row == pytest.approx(same, abs=1e-6)
    assert two["slice_counts"] == one["slice_counts"]
