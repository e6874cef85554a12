# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from custom.bundle.settings import write_settings
from custom.data.phantom import make_phantom
from custom.networks import SCOATNet

NAME = "covid_ct_scoatnet_segmentation"
ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("score", ROOT / "scripts" / "score.py")
score = importlib.util.module_from_spec(spec)
spec.loader.exec_module(score)

AFFINE = np.diag([0.8, 0.8, 5, 1])


def run(folder: Path, *options: str) -> int:
    where = ["--predictions", str(folder / "p"), "--truths", str(folder / "t")]
    return score.main([*where, "--output", str(folder / "out" / "scores"), *options])


def refused(folder: Path, capsys, *options: str) -> str:
    """The one line of an error; nothing may have been written."""
    assert run(folder, *options) == 2
    assert not (folder / "out").exists()
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]


def failed(folder: Path, capsys) -> str:
    """The one line of an error when one of two cases failed; the other is scored."""
    assert run(folder) == 1
    report = json.loads((folder / "out" / "scores.json").read_text())
    assert len(report["cases"]) == len(report["failures"]) == report["summary"]["cases"] == 1
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]
    assert line.startswith("error: 1 of 2 cases failed: slice_2: ")
    assert report["failures"][0]["reason"] in line
    return line


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture
def pictures(tmp_path):
    """Two slices (4, 4), given in an order of names that differs from that of their making."""
    truth, soft = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    truth[0, 0, :] = 255
    soft[0, 0, :2], soft[0, 0, 2], soft[0, 3, 3] = 255, 127, 128  # 2 found, 1 just below, 1 false
    truth[1, 1:3, 1:3] = soft[1, 1:3, 1:3] = 255
    for stem, index in (("slice_10", 1), ("slice_2", 0)):
        picture(tmp_path / "t" / f"{stem}.png", truth[index])
        picture(tmp_path / "p" / "deeper" / f"{stem}.bmp", soft[index])
    return tmp_path


def test_pictures(pictures, capsys):
    assert run(pictures) == 0
    with open(pictures / "out" / "scores.csv", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["slice_10", "slice_2"]
    assert float(rows["slice_10"]["dice"]) == 1
    assert float(rows["slice_2"]["dice"]) == pytest.approx(2 * 2 / (3 + 4))
    assert float(rows["slice_2"]["mae"]) == pytest.approx((128 / 255 + 1 + 128 / 255) / 16)
    assert rows["slice_2"]["hd95_mm"] == rows["slice_2"]["true_ml"] == ""
    report = json.loads((pictures / "out" / "scores.json").read_text())
    assert report["settings"] == {"threshold": 0.5, "surface_tolerance_mm": 3.0}
    assert report["cases"][0]["hd95_mm"] is None
    summary = report["summary"]
    assert summary["per_slice"]["metrics"]["dice"]["mean"] == pytest.approx((1 + 4 / 7) / 2)
    assert summary["pooled"]["metrics"]["dice"] == pytest.approx(2 * 6 / (7 + 8))
    printed = capsys.readouterr().out
    assert f"{(1 + 4 / 7) / 2:.4f} (n 2)" in printed and f"{12 / 15:.4f}" in printed
    for part in ("per_slice", "per_case", "pooled"):
        assert summary[part]["protocol"] in printed


def test_threshold(pictures):
    assert run(pictures, "--threshold", "0.4") == 0
    cases = json.loads((pictures / "out" / "scores.json").read_text())["cases"]
    assert cases[1]["predicted_voxels"] == 4


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_the_truth_is_paired_with_itself_by_name(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for index in range(11):  # s10 sorts before s2, and the folders are written in opposite orders
        blocks = np.kron(rng.random((2, 2)) < 0.5, np.ones((8, 8))) * 255
        picture(tmp_path / "t" / f"s{index}.png", blocks)
        picture(tmp_path / "p" / f"s{index}.{suffix}", blocks)
    assert run(tmp_path) == 0
    metrics = json.loads((tmp_path / "out" / "scores.json").read_text())["summary"]["per_slice"]["metrics"]
    assert metrics["dice"]["mean"] == 1


def test_nifti_with_ends_of_names(tmp_path, capsys):
    """The layout of our own inference: other masks lie beside the prediction."""
    truth = np.zeros((6, 5, 4), np.uint8)
    truth[1:4, 1:4, 1:3] = 1
    for name in ("a", "b"):
        nifti(tmp_path / "p" / name / f"{name}_opacity.nii.gz", truth)
        nifti(tmp_path / "p" / name / f"{name}_lungs.nii.gz", truth * 2)
        nifti(tmp_path / "t" / f"{name}_mask.nii", truth if name == "a" else truth * 0)
    options = ["--prediction-suffix", "_opacity", "--truth-suffix", "_mask"]
    assert run(tmp_path, *options) == 0
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    case = report["cases"][0]
    assert (case["name"], case["dice"], case["hd95_mm"], case["slices"]) == ("a", 1, 0, 4)
    assert case["true_ml"] == pytest.approx(18 * 0.8 * 0.8 * 5 / 1000)
    assert report["summary"]["per_case"]["empty_truths"] == 1
    assert report["summary"]["false_positives"]["ml"]["max"] == pytest.approx(case["true_ml"])
    assert "1 cases with an empty truth: mean 0.0576" in capsys.readouterr().out
    assert run(tmp_path) == 2
    assert "2 of 2 truths have no prediction of the same name" in capsys.readouterr().err


def test_slices_are_axial_however_a_volume_is_stored(tmp_path):
    rng = np.random.default_rng(2)
    pred, truth = (rng.random((2, 7, 6, 5)) < 0.2).astype(np.uint8)
    reports = []
    for turn in (False, True):
        where = tmp_path / str(turn)
        for kind, mask in (("p", pred), ("t", truth)):
            image = nib.Nifti1Image(mask, AFFINE)
            if turn:  # the superior axis first
                image = image.as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))
            (where / kind).mkdir(parents=True)
            nib.save(image, where / kind / "x.nii.gz")
        assert run(where) == 0
        reports.append(json.loads((where / "out" / "scores.json").read_text())["summary"])
    assert [r["slices"] for r in reports] == [5, 5]
    for key in ("dice", "mae", "specificity", "rlr_overlap"):
        straight, turned = (r["per_slice"]["metrics"][key]["mean"] for r in reports)
        assert turned == pytest.approx(straight)
    assert reports[0]["per_case"]["metrics"]["hd95_mm"] == reports[1]["per_case"]["metrics"]["hd95_mm"]


