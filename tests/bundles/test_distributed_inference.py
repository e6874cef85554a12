# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Two processes share a cohort, and one that is killed leaves the rest of it to the next run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_tester import Bundle
from test_distributed import torchrun
from threshold_model import BUNDLE, inference_overrides, reports

from custom.data import make_phantom

CONFIGS = ("inference", "multi_gpu_inference")
NAMES = ["a", "b", "broken", "c", "d"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    phantom = make_phantom((48, 48, 8), (7.2, 7.2, 34.0), seed=2, noise_hu=5.0)
    for number, name in enumerate(NAMES):
        image = phantom.image + np.int16(number)
        image[14 : 17 + number, 24:27, 3:5] = 3000  # what the network takes for opacity
        nib.save(nib.Nifti1Image(image, phantom.affine), folder / f"{name}.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"")
    return folder


def overrides(work: Path, scans: Path) -> dict:
    return {**inference_overrides(work, scans, size=32), "batch_size": 64}


def infer(work: Path, scans: Path, **changed: object):
    return torchrun(BUNDLE, CONFIGS, {**overrides(work, scans), **changed})


def masks(work: Path) -> dict[str, np.ndarray]:
    files = sorted((work / "output").glob("*/*_opacity.nii.gz"))
    return {file.parent.name: np.asarray(nib.load(file).dataobj) for file in files}


def table(work: Path) -> list[dict]:
    with open(work / "output" / "cohort.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stamps(work: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (work / "output").rglob("*_report.json")}


@pytest.fixture(scope="module")
def alone(scans, tmp_path_factory) -> Path:
    """What one process makes of the cohort."""
    work = tmp_path_factory.mktemp("alone")
    workflow = BUNDLE.workflow("infer", ("inference",), overrides(work, scans))
    with pytest.raises(Exception, match="1 of 5 studies failed|evaluate"):
        workflow.run()
    return work


def test_two_processes_write_what_one_does(scans, alone, tmp_path):
    done = infer(tmp_path, scans)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and line.startswith("error: 1 of 5 studies failed: broken: ")
    one, two = masks(alone), masks(tmp_path)
    assert one.keys() == two.keys() == set(NAMES) - {"broken"}
    assert all(np.array_equal(one[name], two[name]) and one[name].any() for name in one)
    assert table(alone) == table(tmp_path) and [row["study"] for row in table(tmp_path)] == NAMES
    # The first process logs what it does: its share is every second study.
    logged = [name for name in NAMES if f" {name}: opacity" in done.stdout]
    assert logged == ["a", "d"] and "5 to do by 2 processes" in done.stdout


def test_a_killed_process_ends_the_run_and_the_next_does_what_is_missing(scans, alone, tmp_path):
    dying = {"network_def::_target_": "tests.bundles.dying_network.DyingConv2d"}
    (scans / "broken.nii.gz").rename(tmp_path / "away")
    try:
        # Rank 1 does b, and dies over d.
        done = infer(tmp_path, scans, **dying)
        assert done.returncode == 1 and "Signal 9 (SIGKILL) received by PID" in done.stderr
        first = stamps(tmp_path)
        assert "b_report.json" in first and "d_report.json" not in first
        assert not (tmp_path / "output" / "cohort.csv").exists()
        before = {file: content.read_bytes() for file, content in files_of(tmp_path, "b").items()}

        again = infer(tmp_path, scans)
        assert again.returncode == 0, again.stderr[-3000:]
        assert f"{len(first)} of 4 studies are done already; {4 - len(first)} to do" in again.stdout
        assert all(stamp == stamps(tmp_path)[name] for name, stamp in first.items())
        assert before == {file: content.read_bytes() for file, content in files_of(tmp_path, "b").items()}
        one, two = masks(alone), masks(tmp_path)
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
        assert table(tmp_path) == [row for row in table(alone) if row["study"] != "broken"]
        assert all(report["status"] == "segmented" for report in reports(tmp_path).values())
    finally:
        (tmp_path / "away").rename(scans / "broken.nii.gz")


def files_of(work: Path, name: str) -> dict[str, Path]:
    return {file.name: file for file in (work / "output" / name).iterdir()}


@pytest.mark.parametrize(
    "name",
    [
        "covid_ct_scoatnet_segmentation",
        "covid_ct_attention_unet_segmentation",
        "covid_ct_ncovsegnet_segmentation",
    ],
)
def test_every_bundle_has_the_overlay(name, tmp_path, scans):
    """Its parts fit its inference config; without torchrun's variables it is not started."""
    config = json.loads(Path(Bundle(name).config("multi_gpu_inference")[0]).read_text(encoding="utf-8"))
    same = json.loads(Path(BUNDLE.config("multi_gpu_inference")[0]).read_text(encoding="utf-8"))
    base = json.loads(Path(Bundle(name).config("inference")[0]).read_text(encoding="utf-8"))
    assert config == same and base["report"]["bundle"] == name
    assert base["initialize"] == [step for step in config["initialize"] if step in base["initialize"]]
