# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from report_checks import check_dicom, read_measurements, read_segment, unexplained

from custom.console import CohortError
from custom.data import write_dicom_series
from custom.handlers import StudyReport
from custom.handlers.study_attention import view_attention
from custom.networks import SCOATNet
from custom.transforms import KeepLungRegionsd, LoadCTd

AFFINE = torch.tensor([[0.0, -2, 0, 9], [-3, 0, 0, 8], [0, 0, 5, -4], [0, 0, 0, 1]], dtype=torch.float64)


def study(shape=(16, 32, 6)) -> tuple[dict, dict]:
    scan = MetaTensor(torch.full((1, *shape), -800.0), affine=AFFINE)
    mask = MetaTensor(torch.zeros(1, *shape), affine=AFFINE)
    mask[0, 2:4, 5:9, 4] = 1
    seen = Orientation("PLS", labels=None)(MetaTensor(torch.rand(1, *shape), affine=AFFINE))
    return {"scan": scan, "name": "s1"}, {"pred": mask, "image": seen}


def with_lungs(batch: dict) -> dict:
    """Two lungs; the first index grows to the front."""
    lung = MetaTensor(torch.zeros(batch["scan"].shape, dtype=torch.uint8), affine=batch["scan"].affine)
    lung[0, 1:15, 2:14, :] = 2
    lung[0, 1:15, 18:30, :] = 1
    return {**batch, "lung": lung}


def dicom_study(folder: Path, **options) -> tuple[dict, dict]:
    """A study as inference has it, loaded from DICOM."""
    hu = np.full((32, 16, 6), -800, np.int16)
    affine = np.array([[-2.0, 0, 0, 9], [0, -3, 0, 8], [0, 0, 5, -4], [0, 0, 0, 1]])
    write_dicom_series(folder / "Mustermann_Erika", hu, affine, **options)
    scan = LoadCTd("scan", ensure_channel_first=True)({"scan": folder / "Mustermann_Erika"})["scan"]
    lung = torch.zeros(scan.shape, dtype=torch.uint8)
    lung[0, 2:14, 1:15, :] = 2
    lung[0, 18:30, 1:15, :] = 1
    mask = torch.zeros(scan.shape)
    mask[0, 5:9, 2:4, 4] = 1
    batch = {"scan": scan, "name": "s1", "lung": MetaTensor(lung, affine=scan.affine)}
    seen = Orientation("PLS", labels=None)(MetaTensor(torch.rand(scan.shape), affine=scan.affine))
    return batch, {"pred": MetaTensor(mask, affine=scan.affine), "image": seen}


def run(report: StudyReport, batch: dict, output: dict) -> None:
    report(SimpleNamespace(state=SimpleNamespace(batch=[batch], output=[output])))


def read(folder: Path, name: str = "s1") -> dict:
    report = json.loads((folder / name / f"{name}_report.json").read_text(encoding="utf-8"))
    assert unexplained(report) == []
    there = {path.name for path in (folder / name).iterdir()} - {f"{name}_report.json"}
    assert there == {file for file in report["files"].values() if file}, "the report names what is there"
    return report


def test_what_was_removed_far_from_the_lungs_is_told(tmp_path):
    batch, output = study()
    batch = with_lungs(batch)
    output["pred"][0, 2:4, 5:9, 4] = 0
    output["pred"][0, 7, 0, :2] = 1  # two voxels of 2 x 3 x 5 mm, 4 mm (two steps of 2 mm) beside a lung
    output["pred"] = KeepLungRegionsd("pred", reach_mm=2)({**batch, **output})["pred"]
    run(StudyReport(tmp_path / "out"), batch, output)
    report = read(tmp_path / "out")
    told = "removed 0.1 mL of opacity that was found nowhere within 2 mm of the lungs (regions: 1)"
    assert report["source"]["notes"] == [told]
    assert report["opacity_voxels"] == 0