def test_a_sheared_grid_has_volumes_but_no_distances(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] = 2  # a tilted gantry
    mask = np.ones((3, 3, 3), np.uint8)
    nifti(tmp_path / "p" / "a.nii", mask, sheared)
    nifti(tmp_path / "t" / "a.nii", mask, sheared)
    assert run(tmp_path) == 0
    (case,) = json.loads((tmp_path / "out" / "scores.json").read_text())["cases"]
    assert case["hd95_mm"] is None
    assert case["true_ml"] == pytest.approx(27 * 0.8 * 0.8 * 5 / 1000)


def test_maps_stored_as_scaled_bytes(tmp_path):
    image = nib.Nifti1Image(np.full((3, 3, 2), 255, np.uint8), AFFINE)
    image.header.set_slope_inter(1 / 255, 0)
    (tmp_path / "p").mkdir()
    nib.save(image, tmp_path / "p" / "a.nii.gz")
    nifti(tmp_path / "t" / "a.nii.gz", np.ones((3, 3, 2), np.uint8))
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["cases"][0]["dice"] == 1


def test_missing_partners_are_named(pictures, capsys):
    (pictures / "p" / "deeper" / "slice_2.bmp").unlink()
    assert "1 of 2 truths have no prediction of the same name" in (line := refused(pictures, capsys))
    assert "'slice_2'" in line
    picture(pictures / "p" / "slice_2.png", np.zeros((4, 4)))
    picture(pictures / "p" / "slice_3.png", np.zeros((4, 4)))
    assert "1 of 3 predictions have no truth" in (line := refused(pictures, capsys)) and "'slice_3'" in line


def test_pairs_that_differ(pictures, capsys):
    picture(pictures / "t" / "slice_2.png", np.zeros((4, 3)))
    line = failed(pictures, capsys)
    assert "slice_2.bmp" in line and "differ in size: (4, 4) and (4, 3)" in line


