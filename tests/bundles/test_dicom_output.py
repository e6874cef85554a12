# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What inference makes of DICOM studies: objects, numbers, and no word of the patient where none belongs."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_tester import run_bundle
from orthanc_tester import Orthanc, is_installed, running_orthanc
from pydicom import Dataset, dcmread
from report_checks import check_dicom, read_measurements, read_segment, unexplained
from threshold_model import BUNDLE, bright_phantom, inference_overrides, lesion, reports

from custom.data import write_dicom_series

SECRETS = ("Mustermann", "Erika", "Smith", "ID-4711", "ID-0815", "ward-7")


@pytest.fixture(scope="module")
def phantom():
    return bright_phantom(
        (lesion((0.55, 0.7, 0.6), (16.0, 20.0, 25.0), "right"),), (64, 64, 16), (5.4, 5.4, 17.0)
    )


def write_patients(folder: Path, phantom) -> Path:
    """Two studies of one patient and a series of another that lacks a slice, in folders with their names."""
    named = {"patient_id": "ID-4711", "patient_name": "Mustermann^Erika"}
    place = folder / "ward-7" / "Mustermann_Erika"
    for date in ("20200301", "20200315"):
        write_dicom_series(place / date, phantom.image, phantom.affine, study_date=date, **named)
    other = write_dicom_series(
        folder / "ward-7" / "Smith",
        phantom.image,
        phantom.affine,
        patient_id="ID-0815",
        patient_name="Smith",
    )
    other[7].unlink()
    return folder


