# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from lidc_phantom import Outlined, write_case, write_chest_xray, write_readings
from monai.transforms import EnsureChannelFirstd, LoadImaged
from pydicom import dcmread

from custom.data import lidc_prepare
from custom.data.datalist import load_cases, read_datalist
from custom.data.lidc_prepare import prepare_lidc
from custom.data.slices import SliceDataset
from custom.data.work import work_through


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Three scans of two patients."""
    folder = tmp_path_factory.mktemp("collection") / "LIDC-IDRI"
    return folder, [write_case(folder, 1), write_case(folder, 1, 2), write_case(folder, 2)]


@pytest.fixture
def scan(tmp_path):
    """One scan that a test may damage."""
    return write_case(tmp_path / "in", 7)


def load(folder, case, kind):
    return nib.load(folder / kind / f"{case['name']}.nii.gz")


def by_series(summary):
    return {case["series_uid"]: case for case in summary.cases}


def test_scans_and_masks_are_those_that_were_outlined(collection, tmp_path):
    folder, written = collection
    summary = prepare_lidc(folder, tmp_path)
    assert (len(summary.cases), summary.reused, summary.left_out) == (3, 0, ())
    cases = by_series(summary)
    for one in written:
        case = cases[one.series_uid]
        image, label = load(tmp_path, case, "images"), load(tmp_path, case, "labels")
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(image.dataobj), one.image)
        assert np.array_equal(np.asarray(label.dataobj), one.half)
        for header in (image, label):
            assert np.allclose(header.affine, one.affine, atol=1e-4)
            assert header.header["sform_code"] == header.header["qform_code"] == 1
        assert case["patient_id"] == one.patient
        assert tuple(n["voxels"] for n in case["nodules"]) == one.voxels
        volume = sum(n["volume_ml"] for n in case["nodules"])
        assert volume == pytest.approx(one.half.sum() * 3.4 * 3.4 * 8 / 1000, rel=1e-4)
        assert case["nodule_slices"] == one.half.any(axis=(0, 1)).sum()
        assert json.loads((tmp_path / "cases" / f"{case['name']}.json").read_text()) == case
    assert json.loads((tmp_path / "skipped.json").read_text()) == []


def test_two_of_four_readers(scan, tmp_path):
    summary = prepare_lidc(tmp_path / "in", tmp_path / "out", four_readers=True)
    label = load(tmp_path / "out", summary.cases[0], "labels")
    assert np.array_equal(np.asarray(label.dataobj), scan.two_of_four)
    assert not np.array_equal(scan.two_of_four, scan.half)


def test_names_and_folders_do_not_matter(collection, tmp_path):
    """All slices of all series in one folder without suffix, XML files elsewhere under other names."""
    folder, written = collection
    (tmp_path / "flat").mkdir()
    (tmp_path / "xml").mkdir()
    for number, file in enumerate(sorted(folder.rglob("*.dcm"))):
        shutil.copy(file, tmp_path / "flat" / f"{number * 7919 % 1000}")
    (tmp_path / "flat" / "LICENSE").write_text("not an image")
    for number, one in enumerate(reversed(written)):
        shutil.copy(one.xml, tmp_path / "xml" / f"{number}.xml")
    summary = prepare_lidc(tmp_path / "flat", tmp_path / "out", xml_dir=tmp_path / "xml")
    cases = by_series(summary)
    for one in written:
        label = load(tmp_path / "out", cases[one.series_uid], "labels")
        assert np.array_equal(np.asarray(label.dataobj), one.half)


def test_a_patient_is_in_one_section_and_one_fold(collection, tmp_path):
    summary = prepare_lidc(collection[0], tmp_path, validation_fraction=0.25, seed=1)
    content = read_datalist(tmp_path / "datalist.json")  # refuses a patient in two places
    assert summary.datalist == tmp_path / "datalist.json" and summary.n_validation == 1
    sections = [{e["patient_id"] for e in content[s]} for s in ("training", "validation")]
    assert sorted(map(len, sections)) == [1, 1] and not sections[0] & sections[1]
    assert content["labels"] == {"0": "background", "1": "nodule"}
    everything = read_datalist(tmp_path / "datalist_all.json")["training"]
    assert len(everything) == 3 and len({(e["patient_id"], e["fold"]) for e in everything}) == 2
    assert len(load_cases(tmp_path / "datalist_all.json", tmp_path)) == 3
    names = [
        {c["name"] for c in load_cases(summary.datalist, tmp_path, s)} for s in ("training", "validation")
    ]
    assert set.union(*names) == {case["name"] for case in summary.cases}
    prepare_lidc(collection[0], tmp_path, validation_fraction=0)
    assert len(read_datalist(tmp_path / "datalist.json")["training"]) == 3


def test_the_same_seed_gives_the_same_validation_patients(tmp_path):
    cases = [{"name": f"c{i}", "patient_id": f"LIDC-IDRI-{i:04d}"} for i in range(20)]
    lists = []
    for seed in (0, 0, 1):
        assert lidc_prepare._write_lists(tmp_path, cases, False, 0.25, 5, seed) == (5, 5)
        lists.append((tmp_path / "datalist.json").read_text())
    assert lists[0] == lists[1] != lists[2]


def test_training_can_draw_the_slices_with_nodules(collection, tmp_path):
    summary = prepare_lidc(collection[0], tmp_path, validation_fraction=0)
    keys = ["image", "label"]
    slices = SliceDataset(
        load_cases(summary.datalist, tmp_path),
        [LoadImaged(keys), EnsureChannelFirstd(keys)],
        [],
        tmp_path / "cache",
        select="lesion",
    )
    assert len(slices) == sum(case["nodule_slices"] for case in summary.cases)
    assert all(slices[i]["label"].any() for i in range(len(slices)))


def test_finished_cases_are_kept_and_changed_ones_done_again(scan, tmp_path, monkeypatch):
    source, out = tmp_path / "in", tmp_path / "out"
    case = prepare_lidc(source, out).cases[0]
    files = [out / kind / f"{case['name']}.nii.gz" for kind in ("images", "labels")]
    times = [file.stat().st_mtime_ns for file in files]
    again = prepare_lidc(source, out)
    assert again.reused == 1 and again.cases == (case,)
    assert [file.stat().st_mtime_ns for file in files] == times
    # Another consensus, a cut-off file and another reading are each done again.
    assert prepare_lidc(source, out, four_readers=True).reused == 0
    assert prepare_lidc(source, out, four_readers=True).reused == 1
    files[1].write_bytes(files[1].read_bytes()[:-5])
    assert prepare_lidc(source, out, four_readers=True).reused == 0
    scan.xml.write_text(scan.xml.read_text() + "<!-- corrected -->")
    assert prepare_lidc(source, out, four_readers=True).reused == 0


@pytest.mark.parametrize("stop_at", ["image", "label", "record"])
def test_a_run_that_is_killed_leaves_nothing_half_done(scan, tmp_path, monkeypatch, stop_at):
    source, out = tmp_path / "in", tmp_path / "out"
    prepare_lidc(source, out, four_readers=True)  # files of another run are there already
    done = []

    def stop(function, names):
        def stopping(*arguments):
            if names[len(done)] == stop_at:
                raise KeyboardInterrupt
            done.append(1)
            return function(*arguments)

        return stopping

    with monkeypatch.context() as patch:
        names = ["image", "label", "record"]
        patch.setattr(lidc_prepare, "write_nifti", stop(lidc_prepare.write_nifti, names))
        patch.setattr(lidc_prepare, "write_json", stop(lidc_prepare.write_json, names))
        with pytest.raises(KeyboardInterrupt):
            prepare_lidc(source, out)
    assert not list((out / "cases").iterdir())
    summary = prepare_lidc(source, out)
    assert summary.reused == 0
    assert np.array_equal(np.asarray(load(out, summary.cases[0], "labels").dataobj), scan.half)
    assert not list(out.rglob(".*"))


def slices_of(scan):
    headers = {file: dcmread(file, stop_before_pixels=True) for file in scan.dicom.glob("*.dcm")}
    return sorted(headers, key=lambda file: headers[file].InstanceNumber)


def damage(scan, how):
    text = scan.xml.read_text()
    if how == "gap":
        slices_of(scan)[5].unlink()
    elif how == "end":  # nodule 1 reaches up to the last slice
        slices_of(scan)[-1].unlink()
    elif how == "outside":
        scan.xml.write_text(text.replace("<xCoord>", "<xCoord>9"))
    elif how == "no height":
        scan.xml.write_text(re.sub(r"<imageZposition>[^<]+", "<imageZposition>999.5", text))
    elif how == "broken XML":
        scan.xml.write_text(text[: len(text) // 2])
    elif how == "broken slice":
        slices_of(scan)[0].write_bytes(b"")
    elif how == "second XML":
        (scan.xml.parent / "second.xml").write_text(text + "<!-- other -->")
    elif how == "no XML":
        scan.xml.unlink()
        write_chest_xray(scan.xml)
    elif how == "other XML":
        scan.xml.write_text(text.replace(scan.series_uid, "1.2.3.4"))
    elif how == "no nodule":
        write_readings(scan.xml, scan.series_uid, [(0.0, "1.9")] * 3, [[], [], [], []])
    elif how == "no agreement":
        mask = np.zeros((20, 20, 12), bool)
        mask[5:8, 5:8, 2] = True
        slices = [(float(i), "") for i in range(12)]
        headers = [dcmread(file, stop_before_pixels=True) for file in slices_of(scan)]
        slices = [(float(h.ImagePositionPatient[2]), "") for h in headers]
        write_readings(scan.xml, scan.series_uid, slices, [[Outlined("1", mask, mask)], [], [], []])
    elif how == "X-ray":
        for file in slices_of(scan):
            image = dcmread(file)
            image.Modality = "DX"
            image.save_as(file)


@pytest.mark.parametrize(
    ("how", "kinds", "reason", "failed"),
    [
        ("gap", ["failed"], "slices are missing", True),
        ("end", ["failed"], "where there is no slice", True),
        ("outside", ["failed"], "outside the image of 100 x 100", True),
        ("no height", ["failed"], "where there is no slice", True),
        ("broken slice", ["failed"], "broken or empty, the first is 00", True),
        ("broken XML", ["CT without XML", "bad XML"], "it is not valid XML", True),
        ("second XML", ["CT without XML", "bad XML"], "otherwise than another XML file does", True),
        ("no XML", ["CT without XML", "XML of a chest X-ray"], "it reads a chest X-ray", False),
        ("other XML", ["CT without XML", "XML without CT"], "not in the source", False),
        ("no nodule", ["CT without a nodule of 3 mm or more"], "no radiologist outlined", False),
        ("no agreement", ["CT without an agreed nodule"], "do not agree on a single voxel", False),
        ("X-ray", ["series that is no CT"], "its modality is DX", False),
    ],
)
def test_what_cannot_be_prepared_is_listed_with_its_reason(tmp_path, how, kinds, reason, failed):
    good = write_case(tmp_path / "in", 1)
    damage(write_case(tmp_path / "in", 2), how)
    summary = prepare_lidc(tmp_path / "in", tmp_path / "out")
    assert [case["series_uid"] for case in summary.cases] == [good.series_uid]
    assert sorted(one.kind for one in summary.left_out) == sorted(kinds)
    assert any(reason in one.reason for one in summary.left_out)
    assert bool(summary.failed) == failed
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [one["reason"] for one in listed] == [one.reason for one in summary.left_out]
    text = str(summary)
    assert "skipped.json" in text and all(one.reason in text for one in summary.failed)
    assert str(tmp_path / "in") not in json.dumps(listed)
    images = [entry["image"] for entry in read_datalist(tmp_path / "out" / "datalist_all.json")["training"]]
    assert images == [f"images/{summary.cases[0]['name']}.nii.gz"]


def test_a_patient_without_a_public_number_is_hashed(scan, tmp_path):
    for file in slices_of(scan):
        image = dcmread(file)
        image.PatientID = "Doe, Jane"
        image.save_as(file)
    (case,) = prepare_lidc(tmp_path / "in", tmp_path / "out").cases
    assert case["patient_id"].startswith("patient-") and "Doe" not in json.dumps(case)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be from 0 to less than 1"),
        ({"n_folds": 1}, ValueError, "n_folds must be at least 2"),
        ({"xml_dir": "missing"}, FileNotFoundError, "no such folder"),
        ({"xml_dir": "."}, FileNotFoundError, "no XML file under"),
    ],
)
def test_user_errors(scan, tmp_path, options, error, message):
    if "xml_dir" in options:
        options["xml_dir"] = tmp_path / "empty" / options["xml_dir"]
        (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        prepare_lidc(tmp_path / "in", tmp_path / "out", **options)


def test_when_nothing_can_be_prepared_the_first_reason_is_told(scan, tmp_path):
    damage(scan, "gap")
    with pytest.raises(
        ValueError, match="no scan under .* could be prepared; left out: 1, .*slices are missing"
    ):
        prepare_lidc(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "datalist.json").exists()


def test_processes_do_the_same(collection, tmp_path):
    for workers in (0, 2):
        prepare_lidc(collection[0], tmp_path / f"{workers}", num_workers=workers)
    files = sorted(p.relative_to(tmp_path / "0") for p in (tmp_path / "0").rglob("*") if p.is_file())
    assert len(files) == 3 * 3 + 3
    for file in files:
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def test_a_dead_process_is_reported():
    with pytest.raises(OSError, match="a worker process died"):
        list(work_through(os._exit, [1, 1], 2, "", ""))


def test_real_scans(ct_data, tmp_path):
    summary = prepare_lidc(ct_data / "lidc", tmp_path)
    assert {case["patient_id"]: [n["voxels"] for n in case["nodules"]] for case in summary.cases} == {
        "LIDC-IDRI-0001": [5428],
        "LIDC-IDRI-0003": [2542, 3241, 261, 704],
    }
    for case in summary.cases:
        label = np.asarray(load(tmp_path, case, "labels").dataobj)
        assert label.sum() == sum(n["voxels"] for n in case["nodules"])  # no two nodules overlap
        assert case["shape"] == list(label.shape) and not summary.left_out