@pytest.mark.parametrize("shift, words", [(0.5, "up to 0.5 mm apart"), (0.01, None)])
def test_affines_that_differ(tmp_path, capsys, shift, words):
    moved = AFFINE.copy()
    moved[0, 3] = shift
    nifti(tmp_path / "p" / "a.nii.gz", np.ones((3, 3, 3), np.uint8))
    nifti(tmp_path / "t" / "a.nii.gz", np.ones((3, 3, 3), np.uint8), moved)
    if words is None:
        assert run(tmp_path) == 0
    else:
        assert words in refused(tmp_path, capsys)


def test_a_flipped_prediction_is_refused_though_its_corner_grid_is_the_same(tmp_path, capsys):
    flipped = AFFINE.copy()
    flipped[0] = [-0.8, 0, 0, 1.6]
    nifti(tmp_path / "p" / "a.nii.gz", np.ones((3, 3, 3), np.uint8), flipped)
    nifti(tmp_path / "t" / "a.nii.gz", np.ones((3, 3, 3), np.uint8))
    assert "their affines differ" in refused(tmp_path, capsys)


@pytest.mark.parametrize("kind, folder", [("prediction", "p"), ("truth", "t")])
def test_values_that_would_be_misread(pictures, capsys, kind, folder):
    for path in (pictures / folder).rglob("*.*"):
        picture(path, np.asarray(Image.open(path)) > 100)
    line = refused(pictures, capsys)
    assert "hold 0 and 1 only" in line and f"--{kind}-max 1" in line
    assert run(pictures, f"--{kind}-max", "1") == 0


def test_labels_are_not_masks(tmp_path, capsys):
    nifti(tmp_path / "p" / "a.nii.gz", np.full((3, 3, 3), 3, np.uint8))
    nifti(tmp_path / "t" / "a.nii.gz", np.ones((3, 3, 3), np.uint8))
    line = refused(tmp_path, capsys)
    assert "holds values from 3 to 3, not from 0 to 1" in line and "--prediction-max" in line
    nifti(tmp_path / "p" / "a.nii.gz", np.full((3, 3, 3), np.nan, np.float32))
    assert "holds values from nan" in refused(tmp_path, capsys)


