# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_tester import (
    ROOT,
    Bundle,
    bundle_command,
    check_configs_agree,
    check_scores,
    run_bundle,
    train_evaluate_infer,
)
from monai.bundle import onnx_export, verify_metadata, verify_net_in_out
from PIL import Image

BUNDLES = [
    Bundle(
        "covid_ct_scoatnet_segmentation",
        reduced={"image_size": [32, 32], "network_def::channels": [8, 8, 8, 8, 8], "batch_size": 4},
        overlays=(
            "loss_mae",
            "loss_iou",
            "loss_bce",
            "loss_dice",
            "loss_focal",
            "loss_bce_dice",
            "recipe_slices",
            "train_all",
        ),
    ),
    Bundle(
        "covid_ct_attention_unet_segmentation",
        reduced={"image_size": [32, 32], "network_def::channels": [4, 4, 8, 8, 8], "batch_size": 4},
        overlays=(
            "table1_baseline_dice",
            "table1_baseline_ftl",
            "table1_attention_dice",
            "table1_attention_ftl",
            "random_slice_split",
            "recipe_slices",
            "train_all",
        ),
    ),
    Bundle(
        "covid_ct_ncovsegnet_segmentation",
        reduced={"image_size": [64, 64], "width": 0.02, "batch_size": 4, "scales": [0.5, 1.0]},
        overlays=tuple(f"table5_{row}" for row in "abcdefgh")
        + ("three_passes", "recipe_slices", "train_all"),
    ),
]
SCOATNET = BUNDLES[0]


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda bundle: bundle.name)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.param


