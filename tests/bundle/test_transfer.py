# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from monai.networks.nets import resnet50

from custom.bundle import TransferPipeline, prepare_network
from custom.data import read_datalist, write_json
from custom.networks import NCoVSegNet, SCOATNet

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLE = ROOT / "bundles" / "covid_ct_ncovsegnet_segmentation"
SMALL = {
    "width": 0.02,
    "image_size": [64, 64],
    "scales": [0.5, 1.0],
    "batch_size": 4,
    "num_workers": 0,
}
# The backbone is a whole ResNet-50: with Adam's moments each of the many checkpoints would take 290 MB.
SGD = {
    "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": "@learning_rate"}
}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in torchvision's format, as if trained on ImageNet."""
    torch.manual_seed(7)
    network = resnet50(
        spatial_dims=2, n_input_channels=3, num_classes=1000, conv1_t_stride=2, bias_downsample=False
    )
    path = tmp_path_factory.mktemp("imagenet") / "resnet50.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def nodules(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cohort with one of its cases for validation, as prepare_lidc writes it."""
    folder = tmp_path_factory.mktemp("nodules")
    shutil.copytree(cohort, folder, dirs_exist_ok=True)
    content = read_datalist(folder / "datalist.json")
    content["validation"] = [content["training"].pop()]
    write_json(folder / "datalist.json", content)
    return folder


def pipeline(folder: Path, cohort: Path, nodules: Path, imagenet: Path, **more) -> TransferPipeline:
    options = {
        "imagenet_weights": str(imagenet),
        "modes": ["none", "imagenet", "two-stage"],
        "overrides": {**SMALL, **SGD, "epochs": 1},
    }
    return TransferPipeline(BUNDLE, folder, cohort, nodules, **{**options, **more})


def test_three_rows_of_table_4_in_one_run_and_finished_stages_are_not_run_again(
    cohort, nodules, imagenet, tmp_path
):
    manifest = pipeline(tmp_path, cohort, nodules, imagenet).run()
    assert list(manifest["stages"]) == ["covid_none", "covid_imagenet", "nodules", "covid_two-stage"]
    with open(tmp_path / "transfer.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["transfer"] for row in rows] == ["none", "imagenet", "two-stage"]
    stages = manifest["stages"]
    assert stages["covid_none"]["settings"]["start"] == "random weights"
    assert stages["covid_imagenet"]["imagenet"]["coverage"] == 1.0
    assert stages["covid_two-stage"]["settings"]["start"].endswith(stages["nodules"]["weights_sha256"])
    assert len({row["weights_sha256"] for row in rows}) == 3
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    again = pipeline(tmp_path, cohort, nodules, imagenet).run()
    assert again == manifest and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == stamps
    with pytest.raises(ValueError, match="finished with other settings"):
        other = {**SMALL, **SGD, "epochs": 1, "seed": 3}
        pipeline(tmp_path, cohort, nodules, imagenet, overrides=other).run()


def test_killed_in_each_stage_and_run_again_gives_the_same_weights(cohort, nodules, imagenet, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    write_json(bundle / "configs" / "sgd.json", SGD)
    words = ["-m", "monai.bundle", "run", "--config_file", str(bundle / "configs" / "transfer.json")]
    words += ["--bundle_root", str(bundle), "--overlays", "['sgd']"]
    words += ["--covid_dir", str(cohort), "--nodules_dir", str(nodules)]
    words += ["--imagenet_weights", str(imagenet), "--overrides", json.dumps({**SMALL, "epochs": 3})]
    stages = ("nodules", "covid_two-stage")

    def command(name: str) -> list[str]:
        return [sys.executable, *words, "--output_dir", str(tmp_path / name)]

    def latest(name: str, stage: str) -> Path:
        return tmp_path / name / stage / "models" / "checkpoint_latest.pt"

    def trained(name: str) -> dict[str, dict]:
        return {stage: torch.load(latest(name, stage), weights_only=True)["network"] for stage in stages}

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    assert subprocess.run(command("whole"), check=False, **quiet).returncode == 0
    whole = trained("whole")
    shutil.rmtree(tmp_path / "whole")  # it is large
    for stage in stages:
        process = subprocess.Popen(command("killed"), **quiet)
        while not latest("killed", stage).is_file() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"{stage} was over before it was killed"
    assert not (tmp_path / "killed" / "transfer.csv").exists()
    assert subprocess.run(command("killed"), check=False, **quiet).returncode == 0
    killed = trained("killed")
    for stage in stages:
        assert all(torch.equal(whole[stage][key], killed[stage][key]) for key in whole[stage]), stage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["three"]}, "unknown transfer mode"),
        ({"modes": []}, "unknown transfer mode"),
        ({"imagenet_weights": None}, "needs imagenet_weights"),
    ],
)
def test_wrong_options_are_refused(cohort, nodules, imagenet, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(tmp_path, cohort, nodules, imagenet, **options)
    with pytest.raises(ValueError, match="needs nodules_dir"):
        pipeline(tmp_path, cohort, None, imagenet)


def test_weights_of_a_stage_must_fit(tmp_path, imagenet):
    network = SCOATNet(channels=(8, 8, 8))
    torch.save(network.state_dict(), tmp_path / "good.pt")
    torch.save(SCOATNet(channels=(8, 8, 16)).state_dict(), tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    fresh = prepare_network(SCOATNet(channels=(8, 8, 8)), pretrained=tmp_path / "good.pt")
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), network.state_dict().values(), strict=True)
    )
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match="does not hold weights of this SCOATNet"):
            prepare_network(SCOATNet(channels=(8, 8, 8)), pretrained=tmp_path / name)
    with pytest.raises(FileNotFoundError, match="weights of the earlier stage"):
        prepare_network(network, pretrained=tmp_path / "none.pt")
    with pytest.raises(ValueError, match="SCOATNet has no backbone"):
        prepare_network(network, imagenet=str(imagenet))
    with pytest.raises(ValueError, match="SHA-256"):
        prepare_network(NCoVSegNet(width=0.02), imagenet=str(imagenet), imagenet_sha256="0" * 64)


@pytest.mark.parametrize("name", ["covid_ct_scoatnet_segmentation", "covid_ct_attention_unet_segmentation"])
def test_the_other_bundles_can_be_trained_on_nodules_first(name, cohort, nodules, tmp_path):
    overrides = {"image_size": [32, 32], "network_def::channels": [8] * 5, "num_workers": 0, "epochs": 1}
    folder = ROOT / "bundles" / name
    manifest = TransferPipeline(
        folder, tmp_path, cohort, nodules, modes=["none", "two-stage"], overrides=overrides
    ).run()
    assert list(manifest["stages"]) == ["covid_none", "nodules", "covid_two-stage"]