def test_other_files_that_cannot_be_taken(pictures, capsys):
    picture(pictures / "p" / "slice_2.png", np.zeros((4, 4)))
    assert "two predictions have the name 'slice_2'" in refused(pictures, capsys)
    (pictures / "p" / "slice_2.png").unlink()
    colour = np.zeros((4, 4, 3))
    colour[..., 0] = 200
    picture(pictures / "p" / "deeper" / "slice_2.bmp", colour)
    assert "in colour" in failed(pictures, capsys)
    (pictures / "p" / "deeper" / "slice_2.bmp").write_bytes(b"nonsense")
    assert "cannot be read as a picture" in failed(pictures, capsys)
    frames = [Image.fromarray(np.zeros((4, 4), np.uint8))] * 2
    (pictures / "p" / "deeper" / "slice_2.bmp").unlink()
    frames[0].save(pictures / "p" / "slice_2.tif", save_all=True, append_images=frames[1:])
    assert "holds 2 pictures" in failed(pictures, capsys)
    shutil.rmtree(pictures / "out")
    assert "no prediction in" in refused(pictures, capsys, "--prediction-suffix", "_x")
    assert "folder of predictions not found" in refused(pictures / "t", capsys)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with weights as training leaves them: their settings beside them."""
    folder = tmp_path_factory.mktemp("bundle") / NAME
    shutil.copytree(ROOT / "bundles" / NAME, folder, ignore=shutil.ignore_patterns("models"))
    torch.manual_seed(0)
    (folder / "models").mkdir()
    torch.save(SCOATNet(channels=(8, 8, 8, 8, 8)).state_dict(), folder / "models" / "model.pt")
    settings = {"channels": [8, 8, 8, 8, 8], "image_size": [32, 32]}
    write_settings(folder / "models" / "model.pt", settings)
    return folder


def test_a_bundle_on_slices_as_they_are_stored(bundle, tmp_path, capfd):
    grey = np.random.default_rng(0).integers(0, 256, (40, 60))
    for name in ("a", "b"):
        picture(tmp_path / "i" / f"{name}.png", grey)
        picture(tmp_path / "t" / f"{name}.png", np.arange(40)[:, None] * np.ones(60) > 20)
    where = ["--images", str(tmp_path / "i"), "--truths", str(tmp_path / "t"), "--truth-max", "1"]
    where += ["--output", str(tmp_path / "out" / "scores"), "--stored-orientation", "transposed"]
    assert score.main(["--bundle", str(bundle), *where]) == 0
    assert "over slices" in capfd.readouterr().out
    kept = tmp_path / "out" / "scores_predictions"
    with Image.open(kept / "probabilities" / "a.png") as soft:
        assert soft.size == (60, 40), "as the slice is stored"
    again = ["--predictions", str(kept / "probabilities"), *where[2:6]]
    assert score.main([*again, "--output", str(tmp_path / "again")]) == 0
    first, second = (
        json.loads(file.read_text()) for file in (tmp_path / "out" / "scores.json", tmp_path / "again.json")
    )
    assert first["cases"] == second["cases"] and len(first["cases"]) == 2


def test_the_bundles_own_threshold_or_the_one_that_is_given(bundle, tmp_path):
    """A network whose output is its bias: the probability is the same everywhere."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    weights = {key: torch.zeros_like(value) for key, value in SCOATNet(channels=[8] * 5).state_dict().items()}
    weights["head.bias"] -= 0.6  # sigmoid(-0.6) = 0.354
    torch.save(weights, folder / "models" / "model.pt")
    settings = {"channels": [8, 8, 8, 8, 8], "image_size": [32, 32], "threshold": 0.3}
    write_settings(folder / "models" / "model.pt", settings)
    picture(tmp_path / "i" / "a.png", np.random.default_rng(0).integers(0, 256, (32, 32)))
    picture(tmp_path / "t" / "a.png", np.ones((32, 32)))
    words = ["--bundle", str(folder), "--images", str(tmp_path / "i"), "--truths", str(tmp_path / "t")]
    for more, threshold, dice in (
        ([], 0.3, 1.0),
        (["--threshold", "0.4"], 0.4, 0.0),
        (["--set", "threshold=0.35"], 0.35, 1.0),
    ):
        output = tmp_path / f"scores_{threshold}"
        assert score.main([*words, *more, "--truth-max", "1", "--output", str(output)]) == 0
        report = json.loads(output.with_name(f"{output.name}.json").read_text())
        assert report["settings"]["threshold"] == threshold
        assert report["cases"][0]["dice"] == dice
        with Image.open(tmp_path / f"scores_{threshold}_predictions" / "masks" / "a.png") as mask:
            assert np.asarray(mask).all() == bool(dice), "the mask is what is scored"


def test_a_bundle_on_volumes(bundle, tmp_path, capfd):
    phantom = make_phantom(shape=(48, 40, 12), spacing=(7.0, 7.0, 20.0), seed=3)
    nifti(tmp_path / "i" / "p.nii.gz", phantom.image.astype(np.float32), phantom.affine)
    nifti(tmp_path / "t" / "p.nii.gz", (phantom.label > 0).astype(np.uint8), phantom.affine)
    words = ["--bundle", str(bundle), "--images", str(tmp_path / "i"), "--truths", str(tmp_path / "t")]
    assert score.main([*words, "--output", str(tmp_path / "scores")]) == 0
    (case,) = json.loads((tmp_path / "scores.json").read_text())["cases"]
    assert case["name"] == "p"
    assert (tmp_path / "scores_predictions" / "p" / "p_report.json").is_file()


def test_a_bundle_that_cannot_predict(bundle, tmp_path, capfd):
    def line(*words: str) -> str:
        common = ["--truths", str(tmp_path), "--output", str(tmp_path / "out" / "scores")]
        assert score.main([*words, *common]) == 2
        assert not (tmp_path / "out" / "scores.json").exists()
        return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")][-1]

    assert "--bundle and --images go together" in line("--bundle", str(bundle))
    assert "is no bundle" in line("--bundle", str(tmp_path), "--images", str(tmp_path))
    assert "folder of images not found" in line("--bundle", str(bundle), "--images", str(tmp_path / "no"))
    picture(tmp_path / "i" / "a.png", np.zeros((8, 8)))
    images = ("--bundle", str(bundle), "--images", str(tmp_path / "i"))
    assert "'x' is no KEY=VALUE" in line(*images, "--set", "x")
    for wrong in ("half", "50"):
        assert f"threshold={wrong}: it must be a probability" in line(*images, "--set", f"threshold={wrong}")
    assert "the bundle ended with exit code 2" in line(*images, "--set", "ckpt_path=missing.pt")
