# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from custom.bundle import CrossValidation, read_study
from custom.console import CohortError
from custom.metrics import ScoredCase, score_case

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "scripts" / "cross_validate.py"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.json"
    small = {"image_size": [32, 32], "batch_size": 8, "num_workers": 0, "epochs": 2}
    systems = {
        "SCOAT-Net": {
            "bundle": "covid_ct_scoatnet_segmentation",
            "overrides": {"network_def#channels": [4, 4, 4, 4, 4], "network_def#reduction": 2},
        },
        "U-Net": {
            "bundle": "covid_ct_scoatnet_segmentation",
            "overlays": ["baseline_unet"],
            "overrides": {"network_def#network#features": [4, 4, 4, 4, 4, 4]},
        },
    }
    path.write_text(
        json.dumps({"title": "Two systems", "reference": "U-Net", "overrides": small, "systems": systems})
    )
    return path


def command(study: Path, cohort: Path, output: Path, *options: str) -> list[str]:
    folders = ["--dataset-dir", str(cohort), "--output-dir", str(output)]
    return [sys.executable, str(SCRIPT), str(study), *folders, *options]


def times(output: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(output.rglob("scores.json"))}


@pytest.fixture(scope="module")
def finished(study, cohort, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Killed in the second of three folds and run again; with the times at which scores stood before."""
    output = tmp_path_factory.mktemp("output") / "out"
    process = subprocess.Popen(
        command(study, cohort, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = output / "runs" / "scoat_net" / "fold_1" / "models" / "checkpoint_latest.pt"
    for _ in range(1200):
        if checkpoint.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.is_file() and not (output / "comparison").exists()
    before = times(output)
    done = subprocess.run(command(study, cohort, output), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"report: {output / 'comparison' / 'comparison.md'}" in done.stdout
    return output, before


def test_a_killed_study_goes_on(finished, study, cohort):
    output, before = finished
    now = times(output)
    assert len(now) == 6 and before and all(now[file] == when for file, when in before.items())
    assert len(list((output / "runs").rglob("finished"))) == 6


def test_a_terminated_study_ends_its_training_too(study, cohort, tmp_path):
    """What schedulers and containers send; the lock of a run is free when nobody works on it."""
    process = subprocess.Popen(
        command(study, cohort, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "out" / "runs" / "scoat_net" / "fold_0"
    for _ in range(1200):
        if (folder / "log.txt").is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (folder / "finished").exists()


def test_every_case_is_scored_once_by_a_network_that_has_not_seen_it(finished, cohort):
    output, _ = finished
    folds = {
        entry["image"].removesuffix(".nii.gz"): entry["fold"]
        for entry in json.loads((cohort / "datalist.json").read_text())["training"]
    }
    rows = json.loads((output / "comparison" / "comparison.json").read_text())["rows"]
    assert sorted(row["name"] for row in rows) == sorted(2 * list(folds))
    assert all(row["fold"] == folds[row["name"]] for row in rows)
    for fold in range(3):
        training = json.loads((output / "runs" / "u_net" / f"fold_{fold}" / "training.json").read_text())
        # Neither the data set's expression nor validation is touched: train.json leaves this fold out.
        assert training["fold"] == fold and training["val_interval"] == "$@epochs + 1"
        assert "train#dataset#data" not in training


def test_scores_are_those_of_the_masks_that_were_kept(finished, cohort):
    output, _ = finished
    for row in json.loads((output / "comparison" / "comparison.json").read_text())["rows"]:
        system = "scoat_net" if row["system"] == "SCOAT-Net" else "u_net"
        folder = output / "runs" / system / f"fold_{row['fold']}" / "scores" / "predictions"
        mask = nib.load(folder / f"{row['name']}.nii.gz")
        truth = nib.load(next(cohort.glob(row["name"].removesuffix("_ct") + "_opacity.nii.gz")))
        assert np.array_equal(mask.affine, truth.affine)
        again = score_case(
            ScoredCase(row["name"], np.asarray(mask.dataobj) > 0, np.asarray(truth.dataobj) > 0)
        ).row
        for key in ("dice", "sensitivity", "true_voxels", "predicted_voxels"):
            assert row[key] == pytest.approx(again[key]), key


def test_the_report_can_be_read(finished):
    folder = finished[0] / "comparison"
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    for part in ("SCOAT-Net", "U-Net", "3 folds", "last epoch", "million parameters", "contour_sheet.png"):
        assert part in text
    assert str(finished[0]) not in text
    for picture in ("box_plots.png", "contour_sheet.png"):
        assert (folder / picture).stat().st_size > 10_000


def test_other_settings_are_refused(finished, study, cohort):
    made = read_study(study, ROOT / "bundles", ["U-Net:epochs=3"])
    with pytest.raises(ValueError, match=r"U-Net, fold 0 in .* other settings \(overrides\)"):
        CrossValidation(made, cohort, finished[0]).run()


def test_some_systems_of_a_study_are_runs_of_the_whole(finished, study, cohort, tmp_path):
    """Nothing is trained again, and the report is of the systems that were asked for."""
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    before = times(output / "runs")
    done = subprocess.run(
        command(study, cohort, output, "--systems", "SCOAT-Net"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert times(output / "runs") == before
    rows = json.loads((output / "comparison" / "comparison.json").read_text())["rows"]
    assert len(rows) == 6 and {row["system"] for row in rows} == {"SCOAT-Net"}
    wrong = subprocess.run(
        command(study, cohort, output, "--systems", "V-Net"), capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: the study has no system 'V-Net'; it has SCOAT-Net; U-Net"


def test_inner_fold_keeps_the_scored_fold_out_of_training_and_choice(study, cohort, tmp_path):
    made = read_study(study, ROOT / "bundles")
    object.__setattr__(made, "selection", "inner_fold")
    object.__setattr__(made, "systems", made.systems[:1])
    runs = CrossValidation(made, cohort, tmp_path, folds=[2])
    assert [runs.inner_fold(fold) for fold in (0, 1, 2)] == [1, 2, 0]
    scores = runs.run()
    folder = tmp_path / "runs" / "scoat_net" / "fold_2"
    training = json.loads((folder / "training.json").read_text())
    assert training["train#dataset#data"].endswith("exclude_fold=[2, 0])")
    assert training["validate#dataset#data"].endswith("fold=0)")
    assert len(scores["SCOAT-Net"]) == 2 and {case.row["fold"] for case in scores["SCOAT-Net"]} == {2}
    assert len(list((tmp_path / "cache" / "slices").glob("*/image.npy"))) == 2  # the two cases of fold 1


def test_a_run_that_fails_is_named_and_the_others_are_done(study, cohort, tmp_path):
    made = read_study(study, ROOT / "bundles", ["U-Net:image_size=[33, 32]"])
    with pytest.raises(CohortError, match=r"1 of 2 runs failed: U-Net, fold 0: .*multiple of 16.*log\.txt"):
        CrossValidation(made, cohort, tmp_path, folds=[0], jobs=2).run()
    assert (tmp_path / "runs" / "scoat_net" / "fold_0" / "finished").is_file()
    assert not (tmp_path / "runs" / "u_net" / "fold_0" / "finished").exists()


def test_two_processes_and_a_stage_before(study, cohort, tmp_path):
    """One stage whose weights a system starts from, trained and scored by two processes."""
    content = json.loads(study.read_text())
    small = {"network_def#channels": [4, 4, 4, 4, 4], "network_def#reduction": 2}
    bundle = {"bundle": "covid_ct_scoatnet_segmentation", "overrides": small}
    systems = {"after": {**bundle, "start": "before"}}
    content |= {"stages": {"before": bundle}, "systems": systems}
    content["reference"] = "after"
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    made = read_study(path, ROOT / "bundles", ["epochs=1"])
    with pytest.raises(ValueError, match="'before' has no data set of its own"):
        CrossValidation(made, cohort, tmp_path / "out")
    made = read_study(path, ROOT / "bundles", ["epochs=1", f"before:dataset_dir={cohort}"])
    scores = CrossValidation(made, cohort, tmp_path / "out", folds=[1], processes=2).run()
    assert len(scores["after"]) == 2
    training = json.loads((tmp_path / "out" / "runs" / "after" / "fold_1" / "training.json").read_text())
    assert training["pretrained_weights"] == str(
        tmp_path / "out" / "runs" / "before" / "stage" / "models" / "model.pt"
    )
    assert os.path.isfile(training["pretrained_weights"])


def test_folds_that_cannot_be(study, cohort, tmp_path):
    made = read_study(study, ROOT / "bundles")
    with pytest.raises(ValueError, match=r"has no fold 7; it has \[0, 1, 2\]"):
        CrossValidation(made, cohort, tmp_path, folds=[7])
    data = json.loads((cohort / "datalist.json").read_text())
    for entry in data["training"]:
        entry.pop("fold")
    (tmp_path / "datalist.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="has 0 folds, at least 2 are needed"):
        CrossValidation(made, tmp_path, tmp_path / "out")
