# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Reports of masks that exist already, and follow-ups, from the command line."""

from __future__ import annotations

import importlib.util
import json
from html import unescape
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from box_chest import Box, Chest, make_chest
from pydicom import dcmread
from report_checks import unexplained
from scipy import ndimage

from custom.data import read_scan, write_dicom_series, write_nifti
from custom.data.masks import LUNG_SEGMENTS, OPACITY_SEGMENT, place_mask, read_mask
from custom.data.phantom import make_phantom
from custom.reporting.dicom_source import patient_key
from custom.reporting.wording import format_ml, why
from custom.transforms import extract_lungs

ROOT = Path(__file__).resolve().parent.parent.parent
BOXES = (Box("left", 10, 80, 120), Box("right", 40, 160, 200, hu=20.0))  # 20 mL and 80 mL
SECRETS = ("Mustermann", "Erika", "ID-4711", "Klinik-Ordner")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_report():
    """The script in this process, which starts faster."""
    main = load("make_report").main

    def run(scan: Path, mask: Path, output: Path, *words: str | Path) -> int:
        return main(["--scan", str(scan), "--mask", str(mask), "--output-dir", str(output), *map(str, words)])

    return run


@pytest.fixture(scope="module")
def follow_up():
    main = load("follow_up").main
    return lambda *words: main([str(word) for word in words])


@pytest.fixture(scope="module")
def chest() -> Chest:
    return make_chest(BOXES)


@pytest.fixture
def files(chest, tmp_path) -> dict[str, Path]:
    """Scan, opacity and lungs as NIfTI."""
    arrays = {"scan": chest.hu.astype(np.int16), "mask": chest.opacity, "lungs": chest.lungs}
    paths = {name: tmp_path / f"{name}.nii.gz" for name in arrays}
    for name, array in arrays.items():
        write_nifti(paths[name], array, chest.affine)
    return paths


def without_lungs(chest: Chest) -> Chest:
    """Soft tissue and the air of the room."""
    hu = np.where(chest.lungs > 0, 40, chest.hu)
    hu[:, 0] = -1020
    return Chest(hu, chest.opacity, np.zeros_like(chest.lungs), chest.affine)


def write_study(folder: Path, chest: Chest, date: str = "20200301", patient: str = "ID-4711") -> Path:
    write_dicom_series(
        folder, chest.hu, chest.affine, patient_id=patient, patient_name="Mustermann^Erika", study_date=date
    )
    return folder


def read(folder: Path) -> dict:
    (file,) = folder.rglob("*_report.json")
    return json.loads(file.read_text(encoding="utf-8"))


def page_of(folder: Path) -> str:
    (file,) = folder.rglob("*_page.html")
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL"])
def test_a_mask_in_any_order_of_axes_gives_the_known_volumes(make_report, files, chest, tmp_path, axes):
    turned = chest.turned(axes)
    mask = tmp_path / "turned.nii.gz"
    write_nifti(mask, turned.opacity, turned.affine)
    assert make_report(files["scan"], mask, tmp_path / "out", "--lungs", files["lungs"]) == 0
    report = read(tmp_path / "out")
    assert report["opacity_volume_ml"] == {"left": 20.0, "right": 80.0, "outside_lungs": 0.0, "total": 100.0}
    assert unexplained(report) == [] and report["model"]["bundle"] == ""
    assert report["files"]["page"] and "given, not made here" in page_of(tmp_path / "out")


def test_a_dicom_study_gets_everything_and_its_segmentation_comes_back(make_report, chest, files, tmp_path):
    scan = write_study(tmp_path / "scan", chest)
    assert make_report(scan, files["mask"], tmp_path / "one", "--lungs", files["lungs"]) == 0
    first = read(tmp_path / "one")
    folder = tmp_path / "one" / first["study"]
    assert all(first["files"].values()) and first["opacity_volume_ml"]["total"] == 100.0
    for kind, file in first["files"].items():
        assert (folder / file).is_file(), kind
    seg = folder / first["files"]["seg"]
    types = {item.SegmentLabel: item.SegmentAlgorithmType for item in dcmread(seg).SegmentSequence}
    assert types["Opacity"] == "SEMIAUTOMATIC" and types["Left lung"] == "AUTOMATIC"
    # What was written, or has been corrected in a viewer, goes in again; its empty frames were left out.
    assert make_report(scan, seg, tmp_path / "two", "--lungs", seg) == 0
    second = read(tmp_path / "two")
    for key in ("opacity_volume_ml", "lung_volume_ml", "severity", "study"):
        assert second[key] == first[key], key


