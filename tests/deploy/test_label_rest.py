# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A server on a folder of NIfTI files, all three bundles in it, and a client that annotates."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
from label_tester import (
    NAMES,
    NCOVSEGNET,
    SCOATNET,
    check_same,
    listening_addresses,
    pack_and_unpack,
    segment,
    serving,
    sha256,
)

from custom.data.files import write_nifti
from custom.data.phantom_cohort import write_cohort
from custom.data.scans import read_scan

REAL = "ct_lung_dicom"
PHANTOM = "case_000_ct"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("rest")


@pytest.fixture(scope="module")
def scans(work):
    """Five phantoms, a real scan where there is one, and a file that is no CT."""
    folder = work / "scans"
    folder.mkdir()
    write_cohort(work / "cohort", 5, seed=3, shape=(48, 48, 6), spacing=(7.2, 7.2, 45.0))
    for file in (work / "cohort").glob("*_ct.nii.gz"):
        shutil.copy(file, folder)
    if os.environ.get("CT_DATA"):
        scan = read_scan(Path(os.environ["CT_DATA"]) / REAL)
        write_nifti(folder / f"{REAL}.nii.gz", scan.voxels, scan.affine)
    rng = np.random.default_rng(0)
    write_nifti(folder / "photo.nii.gz", rng.integers(0, 255, (32, 32, 8)).astype(np.uint8), np.eye(4))
    return folder


@pytest.fixture(scope="module")
def unpacked(work):
    """One of the three comes from a zip, the others from the repository."""
    return {NCOVSEGNET: pack_and_unpack(NCOVSEGNET, work / "zip")}


@pytest.fixture(scope="module")
def server(work, models, scans, unpacked):
    with serving(work / "server", models, str(scans), unpacked) as started:
        yield started


@pytest.fixture(scope="module")
def expected(work, models, scans):
    """Masks that ``monai.bundle run`` writes for the good scans, by bundle and scan."""
    good = work / "good"
    good.mkdir()
    for name in (PHANTOM, REAL):
        if (scans / f"{name}.nii.gz").is_file():
            shutil.copy(scans / f"{name}.nii.gz", good)
    return {name: segment(name, models[name], good, work / "expected" / name) for name in NAMES}


def test_it_says_what_it_serves_and_listens_on_this_machine_only(server, scans):
    info = server.get("/info/")
    assert set(info["models"]) == set(info["trainers"]) == set(NAMES)
    for model in info["models"].values():
        assert model["type"] == "segmentation" and model["labels"] == {"opacity": 1}
    assert info["labels"] == ["opacity"] and "Research use only" in info["description"]
    assert server.get("/datastore/")["total"] == len(list(scans.glob("*.nii.gz")))
    assert listening_addresses(server.port) == {"127.0.0.1"}
    for word in ("monailabel 0.8.5", "torch 2.", "monai 1.", f"up: {server.url}"):
        assert word in server.said()


def test_next_sample(server, scans):
    sample = server.next_sample("first")
    assert Path(sample["path"]).parent == scans and Path(sample["path"]).is_file()
    assert server.next_sample("random")["id"] in {file.name[:-7] for file in scans.glob("*.nii.gz")}


@pytest.mark.parametrize("scan", [PHANTOM, REAL])
@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_the_one_that_monai_bundle_run_writes(server, scans, expected, name, scan, tmp_path):
    source = scans / f"{scan}.nii.gz"
    if not source.is_file():
        pytest.skip("CT_DATA is not set: it names the folder of real CT data")
    mask = server.mask(name, scan, tmp_path / "mask.nii.gz")
    check_same(mask, expected[name][scan], nib.load(source).affine)


def test_a_scan_that_is_no_ct_is_refused_in_one_line(server):
    answer = server.infer(SCOATNET, "photo")
    assert answer.status_code == 422
    line = answer.json()["detail"]
    assert "photo.nii.gz" in line and "\n" not in line and "Traceback" not in line


def test_unknown_images_and_models_are_errors(server):
    assert not server.infer(SCOATNET, "no_such_image").ok
    assert not server.infer("no_such_model", PHANTOM).ok
    assert server.get("/info/")["models"], "the server lives on"


def test_training_without_labels_says_so(server):
    answer = requests.post(f"{server.url}/train/{SCOATNET}?run_sync=true", json={"max_epochs": 1}, timeout=60)
    assert not answer.ok and "no label has been saved" in server.log()


def test_labels_are_saved_and_a_round_of_training_changes_what_is_served(
    server, scans, models, work, tmp_path
):
    before = {name: sha256(file) for name, file in models.items()}
    for case in ("case_000", "case_001", "case_002"):
        answer = server.save_label(f"{case}_ct", work / "cohort" / f"{case}_opacity.nii.gz")
        assert answer.ok, answer.text
        saved = nib.load(scans / "labels" / "final" / f"{case}_ct.nii.gz")
        truth = nib.load(work / "cohort" / f"{case}_opacity.nii.gz")
        assert np.array_equal(np.asarray(saved.dataobj), np.asarray(truth.dataobj))
    assert server.get("/datastore/")["completed"] == 3

    good = tmp_path / "good"
    good.mkdir()
    shutil.copy(scans / f"{PHANTOM}.nii.gz", good)
    affine = nib.load(scans / f"{PHANTOM}.nii.gz").affine
    digests = {sha256(server.weights(SCOATNET))}
    for _ in range(2):  # a second round goes on from the first, and does not find it finished
        lines = server.train(SCOATNET)
        assert sum("val_mean_dice" in line and "Epoch[1]" in line for line in lines) == 1, lines
        digests.add(sha256(server.weights(SCOATNET)))
    assert len(digests) == 3, "every round must leave new weights"
    mask = server.mask(SCOATNET, PHANTOM, tmp_path / "mask.nii.gz")
    again = segment(SCOATNET, server.weights(SCOATNET), good, tmp_path / "output")[PHANTOM]
    assert np.array_equal(np.asarray(mask.dataobj) > 0, np.asarray(again.dataobj) > 0)
    assert np.array_equal(mask.affine, affine)
    assert {name: sha256(file) for name, file in models.items()} == before
    assert sha256(server.weights(NAMES[1])) == before[NAMES[1]]


def test_it_stops_with_all_it_has_started_and_a_restart_keeps_what_was_trained(
    server, work, models, scans, unpacked
):
    assert server.stop(signal.SIGINT) == 0 and "stopping" in server.said()
    assert not listening_addresses(server.port)
    trained = sha256(server.weights(SCOATNET))
    assert trained != sha256(models[SCOATNET])
    with serving(work / "server", models, str(scans), unpacked) as again:
        assert sha256(again.weights(SCOATNET)) == trained
        assert f"{SCOATNET}: weights trained here" in again.said()
        assert set(again.get("/info/")["models"]) == set(NAMES)
        assert again.stop() == 0
