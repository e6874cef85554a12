# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from custom.data.phantom import make_phantom

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "prepare_covid.py"
main = runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def phantom():
    return make_phantom((36, 32, 5), (10, 11, 50), seed=1, burden=0.7)


def write(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


@pytest.fixture
def mosmed(tmp_path, phantom):
    for number in (255, 256, 257):
        write(tmp_path / "in" / "studies" / f"study_0{number}.nii.gz", phantom.image, phantom.affine)
        mask = (phantom.label > 0).astype(np.int16)
        write(tmp_path / "in" / "masks" / f"study_0{number}_mask.nii.gz", mask, phantom.affine)
    return ["mosmed", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]


def test_exit_codes(mosmed, tmp_path, capsys):
    assert main([*mosmed, "--testing", "1", "--folds", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 volumes of 2 patients for training in 2 folds" in out
    assert "1 volumes of 1 patients for testing" in out
    (tmp_path / "in" / "studies" / "study_0256.nii.gz").unlink()
    assert main([*mosmed, "--testing", "1"]) == 1
    captured = capsys.readouterr()
    assert "failed, study_0256: its mask is there" in captured.out and "Traceback" not in captured.err
    assert json.loads((tmp_path / "out" / "skipped.json").read_text())[0]["failed"] is True
    assert main(mosmed) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: 10 studies are asked for testing, it can be 0 to 1 of the 2 with a mask"


def test_nothing_to_prepare(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    assert main(["medseg", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    what = f"no case of MedSeg COVID-19 CT under {tmp_path / 'in'} can be used, 0 left out"
    assert (captured.out, captured.err) == ("", f"error: {what}\n")


def test_covid_ct_seg(tmp_path, phantom, capsys):
    grey = np.clip((phantom.image + 1250.0) / 1500 * 255, 0, 255).astype(np.uint8)
    for name, image in (("coronacases_001", phantom.image), ("radiopaedia_7_85703_0", grey)):
        for folder, array in (
            ("COVID-19-CT-Seg_20cases", image),
            ("Infection_Mask", (phantom.label > 0).astype(np.uint8)),
            ("Lung_Mask", phantom.lungs),
        ):
            write(tmp_path / folder / f"{name}.nii.gz", array, phantom.affine)
    words = ["covid-ct-seg", "--source", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--testing"]) == 0
    out = capsys.readouterr().out
    assert "1 volumes of 1 patients for testing\n" in out and "left out, windowed volume: 1" in out
    assert main([*words, "--volumes-as-slices", "--orientation", "upright"]) == 0
    assert "slices of 1 patients for training in 1 folds" in capsys.readouterr().out
    for file in (tmp_path / "out" / "slices" / "images").iterdir():
        shown = np.asarray(Image.open(file))
        assert np.array_equal(shown, grey[:, :, int(file.stem[-4:])])


def test_medseg(tmp_path, phantom, capsys):
    write(tmp_path / "in" / "rp_im" / "1.nii.gz", phantom.image, phantom.affine)
    write(tmp_path / "in" / "rp_msk" / "1.nii.gz", 2 * (phantom.label > 0).astype(np.uint8), phantom.affine)
    words = ["medseg", "--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--keep-classes", "--without-effusion"]) == 0
    labels = json.loads((tmp_path / "out" / "datalist.json").read_text())["labels"]
    assert labels == {"0": "background", "1": "ground-glass opacity", "2": "consolidation"}
    assert main([*words, "--volumes-as-slices", "--window", "400", "-1000"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the window must grow, got 400 to -1000 HU"
    assert main([*words, "--volumes-as-slices", "--window", "-600", "-500"]) == 0
    shown = next((tmp_path / "out" / "slices" / "images").iterdir())
    hu = phantom.image[:, :, int(shown.stem[-4:])].T
    grey = np.asarray(Image.open(shown))
    assert (grey[hu <= -600] == 0).all() and (grey[hu >= -500] == 255).all()
