# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Files that may not be read, and folders that may not be written to, through the bundles' own workflows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from threshold_model import BUNDLE, inference_overrides, reports

from custom.console import CohortError, describe_error
from custom.data.dicom_writer import write_dicom_series
from tests.bad_scans import nifti, table_phantom
from tests.permissions import read_only, unreadable


@pytest.fixture(scope="module")
def phantom():
    return table_phantom()


def run(workflow) -> tuple[str, int]:
    """Run what must fail; returns the line that the user reads, and the exit code."""
    with pytest.raises(Exception) as caught:  # noqa: B017 - MONAI wraps it; what the user sees is checked
        workflow.run()
    line = describe_error(caught.value)
    assert line is not None and "\n" not in line
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, CohortError):
        cause = cause.__cause__
    return line, 2 if cause is None else cause.exit_code


def series(folder: Path, phantom, seed: int) -> list[Path]:
    return write_dicom_series(folder, phantom.image, phantom.affine, seed=seed)


def test_what_may_not_be_read_is_listed_and_the_others_are_done(tmp_path, phantom):
    """Also whole studies and folders, which are easily taken for not being there."""
    scans = tmp_path / "scans ä"
    scans.mkdir()
    for name in ("good", "denied"):
        nifti(scans / f"{name}.nii.gz", phantom.image, phantom.affine)
    one_slice, all_slices, folder = (scans / f"{name}_Mustermann" for name in ("one", "all", "folder"))
    first, *_ = series(one_slice, phantom, 1)
    study = series(all_slices, phantom, 2)
    series(folder, phantom, 3)
    overrides = {**inference_overrides(tmp_path / "work", scans, size=32), "dicom_output": False}
    with unreadable(scans / "denied.nii.gz", first, *study), read_only(folder):
        folder.chmod(0o000)
        line, code = run(BUNDLE.workflow("infer", ("inference",), overrides))
    assert line.startswith("4 of 5 studies failed: ") and code == 1
    assert f"cannot be read (Permission denied): {scans / 'denied.nii.gz'}" in line
    assert f"permission denied to read {len(study)} files or folders; 'find SCANS ! -readable' lists" in line
    assert "permission denied to read a file or folder; " in line
    assert "Mustermann" not in line, "folders of DICOM files are named after patients"
    assert "1 file beside it cannot be read: permission denied" in line
    statuses = {name: report["status"] for name, report in reports(tmp_path / "work").items()}
    assert statuses.pop("good") == "segmented" and set(statuses.values()) == {"failed"} and len(statuses) == 4


def test_results_that_cannot_be_written(tmp_path, phantom):
    (tmp_path / "scans").mkdir()
    nifti(tmp_path / "scans" / "a.nii.gz", phantom.image, phantom.affine)
    out = tmp_path / "out ß"
    out.mkdir()
    overrides = inference_overrides(tmp_path / "work", tmp_path / "scans", size=32)
    with read_only(out):
        for place in (out, out / "more" / "results"):
            workflow = BUNDLE.workflow("infer", ("inference",), {**overrides, "output_dir": str(place)})
            line, code = run(workflow)
            assert line.startswith(f"Permission denied: {out}") and code == 2
    assert not list(out.iterdir())


@pytest.fixture
def data(tmp_path, phantom) -> Path:
    """Two cases in two folds."""
    entries = []
    for number in range(2):
        nifti(tmp_path / f"{number}.nii.gz", phantom.image, phantom.affine)
        nifti(tmp_path / f"{number}_mask.nii.gz", (phantom.label > 0).astype(np.uint8), phantom.affine)
        entry = {"image": f"{number}.nii.gz", "label": f"{number}_mask.nii.gz"}
        entries.append({**entry, "patient_id": str(number), "fold": number})
    (tmp_path / "datalist.json").write_text(json.dumps({"training": entries}), encoding="utf-8")
    return tmp_path


def overrides_of(data: Path, work: Path) -> dict:
    """Of train and evaluate with a network that thresholds."""
    content = inference_overrides(work, data, size=32)
    kept = {key: content[key] for key in ("network_def", "hu_window", "image_size", "ckpt_path")}
    return {**BUNDLE.training_paths(work, data), **kept, "batch_size": 64, "epochs": 1}


@pytest.mark.parametrize("key", ["ckpt_dir", "cache_dir"])
def test_a_training_that_cannot_write(data, tmp_path, key):
    overrides = overrides_of(data, tmp_path / "work")
    overrides.pop("ckpt_path")
    out = tmp_path / "out ß"
    out.mkdir()
    overrides[key] = str(out)
    with read_only(out):
        line, code = run(BUNDLE.workflow("train", ("train",), overrides))
    assert line.startswith("Permission denied: ") and str(out) in line and code == 2
    assert not list(out.iterdir())


def test_an_evaluation_that_cannot_write(data, tmp_path):
    overrides = overrides_of(data, tmp_path / "work")
    out = tmp_path / "out ß"
    out.mkdir()
    overrides["output_dir"] = str(out / "eval")
    with read_only(out):
        line, code = run(BUNDLE.workflow("train", ("train", "evaluate"), overrides))
    assert line.startswith("Permission denied: ") and str(out) in line and code == 2
    assert not list(out.iterdir())


@pytest.mark.parametrize("name", ["1.nii.gz", "1_mask.nii.gz", "datalist.json"])
def test_training_data_that_may_not_be_read(data, tmp_path, name):
    overrides = overrides_of(data, tmp_path / "work")
    overrides.pop("ckpt_path")
    with unreadable(data / name):
        line, code = run(BUNDLE.workflow("train", ("train",), overrides))
    assert f"Permission denied: {data / name}" in line and code == 2
    assert not (tmp_path / "work" / "models" / "checkpoint_latest.pt").exists()


def test_a_checkpoint_that_may_not_be_read_is_not_overwritten(data, tmp_path):
    overrides = overrides_of(data, tmp_path / "work")
    overrides.pop("ckpt_path")
    BUNDLE.workflow("train", ("train",), overrides).run()
    latest = tmp_path / "work" / "models" / "checkpoint_latest.pt"
    before = latest.read_bytes()
    with unreadable(latest):
        line, code = run(BUNDLE.workflow("train", ("train",), {**overrides, "epochs": 2}))
    assert line == f"Permission denied: {latest}" and code == 2
    assert latest.read_bytes() == before


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_weights_that_may_not_be_read(data, tmp_path, kind):
    work = tmp_path / "work"
    (data / "scans").mkdir()
    (data / "0.nii.gz").rename(data / "scans" / "0.nii.gz")
    overrides = (
        inference_overrides(work, data / "scans", size=32)
        if kind == "infer"
        else {**overrides_of(data, work), "fold": 1}
    )
    names = ("inference",) if kind == "infer" else ("train", "evaluate")
    with unreadable(work / "model.pt"):
        line, code = run(BUNDLE.workflow(kind, names, overrides))
    assert f"Permission denied: {work / 'model.pt'}" in line and code == 2
