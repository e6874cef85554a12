# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Plain slices through a bundle: a network whose answer is known, broken files, orientation, scores."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_tester import ROOT, Bundle
from PIL import Image

from custom.bundle.settings import write_settings
from custom.console import CohortError, describe_error
from custom.data.plain_slices import turn_back

BUNDLES = [Bundle(f"covid_ct_{name}_segmentation") for name in ("scoatnet", "attention_unet", "ncovsegnet")]
SIZE = (40, 64)
NETWORK = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}


def segment(folder: Path, bundle: Bundle = BUNDLES[0], **overrides) -> list[dict[str, str]]:
    """Opacity is what is brighter than half of the window, at a threshold of 0.5; the rows of the table."""
    weights = {"weight": torch.full((1, 1, 1, 1), 8.0), "bias": torch.tensor([-4.0])}
    torch.save(weights, folder / "model.pt")
    write_settings(folder / "model.pt", {"image_size": list(SIZE), "hu_window": [-1100, 300]})
    paths = {
        "bundle_root": str(bundle.folder),
        "dataset_dir": str(folder / "images"),
        "output_dir": str(folder / "out"),
        "ckpt_path": str(folder / "model.pt"),
        "network_def": NETWORK,
    }
    workflow = bundle.workflow("infer", ("inference", "inference_slices"), {**paths, **overrides})
    assert workflow.check_properties() == []
    try:
        workflow.run()
    except RuntimeError as error:  # MONAI's, around what an expression raises
        assert isinstance(error.__cause__, CohortError)
        raise error.__cause__ from None
    with open(folder / "out" / "slices.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.mode == "L"
        return np.asarray(picture)


@pytest.fixture
def slices(tmp_path: Path) -> dict[str, np.ndarray]:
    """Two slices as large as the network's input, with a bright lesion each; returns their masks."""
    masks = {}
    for number in (2, 10):
        mask = np.zeros(SIZE, bool)
        mask[5:15, number : number + 20] = True
        masks[f"s{number}"] = mask
        save(tmp_path / "images" / f"s{number}.png", np.where(mask, 180, 40).astype(np.uint8))
        save(tmp_path / "truths" / f"s{number}.png", np.where(mask, 255, 0).astype(np.uint8))
    return masks


def score(folder: Path, predictions: str) -> dict:
    spec = importlib.util.spec_from_file_location("score", ROOT / "scripts" / "score.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    places = ["--predictions", str(folder / "out" / predictions), "--truths", str(folder / "truths")]
    assert script.main([*places, "--output", str(folder / predictions)]) == 0
    return json.loads((folder / f"{predictions}.json").read_text())["summary"]


def test_masks_numbers_and_pictures_of_slices_can_be_scored(slices, tmp_path, capsys):
    rows = segment(tmp_path, probabilities=True)
    assert [row["name"] for row in rows] == ["s2", "s10"]
    for row in rows:
        mask = read(tmp_path / "out" / "masks" / f"{row['name']}.png")
        assert np.array_equal(mask, np.where(slices[row["name"]], 255, 0))
        assert (row["height"], row["width"], row["opacity_pixels"], row["reason"]) == ("40", "64", "200", "")
        assert float(row["opacity_percent_of_picture"]) == pytest.approx(100 * 200 / (40 * 64), abs=1e-4)
        probability = read(tmp_path / "out" / "probabilities" / f"{row['name']}.png")
        low, high = (round(255 / (1 + np.exp(4 - 8 * v / 255))) for v in (40, 180))
        assert set(np.unique(probability)) == {low, high} and low < 128 <= high
        with Image.open(tmp_path / "out" / "overlays" / f"{row['name']}.png") as picture:
            overlay = np.asarray(picture)
        assert overlay.shape == (*SIZE, 3)
        assert tuple(overlay[5, 11]) == (255, 40, 40) and tuple(overlay[10, 15]) == (180, 180, 180)
    capsys.readouterr()
    hard, soft = score(tmp_path, "masks"), score(tmp_path, "probabilities")
    printed = capsys.readouterr().out
    for name in ("Dice", "sensitivity", "specificity", "MAE", "mean over slices", "pooled"):
        assert name in printed
    share = 200 / (40 * 64)
    expected = (share * (255 - high) + (1 - share) * low) / 255
    for summary, mae in ((hard, 0.0), (soft, expected)):
        for table in (summary["per_slice"]["metrics"], summary["pooled"]["metrics"]):
            values = {k: v["mean"] if isinstance(v, dict) else v for k, v in table.items()}
            assert values["dice"] == values["sensitivity"] == values["specificity"] == 1
            assert values["mae"] == pytest.approx(mae, abs=1e-6)


@pytest.mark.parametrize("orientation", ["transposed", "rotated-90"])
def test_masks_lie_as_the_pictures_are_stored(orientation, slices, tmp_path):
    for name, mask in slices.items():
        stored = turn_back(np.where(mask, 180, 40).astype(np.uint8), orientation)
        save(tmp_path / "images" / f"{name}.png", stored)
        assert stored.shape == SIZE[::-1]
    segment(tmp_path, stored_orientation=orientation)
    for name, mask in slices.items():
        expected = turn_back(np.where(mask, 255, 0), orientation)
        assert np.array_equal(read(tmp_path / "out" / "masks" / f"{name}.png"), expected)
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as picture:
            assert picture.size == SIZE[::-1], "upright, as it was seen: width and height"
    assert not (tmp_path / "out" / "probabilities").exists()


def test_the_threshold_is_a_setting(slices, tmp_path):
    """The lesions' probability is 1 / (1 + exp(4 - 8 * 180 / 255)) = 0.8384."""
    for threshold, found in ((0.83, "200"), (0.85, "0")):
        assert [row["opacity_pixels"] for row in segment(tmp_path, threshold=threshold)] == [found, found]
    with pytest.raises(RuntimeError) as caught:
        segment(tmp_path, threshold=50)
    assert "threshold must be a probability above 0 and below 1, got 50" in describe_error(caught.value)


def test_slices_that_lie_on_their_side_are_warned_of(tmp_path, capsys):
    """Dark lungs beside each other, stored transposed; five slices can be judged."""
    upright = np.full((100, 140), 200, np.uint8)
    upright[20:80, 15:60] = upright[20:80, 80:125] = 40
    for number in range(5):
        save(tmp_path / "images" / f"s{number}.png", upright.T)
    segment(tmp_path)
    said = capsys.readouterr().out
    assert "stored on their side" in said and "--stored_orientation transposed or" in said
    segment(tmp_path, stored_orientation="transposed")
    assert "on their side" not in capsys.readouterr().out


def test_a_window_of_pictures_that_differs_is_undone(slices, tmp_path):
    # Half of the window of the weights is -400 HU.
    rows = segment(tmp_path, picture_window=[-2000, 600])  # here 180 stands for -165 HU, 40 for -1592
    assert [row["opacity_pixels"] for row in rows] == ["200", "200"]
    rows = segment(tmp_path, picture_window=[-2000, 0])  # 180 stands for -588 HU
    assert [row["opacity_pixels"] for row in rows] == ["0", "0"]


def test_slices_of_an_unknown_window_are_matched_and_the_table_says_so(tmp_path):
    """Lung is at 80, tissue at 160 and a lesion at 120, in the reference window at 128."""
    picture = np.full((128, 128), 80, np.uint8)
    picture[:50] = 160
    picture[60:70, 20:40] = 122
    picture += np.random.default_rng(0).integers(0, 3, picture.shape, np.uint8)
    save(tmp_path / "images" / "bright.png", picture)
    save(tmp_path / "images" / "flat.png", np.full((128, 128), 90, np.uint8))
    rows = segment(tmp_path)
    assert [row["grey_match"] for row in rows] == ["", ""]
    assert int(rows[0]["opacity_pixels"]) == pytest.approx(50 * 128, abs=128), "the tissue alone"
    rows = segment(tmp_path, match_greys=True)
    lung, tissue = (int(word.split()[1]) for word in rows[0]["grey_match"].split(", "))
    assert abs(lung - 81) <= 1 and abs(tissue - 161) <= 1
    assert int(rows[0]["opacity_pixels"]) == pytest.approx(50 * 128 + 200, abs=160), "the lesion, too"
    assert rows[1]["grey_match"].startswith("as it is: ") and rows[1]["opacity_pixels"] == "0"
    with Image.open(tmp_path / "out" / "overlays" / "bright.png") as overlay:
        assert np.asarray(overlay)[100, 100, 0] == picture[100, 100], "shown as it is stored"
    rows = segment(tmp_path, match_greys=True, picture_window=[-1000, 400])
    assert [row["grey_match"] for row in rows] == ["", ""], "a window that was given is believed"


def test_broken_files_are_listed_and_leave_nothing_of_an_earlier_run(slices, tmp_path):
    segment(tmp_path)
    (tmp_path / "images" / "s2.png").write_bytes(b"torn")
    save(tmp_path / "images" / "deep.png", np.full(SIZE, 9000, np.uint16))
    save(tmp_path / "images" / "colour.png", np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8))
    with pytest.raises(CohortError, match="3 of 4 pictures failed") as caught:
        segment(tmp_path)
    assert caught.value.exit_code == 1
    for reason in ("s2: ", "cannot be read as a picture", "more than 8 bits", "in colour"):
        assert reason in str(caught.value)
    left = sorted(file.name for kind in ("masks", "overlays") for file in (tmp_path / "out" / kind).iterdir())
    assert left == ["s10.png", "s10.png"]
    with open(tmp_path / "out" / "slices.csv", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows["s10"]["opacity_pixels"] == "200" and "in colour" in rows["colour"]["reason"]
    (tmp_path / "images" / "s10.png").unlink()
    with pytest.raises(CohortError, match="3 of 3 pictures failed") as caught:
        segment(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_each_bundle_sees_slices_as_it_does_in_training(bundle, slices, tmp_path):
    (tmp_path / "model.pt").touch()
    overrides = {
        "dataset_dir": str(tmp_path / "images"),
        "ckpt_path": str(tmp_path / "model.pt"),
        "hu_window": [-1100, 300],
        "image_size": [32, 32],
    }
    inference = bundle.workflow("infer", ("inference", "inference_slices"), overrides).parser
    seen = inference.get_parsed_content("dataset")[0]["image"]
    training = bundle.workflow("train", ("train", "train_slices"), {"image_size": [32, 32]}).parser
    prepare = training.get_parsed_content("validate#preprocessing")
    paths = {"image": str(tmp_path / "images" / "s2.png"), "label": str(tmp_path / "truths" / "s2.png")}
    trained = prepare(paths)["image"]
    assert seen.shape == trained.shape == (1, 32, 32)
    assert torch.allclose(seen.as_tensor(), trained.as_tensor(), atol=1e-5)
