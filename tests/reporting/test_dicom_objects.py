# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import logging
import warnings
from pathlib import Path

import dicom_faults
import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from pydicom import Dataset, dcmread
from report_checks import centre, check_dicom, millilitres, read_measurements, read_segment

from custom.data import read_scan, write_dicom_series
from custom.reporting import measure_opacity
from custom.reporting.dicom_objects import SEGMENTS, make_segments, write_dicom
from custom.reporting.dicom_source import DicomOutputError, patient_key, read_source

MODEL = {"bundle": "a_bundle", "software_version": "1.2.3", "weights_sha256": "ab" * 32}
SHAPE = (30, 24, 9)
AFFINE = np.array([[-1.5, 0, 0, 20], [0, -1.5, 0, 30], [0, 0, 4.0, -50], [0, 0, 0, 1.0]])
LABELS = dict(
    zip(
        SEGMENTS,
        ("Left lung", "Right lung", "Opacity", "Ground-glass opacity", "Consolidation"),
        strict=True,
    )
)


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, lungs and an opacity that is symmetric in no direction, half of it dense."""
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[3:13, 4:20, 1:8] = 2  # the first index grows to the left
    lungs[17:27, 4:20, 1:7] = 1
    opacity = np.zeros(SHAPE, np.uint8)
    opacity[18:22, 5:8, 2:4] = 1
    opacity[19, 12, 4] = 1
    opacity[4:6, 15, 6] = 1
    hu = np.where(lungs > 0, -850, 40).astype(np.int16)
    hu[opacity > 0] = -500
    hu[18:20, 5:8, 2:4] = -50
    return hu, lungs, opacity


def masks_of(hu: np.ndarray, lungs: np.ndarray, opacity: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "left_lung": lungs == 1,
        "right_lung": lungs == 2,
        "opacity": opacity > 0,
        "ground_glass": (opacity > 0) & (hu < -200),
        "consolidation": (opacity > 0) & (hu >= -200),
    }


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return write_dicom_series(
        tmp_path / "scan", scene()[0], AFFINE, patient_id="ID-4711", patient_name="Mustermann", shuffle=True
    )


def turned(array: np.ndarray, codes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes)
    )
    image = nib.Nifti1Image(array.astype(np.uint8), AFFINE).as_reoriented(change)
    return np.asarray(image.dataobj), image.affine


def write(files: list[Path], folder: Path, **options) -> dict:
    hu, lungs, opacity = options.pop("scene", None) or scene()
    measured = measure_opacity(opacity, AFFINE, lungs, hu)
    source = read_source(list(map(str, files)), **options)
    return write_dicom(folder, "x", source, make_segments(opacity, lungs, hu), AFFINE, measured, MODEL)


def test_segments_come_back_where_they_were_with_their_codes(files, tmp_path):
    hu, lungs, opacity = scene()
    written = write(files, tmp_path)
    assert written["segments"] == list(SEGMENTS)
    for name, mask in masks_of(hu, lungs, opacity).items():
        back, affine = read_segment(tmp_path / "x_seg.dcm", LABELS[name])
        assert back.sum() == mask.sum(), name
        assert np.allclose(centre(back, affine), centre(mask, AFFINE), atol=1e-3), name
    segmentation = dcmread(tmp_path / "x_seg.dcm")
    assert segmentation.SegmentationType == "BINARY"
    codes = {}
    for item in segmentation.SegmentSequence:
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        modifier = kind.get("SegmentedPropertyTypeModifierCodeSequence")
        codes[item.SegmentLabel] = (
            kind.CodingSchemeDesignator,
            kind.CodeValue,
            modifier[0].CodeValue if modifier else None,
            item.SegmentedPropertyCategoryCodeSequence[0].CodeValue,
        )
    assert codes == {
        "Left lung": ("SCT", "39607008", "7771000", "91723000"),
        "Right lung": ("SCT", "39607008", "24028007", "91723000"),
        "Opacity": ("DCM", "112001", None, "49755003"),
        "Ground-glass opacity": ("DCM", "112120", None, "49755003"),
        "Consolidation": ("SCT", "95436008", None, "49755003"),
    }
    check_dicom(tmp_path / "x_seg.dcm")
    check_dicom(tmp_path / "x_sr.dcm")


def test_each_frame_refers_to_the_slice_it_lies_on_and_none_is_empty(files, tmp_path):
    write(files, tmp_path)
    segmentation = hd.seg.segread(tmp_path / "x_seg.dcm")
    positions = {dcmread(file).SOPInstanceUID: dcmread(file).ImagePositionPatient for file in files}
    assert len(segmentation.PerFrameFunctionalGroupsSequence) == 6 + 7 + 4 + 4 + 2
    for frame, pixels in zip(
        segmentation.PerFrameFunctionalGroupsSequence, segmentation.pixel_array, strict=True
    ):
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        assert list(place) == list(positions[image.ReferencedSOPInstanceUID])
        assert pixels.any()
    (series,) = segmentation.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == dcmread(files[0]).SeriesInstanceUID
    assert len(series.ReferencedInstanceSequence) == SHAPE[2]


@pytest.mark.parametrize(
    "codes",
    [codes for order in itertools.permutations(("LR", "PA", "SI")) for codes in itertools.product(*order)],
    ids="".join,
)
def test_masks_in_any_axis_order_give_the_same_frames(files, codes):
    source = read_source(list(map(str, files)))
    opacity = scene()[2]
    array, affine = turned(opacity, codes)
    assert np.array_equal(source.to_frames(array, affine), opacity.transpose(2, 1, 0))


def test_a_mask_of_another_grid_is_refused(files):
    source = read_source(list(map(str, files)))
    opacity = scene()[2]
    shifted = AFFINE.copy()
    shifted[2, 3] += 4.0  # one slice higher
    coarser = AFFINE @ np.diag([2.0, 2, 1, 1])
    for mask, affine in (
        (opacity, shifted),
        (opacity[::2, ::2], coarser),
        (opacity[..., :8], AFFINE),
        (opacity, AFFINE @ np.diag([1, 1, 0.0, 1])),
    ):
        with pytest.raises(DicomOutputError, match="does not lie on the grid"):
            source.to_frames(mask, affine)


def test_the_report_says_what_the_json_says(files, tmp_path):
    hu, lungs, opacity = scene()
    measured = measure_opacity(opacity, AFFINE, lungs, hu)
    written = write(files, tmp_path)
    numbers = read_measurements(tmp_path / "x_sr.dcm")
    share = "Percentage of lung volume %"
    expected = {
        ("Severity", "CT severity score over six lung zones, 0 to 24 1"): measured["severity"]["score"]
    }
    for side in ("left", "right"):
        lung = f"{side.capitalize()} lung"
        expected[lung, "Volume mL"] = measured["lung_volume_ml"][side]
        expected[lung, "Attenuation Coefficient [hnsf'U]"] = measured["lung_mean_hu"][side]
    for name in ("opacity", "ground_glass", "consolidation"):
        label = LABELS[name]
        for side, tracked in (
            ("total", label),
            ("left", f"{label}, left lung"),
            ("right", f"{label}, right lung"),
        ):
            expected[tracked, "Volume mL"] = measured[f"{name}_volume_ml"][side]
            expected[tracked, share] = measured[f"{name}_percent_of_lung"][side]
    expected["Opacity", "Attenuation Coefficient [hnsf'U]"] = measured["opacity_mean_hu"]["total"]
    assert numbers == expected
    report = dcmread(tmp_path / "x_sr.dcm")
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    evidence = {
        instance.ReferencedSOPInstanceUID: series.SeriesInstanceUID
        for study in report.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    }
    images = [dcmread(file) for file in files]
    assert {image.SOPInstanceUID: image.SeriesInstanceUID for image in images}.items() <= evidence.items()
    assert written["seg_sop_instance_uid"] in evidence
    assert written["sr_sop_instance_uid"] == report.SOPInstanceUID


def test_volumes_of_the_report_are_those_of_the_segments(files, tmp_path):
    write(files, tmp_path)
    numbers = read_measurements(tmp_path / "x_sr.dcm")
    for label in LABELS.values():
        mask, affine = read_segment(tmp_path / "x_seg.dcm", label)
        assert numbers[label, "Volume mL"] == pytest.approx(millilitres(mask, affine), abs=1e-3)


def test_no_opacity_is_0_ml_in_the_report_and_no_segment(files, tmp_path):
    hu, lungs, opacity = scene()
    written = write(files, tmp_path, scene=(hu, lungs, np.zeros_like(opacity)))
    assert written["segments"] == ["left_lung", "right_lung"]
    numbers = read_measurements(tmp_path / "x_sr.dcm")
    assert numbers["Opacity", "Volume mL"] == 0 and numbers["Left lung", "Volume mL"] > 0
    assert ("Opacity", "Attenuation Coefficient [hnsf'U]") not in numbers
    for kind in ("seg", "sr"):
        check_dicom(tmp_path / f"x_{kind}.dcm")


def test_no_lungs_and_no_opacity_is_a_report_alone(files, tmp_path):
    hu, _, opacity = scene()
    nothing = np.zeros_like(opacity)
    written = write(files, tmp_path, scene=(hu, nothing, nothing))
    assert written["segments"] == [] and written["seg_sop_instance_uid"] is None
    assert not (tmp_path / "x_seg.dcm").exists()
    numbers = read_measurements(tmp_path / "x_sr.dcm")
    assert numbers["Opacity", "Volume mL"] == 0 and ("Left lung", "Volume mL") not in numbers
    check_dicom(tmp_path / "x_sr.dcm")


def test_one_slice(tmp_path):
    hu, lungs, opacity = (array[:, :, 2:3] for array in scene())
    affine = AFFINE.copy()
    affine[2, 3] += 8
    files = write_dicom_series(tmp_path / "scan", hu, affine)
    source = read_source(list(map(str, files)))
    measured = measure_opacity(opacity, affine, lungs, hu)
    write_dicom(tmp_path, "x", source, make_segments(opacity, lungs, hu), affine, measured, MODEL)
    frame = hd.seg.segread(tmp_path / "x_seg.dcm").PerFrameFunctionalGroupsSequence[0]
    assert [float(v) for v in frame.PlanePositionSequence[0].ImagePositionPatient] == [-20.0, -30.0, -42.0]
    for kind in ("seg", "sr"):
        check_dicom(tmp_path / f"x_{kind}.dcm")


def test_patient_and_study_are_carried_over_and_nothing_is_said_of_them(files, tmp_path, caplog):
    dicom_faults.set_tags(
        files,
        SpecificCharacterSet="ISO_IR 100",
        PatientName="Müller",  # without a caret, which highdicom remarks upon
        PatientSex="F",
        PatientBirthDate="19700101",
        PatientAge="050Y",
        PatientWeight="70.5",
        AccessionNumber="ACC-1",
        StudyDescription="Thorax nativ, Frau Müller",
        InstitutionName="Klinik",
    )
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        write(files, tmp_path)
    assert not caplog.records and not [w for w in warned if "ller" in str(w.message)]
    source = dcmread(files[0])
    for kind in ("seg", "sr"):
        made = dcmread(tmp_path / f"x_{kind}.dcm")
        for keyword in (
            *("PatientID", "PatientName", "PatientSex", "PatientBirthDate", "PatientAge", "PatientWeight"),
            *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "StudyDescription"),
        ):
            assert made[keyword].value == source[keyword].value, keyword
        assert "PatientIdentityRemoved" not in made
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
        check_dicom(tmp_path / f"x_{kind}.dcm")
    assert dcmread(tmp_path / "x_seg.dcm").FrameOfReferenceUID == source.FrameOfReferenceUID


def every_text(dataset: Dataset) -> str:
    return "\n".join(str(element.value) for element in dataset.iterall())


def test_deidentified_objects_tell_nothing_and_fit_each_other(files, tmp_path):
    planted = {
        "PatientName": "Mustermann^Erika",
        "PatientAddress": "Hauptstrasse 1",
        "AccessionNumber": "ACC-1",
        "StudyDescription": "Thorax Mustermann",
        "InstitutionName": "Klinik am See",
        "ReferringPhysicianName": "Arzt^Anna",
        "DeviceSerialNumber": "SN-99",
    }
    dicom_faults.set_tags(files, **planted)
    written = write(files, tmp_path, deidentify=True)
    source = [dcmread(file) for file in files]
    uids = {str(image[k].value) for image in source for k in ("SOPInstanceUID", "SeriesInstanceUID")}
    uids |= {str(source[0].StudyInstanceUID), str(source[0].FrameOfReferenceUID)}
    made = [dcmread(tmp_path / f"x_{kind}.dcm") for kind in ("seg", "sr")]
    for dataset in made:
        content = every_text(dataset) + every_text(dataset.file_meta)
        for secret in (*planted.values(), "ID-4711", "Mustermann", "20200301", *uids):
            assert secret not in content, secret
        assert dataset.StudyTime != "120000"  # which could be in a UID by chance
        assert dataset.PatientIdentityRemoved == "YES" and dataset.DeidentificationMethod
        assert dataset.PatientID == made[0].PatientID and dataset.PatientID.startswith("anon-")
        assert dataset.StudyInstanceUID == made[0].StudyInstanceUID
    for kind in ("seg", "sr"):
        check_dicom(tmp_path / f"x_{kind}.dcm")
        assert b"ID-4711" not in (tmp_path / f"x_{kind}.dcm").read_bytes()
    assert written["seg_sop_instance_uid"] in every_text(made[1])
    opacity = scene()[2]
    back, affine = read_segment(tmp_path / "x_seg.dcm", "Opacity")
    assert np.allclose(centre(back, affine), centre(opacity, AFFINE), atol=1e-3)
    write(files, tmp_path, deidentify=True)
    again = dcmread(tmp_path / "x_seg.dcm")
    assert again.StudyInstanceUID != made[0].StudyInstanceUID, "two releases cannot be linked"


def test_pixels_are_not_read_again(files):
    whole = read_source(list(map(str, files)))
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: content.index(b"\xe0\x7f\x10\x00") + 20])  # Pixel Data, cut off
    assert read_source(list(map(str, files))).headers == whole.headers


@pytest.mark.parametrize("tag", ["FrameOfReferenceUID", "PixelSpacing"])
def test_a_source_that_lacks_a_tag_is_refused_by_name(files, tag):
    dicom_faults.set_tags(files, **{tag: None})
    with pytest.raises(DicomOutputError, match=f"no {tag}"):
        read_source(list(map(str, files)))


def test_a_source_that_is_gone_is_refused_without_its_path(files):
    files[3].unlink()
    with pytest.raises(DicomOutputError, match="cannot be read again") as caught:
        read_source(list(map(str, files)))
    assert "scan" not in str(caught.value) and caught.value.__cause__ is None


def test_a_malformed_value_of_the_patient_is_carried_over_as_it_is(files, tmp_path):
    dicom_faults.set_tags(files, PatientWeight="70.5")
    for file in files:
        file.write_bytes(file.read_bytes().replace(b"DS\x04\x0070.5", b"DS\x04\x00seve"))
    write(files, tmp_path)
    assert dcmread(tmp_path / "x_seg.dcm").PatientWeight == "seve"


def test_what_libraries_say_of_headers_is_not_passed_on(files, tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise KeyError("Mustermann")

    monkeypatch.setattr("custom.reporting.dicom_objects.make_report", fail)
    with pytest.raises(DicomOutputError, match=r"do not make DICOM objects \(KeyError\)$"):
        write(files, tmp_path)
    assert not list(tmp_path.glob("*.dcm"))


def test_the_patient_key_is_the_same_for_all_studies_of_a_patient(tmp_path):
    def key(folder: str, **options) -> str | None:
        return patient_key(str(write_dicom_series(tmp_path / folder, scene()[0], AFFINE, **options)[0]))

    first = key("a", patient_id="ID-4711", study_date="20200101")
    assert first is not None and "4711" not in first and first.startswith("patient-")
    assert key("b", patient_id="ID-4711", patient_name="Other^Name", study_date="20200601") == first
    assert key("c", patient_id="ID-4712") != first
    assert key("d", patient_id="") is None
    assert patient_key(str(tmp_path / "nothing.dcm")) is None


@pytest.mark.parametrize("folder", ["ct_lung_dicom", "lidc/LIDC-IDRI-0001"])
def test_real_scans(ct_data, tmp_path, folder):
    scan = read_scan(ct_data / folder)
    opacity = np.zeros(scan.voxels.shape, np.uint8)
    i, j, k = (size // 3 for size in opacity.shape)
    opacity[i : i + 40, j : j + 30, k : k + 8] = 1
    lungs = np.zeros_like(opacity)
    lungs[i - 10 : i + 60, j - 10 : j + 60, k - 3 : k + 12] = 2
    measured = measure_opacity(opacity, scan.affine, lungs, scan.voxels)
    source = read_source(scan.study["files"])
    assert np.allclose(source.affine, scan.affine)
    masks = masks_of(scan.voxels, lungs, opacity)
    segments = make_segments(opacity, lungs, scan.voxels)
    written = write_dicom(tmp_path, "x", source, segments, scan.affine, measured, MODEL)
    assert written["segments"][:2] == ["right_lung", "opacity"]
    for name in ("right_lung", "opacity"):
        back, affine = read_segment(tmp_path / "x_seg.dcm", LABELS[name])
        assert np.allclose(centre(back, affine), centre(masks[name], scan.affine), atol=0.05)
        assert millilitres(back, affine) == pytest.approx(millilitres(masks[name], scan.affine), rel=1e-3)
    for kind in ("seg", "sr"):
        check_dicom(tmp_path / f"x_{kind}.dcm")
