# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import pytest

from custom.bundle import read_study

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLES = ROOT / "bundles"
SCOATNET = "covid_ct_scoatnet_segmentation"


def study(**changes) -> dict:
    content = {
        "title": "A study",
        "reference": "plain",
        "overlays": ["train_slices"],
        "overrides": {"epochs": 3, "seed": 1},
        "stages": {"nodules": {"bundle": SCOATNET, "overlays": ["pretrain"]}},
        "systems": {
            "plain": {"bundle": SCOATNET, "overrides": {"epochs": 4}},
            "other": {"bundle": SCOATNET, "overlays": ["loss_dice"], "start": "nodules"},
        },
    }
    return {**content, **changes}


def read(folder: Path, content: object, *settings: str):
    path = folder / "study.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_study(path, BUNDLES, settings)


def test_what_a_system_is_made_of(tmp_path):
    made = read(tmp_path, study(), "seed=7", "other:image_size=[64, 64]", "plain:network_def::channels=[8]")
    plain, other = made.systems
    assert [file.name for file in plain.configs()] == ["train.json", "train_slices.json"]
    assert [f.name for f in other.configs("evaluate")] == [
        "train.json",
        "train_slices.json",
        "loss_dice.json",
        "evaluate.json",
    ]
    assert plain.overrides == {"epochs": 4, "seed": 7, "network_def::channels": [8]}
    assert other.overrides == {"epochs": 3, "seed": 7, "image_size": [64, 64]}
    assert other.start == "nodules" and made.selection == "last"
    (stage,) = made.stages
    assert [file.name for file in stage.configs()] == ["train.json", "pretrain.json"]  # not the study's own


def test_some_of_the_systems(tmp_path):
    made = read(tmp_path, study())
    plain, other = made.only(["plain"]), made.only(["other", "other"])
    assert [s.name for s in plain.systems] == ["plain"] and plain.stages == () and plain.reference == "plain"
    assert [s.name for s in other.systems] == ["other"] and other.stages == made.stages
    assert other.reference == "other", "the study's own is not among them"
    assert made.only(["other", "plain"]) == made, "their order is the study's"
    with pytest.raises(ValueError, match="no system 'nodules'; it has plain; other"):
        made.only(["nodules"])


def test_an_overlay_may_lie_beside_the_study(tmp_path):
    (tmp_path / "mine.json").write_text('{"batch_size": 2}')
    made = read(tmp_path, study(overlays=["mine.json"]))
    assert made.systems[0].overlays == (tmp_path / "mine.json",)


def test_shipped_studies_can_be_read():
    files = sorted((ROOT / "scripts" / "studies").glob("*.json"))
    assert files
    for file in files:
        read_study(file, BUNDLES)


MISTAKES = {
    "no JSON": ("{", "not valid JSON"),
    "a list": ([], "must be an object"),
    "misspelt key": (study(sytems={}), "unknown key 'sytems'"),
    "no systems": (study(systems={}), "'systems' is missing"),
    "unknown bundle": (study(systems={"plain": {"bundle": "none"}}), "bundle 'none' not found"),
    "unknown overlay": (study(overlays=["none"]), "overlay 'none' not found"),
    "unknown reference": (study(reference="Plain"), "reference 'Plain' is none of its systems"),
    "unknown selection": (study(selection="best"), "unknown selection 'best'"),
    "unknown stage": (
        study(systems={"plain": {"bundle": SCOATNET, "start": "lidc"}}),
        "starts from 'lidc', which is no stage",
    ),
    "one folder for two": (
        study(systems={"plain": {"bundle": SCOATNET}, "Plain": {"bundle": SCOATNET}}),
        "names must differ",
    ),
    "misspelt option": (study(overrides={"epoch": 3}), "did you mean --epochs?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    content, message = MISTAKES[mistake]
    with pytest.raises((ValueError, FileNotFoundError), match=r"^study .*study\.json") as caught:
        read(tmp_path, content)
    assert message in str(caught.value)


def test_settings_that_are_none(tmp_path):
    for setting in ("epochs", "=3", "nobody:epochs=3"):
        with pytest.raises(ValueError, match=r"KEY=VALUE|unknown option"):
            read(tmp_path, study(), setting)