@pytest.fixture(scope="module")
def trained(bundle: Bundle, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    work = tmp_path_factory.mktemp("bundle")
    return work, train_evaluate_infer(bundle, cohort, work)


def test_train_evaluate_and_infer(bundle, trained, cohort):
    work, report = trained
    scan = nib.load(sorted(cohort.glob("*_ct.nii.gz"))[0])
    mask = nib.load(work / "output" / report["study"] / report["files"]["opacity"])
    assert mask.shape == scan.shape and np.array_equal(mask.affine, scan.affine)
    voxels = int(np.count_nonzero(mask.get_fdata()))
    assert report["opacity_voxels"] == voxels
    volume = voxels * abs(np.linalg.det(scan.affine[:3, :3])) / 1000
    assert report["opacity_volume_ml"]["total"] == pytest.approx(volume, abs=0.001)
    picture = work / "output" / report["study"] / f"{report['study']}_overview.png"
    assert min(Image.open(picture).size) > 400


def test_configs_agree(bundle):
    check_configs_agree(bundle)


def test_overlays_have_all_properties(bundle, cohort, tmp_path):
    paths = bundle.training_paths(tmp_path, cohort)
    for overlay in bundle.overlays:
        workflow = bundle.workflow("train", ("train", overlay), paths)
        assert workflow.check_properties() == [], overlay


def test_other_sections_are_scored_whole(bundle, cohort, tmp_path):
    content = json.loads((cohort / "datalist.json").read_text())
    content["testing"] = [
        {key: entry[key] for key in ("image", "label", "patient_id")} for entry in content.pop("training")
    ]
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    overrides = bundle.training_paths(tmp_path, cohort) | {"section": "testing"}
    overrides["data_list_file"] = str(tmp_path / "datalist.json")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").touch()
    workflow = bundle.workflow("train", ("train", "evaluate"), overrides)
    assert len(workflow.parser.get_parsed_content("validate#dataset")) == 6


def test_losses_of_scoatnets_table_1_by_hand(cohort, tmp_path):
    logits = torch.tensor([[[[0.0, 2.0], [-1.0, 0.5]]], [[[1.0, -2.0], [3.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]], [[[1.0, 0.0], [1.0, 0.0]]]])
    p, y = torch.sigmoid(logits).numpy().astype(float), target.numpy().astype(float)
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    intersection = (p * y).sum()
    dice = 1 - 2 * intersection / ((p**2).sum() + (y**2).sum())
    expected = {
        "loss_mae": np.abs(p - y).mean(),
        "loss_iou": 1 - intersection / (p.sum() + y.sum() - intersection),
        "loss_bce": bce,
        "loss_dice": dice,
        "loss_focal": (-(y * (1 - p) ** 2 * np.log(p) + (1 - y) * p**2 * np.log(1 - p))).mean(),
        "loss_bce_dice": bce + 0.5 * dice,
    }
    for overlay, value in expected.items():
        workflow = SCOATNET.workflow("train", ("train", overlay), SCOATNET.training_paths(tmp_path, cohort))
        loss = workflow.parser.get_parsed_content("loss")
        assert float(loss(logits, target)) == pytest.approx(value, abs=1e-4), overlay


def test_metadata_network_and_onnx(bundle, tmp_path, trained, monkeypatch):
    work, _ = trained
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the export leaves a copy of the weights there
    metadata = bundle.folder / "configs" / "metadata.json"
    schema = ROOT / "scripts" / "meta_schema_20240725.json"  # MONAI's, Apache-2.0: no network is needed
    assert schema.is_file()
    verify_metadata(meta_file=str(metadata), filepath=str(schema))
    small = json.loads(metadata.read_text())
    for side in small["network_data_format"].values():
        for value in side.values():
            value["spatial_shape"] = [64, 64]
    (tmp_path / "metadata.json").write_text(json.dumps(small))
    overrides = {k: v for k, v in bundle.reduced.items() if k in ("network_def::channels", "width")}
    for config in ("train", "inference"):
        verify_net_in_out(
            net_id="network_def",
            meta_file=str(tmp_path / "metadata.json"),
            config_file=bundle.config(config)[0],
            **overrides,
        )
    onnx_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.onnx"),
        ckpt_file=str(work / "models" / "model.pt"),
        meta_file=str(tmp_path / "metadata.json"),
        config_file=bundle.config("inference")[0],
        input_shape=[1, 1, 64, 64],
        use_trace=True,
        **overrides,
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 1, 64, 64), dtype=np.float32)
    (logits,) = session.run(None, {session.get_inputs()[0].name: image})
    workflow = bundle.workflow("infer", ("inference",), {"ckpt_path": str(work / "models" / "model.pt")})
    network = workflow.parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(work / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        assert np.allclose(logits, network.eval()(torch.from_numpy(image)).numpy(), atol=1e-4)


def test_training_on_plain_slices(bundle, tmp_path):
    from custom.data import prepare_slices

    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(6):
        image = rng.integers(0, 90, (40, 50), dtype=np.uint8)
        mask = np.zeros((40, 50), np.uint8)
        mask[10:20, 5 * number : 5 * number + 10] = 255
        Image.fromarray(np.where(mask > 0, 200, image).astype(np.uint8)).save(
            tmp_path / "images" / f"{number}.png"
        )
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    prepare_slices(tmp_path / "images", tmp_path / "masks", tmp_path / "data", n_folds=3)
    overrides = {**bundle.training_paths(tmp_path, tmp_path / "data"), "epochs": 2}
    workflow = bundle.workflow("train", ("train", "train_slices"), overrides)
    assert workflow.check_properties() == []
    workflow.run()
    evaluation = bundle.workflow("train", ("train", "train_slices", "evaluate"), overrides)
    assert evaluation.check_properties() == []
    evaluation.run()
    check_scores(tmp_path / "eval", cases=2)


def test_the_papers_split_by_slice_is_scored_by_slice(cohort, tmp_path):
    bundle = BUNDLES[1]
    overrides = {**bundle.training_paths(tmp_path, cohort), "epochs": 1, "select_slices": "all"}
    workflow = bundle.workflow("train", ("train", "random_slice_split"), overrides)
    workflow.run()
    evaluation = bundle.workflow("train", ("train", "evaluate", "random_slice_split"), overrides)
    evaluation.run()
    check_scores(tmp_path / "eval", cases=7)  # a fifth of 6 volumes of 6 slices


def test_it_runs_from_its_folder_and_from_the_root(bundle, cohort, tmp_path, trained):
    work, _ = trained
    for place in (bundle.folder, ROOT):
        paths = bundle.training_paths(work, cohort)
        paths["output_dir"] = str(tmp_path / place.name)
        if place == bundle.folder:
            del paths["bundle_root"]
        done = run_bundle(bundle, ("train", "evaluate"), paths, cwd=place)
        assert done.returncode == 0, done.stderr
        check_scores(tmp_path / place.name, cases=2)


def test_user_errors_end_in_one_line_and_code_2(bundle, cohort, tmp_path):
    paths = bundle.training_paths(tmp_path, cohort)
    mistakes = [
        (("train",), {**paths, "dataset_dir": str(tmp_path / "none")}, "datalist.json not found"),
        (("train",), {**paths, "epoch": 3}, "did you mean --epochs?"),
        (("train", "evaluate"), paths, "model.pt not found"),
    ]
    for names, overrides, message in mistakes:
        done = run_bundle(bundle, names, overrides)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
        assert "Traceback" not in done.stderr + done.stdout


def test_killed_at_a_random_moment_and_restarted_gives_the_same_weights(bundle, cohort, tmp_path):
    def paths(name: str) -> dict:
        return {**bundle.training_paths(tmp_path / name, cohort), "epochs": 4}

    done = run_bundle(bundle, ("train",), paths("whole"))
    assert done.returncode == 0, done.stderr
    whole = torch.load(tmp_path / "whole" / "models" / "checkpoint_latest.pt", weights_only=True)["network"]
    shutil.rmtree(tmp_path / "whole")  # that of a ResNet-50 is large
    checkpoint = tmp_path / "killed" / "models" / "checkpoint_latest.pt"
    moment = random.Random(time.time_ns()).uniform(0, 1.5)
    process = subprocess.Popen(
        bundle_command(bundle, ("train",), paths("killed")),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not checkpoint.is_file() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = run_bundle(bundle, ("train",), paths("killed"))
    assert again.returncode == 0, again.stderr
    resumed = torch.load(checkpoint, weights_only=True)["network"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole), (
        f"killed {moment:.2f} s after an epoch"
    )
