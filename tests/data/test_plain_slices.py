# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from custom.console import CohortError
from custom.data.plain_slices import ORIENTATIONS, group_similar, prepare_slices, turn, turn_back


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for name in ("2", "10", "1"):
        image = rng.integers(0, 256, (20, 30), dtype=np.uint8)
        mask = np.zeros((20, 30), np.uint8)
        mask[3, 7] = 255
        Image.fromarray(image).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def prepare(folder, **options):
    options = {"n_folds": 3, **options}
    return prepare_slices(folder / "images", folder / "masks", folder / "out", **options)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_turning_back_undoes_turning(orientation):
    pixels = np.arange(6).reshape(2, 3)
    assert np.array_equal(turn_back(turn(pixels, orientation), orientation), pixels)
    with pytest.raises(ValueError, match="unknown orientation"):
        turn(pixels, "sideways")


def test_transposed_slices_are_made_upright_and_it_is_recorded(folders):
    datalist = json.loads(prepare(folders, orientation="transposed").read_text())
    assert datalist["stored_orientation"] == "transposed"
    assert [e["image"] for e in datalist["training"]] == ["images/1.png", "images/2.png", "images/10.png"]
    mask = np.asarray(Image.open(folders / "out" / "masks" / "1.png"))
    assert mask.shape == (30, 20) and mask[7, 3] == 255 and mask.sum() == 255
    stored = np.asarray(Image.open(folders / "images" / "1.png"))
    upright = np.asarray(Image.open(folders / "out" / "images" / "1.png"))
    assert np.array_equal(turn_back(upright, "transposed"), stored)


def test_slices_that_look_alike_share_a_patient_and_a_fold(folders):
    near = np.asarray(Image.open(folders / "images" / "1.png")).astype(int) + 1
    Image.fromarray(np.clip(near, 0, 255).astype(np.uint8)).save(folders / "images" / "7.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folders / "masks" / "7.png")
    entries = {e["image"]: e for e in json.loads(prepare(folders).read_text())["training"]}
    same, copy = entries["images/1.png"], entries["images/7.png"]
    assert (copy["patient_id"], copy["fold"]) == (same["patient_id"], same["fold"])
    assert len({e["patient_id"] for e in entries.values()}) == 3


def test_likeness_is_transitive():
    base = np.random.default_rng(1).normal(size=(64, 64))
    pictures = [base, np.random.default_rng(2).normal(size=(64, 64)), 3 * base + 5, base.copy()]
    assert group_similar(pictures) == [0, 1, 0, 0]


def test_pairing_is_by_name_and_faults_are_named(folders):
    (folders / "masks" / "10.png").rename(folders / "masks" / "11.png")
    with pytest.raises(FileNotFoundError, match="1 images have no mask"):
        prepare(folders)
    (folders / "masks" / "11.png").rename(folders / "masks" / "10.png")
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(folders / "masks" / "2.png")
    with pytest.raises(CohortError, match="1 of 3 slices failed: 2: .* they must agree") as caught:
        prepare(folders, n_folds=2)
    assert caught.value.exit_code == 1
    (folders / "masks" / "2.png").write_bytes(b"no picture")
    with pytest.raises(CohortError, match="2: .* cannot be read as a picture"):
        prepare(folders, n_folds=2)
    listed = json.loads((folders / "out" / "datalist.json").read_text())["training"]
    assert [entry["image"] for entry in listed] == ["images/1.png", "images/10.png"]
    with pytest.raises(ValueError, match="3 folds are asked for, .* 1 of 3 slices failed: 2: "):
        prepare(folders)
    for file in (folders / "masks").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(CohortError) as caught:
        prepare(folders)
    assert caught.value.exit_code == 2
    with pytest.raises(FileNotFoundError, match="not found"):
        prepare_slices(folders / "none", folders / "masks", folders / "out")


def test_real_slices(ct_data, tmp_path, caplog):
    source = ct_data / "covid_semiseg_train"
    prepare_slices(source / "images", source / "masks", tmp_path / "as stored")
    assert "stored on their side" in caplog.text and "--orientation transposed or" in caplog.text
    caplog.clear()
    path = prepare_slices(source / "images", source / "masks", tmp_path, orientation="transposed")
    assert caplog.text == ""
    entries = json.loads(path.read_text())["training"]
    patient = {e["image"]: e["patient_id"] for e in entries}
    assert len(entries) == 50
    assert patient["images/10.png"] == patient["images/43.png"]  # the same slice, published twice
    assert sorted({e["fold"] for e in entries}) == [0, 1, 2, 3, 4]
