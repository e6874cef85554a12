# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation

from custom.handlers import StudyReport
from custom.networks import SCOATNet

AFFINE = torch.tensor([[0.0, -2, 0, 9], [-3, 0, 0, 8], [0, 0, 5, -4], [0, 0, 0, 1]], dtype=torch.float64)


def study(shape=(16, 32, 6)) -> tuple[dict, dict]:
    scan = MetaTensor(torch.full((1, *shape), -800.0), affine=AFFINE)
    mask = MetaTensor(torch.zeros(1, *shape), affine=AFFINE)
    mask[0, 2:4, 5:9, 4] = 1
    seen = Orientation("PLS", labels=None)(MetaTensor(torch.rand(1, *shape), affine=AFFINE))
    return {"scan": scan, "name": "s1"}, {"pred": mask, "image": seen}


def run(report: StudyReport, batch: dict, output: dict) -> None:
    report(SimpleNamespace(state=SimpleNamespace(batch=[batch], output=[output])))


def test_mask_numbers_and_picture_of_a_study(tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    network = SCOATNet(channels=(8, 8, 8, 8))
    network.train()
    run(StudyReport(tmp_path / "out", network, "a_bundle", weights), *study())
    folder = tmp_path / "out" / "s1"
    assert sorted(p.name for p in folder.iterdir()) == [
        "s1_opacity.nii.gz",
        "s1_overview.png",
        "s1_report.json",
    ]
    mask = nib.load(folder / "s1_opacity.nii.gz")
    assert np.array_equal(mask.affine, AFFINE.numpy()) and mask.get_data_dtype() == np.uint8
    assert np.argwhere(mask.get_fdata()).min(axis=0).tolist() == [2, 5, 4]
    report = json.loads((folder / "s1_report.json").read_text())
    assert report["opacity_volume_ml"]["total"] == pytest.approx(8 * 30 / 1000)
    assert report["lung_volume_ml"]["total"] is None and report["reasons"]["lung_volume_ml"]
    assert report["model"]["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert network.training, "the report leaves the network as it was"


def test_attention_is_that_of_the_shown_slice(tmp_path):
    batch, output = study()
    for k in range(6):
        output["image"][0, :, :, k] = k / 10
    asked = []

    class Network(torch.nn.Linear):
        shown_attention_maps = ("a",)

        def attention_maps(self, x, names):
            asked.append((float(x.mean()), names))
            return {"a": x}

    run(StudyReport(tmp_path, Network(1, 1)), batch, output)
    assert asked == [(pytest.approx(0.4), ("a",))]  # slice 4 holds the opacity


def test_a_mask_that_was_not_inverted_is_refused_and_nothing_is_written(tmp_path):
    batch, output = study()
    output["pred"] = output["pred"][:, ::2]
    with pytest.raises(ValueError, match="postprocessing must invert"):
        run(StudyReport(tmp_path), batch, output)
    batch, output = study()
    output["pred"].affine = torch.eye(4)
    with pytest.raises(ValueError, match="differ in their affines"):
        run(StudyReport(tmp_path), batch, output)
    assert list(tmp_path.iterdir()) == []
