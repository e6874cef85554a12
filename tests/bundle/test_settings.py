# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Settings that travel with weights: read, refused, and taken by what builds networks and packs bundles."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from custom.bundle.loading import WeightsLoader
from custom.bundle.manifest import is_part, is_work
from custom.bundle.network_check import build_network, check_network
from custom.bundle.packing import pack_bundle
from custom.bundle.settings import SCHEMA, check_settings, read_settings, trained_with, write_settings
from custom.bundle.standards import Standards
from custom.bundle.verification import verify_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "covid_ct_attention_unet_segmentation"
SETTINGS = {
    "hu_window": [-1100, 300],
    "image_size": [64, 64],
    "channels": [4, 4, 4, 4, 4],
    "attention": False,
}


def test_a_setting_beside_the_weights_comes_before_the_published_one(tmp_path):
    weights = tmp_path / "model.pt"
    assert trained_with(weights, "hu_window", [-1000, 400]) == [-1000, 400]
    assert trained_with(None, "width", 1.0) == 1.0
    write_settings(weights, {**SETTINGS, "image_size": (64, 64), "width": None})
    assert json.loads((tmp_path / "model.json").read_text()) == {"schema": SCHEMA, "settings": SETTINGS}
    assert trained_with(weights, "hu_window", [-1000, 400]) == [-1100, 300]
    assert trained_with(str(weights), "attention", True) is False
    assert trained_with(weights, "lung_margin_mm", 5.0) == 5.0, "not told: the published one"
    assert trained_with(tmp_path / "other.pt", "hu_window", [-1000, 400]) == [-1000, 400]
    write_settings(weights, None)
    assert not (tmp_path / "model.json").exists(), "those of other weights must not stay"


def settings(**values: object) -> str:
    return json.dumps({"schema": SCHEMA, "settings": values})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\xff\xfe", "is not UTF-8"),
        ("version https://git-lfs.github.com/spec/v1", "is not JSON"),
        ("[]", f"is not of the schema {SCHEMA}"),
        ('{"settings": {}}', f"is not of the schema {SCHEMA}"),
        (json.dumps({"schema": SCHEMA}), "has no settings"),
        (settings(hu_window="$open('x')"), "is \"$open('x')\", no number"),
        (settings(hu_window=[300, -1100]), "two HU, the lower first"),
        (settings(hu_window=-1100), "two HU, the lower first"),
        (settings(image_size=[256]), "two numbers of pixels"),
        (settings(image_size=[256.5, 256]), "two numbers of pixels"),
        (settings(channels=[]), "no number"),
        (settings(channels=[8, 0]), "whole numbers above 0"),
        (settings(lung_margin_mm=-1), "0 or more"),
        (settings(width=True), "a number above 0"),
        (settings(width=float("nan")), "no number"),
        (settings(threshold=1), "a probability between 0 and 1"),
        (settings(attention=[1]), "a value like True is needed"),
    ],
)
def test_broken_settings_end_in_one_line(text, reason, tmp_path):
    (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        trained_with(tmp_path / "model.pt", "attention", True)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'model.json'}: ") and reason in line and "\n" not in line
    assert "take the file that came with the weights" in line


def test_a_folder_or_a_dangling_link_in_its_place_is_not_passed_over(tmp_path):
    (tmp_path / "model.json").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="cannot be read"):
        read_settings(tmp_path / "model.pt")
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        read_settings(tmp_path / "model.pt")


def test_what_cannot_be_a_setting_is_refused_before_it_is_written(tmp_path):
    for wrong in ({"device": torch.device("cpu")}, {"hu_window": [0, 0]}, {"a": [[1]]}, {"b": "text"}):
        with pytest.raises(ValueError):
            write_settings(tmp_path / "model.pt", wrong)
    assert not list(tmp_path.iterdir())
    assert check_settings({"mine": (1, 2.5), "off": False, "gone": None}) == {"mine": [1, 2.5], "off": False}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with the weights of a small network and their settings."""
    folder = tmp_path / NAME
    shutil.copytree(ROOT / "bundles" / NAME, folder, ignore=shutil.ignore_patterns("models", "eval", "cache"))
    (folder / "models").mkdir()
    write_settings(folder / "models" / "model.pt", SETTINGS)
    network = build_network(config(folder), folder / "models" / "model.pt")
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in network.state_dict().items()}
    torch.save(state, folder / "models" / "model.pt")
    return folder


def config(folder: Path) -> dict:
    return json.loads((folder / "configs" / "inference.json").read_text())


def test_the_network_is_that_of_the_weights(bundle):
    weights = bundle / "models" / "model.pt"
    small, published = build_network(config(bundle), weights), build_network(config(bundle))
    assert small.channels == (4,) * 5 and published.channels == (32, 64, 128, 256, 512)
    assert not [key for key in small.state_dict() if "attention" in key]
    standards = Standards.of_repository(ROOT)
    folder = bundle / "configs"
    configs = {n: json.loads((folder / f"{n}.json").read_text()) for n in ("train", "inference", "metadata")}
    assert list(check_network(configs, configs["metadata"], bundle)) == []
    # A command-line override still wins.
    assert build_network({**config(bundle), "channels": [8] * 5}, weights).channels == (8,) * 5
    (bundle / "models" / "model.json").write_text(settings(channels="$1"))
    (finding,) = [f for f in verify_bundle(bundle, standards).findings if "model.json" in f]
    assert finding.startswith('models/model.json: channels is "$1", no number')
    weights.unlink()
    write_settings(weights, SETTINGS)
    found = verify_bundle(bundle, standards).findings
    assert "models/model.json: tells of weights, and there is no models/model.pt" in found


def test_without_their_settings_weights_do_not_fit_and_it_is_said_why(bundle):
    weights = bundle / "models" / "model.pt"
    with torch.device("meta"):
        published = build_network(config(bundle))
    with pytest.raises(ValueError, match=r"trained with these settings$"):
        WeightsLoader(str(weights), {"model": published})(None)
    (bundle / "models" / "model.json").unlink()
    with pytest.raises(ValueError, match="there is no model.json beside it, which would name them"):
        WeightsLoader(str(weights), {"model": published})(None)


def test_a_packed_bundle_carries_them_and_leaves_older_weights(bundle, tmp_path):
    for name in ("model_0123abcd.pt", "model_0123abcd.json", "imagenet.json"):
        (bundle / "models" / name).write_text("{}")
        assert is_work(f"models/{name}") and not is_part(f"models/{name}", packed=True)
    packed = pack_bundle(bundle, tmp_path / "a.zip", ())
    with zipfile.ZipFile(packed.path) as archive:
        names = [name.removeprefix(f"{NAME}/") for name in archive.namelist()]
        manifest = json.loads(archive.read(f"{NAME}/manifest.json"))
        told = archive.read(f"{NAME}/README.md").decode()
    assert [name for name in names if name.startswith("models/")] == ["models/model.json", "models/model.pt"]
    assert "models/model.json" in manifest["files"] and "`models/model.json` the settings" in told
    assert len(packed.left_out) == 3
