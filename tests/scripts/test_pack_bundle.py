# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Packed bundles do their work where MONAI is installed and this repository is not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {
    "covid_ct_scoatnet_segmentation": {"image_size": [32, 32], "network_def::channels": [8] * 5},
    "covid_ct_attention_unet_segmentation": {"image_size": [32, 32], "network_def::channels": [4] * 5},
    "covid_ct_ncovsegnet_segmentation": {"image_size": [64, 64], "width": 0.02},
}
LEAVE = shutil.ignore_patterns("models", "eval", "cache", "output", "data", "transfer")
SCOATNET = "covid_ct_scoatnet_segmentation"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack_bundle, verify_bundle = script("pack_bundle"), script("verify_bundle")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the packages of this one, and neither this repository nor its package custom."""
    folder = tmp_path_factory.mktemp("fresh")
    packages = folder / "packages"
    packages.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            # A .pth file is what makes an editable install of this repository found.
            ours = entry.name == "custom" or "covid_ct" in entry.name or entry.suffix == ".pth"
            if not ours and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(f"{packages}\n")
    python = folder / "venv" / "bin" / "python"
    for module, found in (("monai", True), ("custom", False)):
        code = f"import importlib.util as u, sys; sys.exit((u.find_spec('{module}') is not None) != {found})"
        assert subprocess.run([python, "-c", code], cwd=folder, check=False).returncode == 0, module
    return python


@dataclass
class Receiver:
    """Someone with an unpacked bundle."""

    python: Path
    folder: Path  # of the bundle
    data: Path
    small: dict

    def run(self, *configs: str, cwd: Path, **overrides) -> subprocess.CompletedProcess:
        """``python -m monai.bundle run``, with relative paths in the bundle's folder."""
        inside = cwd == self.folder
        root = Path() if inside else self.folder
        files = [str(root / "configs" / f"{name}.json") for name in configs]
        words = ["--config_file", str(files), "--logging_file", str(root / "configs" / "logging.conf")]
        options = {} if inside else {"bundle_root": str(self.folder)}
        for key, value in {**options, **self.small, **overrides}.items():
            if value is not None:
                words += [f"--{key}", value if isinstance(value, str) else repr(value)]
        return subprocess.run(
            [self.python, "-m", "monai.bundle", "run", *words],
            cwd=cwd,
            env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def train_evaluate_infer(self, cwd: Path, **places: str) -> None:
        training = {"dataset_dir": str(self.data), "num_workers": 0, **places}
        for names in (("train",), ("train", "evaluate")):
            done = self.run(*names, cwd=cwd, epochs=1, **training)
            assert done.returncode == 0, done.stderr[-2000:]
        models = Path(places.get("ckpt_dir", self.folder / "models"))
        assert (models / "model.pt").is_file()
        output = Path(places.get("output_dir", self.folder / "eval"))
        scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
        assert len(scores["cases"]) == 2
        scans = self.data.parent / "scans"
        results = output.parent / "results"
        done = self.run(
            "inference",
            cwd=cwd,
            dataset_dir=str(scans),
            output_dir=str(results),
            ckpt_path=str(models / "model.pt"),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert list(results.rglob("*_opacity.nii.gz"))

    def refusal(self, cwd: Path, **overrides) -> str:
        """The one line that an inference ends in."""
        done = self.run("inference", cwd=cwd, dataset_dir=str(self.data.parent / "scans"), **overrides)
        assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line


@pytest.fixture(scope="module")
def data(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("received")
    (folder / "data").symlink_to(cohort)
    (folder / "scans").mkdir()
    scan = sorted(cohort.glob("*_ct.nii.gz"))[0]
    (folder / "scans" / scan.name).symlink_to(scan)
    return folder / "data"


def receive(name: str, fresh: Path, data: Path, folder: Path, weights: dict | None = None) -> Receiver:
    """Pack a bundle as its owner does and unpack it as its receiver does."""
    source = folder / "sender" / name
    shutil.copytree(ROOT / "bundles" / name, source, ignore=LEAVE)
    assert pack_bundle.main([str(source), "--output", str(folder / "bundle.zip")]) == 0
    with zipfile.ZipFile(folder / "bundle.zip") as archive:
        archive.extractall(folder / "got")
    return Receiver(fresh, folder / "got" / name, data, SMALL[name])


@pytest.mark.parametrize("name", sorted(SMALL))
def test_an_unpacked_bundle_trains_evaluates_and_infers(name, fresh, data, tmp_path):
    receiver = receive(name, fresh, data, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    places = {key: str(elsewhere / key) for key in ("ckpt_dir", "output_dir", "cache_dir")}
    receiver.train_evaluate_infer(elsewhere, **places)
    assert not (receiver.folder / "models").exists(), "everything was to go elsewhere"
    if name == SCOATNET:  # the others need not show it again
        receiver.train_evaluate_infer(receiver.folder)


def test_mistakes_of_a_receiver_end_in_one_line(fresh, data, tmp_path):
    receiver = receive(SCOATNET, fresh, data, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "model.pt not found; it should hold the weights: train the bundle first" in receiver.refusal(
        elsewhere
    )

    assert "is not the folder of this bundle; give it as --bundle_root" in receiver.refusal(
        elsewhere, bundle_root=None
    )

    (receiver.folder / "models").mkdir()
    torch.save({"weight": torch.zeros(1)}, receiver.folder / "models" / "model.pt")
    assert "model.pt does not fit this SCOATNet: of 455 tensors" in receiver.refusal(elsewhere)


def test_two_versions_in_one_process_are_told_apart(fresh, data, tmp_path):
    """A server loads several bundles as MONAI Label does: no initialize, only what it needs."""
    first = receive(SCOATNET, fresh, data, tmp_path / "a").folder
    second = receive("covid_ct_attention_unet_segmentation", fresh, data, tmp_path / "b").folder
    code = """
import sys
from monai.bundle import ConfigParser
for path in sys.argv[1:]:
    sys.path.insert(0, path)
    parser = ConfigParser()
    parser.read_config(path + "/configs/inference.json")
    parser["bundle_root"] = path
    print(type(parser.get_parsed_content("network_def")).__name__)
    sys.path.remove(path)
"""

    other = tmp_path / "other" / SCOATNET
    shutil.copytree(first, other)
    file = other / "custom" / "__init__.py"
    file.write_text(file.read_text().replace('__version__ = "', '__version__ = "9'))
    words = [fresh, "-c", code, str(first), str(second), str(other)]
    done = subprocess.run(words, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stdout.split() == ["SCOATNet", "DilatedAttentionUNet"]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ImportError: ")]
    assert "brings custom 90.1.0 (SHA-256 " in line and "but custom 0.1.0 (SHA-256 " in line


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "bundles" / SCOATNET, SCOATNET, ignore=LEAVE)
    Path(SCOATNET, "eval").mkdir()
    Path(SCOATNET, "eval", "scores.json").write_text("{}")
    assert pack_bundle.main([SCOATNET]) == 0
    out = capsys.readouterr().out
    assert f"written: {SCOATNET}_v0.1.0.zip" in out and "without weights: models/model.pt is not there" in out
    assert "left out: 1 files of training and inference in eval" in out
    assert verify_bundle.main([f"{SCOATNET}_v0.1.0.zip"]) == 0
    assert capsys.readouterr().out.startswith(f"right: {SCOATNET} 0.1.0, custom ")

    train = Path(SCOATNET, "configs", "train.json")
    train.write_text(train.read_text().replace('"learning_rate": 0.01', '"learning_rate": "$1 / 100"'))
    assert verify_bundle.main([SCOATNET]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['configs/train.json: learning_rate: expression that is not known: "$1 / 100"']
    Path(f"{SCOATNET}_v0.1.0.zip").unlink()
    assert pack_bundle.main([SCOATNET]) == 2
    captured = capsys.readouterr()
    assert "learning_rate" in captured.out and captured.err.count("error: ") == 1
    assert not Path(f"{SCOATNET}_v0.1.0.zip").exists()

    assert verify_bundle.main([SCOATNET, "--unknown"]) == 0
    Path("mine.txt").write_text(capsys.readouterr().out)
    assert Path("mine.txt").read_text() == "$1 / 100\n"
    assert verify_bundle.main([SCOATNET, "--allow", "mine.txt"]) == 0
    assert pack_bundle.main([SCOATNET, "--allow", "mine.txt", "--output", "other.zip"]) == 0
    capsys.readouterr()
    for words in (["nowhere"], [SCOATNET, "--allow", "nowhere.txt"]):
        assert verify_bundle.main(words) == 2 and pack_bundle.main(words) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