def test_an_nrrd_file_that_is_cut_to_its_content_is_put_in_place(make_report, chest, files, tmp_path):
    itk = pytest.importorskip("itk")
    found = np.argwhere(chest.opacity)
    low, high = found.min(axis=0), found.max(axis=0) + 1
    part = chest.opacity[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    image = itk.image_from_array(np.ascontiguousarray(part.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ chest.affine
    image.SetSpacing([5.0, 5.0, 10.0])
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / [5, 5, 10]))
    image.SetOrigin((lps @ [*low, 1])[:3].tolist())
    itk.imwrite(image, str(tmp_path / "a.seg.nrrd"))
    assert (
        make_report(files["scan"], tmp_path / "a.seg.nrrd", tmp_path / "out", "--lungs", files["lungs"]) == 0
    )
    assert read(tmp_path / "out")["opacity_volume_ml"]["total"] == 100.0
    back = read_mask(tmp_path / "a.seg.nrrd", OPACITY_SEGMENT)
    assert np.array_equal(place_mask(*back, chest.hu.shape, chest.affine), chest.opacity)


def test_the_lungs_are_found_where_none_are_given(make_report, tmp_path):
    from custom.data.phantom import make_phantom

    phantom = make_phantom((64, 64, 24), (5.4, 5.4, 12.0), seed=1, lesions=["ground_glass"], burden=0.3)
    paths = phantom.save(tmp_path, "p")
    assert make_report(paths["ct"], paths["opacity"], tmp_path / "out") == 0
    report = read(tmp_path / "out")
    truth = (phantom.label > 0).sum() * 5.4 * 5.4 * 12 / 1000
    assert report["opacity_volume_ml"]["total"] == pytest.approx(truth, rel=1e-3)
    assert report["lung_volume_ml"]["left"] > 500


@pytest.mark.parametrize("fault", ["spacing", "place", "turn", "larger"])
def test_a_mask_of_another_study_measures_nothing(make_report, files, chest, tmp_path, capsys, fault):
    affine, opacity = chest.affine.copy(), chest.opacity
    if fault == "spacing":
        affine[:3, :3] *= 1.1
    elif fault == "place":
        affine[0, 3] += 2.0
    elif fault == "turn":
        affine[:2, :2] = np.array([[0.9, -0.2], [0.2, 0.9]]) @ affine[:2, :2]
    else:
        opacity = np.pad(opacity, ((0, 0), (0, 0), (0, 3)))
    write_nifti(tmp_path / "other.nii.gz", opacity, affine)
    assert make_report(files["scan"], tmp_path / "other.nii.gz", tmp_path / "out") == 2
    report = read(tmp_path / "out")
    assert report["status"] == "failed" and "the mask is not one of this scan" in report["reason"]
    assert report["opacity_volume_ml"]["total"] is None and unexplained(report) == []
    page = page_of(tmp_path / "out")
    assert "No result" in page and "the mask is not one of this scan" in page
    assert "the mask is not one of this scan" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_a_mask_of_another_study_on_the_same_grid_is_doubted(make_report, chest, files, tmp_path):
    moved = np.roll(chest.opacity, (-11, 20), axis=(1, 2))  # much of it falls outside the lungs
    write_nifti(tmp_path / "moved.nii.gz", moved, chest.affine)
    assert (
        make_report(files["scan"], tmp_path / "moved.nii.gz", tmp_path / "out", "--lungs", files["lungs"])
        == 0
    )
    report = read(tmp_path / "out")
    assert any("is it a mask of this scan?" in note for note in report["source"]["notes"])
    assert "of the opacity lies outside the lungs: is it a mask of this scan?" in page_of(tmp_path / "out")


def test_an_empty_mask_and_a_scan_without_lungs(make_report, chest, files, tmp_path):
    write_nifti(tmp_path / "empty.nii.gz", np.zeros_like(chest.opacity), chest.affine)
    assert (
        make_report(files["scan"], tmp_path / "empty.nii.gz", tmp_path / "a", "--lungs", files["lungs"]) == 0
    )
    report = read(tmp_path / "a")
    assert report["opacity_volume_ml"]["total"] == 0 and report["severity"]["score"] == 0
    assert "No opacity is marked in this study" in page_of(tmp_path / "a")
    body = without_lungs(chest).hu.astype(np.int16)
    write_nifti(tmp_path / "body.nii.gz", body, chest.affine)
    assert make_report(tmp_path / "body.nii.gz", files["mask"], tmp_path / "b") == 2
    report = read(tmp_path / "b")
    assert report["opacity_volume_ml"]["total"] is None and "no lung was found" in report["reason"]
    assert "no lung was found" in page_of(tmp_path / "b")


def test_one_lung_absent_and_no_study_date(make_report, tmp_path):
    """A left lung without air, as in a white-out: the numbers that need it are null, with the reason."""
    phantom = make_phantom((96, 96, 24), (3.6, 3.6, 12.0), seed=3, lesions=[])
    hu = np.where(phantom.lungs == 1, 40, phantom.image)
    opacity = np.zeros(hu.shape, np.uint8)
    opacity[tuple(np.argwhere(phantom.lungs == 2)[::10].T)] = 1
    for file in write_dicom_series(tmp_path / "scan", hu, phantom.affine, patient_id="ID-4711"):
        header = dcmread(file)
        for tag in ("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"):
            header.pop(tag, None)
        header.save_as(file)
    write_nifti(tmp_path / "mask.nii.gz", opacity, phantom.affine)
    assert make_report(tmp_path / "scan", tmp_path / "mask.nii.gz", tmp_path / "out") == 0
    report = read(tmp_path / "out")
    millilitres = opacity.sum() * 3.6 * 3.6 * 12.0 / 1000
    assert report["opacity_volume_ml"]["total"] == pytest.approx(millilitres, abs=1e-3), "that of the mask"
    assert report["source"]["study_date"] is None and report["lung_volume_ml"]["left"] is None
    for path in ("opacity_percent_of_lung.left", "opacity_percent_of_lung.total", "severity.score"):
        group, field = path.split(".")
        assert report[group][field] is None and "left lung" in why(report, path), path
    assert unexplained(report) == []
    assert "left_lung" not in report["dicom"]["segments"] and "right_lung" in report["dicom"]["segments"]
    page = page_of(tmp_path / "out")
    assert "The left lung was not found" in page and "study date not known" in page


def test_the_value_of_opacity_is_asked_for_where_it_is_not_plain(make_report, chest, files, tmp_path):
    labels = chest.opacity * 3
    labels[0, 0, 0] = 7
    write_nifti(tmp_path / "labels.nii.gz", labels, chest.affine)
    words = (files["scan"], tmp_path / "labels.nii.gz")
    assert make_report(*words, tmp_path / "a") == 2
    assert "holds the values 3, 7" in read(tmp_path / "a")["reason"]
    assert "--label" in read(tmp_path / "a")["reason"]
    assert make_report(*words, tmp_path / "b", "--label", "3", "--lungs", files["lungs"]) == 0
    assert read(tmp_path / "b")["opacity_volume_ml"]["total"] == 100.0
    assert make_report(*words, tmp_path / "c", "--label", "2") == 2
    assert "no voxel of the mask has the value 2" in read(tmp_path / "c")["reason"]
    write_nifti(tmp_path / "soft.nii.gz", chest.opacity * np.float32(0.6), chest.affine)
    assert make_report(files["scan"], tmp_path / "soft.nii.gz", tmp_path / "d") == 2
    assert "threshold it first" in read(tmp_path / "d")["reason"]


def test_mistakes_on_the_command_line_are_one_line(make_report, follow_up, files, tmp_path, capsys):
    out = tmp_path / "out"
    for scan, mask, words, message in (
        (tmp_path / "no.nii.gz", files["mask"], (), "scan not found"),
        (tmp_path, files["mask"], (), "scans in"),
        (files["scan"], tmp_path / "no.nii.gz", (), "mask not found"),
        (files["scan"], files["mask"], ("--study-date", "2020-03-01"), "must be a date as 20200315"),
    ):
        assert make_report(scan, mask, out, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not out.exists()
    for words, message in (
        ([tmp_path], "no report"),
        ([tmp_path / "a.json"], "give --output-dir"),
        ([tmp_path / "a.json", "--output-dir", out], "report not found"),
    ):
        assert follow_up(*words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_a_dicom_segmentation_without_opacity_is_refused(chest, files, make_report, tmp_path):
    scan = write_study(tmp_path / "scan", chest)
    write_nifti(tmp_path / "empty.nii.gz", np.zeros_like(chest.opacity), chest.affine)
    assert make_report(scan, tmp_path / "empty.nii.gz", tmp_path / "a", "--lungs", files["lungs"]) == 0
    (seg,) = (tmp_path / "a").rglob("*_seg.dcm")
    assert make_report(scan, seg, tmp_path / "b") == 2
    assert "no segment opacity, but left lung, right lung" in read(tmp_path / "b")["reason"]
    lungs, affine = read_mask(seg, LUNG_SEGMENTS)
    assert np.array_equal(place_mask(lungs, affine, chest.hu.shape, chest.affine), chest.lungs)
    assert make_report(scan, scan / "00001.dcm", tmp_path / "c") == 2
    assert "neither NIfTI" in read(tmp_path / "c")["reason"]


def test_a_patient_over_time_without_a_word_of_who_it_is(make_report, follow_up, tmp_path, capsys, caplog):
    """Three dates with other slices, one of them without lungs, in folders with the patient's name."""
    place, out = tmp_path / "Klinik-Ordner" / "Mustermann_Erika", tmp_path / "out"
    for date, spacing, width in (("20200301", (5, 5, 10), 10), ("20200309", (2, 2, 8), 40)):
        chest = make_chest((Box("left", width, 160, 200), BOXES[1]), spacing)
        scan = write_study(place / date, chest, date)
        write_nifti(place / f"{date}.nii.gz", chest.opacity, chest.affine)
        write_nifti(place / f"{date}_lungs.nii.gz", chest.lungs, chest.affine)
        lungs = ("--lungs", place / f"{date}_lungs.nii.gz")
        assert make_report(scan, place / f"{date}.nii.gz", out, *lungs) == 0
    solid = without_lungs(make_chest())
    scan = write_study(place / "20200320", solid, "20200320")
    write_nifti(place / "20200320.nii.gz", solid.opacity, solid.affine)
    assert make_report(scan, place / "20200320.nii.gz", out) == 2

    assert follow_up(out) == 0
    (file,) = out.glob("followup_patient-*.json")
    followup = json.loads(file.read_text(encoding="utf-8"))
    assert followup["course"] == "increasing"
    assert [entry["opacity_volume_ml"]["total"] for entry in followup["studies"]] == [100.0, 160.0, None]
    assert "no lung was found" in followup["studies"][2]["reason"]
    written = capsys.readouterr()
    said = "\n".join([written.out.replace(str(tmp_path), ""), written.err, caplog.text])
    texts = [path for path in out.rglob("*") if path.suffix in (".html", ".json", ".csv")]
    assert len([path for path in texts if path.suffix == ".html"]) == 4
    for secret in (*SECRETS, str(tmp_path)):
        assert secret not in said, secret
        assert not any(secret in str(path.relative_to(tmp_path)) for path in out.rglob("*")), secret
        for path in texts:
            assert secret not in path.read_text(encoding="utf-8"), (secret, path.name)


def test_nifti_scans_are_followed_when_they_are_said_to_be_of_one_patient(
    make_report, follow_up, tmp_path, capsys
):
    for number, width in enumerate((10, 40), start=1):
        chest = make_chest((Box("left", width, 160, 200),))
        paths = [tmp_path / f"{number}_{kind}.nii.gz" for kind in ("ct", "mask", "lungs")]
        for path, array in zip(paths, (chest.hu.astype(np.int16), chest.opacity, chest.lungs), strict=True):
            write_nifti(path, array, chest.affine)
        words = ("--lungs", paths[2], "--study-date", f"2020030{number}")
        assert make_report(paths[0], paths[1], tmp_path / "out", *words) == 0
    assert follow_up(tmp_path / "out") == 2
    assert "--one-patient" in capsys.readouterr().err
    assert follow_up(tmp_path / "out", "--one-patient") == 0
    (file,) = (tmp_path / "out").glob("followup_*.json")
    followup = json.loads(file.read_text(encoding="utf-8"))
    assert followup["course"] == "increasing" and followup["patient_key"] is None
    assert followup["studies"][1]["since_prior"]["change_ml"]["left"] == 60.0
    assert "put together by hand" in followup["reasons"]["patient_key"]


def test_deidentified_reports_make_no_follow_up_on_their_own(make_report, follow_up, chest, files, tmp_path):
    for date in ("20200301", "20200309"):
        scan = write_study(tmp_path / date, chest, date)
        words = ("--lungs", files["lungs"], "--deidentify", "--no-dicom")
        assert make_report(scan, files["mask"], tmp_path / "out", *words) == 0
    assert follow_up(tmp_path / "out") == 2
    for page in (tmp_path / "out").rglob("*_page.html"):
        text = page.read_text(encoding="utf-8")
        assert "2020-03" not in text and "patient-" not in text and "de-identified" in text


def test_real_patients_over_two_dates(make_report, follow_up, ct_data, tmp_path):
    """One slice a date: masks by threshold; one patient's slices show no lung."""
    keys = {}
    for patient in sorted((ct_data / "covid_hu_slices").iterdir()):
        for number, file in enumerate(sorted(patient.iterdir())):
            folder = tmp_path / f"{patient.name}-{number}"
            folder.mkdir()
            (folder / "1.dcm").symlink_to(file)
            scan = read_scan(folder)
            hu = np.maximum(scan.voxels, -1024)
            lungs = extract_lungs(hu, scan.affine)
            opacity = (ndimage.gaussian_filter(hu, (1, 1, 0)) > -650) & (lungs > 0)
            mask = tmp_path / f"{folder.name}.nii.gz"
            nib.save(nib.Nifti1Image(opacity.astype(np.uint8), scan.affine), mask)
            code = make_report(folder, mask, tmp_path / "out", "--no-dicom")
            assert code == (2 if patient.name == "A027284" else 0), folder.name
            keys[patient.name] = patient_key(str(file))
    assert follow_up(tmp_path / "out") == 0
    assert len(keys) == 5 and len(set(keys.values())) == 5
    for patient, key in keys.items():
        followup = json.loads((tmp_path / "out" / f"followup_{key}.json").read_text(encoding="utf-8"))
        page = (tmp_path / "out" / f"followup_{key}.html").read_text(encoding="utf-8")
        before, after = followup["studies"]
        assert followup["course"] is None and followup["reasons"]["course"] in unescape(page)
        if patient == "A027284":
            assert "fewer than two studies have both numbers and a date" in followup["reasons"]["course"]
            for entry in (before, after):
                assert entry["status"] == "failed" and "no lung was found" in entry["reason"]
                assert entry["opacity_volume_ml"]["total"] is None
            assert page.count("no numbers: no lung was found; is it a chest CT?") == 2
            assert "<svg" not in page, "no curve and no picture of what was not measured"
            continue
        assert "single slice" in followup["reasons"]["course"], "their levels are not known"
        change = after["opacity_volume_ml"]["total"] - before["opacity_volume_ml"]["total"]
        assert after["since_prior"]["change_ml"]["total"] == pytest.approx(change, abs=2e-3)
        for entry in (before, after):
            assert entry["opacity_volume_ml"]["total"] > 0 and entry["opacity_percent_of_lung"]["total"] > 0
            assert f"LOV {format_ml(entry['opacity_volume_ml']['total'])} mL" in page, (
                "printed on its picture"
            )
        assert page.count('<svg class="curve"') == 2 and page.count('<svg class="picture"') == 2
        assert "axial, the only slice of each date" in page