def test_a_cohort_of_patients_is_done_without_a_word_of_who_they_are(phantom, tmp_path):
    scans = write_patients(tmp_path / "scans", phantom)
    done = run_bundle(BUNDLE, ("inference",), inference_overrides(tmp_path, scans))
    assert done.returncode == 1, done.stderr
    output = tmp_path / "output"
    files = [path for path in output.rglob("*") if path.is_file()]
    said = "\n".join([done.stdout, done.stderr, *map(str, files)])
    assert "opacity" in done.stdout and "slices are missing" in done.stderr
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix in (".json", ".csv", ".html")]
    for secret in SECRETS:
        assert secret not in said, secret
        assert secret not in "\n".join(texts), secret
    found = reports(tmp_path)
    assert sorted(report["status"] for report in found.values()) == ["failed", "segmented", "segmented"]
    for report in found.values():
        assert unexplained(report) == []
    keys = {r["source"]["patient_key"] for r in found.values() if r["status"] == "segmented"}
    assert len(keys) == 1, "both dates are of one patient"
    with open(output / "cohort.csv", newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert sorted(row["source.study_date"] for row in rows) == ["20200301", "20200301", "20200315"]
    for report in found.values():
        for kind in ("seg", "sr") if report["status"] == "segmented" else ():
            made = output / report["study"] / report["files"][kind]
            assert dcmread(made).PatientID == "ID-4711"
            check_dicom(made)


@pytest.mark.parametrize(("dicom_output", "deidentify"), [(False, False), (True, True)])
def test_the_options_of_the_config(phantom, tmp_path, dicom_output, deidentify):
    write_dicom_series(
        tmp_path / "scans", phantom.image, phantom.affine, patient_id="ID-4711", patient_name="Smith"
    )
    options = {"dicom_output": dicom_output, "deidentify": deidentify}
    overrides = inference_overrides(tmp_path, tmp_path / "scans")
    BUNDLE.workflow("infer", ("inference",), {**overrides, **options}).run()
    (report,) = reports(tmp_path).values()
    made = sorted(path.name.rsplit("_")[-1] for path in (tmp_path / "output").rglob("*.dcm"))
    assert made == (["seg.dcm", "sr.dcm"] if dicom_output else [])
    assert (report["dicom"] is not None) == dicom_output
    assert (report["source"]["study_date"] is None) == deidentify
    for file in (tmp_path / "output").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(secret.encode() in content for secret in SECRETS), file.name


@pytest.mark.parametrize("folder", ["lidc/LIDC-IDRI-0001", "ct_lung_dicom"])
def test_real_scans_and_an_archive(ct_data, tmp_path, folder):
    overrides = inference_overrides(tmp_path, ct_data / folder)
    overrides["hu_window"] = [-1000, 200]  # opacity is what is brighter than -400 HU, wherever it is
    BUNDLE.workflow("infer", ("inference",), overrides).run()
    (report,) = reports(tmp_path).values()
    assert unexplained(report) == []
    results = tmp_path / "output" / report["study"]
    for kind in ("seg", "sr"):
        check_dicom(results / report["files"][kind])
    assert report["dicom"]["segments"][:3] == ["left_lung", "right_lung", "opacity"]
    numbers = read_measurements(results / report["files"]["sr"])
    assert numbers["Opacity", "Volume mL"] == report["opacity_volume_ml"]["total"] > 10
    for side in ("left", "right"):
        mask, affine = read_segment(results / report["files"]["seg"], f"{side.capitalize()} lung")
        volume = mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
        assert volume == pytest.approx(report["lung_volume_ml"][side], rel=0.001)
        assert numbers[f"{side.capitalize()} lung", "Volume mL"] == report["lung_volume_ml"][side] > 1000

    if not is_installed():
        pytest.skip("Orthanc is not installed (Debian packages orthanc and orthanc-dicomweb)")
    series_uid = report["source"]["series_uid"]
    sources = [file for file in (ct_data / folder).rglob("*.dcm") if is_of(file, series_uid)]
    with running_orthanc(tmp_path / "orthanc") as archive:
        check_archive(archive, sources, results, report)


def is_of(file: Path, series_uid: str) -> bool:
    return str(dcmread(file, stop_before_pixels=True).SeriesInstanceUID) == series_uid


def check_archive(archive: Orthanc, sources: list[Path], results: Path, report: dict) -> None:
    """The series, its Segmentation and Structured Report come back by DICOMweb as they were stored."""
    made = {kind: results / report["files"][kind] for kind in ("seg", "sr")}
    sent = {file: dcmread(file) for file in (*sources, *made.values())}
    stored = [uid for file in sent for uid in archive.store([file])]
    assert stored == [dataset.SOPInstanceUID for dataset in sent.values()]

    study = f"studies/{report['source']['study_uid']}"
    modalities = sorted(found["00080060"]["Value"][0] for found in archive.query(f"{study}/series"))
    assert modalities == ["CT", "SEG", "SR"], "all three belong to one study, as a PACS shows it"
    back = {str(dataset.SOPInstanceUID): dataset for dataset in archive.retrieve(study)}
    assert set(back) == set(stored)
    for dataset in sent.values():
        assert back[str(dataset.SOPInstanceUID)] == dataset, dataset.Modality

    segmentation, structured = (back[report["dicom"][f"{kind}_sop_instance_uid"]] for kind in made)
    check_frames(segmentation, results / report["files"]["opacity"], back)
    (evidence,) = structured.CurrentRequestedProcedureEvidenceSequence
    assert evidence.StudyInstanceUID == report["source"]["study_uid"]
    referred = {
        str(item.ReferencedSOPInstanceUID)
        for series in evidence.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert referred <= set(back) and str(segmentation.SOPInstanceUID) in referred


def check_frames(segmentation: Dataset, opacity: Path, back: dict[str, Dataset]) -> None:
    """Every frame of the opacity is that plane of the mask on the disk, and names the slice it lies on."""
    mask = nib.load(opacity)
    voxels, to_index = np.asarray(mask.dataobj) > 0, np.linalg.inv(mask.affine)
    (item,) = (item for item in segmentation.SegmentSequence if item.SegmentLabel == "Opacity")
    codes = [
        (code.CodeValue, code.CodingSchemeDesignator)
        for sequence in ("PropertyTypeCode", "PropertyCategoryCode")
        for code in item[f"Segmented{sequence}Sequence"]
    ]
    assert codes == [("112001", "DCM"), ("49755003", "SCT")]
    (series,) = segmentation.ReferencedSeriesSequence
    assert all(str(image.ReferencedSOPInstanceUID) in back for image in series.ReferencedInstanceSequence)
    assert segmentation.SegmentationType == "BINARY"
    counted = 0
    for frame, group in zip(
        segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True
    ):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber != item.SegmentNumber:
            continue
        (derivation,) = group.DerivationImageSequence
        (image,) = derivation.SourceImageSequence
        source = back[str(image.ReferencedSOPInstanceUID)]
        position = source.ImagePositionPatient
        assert np.allclose(group.PlanePositionSequence[0].ImagePositionPatient, position, atol=1e-3)
        # From the source's own tags, by DICOM's equation and none of ours; LPS to RAS turns two signs.
        rows, columns = np.nonzero(frame)
        down, across = (float(value) for value in source.PixelSpacing)
        along = np.array(source.ImageOrientationPatient, float).reshape(2, 3)
        places = np.array(position, float) + np.outer(columns * across, along[0])
        places = (places + np.outer(rows * down, along[1])) * (-1, -1, 1)
        found = nib.affines.apply_affine(to_index, places)
        assert np.abs(found - found.round()).max() < 0.05
        assert voxels[tuple(found.round().astype(int).T)].all()
        counted += len(rows)
    assert counted == np.count_nonzero(voxels) > 0
