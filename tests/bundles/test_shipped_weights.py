# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The weights that come with the bundles: what they are, and that they see what is plain to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from custom.bundle.loading import describe_misfit, read_weights
from custom.bundle.settings import read_settings
from custom.data.files import file_sha256

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path.parent for path in ROOT.glob("bundles/*/configs"))
LIMIT = 64_000_000  # bytes


@pytest.fixture(params=BUNDLES, ids=lambda path: path.name)
def bundle(request) -> Path:
    return request.param


def infer(bundle: Path, scans: Path, output: Path, *names: str) -> None:
    configs = [str(bundle / "configs" / f"{name}.json") for name in ("inference", *names)]
    words = ["-m", "monai.bundle", "run", "--config_file", str(configs), "--bundle_root", str(bundle)]
    words += ["--dataset_dir", str(scans), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_they_fit_are_small_and_documented(bundle):
    file = bundle / "models" / "model.pt"
    weights = read_weights(file)
    assert file.stat().st_size < LIMIT
    assert {value.dtype for value in weights.values() if value.ndim > 1} == {torch.float16}
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser["bundle_root"] = str(bundle)
    network = parser.get_parsed_content("network_def")
    assert not describe_misfit(weights, network)
    settings = read_settings(file)
    side = 352 if "ncovsegnet" in bundle.name else 256
    assert settings["hu_window"] == [-1100, 300] and settings["image_size"] == [side, side]
    assert "research" in (bundle / "models" / "LICENSE").read_text(encoding="utf-8")
    card = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert file_sha256(file) in card, "the card is that of these weights"


def test_slices_of_real_patients(bundle, ct_data, tmp_path):
    """Of the same hospital: one patient with opacity in most of both lungs, one in little of them."""
    percent = {}
    for patient in ("A046441", "A048383"):
        infer(bundle, ct_data / "covid_hu_slices" / patient, tmp_path / patient)
        reports = [json.loads(f.read_text()) for f in (tmp_path / patient).rglob("*_report.json")]
        percent[patient] = [report["opacity_percent_of_lung"]["total"] for report in reports]
        assert len(reports) == 2
    assert min(percent["A046441"]) > 40, percent
    assert min(percent["A048383"]) > 1 and max(percent["A048383"]) < 30, percent


def test_slices_that_they_were_trained_on(bundle, ct_data, tmp_path):
    """Trained weights find what they were shown; it says nothing of other slices."""
    source = ct_data / "covid_semiseg_train"
    (tmp_path / "images").mkdir()
    names = [path.stem for path in sorted((source / "images").iterdir())[:6]]
    dice = []
    for name in names:
        with Image.open(source / "images" / f"{name}.jpg") as picture:
            upright = Image.fromarray(np.asarray(picture.convert("L")).T)
            upright.save(tmp_path / "images" / f"{name}.png")
    infer(bundle, tmp_path / "images", tmp_path / "out", "inference_slices")
    for name in names:
        (mask,) = (source / "masks").glob(f"{name}.*")
        with Image.open(mask) as truth, Image.open(tmp_path / "out" / "masks" / f"{name}.png") as found:
            t, p = np.asarray(truth.convert("L")).T > 127, np.asarray(found) > 127
        dice.append(2 * (t & p).sum() / (t.sum() + p.sum()))
    assert np.mean(dice) > 0.6, dice