def test_mask_numbers_and_picture_of_a_study(tmp_path):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    network = SCOATNet(channels=(8, 8, 8, 8))
    network.train()
    run(StudyReport(tmp_path / "out", network, "a_bundle", weights), *study())
    folder = tmp_path / "out" / "s1"
    assert sorted(p.name for p in folder.iterdir()) == [
        "s1_opacity.nii.gz",
        "s1_overview.png",
        "s1_page.html",
        "s1_report.json",
    ]
    mask = nib.load(folder / "s1_opacity.nii.gz")
    assert np.array_equal(mask.affine, AFFINE.numpy()) and mask.get_data_dtype() == np.uint8
    assert np.argwhere(mask.get_fdata()).min(axis=0).tolist() == [2, 5, 4]
    report = read(tmp_path / "out")
    assert report["opacity_volume_ml"]["total"] == pytest.approx(8 * 30 / 1000)
    assert report["lung_volume_ml"]["total"] is None and report["reasons"]["lung_volume_ml"]
    assert report["model"]["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert report["dicom"] is None and "not DICOM" in report["reasons"]["dicom"]
    assert network.training, "the report leaves the network as it was"


def test_attention_is_that_of_the_shown_slice(tmp_path):
    batch, output = study()
    for k in range(6):
        output["image"][0, :, :, k] = k / 10
    asked = []

    class Network(torch.nn.Linear):
        shown_attention_maps = ("a",)

        def attention_maps(self, x, names):
            asked.append((float(x.mean()), names))
            return {"a": x}

    run(StudyReport(tmp_path, Network(1, 1)), batch, output)
    assert asked == [(pytest.approx(0.4), ("a",))]  # slice 4 holds the opacity


@pytest.mark.parametrize("fault", ["shape", "affine"])
def test_a_mask_of_another_study_measures_nothing(tmp_path, fault):
    report = StudyReport(tmp_path)
    run(report, *study())
    batch, output = study()
    if fault == "shape":
        output["pred"] = output["pred"][:, ::2]
    else:
        output["pred"].affine = torch.eye(4)
    run(report, batch, output)
    failed = read(tmp_path)
    assert failed["status"] == "failed" and "not one of this scan" in failed["reason"]
    assert "postprocessing must invert" in failed["reason"]
    assert failed["opacity_volume_ml"]["total"] is None and failed["opacity_voxels"] is None
    left = sorted(path.name for path in (tmp_path / "s1").iterdir())
    assert left == ["s1_page.html", "s1_report.json"], "the first run's masks are gone"
    with pytest.raises(CohortError, match="not one of this scan"):
        report.finish()


@pytest.mark.parametrize("fault", ["shape", "affine", "soft tissue"])
def test_a_lung_mask_of_another_study_is_not_used(tmp_path, fault):
    batch, output = study()
    batch = with_lungs(batch)
    if fault == "shape":
        batch["lung"] = batch["lung"][:, 1:]
    elif fault == "affine":
        batch["lung"].affine = torch.eye(4)
    else:
        batch["scan"][:] = 40
        batch["scan"][0, :, 15:17] = -800  # where the mask has no lung
    run(StudyReport(tmp_path), batch, output)
    report = read(tmp_path)
    assert report["status"] == "segmented" and report["opacity_volume_ml"]["total"] == 0.24
    assert report["files"]["lungs"] is None
    for field in ("lung_volume_ml", "opacity_percent_of_lung", "severity.score", "files.lungs"):
        assert "not" in report["reasons"][field] and "of this scan" in report["reasons"][field], field
    check = {c["name"]: c["status"] for c in report["acquisition"]["checks"]}
    assert check["lung_mask"] == "flagged" and check["coverage"] == "unknown"


def test_no_opacity_and_one_lung_absent_are_stated(tmp_path):
    batch, output = study()
    output["pred"][:] = 0
    run(StudyReport(tmp_path), with_lungs(batch), output)
    report = read(tmp_path)
    assert report["opacity_volume_ml"] == {"left": 0.0, "right": 0.0, "outside_lungs": 0.0, "total": 0.0}
    assert report["reasons"]["opacity_mean_hu.total"] == "there is no opacity"
    assert report["severity"]["score"] is None and "cuts off" in report["reasons"]["severity.score"]
    batch = with_lungs(study()[0])
    batch["lung"][batch["lung"] == 1] = 0
    run(StudyReport(tmp_path), batch, study()[1])
    report = read(tmp_path)
    assert report["opacity_percent_of_lung"]["left"] is report["opacity_percent_of_lung"]["total"] is None
    assert "no left lung was found" in report["reasons"]["opacity_percent_of_lung.left"]


def test_a_lobe_mask_gives_the_lobar_score(tmp_path):
    batch, output = study()
    batch["lobes"] = MetaTensor(torch.zeros(batch["scan"].shape, dtype=torch.uint8), affine=AFFINE)
    for value in range(1, 6):
        batch["lobes"][0, :, 6 * value - 6 : 6 * value] = value
    run(StudyReport(tmp_path), batch, output)
    # Opacity in columns 5 to 8: 2 of the first lobe's 576 voxels and 6 of the second's.
    assert read(tmp_path)["severity"]["lobes"] == {
        "left_upper": 1,
        "left_lower": 1,
        "right_upper": 0,
        "right_middle": 0,
        "right_lower": 0,
    }
    assert read(tmp_path)["severity"]["lobar_score"] == 2


def test_a_dicom_study_gets_dicom_objects_that_say_the_same(tmp_path):
    run(StudyReport(tmp_path / "out", bundle="a_bundle"), *dicom_study(tmp_path, patient_id="ID-4711"))
    report = read(tmp_path / "out")
    folder = tmp_path / "out" / "s1"
    assert report["dicom"]["segments"] == ["left_lung", "right_lung", "opacity", "ground_glass"]
    assert report["dicom"]["deidentified"] is False
    assert report["source"]["study_date"] == "20200301"
    assert report["source"]["patient_key"].startswith("patient-")
    for kind in ("seg", "sr"):
        check_dicom(folder / f"s1_{kind}.dcm")
    numbers = read_measurements(folder / "s1_sr.dcm")
    assert numbers["Opacity", "Volume mL"] == report["opacity_volume_ml"]["total"] == 0.24
    assert numbers["Right lung", "Volume mL"] == report["lung_volume_ml"]["right"]
    assert read_segment(folder / "s1_seg.dcm", "Opacity")[0].sum() == report["opacity_voxels"] == 8


def test_switched_off_or_without_highdicom_there_are_none_and_the_report_says_so(
    tmp_path, monkeypatch, caplog
):
    run(StudyReport(tmp_path / "out"), *dicom_study(tmp_path))
    run(StudyReport(tmp_path / "out", dicom_output=False), *dicom_study(tmp_path))
    report = read(tmp_path / "out")  # the objects of the first run are gone
    assert report["dicom"] is None and report["reasons"]["dicom"] == "switched off: dicom_output is false"
    monkeypatch.setattr("custom.reporting.dicom_objects.importlib.util.find_spec", lambda name: None)
    handler = StudyReport(tmp_path / "out")
    for _ in range(2):
        run(handler, *dicom_study(tmp_path))
    report = read(tmp_path / "out")
    assert "highdicom is not installed: install covid-ct-bundles[dicom]" in report["reasons"]["dicom"]
    assert [r.getMessage().count("highdicom") for r in caplog.records if r.levelname == "WARNING"] == [1]


def test_switches_are_read_as_the_command_line_gives_them(tmp_path):
    assert StudyReport(tmp_path, dicom_output="false").dicom_output is False
    assert StudyReport(tmp_path, deidentify="True").deidentify is True
    with pytest.raises(ValueError, match="deidentify must be true or false, got 'no'"):
        StudyReport(tmp_path, deidentify="no")


def test_headers_that_are_gone_cost_the_dicom_objects_and_not_the_study(tmp_path, caplog):
    batch, output = dicom_study(tmp_path)
    for file in (tmp_path / "Mustermann_Erika").iterdir():
        file.unlink()
    run(StudyReport(tmp_path / "out"), batch, output)
    report = read(tmp_path / "out")
    assert report["status"] == "segmented" and report["opacity_volume_ml"]["total"] == 0.24
    assert "cannot be read again" in report["reasons"]["dicom"]
    assert report["source"]["patient_key"] is None
    assert "Mustermann" not in caplog.text


@pytest.mark.parametrize("deidentify", [False, True])
def test_no_log_and_no_file_name_tells_of_the_patient(tmp_path, caplog, capfd, deidentify):
    secrets = ("Mustermann", "Erika", "ID-4711")
    with caplog.at_level(logging.DEBUG):
        batch, output = dicom_study(tmp_path / "in", patient_id="ID-4711", patient_name="Mustermann Erika")
        handler = StudyReport(tmp_path / "out", deidentify=deidentify)
        run(handler, batch, output)
        handler.finish()
    printed = capfd.readouterr()
    names = "\n".join(str(path) for path in (tmp_path / "out").rglob("*"))
    said = "\n".join([caplog.text, printed.out, printed.err, names])
    assert "s1: opacity" in said
    for secret in (*secrets, str(tmp_path / "in"), "/in/"):
        assert secret not in said, secret
    for file in (tmp_path / "out").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        told = any(secret.encode() in content for secret in secrets)
        assert told == (not deidentify and file.suffix == ".dcm"), "a PACS needs to know whose objects are"
    report = read(tmp_path / "out")
    assert (report["source"]["study_uid"] is None) == deidentify == report["dicom"]["deidentified"]


def test_a_cohort_gets_a_table_with_all_studies(tmp_path):
    cohort = SimpleNamespace(failures=[{"name": "bad", "reason": "no lung was found"}], total=3)
    handler = StudyReport(tmp_path, cohort=cohort)
    for name in ("s1", "s2"):
        batch, output = study()
        run(handler, {**with_lungs(batch), "name": name}, output)
    with pytest.raises(CohortError, match="1 of 3 studies failed: bad: no lung was found") as caught:
        handler.finish()
    assert caught.value.exit_code == 1
    with open(tmp_path / "cohort.csv", newline="", encoding="utf-8") as file:
        rows = {row["study"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"s1", "s2", "bad"}
    assert rows["bad"]["status"] == "failed" and rows["bad"]["opacity_volume_ml.total"] == ""
    expected = read(tmp_path, "s1")["opacity_volume_ml"]["right"]
    assert float(rows["s1"]["opacity_volume_ml.right"]) == expected > 0


def test_one_study_is_no_cohort(tmp_path):
    handler = StudyReport(tmp_path)
    run(handler, *study())
    handler.finish()
    assert not (tmp_path / "cohort.csv").exists()


def test_pages_can_be_switched_off_and_name_the_settings(tmp_path):
    run(StudyReport(tmp_path / "off", pages="false"), *study())
    off = json.loads((tmp_path / "off" / "s1" / "s1_report.json").read_text(encoding="utf-8"))
    assert off["files"]["page"] is None and off["reasons"]["files.page"] == "switched off: pages is false"
    assert not list((tmp_path / "off").rglob("*.html"))
    run(StudyReport(tmp_path / "on", settings={"hu_window": [-1000, 400]}), *study())
    page = (tmp_path / "on" / "s1" / "s1_page.html").read_text(encoding="utf-8")
    assert "Window of the input (HU)" in page
    on = json.loads((tmp_path / "on" / "s1" / "s1_report.json").read_text(encoding="utf-8"))
    assert on["files"]["page"] == "s1_page.html"


def test_attention_maps_are_shown_in_the_slices_true_proportions(tmp_path):
    class Network(torch.nn.Linear):
        def attention_maps(self, x, names):
            return {"gate": x}

    # 16 x 32 voxels of 3 x 2 mm in the network's order: rows of 48 mm, columns of 64 mm.
    report = StudyReport(tmp_path, Network(1, 1))
    batch, output = study()
    view = view_attention(report.network, output["image"], (2, 5, 4), AFFINE.numpy())
    rows, columns = view.image.shape
    spacing = np.linalg.norm(np.asarray(output["image"].affine)[:3, :2], axis=0)
    assert view.aspect == pytest.approx(columns * spacing[1] / (rows * spacing[0]))
    whole = output["image"].as_tensor().numpy()
    assert not np.shares_memory(view.image, whole), "the slice would keep the whole scan in memory"
    run(report, batch, output)
    assert "Attention maps" in (tmp_path / "s1" / "s1_page.html").read_text(encoding="utf-8")
