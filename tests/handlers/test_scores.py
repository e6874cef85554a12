# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from custom.handlers import ScoreReport
from custom.reporting.scores import read_scores

# Rows run to posterior, slices lie along the first axis, as an unturned sagittal array would have them.
AFFINE = torch.tensor([[0.0, 2, 0, 0], [0, 0, -3, 0], [5, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)


def run(report: ScoreReport, *cases: tuple[str, dict]) -> None:
    report._start(None)
    for name, output in cases:
        report(SimpleNamespace(state=SimpleNamespace(batch=[{"name": name}], output=[output])))
    report.finish(None)


def volume(*filled: tuple, value: float = 1.0) -> MetaTensor:
    data = torch.zeros(1, 4, 6, 8)
    for box in filled:
        data[(0, *box)] = value
    return MetaTensor(data, affine=AFFINE)


def test_scores_masks_and_geometry_of_volumes(tmp_path):
    truth = volume((1, slice(0, 2), slice(0, 4)))  # 8 voxels on slice 1
    soft = volume((1, slice(0, 2), slice(0, 2)), (3, 0, 0), value=0.75)  # 4 of them, and 1 on slice 3
    output = {"label": truth, "pred": (soft >= 0.5).float(), "probability": soft}
    run(ScoreReport(tmp_path), ("b", output), ("a", {"label": truth, "pred": truth}))
    content = json.loads((tmp_path / "scores.json").read_text())
    a, b = content["cases"]
    assert (a["name"], b["name"]) == ("a", "b") and a["dice"] == 1 and a["mae"] == 0
    assert b["dice"] == pytest.approx(2 * 4 / (5 + 8)) and b["slices"] == 4
    assert b["true_ml"] == pytest.approx(8 * 30 / 1000)
    # 4 voxels miss 0.25 of the truth, 4 miss all of it, one is 0.75 too much
    assert b["mae"] == pytest.approx((4 * 0.25 + 4 + 0.75) / 192)
    assert content["summary"]["per_slice"]["empty_truths"] == 6
    mask = nib.load(tmp_path / "predictions" / "b.nii.gz")
    assert np.array_equal(mask.affine, AFFINE.numpy()) and np.count_nonzero(mask.get_fdata()) == 5
    back = read_scores(tmp_path / "scores.json")
    assert back[1].row == b and back[1].slices.sum(axis=0)[0] == 4


def test_plain_slices_have_no_millimetres(tmp_path):
    truth = MetaTensor(torch.zeros(1, 5, 7))
    truth[0, 1, 2:4] = 1
    run(ScoreReport(tmp_path), ("s", {"label": truth, "pred": truth}))
    row = json.loads((tmp_path / "scores.json").read_text())["cases"][0]
    assert row["dice"] == 1 and row["hd95_mm"] is None and row["true_ml"] is None
    pixels = np.asarray(Image.open(tmp_path / "predictions" / "s.png"))
    assert pixels.shape == (5, 7) and pixels.sum() == 2 * 255


def test_a_mask_that_is_not_its_probability_is_refused(tmp_path):
    truth = volume((0, 0, 0))
    with pytest.raises(ValueError, match="'pred' is not 'probability'"):
        run(ScoreReport(tmp_path), ("s", {"label": truth, "pred": truth, "probability": truth * 0.4}))
    assert not (tmp_path / "scores.json").exists()


def test_nothing_is_kept_of_an_earlier_run(tmp_path):
    truth = volume((0, 0, 0))
    report = ScoreReport(tmp_path)
    for _ in range(2):
        run(report, ("s", {"label": truth, "pred": truth}))
    assert len(read_scores(tmp_path / "scores.json")) == 1


def test_what_is_no_file_of_scores_is_refused(tmp_path):
    (tmp_path / "scores.json").write_text('{"cases": []}')
    with pytest.raises(ValueError, match="no file of scores"):
        read_scores(tmp_path / "scores.json")
