# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose
from PIL import Image

from custom.data.covid_checks import GREY, HU, LabelRule, check_same_grid, find_value_kind, sides_agree
from custom.data.covid_files import covid_ct_seg_name
from custom.data.covid_sets import prepare_covid_ct_seg, prepare_medseg, prepare_mosmed
from custom.data.covid_slices import SliceOptions
from custom.data.datalist import load_cases, read_datalist
from custom.data.phantom import make_phantom
from custom.data.scans import Scan, read_scan
from custom.transforms import CheckSameGridd, LoadCTd, LungMaskd, ValidateHU, ValidateHUd

FLIP_ROWS = np.diag([1.0, -1.0, 1.0, 1.0])


@functools.cache
def patient(seed: int = 0):
    return make_phantom((36, 32, 5), (10, 11, 50), seed=seed, burden=0.7)


def write(path, array, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def write_las(path, array, affine):
    """As MosMedData and the coronacases are stored: rows grow to the left, columns to anterior."""
    flip = FLIP_ROWS.copy()
    flip[1, 3] = array.shape[1] - 1
    return write(path, array[:, ::-1], affine @ flip)


def opacity(phantom):
    return (phantom.label > 0).astype(np.int16)


def windowed(phantom):
    """As COVID-19-CT-Seg has windowed the Radiopaedia volumes."""
    return np.clip((phantom.image + 1250.0) / 1500 * 255, 0, 255).astype(np.int16)


def write_mosmed(folder, count):
    for number in range(255, 255 + count):
        phantom = patient(number % 2)
        write_las(folder / "studies" / "CT-1" / f"study_0{number}.nii.gz", phantom.image, phantom.affine)
        write_las(folder / "masks" / f"study_0{number}_mask.nii.gz", opacity(phantom), phantom.affine)
    return folder


def write_covid_ct_seg(folder, coronacases=2, radiopaedia=("10_85902_1", "10_85902_3", "7_85703_0")):
    for number in range(1, coronacases + 1):
        phantom, name = patient(number), f"coronacases_{number:03d}.nii.gz"
        write_las(folder / "COVID-19-CT-Seg_20cases" / name, phantom.image, phantom.affine)
        write_las(folder / "Infection_Mask" / name, opacity(phantom).astype(np.uint8), phantom.affine)
        write_las(folder / "Lung_Mask" / name, phantom.lungs, phantom.affine)
        union = np.where(phantom.label > 0, 3, phantom.lungs).astype(np.uint8)
        write_las(folder / "Lung_and_Infection_Mask" / name, union, phantom.affine)
    for number, case in enumerate(radiopaedia):
        phantom, name = patient(number), f"radiopaedia_{case}.nii.gz"
        false = phantom.affine @ FLIP_ROWS  # the slices lie as in DICOM, the header says otherwise
        write(folder / "COVID-19-CT-Seg_20cases" / name, windowed(phantom), false)
        write(folder / "Infection_Mask" / name, opacity(phantom).astype(np.uint8), false)
        write(folder / "Lung_Mask" / name, phantom.lungs, false)
    return folder


def classes(phantom):
    """The phantom's lesions, striped with MedSeg's three labels."""
    stripes = 1 + np.indices(phantom.label.shape).sum(axis=0) % 3
    return np.where(phantom.label > 0, stripes, 0).astype(np.uint8)


def lesion_slices(phantom):
    return np.flatnonzero(phantom.label.any(axis=(0, 1))).tolist()


def write_medseg(folder, volumes=2, stack=True):
    for number in range(1, volumes + 1):
        phantom = patient(number)
        write_las(folder / "rp_im" / f"{number}.nii.gz", phantom.image, phantom.affine)
        write_las(folder / "rp_msk" / f"{number}.nii.gz", classes(phantom), phantom.affine)
    if stack:
        parts = [(patient(seed), lesion_slices(patient(seed))[0]) for seed in (1, 2, 1, 0)]
        image = np.stack([phantom.image[:, :, k] for phantom, k in parts], axis=2)
        labels = np.stack([classes(phantom)[:, :, k] for phantom, k in parts], axis=2)
        write(folder / "tr_im.nii.gz", image.astype(np.float32), np.eye(4))
        write(folder / "tr_mask.nii.gz", labels.astype(np.float64), np.diag([-1.0, -1.0, 1.0, 1.0]))
    return folder


def scan(voxels, affine=None, file="ct.nii.gz"):
    affine = np.diag([-1.0, -1.0, 5.0, 1.0]) if affine is None else affine
    return Scan(np.asarray(voxels, np.float32), affine, {"files": [file], "notes": []})


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def values(path):
    return np.asarray(nib.load(path).dataobj)


def picture(path):
    return np.asarray(Image.open(path))


class TestMosmed:
    def test_studies_stay_in_place_and_are_split(self, tmp_path):
        source = write_mosmed(tmp_path / "COVID19_1110", 9)
        write(source / "studies" / "CT-0" / "study_0001.nii.gz", patient().image, patient().affine)
        (source / "masks" / "foo").write_text("\n")
        before = {file: (source / file).read_bytes() for file in files_of(source)}
        out = tmp_path / "prepared"
        summary = prepare_mosmed(source, out, n_testing=3, n_folds=3)
        assert (len(summary.cases), summary.reused, summary.failed) == (9, 0, ())
        assert [(one.kind, one.what) for one in summary.left_out] == [("studies without a mask", "1 studies")]
        content = read_datalist(out / "datalist.json")
        assert [len(content[section]) for section in ("training", "testing")] == [6, 3]
        assert sorted(entry["fold"] for entry in content["training"]) == [0, 0, 1, 1, 2, 2]
        assert "not published" in content["protocol"]
        for section in ("training", "testing"):
            for case in load_cases(out / "datalist.json", out, section):
                assert case["image"] == str(source / "studies" / "CT-1" / f"{case['name']}.nii.gz")
                assert case["label"] == str(source / "masks" / f"{case['name']}_mask.nii.gz")
                assert case["patient_id"] == case["name"]
        assert {file: (source / file).read_bytes() for file in files_of(source)} == before
        assert not [file for file in files_of(out) if not file.endswith(".json")]
        one = summary.cases[0]
        assert one["lesion_voxels"] == (patient(1).label > 0).sum()
        assert one["lesion_ml"] == pytest.approx(one["lesion_voxels"] * 10 * 11 * 50 / 1000)
        assert one["spacing_mm"] == [10, 11, 50] and one["shape"] == [36, 32, 5]
        assert "earlier run" not in str(summary)
        assert "6 volumes of 6 patients for training in 3 folds" in str(summary)

    def test_one_that_fails_does_not_change_the_test_set(self, tmp_path):
        def testing(seed=0):
            prepare_mosmed(source, tmp_path / "out", n_testing=3, seed=seed)
            return {entry["patient_id"] for entry in read_datalist(tmp_path / "out/datalist.json")["testing"]}

        source = write_mosmed(tmp_path / "in", 8)
        first = testing()
        assert testing() == first and any(testing(seed) != first for seed in (1, 2, 3))
        broken = sorted({f"study_0{n}" for n in range(255, 263)} - first)[0]
        file = source / "studies" / "CT-1" / f"{broken}.nii.gz"
        file.write_bytes(file.read_bytes()[:-20])
        summary = prepare_mosmed(source, tmp_path / "out", n_testing=3)
        assert [one.what for one in summary.failed] == [broken] and "gzip" in summary.failed[0].reason
        assert testing() == first
        assert json.loads((tmp_path / "out" / "skipped.json").read_text())[0]["what"] == broken
        assert f"failed, {broken}: damaged" in str(summary)

    def test_data_and_list_can_be_moved_together(self, tmp_path):
        source = write_mosmed(tmp_path / "old" / "in", 3)
        (tmp_path / "link").symlink_to(tmp_path / "old")
        prepare_mosmed(source, tmp_path / "link" / "deep" / "out", n_testing=0)
        assert len(load_cases(tmp_path / "link/deep/out/datalist.json", tmp_path / "link/deep/out")) == 3
        shutil.move(tmp_path / "old", tmp_path / "new")
        cases = load_cases(tmp_path / "new/deep/out/datalist.json", tmp_path / "new/deep/out")
        assert cases[0]["image"].startswith(str(tmp_path / "new" / "in"))

    def test_a_linked_file_keeps_its_name(self, tmp_path):
        source = write_mosmed(tmp_path / "in", 2)
        (tmp_path / "store").mkdir()
        file = source / "studies" / "CT-1" / "study_0255.nii.gz"
        file.symlink_to(shutil.move(file, tmp_path / "store" / "0a1b2c"))
        prepare_mosmed(source, tmp_path / "out", n_testing=0)
        entries = read_datalist(tmp_path / "out" / "datalist.json")["training"]
        assert entries[0]["image"] == "../in/studies/CT-1/study_0255.nii.gz"

    def test_output_may_be_the_data_folder(self, tmp_path):
        source = write_mosmed(tmp_path, 2)
        mask = source / "masks" / "study_0255_mask.nii.gz"
        write_las(mask, opacity(patient(1)) * np.float32(1.0002), patient(1).affine)
        for reused in (0, 2):
            summary = prepare_mosmed(source, source, n_testing=0)
            assert (summary.reused, summary.failed) == (reused, ())
        entry = read_datalist(source / "datalist.json")["training"][0]
        assert entry["image"] == "studies/CT-1/study_0255.nii.gz"
        assert entry["label"] == "labels/study_0255.nii.gz"  # not whole numbers: written as such
        label = nib.load(source / entry["label"])
        assert label.get_data_dtype() == np.uint8
        assert np.array_equal(values(source / entry["label"]), opacity(patient(1))[:, ::-1])
        image = nib.load(source / entry["image"])
        assert np.allclose(label.affine, image.affine, atol=1e-4)

    def test_user_errors(self, tmp_path):
        source = write_mosmed(tmp_path / "in", 2)
        for options, message in (
            ({"n_testing": 2}, "can be 0 to 1 of the 2"),
            ({"n_testing": -1}, "can be 0 to 1 of the 2"),
            ({"n_folds": 1}, "n_folds must be at least 2"),
        ):
            with pytest.raises(ValueError, match=message):
                prepare_mosmed(source, tmp_path / "out", **options)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            prepare_mosmed(tmp_path / "nowhere", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="no case of MosMedData .* can be used, 0 left out$"):
            prepare_mosmed(tmp_path / "empty", tmp_path / "out")
        shutil.copytree(source / "masks", source / "copy")
        with pytest.raises(ValueError, match="are both 'study_0255'"):
            prepare_mosmed(source, tmp_path / "out")

    def test_real_masks(self, ct_data, tmp_path):
        """Real masks with made-up CT volumes: two on the masks' grids, one stored the other way round."""
        (tmp_path / "in" / "studies").mkdir(parents=True)
        (tmp_path / "in" / "masks").mkdir()
        for name in os.listdir(ct_data / "mosmed_masks"):  # among them a stray file
            (tmp_path / "in" / "masks" / name).symlink_to(ct_data / "mosmed_masks" / name)
        voxels = {}
        for number in (255, 256, 257):
            mask = nib.load(ct_data / "mosmed_masks" / f"study_0{number}_mask.nii.gz")
            voxels[f"study_0{number}"] = int(np.asarray(mask.dataobj).sum())
            ct = np.full(mask.shape, -1000, np.int16)
            ct[60:450, 120:400] = 40
            ct[100:400, 150:350] = -850
            affine = mask.affine @ FLIP_ROWS if number == 257 else mask.affine
            write(tmp_path / "in" / "studies" / f"study_0{number}.nii", ct, affine)
        summary = prepare_mosmed(tmp_path / "in", tmp_path / "out", n_testing=1)
        assert {case["name"]: case["lesion_voxels"] for case in summary.cases} == {
            name: voxels[name] for name in ("study_0255", "study_0256")
        }
        assert all(case["label_in_place"] and case["spacing_mm"][2] == 8 for case in summary.cases)
        assert summary.cases[0]["spacing_mm"][0] == pytest.approx(0.923)
        reasons = {one.what: one.reason for one in summary.failed}
        assert len(reasons) == 7 and "LPS and LAS" in reasons["study_0257"]
        assert all("no study_" in reasons[f"study_0{number}"] for number in range(258, 264))


class TestCovidCtSeg:
    def test_volumes_in_hu_come_with_lungs_and_windowed_ones_are_left_out(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in")
        summary = prepare_covid_ct_seg(source, tmp_path / "out")
        assert summary.failed == () and summary.slice_list is None
        assert [(one.what, one.kind) for one in summary.left_out] == [
            (f"radiopaedia_{name}", "windowed volume") for name in ("10_85902_1", "10_85902_3", "7_85703_0")
        ]
        assert "left out, windowed volume: 3" in str(summary)
        cases = load_cases(summary.datalist, tmp_path / "out")
        assert [case["name"] for case in cases] == ["coronacases_001", "coronacases_002"]
        read = Compose(
            [
                LoadCTd(("image", "label", "lung"), ensure_channel_first=True),
                CheckSameGridd(("image", "label", "lung")),
                ValidateHUd("image"),
                LungMaskd("image"),
            ]
        )
        for number, case in enumerate(cases, 1):
            data = read(case)  # what the bundles' training begins with
            assert np.array_equal(data["lung"][0], patient(number).lungs[:, ::-1])
            assert np.array_equal(data["label"][0], opacity(patient(number))[:, ::-1])

    def test_coronacases_for_testing(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in", radiopaedia=())
        summary = prepare_covid_ct_seg(source, tmp_path / "out", testing=True)
        content = read_datalist(summary.datalist)
        assert "training" not in content and len(content["testing"]) == 2
        assert all("fold" not in entry for entry in content["testing"])

    def test_windowed_volumes_as_slices(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in")
        summary = prepare_covid_ct_seg(source, tmp_path / "out", volumes_as_slices=True, n_folds=2)
        entries = read_datalist(summary.slice_list)["training"]
        patients = {entry["patient_id"]: entry["fold"] for entry in entries}
        assert sorted(patients.values()) == [0, 1]  # the reader refuses a patient in two folds
        assert set(patients) == {"radiopaedia_10", "radiopaedia_7"}
        expected = {}
        for number, name in enumerate(("10_85902_1", "10_85902_3", "7_85703_0")):
            for k in lesion_slices(patient(number)):
                expected[f"radiopaedia_{name}_{k:04d}"] = (patient(number), k)
        cases = load_cases(summary.slice_list, tmp_path / "out" / "slices")
        assert {case["name"] for case in cases} == set(expected) and len(expected) > 3
        for case in cases:
            phantom, k = expected[case["name"]]
            assert np.array_equal(picture(case["image"]), windowed(phantom)[:, :, k].T)
            assert np.array_equal(picture(case["label"]), opacity(phantom)[:, :, k].T * 255)
        assert len(read_datalist(summary.datalist)["training"]) == 2

    def test_lungs_that_contradict_the_header_are_left_out(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in", radiopaedia=())
        lungs = patient(1).lungs
        swapped = np.where(lungs > 0, 3 - lungs, 0).astype(np.uint8)
        write_las(source / "Lung_Mask" / "coronacases_001.nii.gz", swapped, patient(1).affine)
        rough = patient(2).lungs * 1.0001
        write_las(source / "Lung_Mask" / "coronacases_002.nii.gz", rough, patient(2).affine)
        summary = prepare_covid_ct_seg(source, tmp_path / "out")
        first, second = read_datalist(summary.datalist)["training"]
        assert "lung" not in first and second["lung"] == "lungs/coronacases_002.nii.gz"
        assert np.array_equal(values(tmp_path / "out" / second["lung"]), patient(2).lungs[:, ::-1])
        assert "note, coronacases_001: its lung mask was left out" in str(summary) and not summary.failed

    def test_names_of_the_other_copy(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in", coronacases=1, radiopaedia=("10_85902_1",))
        for old, new in (
            ("COVID-19-CT-Seg_20cases", "ct_scans"),
            ("Infection_Mask", "infection_mask"),
            ("Lung_Mask", "lung_mask"),
        ):
            shutil.move(source / old, source / new)
        scans = source / "ct_scans"
        for old, new in (
            ("coronacases_001.nii.gz", "coronacases_org_001.nii.gz"),
            ("radiopaedia_10_85902_1.nii.gz", "radiopaedia_org_covid-19-pneumonia-10_85902_1-dcm.nii.gz"),
        ):
            shutil.move(scans / old, scans / new)
        shutil.copy(scans / "coronacases_org_001.nii.gz", scans / "another.nii.gz")
        summary = prepare_covid_ct_seg(source, tmp_path / "out", volumes_as_slices=True)
        assert [case["name"] for case in summary.cases] == ["coronacases_001", "radiopaedia_10_85902_1"]
        assert [(one.what, one.failed) for one in summary.left_out] == [("ct_scans/another.nii.gz", False)]

    def test_what_is_incomplete_fails(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in", coronacases=4, radiopaedia=())
        (source / "Infection_Mask" / "coronacases_001.nii.gz").unlink()
        (source / "Lung_Mask" / "coronacases_002.nii.gz").unlink()
        (source / "COVID-19-CT-Seg_20cases" / "coronacases_003.nii.gz").unlink()
        summary = prepare_covid_ct_seg(source, tmp_path / "out")
        reasons = [one.reason for one in summary.failed]
        assert [reason.split(" of it")[0] for reason in reasons] == [
            "there is no infection mask",
            "there is no lung mask",
            "there is no CT",
        ]
        shutil.rmtree(source / "Lung_Mask")  # not downloaded at all: the bundles find the lungs themselves
        summary = prepare_covid_ct_seg(source, tmp_path / "out")
        assert len(summary.failed) == 2
        assert all("lung" not in entry for entry in read_datalist(summary.datalist)["training"])

    def test_only_windowed_volumes(self, tmp_path):
        source = write_covid_ct_seg(tmp_path / "in", coronacases=0)
        with pytest.raises(ValueError, match="3 left out; the first is radiopaedia_.*--volumes-as-slices"):
            prepare_covid_ct_seg(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("coronacases_001.nii.gz", "coronacases_001"),
        ("coronacases_org_case010.nii", "coronacases_010"),
        ("radiopaedia_4_85506_1.nii.gz", "radiopaedia_4_85506_1"),
        ("radiopaedia_org_covid-19-pneumonia-40_86625_0-dcm.nii", "radiopaedia_40_86625_0"),
        ("study_0255.nii.gz", None),
    ],
)
def test_names_of_cases(file, name):
    assert covid_ct_seg_name(Path(file)) == name


class TestMedseg:
    @pytest.mark.parametrize(
        ("options", "present", "labels"),
        [
            ({}, [0, 1, 1, 1], ["ground-glass opacity or consolidation or pleural effusion"]),
            ({"without_effusion": True}, [0, 1, 1, 0], ["ground-glass opacity or consolidation"]),
            (
                {"keep_classes": True},
                [0, 1, 2, 3],
                ["ground-glass opacity", "consolidation", "pleural effusion"],
            ),
            (
                {"keep_classes": True, "without_effusion": True},
                [0, 1, 2, 0],
                ["ground-glass opacity", "consolidation"],
            ),
        ],
    )
    def test_classes(self, tmp_path, options, present, labels):
        source = write_medseg(tmp_path / "in")
        summary = prepare_medseg(source, tmp_path / "out", **options)
        assert summary.left_out == ()
        volumes, slices = read_datalist(summary.datalist), read_datalist(summary.slice_list)
        assert (
            volumes["labels"]
            == slices["labels"]
            == {str(number): name for number, name in enumerate(["background", *labels])}
        )
        become = np.array(present, np.uint8).take
        for number, entry in enumerate(volumes["training"], 1):
            in_place = present == [0, 1, 2, 3]
            name = f"../in/rp_msk/{number}.nii.gz" if in_place else f"labels/rp_{number}.nii.gz"
            assert (entry["image"], entry["label"]) == (f"../in/rp_im/{number}.nii.gz", name)
            expected = become(classes(patient(number)))[:, ::-1]
            assert np.array_equal(values(tmp_path / "out" / entry["label"]), expected)
        factor = 1 if "keep_classes" in options else 255
        mask = picture(tmp_path / "out" / "slices" / "masks" / "tr_0001.png")
        assert np.array_equal(
            mask, become(classes(patient(2)))[:, :, lesion_slices(patient(2))[0]].T * factor
        )

    def test_the_stack_is_slices_and_alike_ones_share_a_patient(self, tmp_path):
        source = write_medseg(tmp_path / "in", volumes=0)
        summary = prepare_medseg(source, tmp_path / "out", n_folds=2)
        assert summary.datalist is None and summary.cases == ()
        entries = read_datalist(summary.slice_list)["training"]
        assert [entry["image"] for entry in entries] == [f"images/tr_{k:04d}.png" for k in range(4)]
        assert entries[0]["patient_id"] == entries[2]["patient_id"] == "medseg_tr_0000"
        hu = patient(2).image[:, :, lesion_slices(patient(2))[0]].T
        expected = np.clip(np.rint((hu + 1000.0) / 1400 * 255), 0, 255)
        shown = picture(tmp_path / "out" / "slices" / "images" / "tr_0001.png")
        assert shown.dtype == np.uint8 and np.abs(shown - expected).max() <= 1  # ties in float32

    def test_volumes_as_slices_are_upright_by_their_header(self, tmp_path):
        source = write_medseg(tmp_path / "in")
        options = SliceOptions(window=(-1250, 250))
        summary = prepare_medseg(source, tmp_path / "out", volumes_as_slices=True, slices=options)
        assert len(read_datalist(summary.datalist)["training"]) == 2
        entries = read_datalist(summary.slice_list)["training"]
        expected = {
            f"rp_{number}_{k:04d}": (number, k) for number in (1, 2) for k in lesion_slices(patient(number))
        }
        names = [entry["image"][len("images/") : -len(".png")] for entry in entries]
        assert names == [*expected, *(f"tr_{k:04d}" for k in range(4))]
        for entry, (number, k) in zip(entries, expected.values(), strict=False):
            assert entry["patient_id"] == f"medseg_rp_{number}"
            shown = picture(tmp_path / "out" / "slices" / entry["image"])
            grey = np.clip(np.rint((patient(number).image[:, :, k].T + 1250.0) / 1500 * 255), 0, 255)
            assert np.abs(shown - grey).max() <= 1
            drawn = picture(tmp_path / "out" / "slices" / entry["label"])
            assert np.array_equal(drawn, opacity(patient(number))[:, :, k].T * 255)

    def test_half_a_data_set(self, tmp_path):
        source = write_medseg(tmp_path / "in")
        (source / "tr_mask.nii.gz").unlink()
        (source / "rp_msk" / "2.nii.gz").unlink()
        summary = prepare_medseg(source, tmp_path / "out")
        assert [one.what for one in summary.failed] == ["rp_2", "tr_im"]
        assert len(summary.cases) == 1 and summary.slice_list is None

    def test_a_stack_that_does_not_fit_fails(self, tmp_path):
        source = write_medseg(tmp_path / "in", volumes=1)
        write(source / "tr_mask.nii.gz", np.zeros((36, 32, 3), np.uint8), np.eye(4))
        summary = prepare_medseg(source, tmp_path / "out")
        assert "differ in size: (36, 32, 4) and (36, 32, 3) voxels" in summary.failed[0].reason
        write(source / "tr_mask.nii.gz", np.full((36, 32, 4), 4, np.uint8), np.eye(4))
        summary = prepare_medseg(source, tmp_path / "out")
        assert "has values 4 besides 0, 1, 2, 3" in summary.failed[0].reason

    def test_options_of_slices(self):
        with pytest.raises(ValueError, match="the window must grow"):
            SliceOptions(window=(100, 100))
        with pytest.raises(ValueError, match="unknown orientation"):
            SliceOptions(orientation="flipped")


def test_a_second_run_reads_only_what_changed(tmp_path, monkeypatch):
    source, out = write_medseg(tmp_path / "in", stack=False), tmp_path / "out"
    first = prepare_medseg(source, out, volumes_as_slices=True)
    lists = [summary_list.read_text() for summary_list in (first.datalist, first.slice_list)]

    def again(**options):
        read = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "custom.data.covid_volumes.read_scan", lambda f: read.append(f.name) or read_scan(f)
            )
            summary = prepare_medseg(source, out, **{"volumes_as_slices": True} | options)
        return summary, read

    summary, read = again()
    assert (summary.reused, read) == (2, []) and "earlier run: 2 of 2" in str(summary)
    assert summary.cases == first.cases
    assert [file.read_text() for file in (summary.datalist, summary.slice_list)] == lists
    (out / "labels" / "rp_1.nii.gz").unlink()
    assert again()[1] == ["1.nii.gz", "1.nii.gz"] and (out / "labels" / "rp_1.nii.gz").exists()
    next((out / "slices" / "masks").glob("rp_2*")).write_bytes(b"half")
    assert again()[1] == ["2.nii.gz", "2.nii.gz"]
    os.utime(source / "rp_msk" / "1.nii.gz", (1, 1))
    assert again()[1] == ["1.nii.gz", "1.nii.gz"]
    (out / "cases" / "rp_1.json").write_text("[")
    assert again()[1] == ["1.nii.gz", "1.nii.gz"]
    assert len(again(without_effusion=True)[1]) == 4
    assert again(without_effusion=True)[1] == []


def test_results_come_in_order_whatever_order_workers_finish_in(tmp_path, monkeypatch):
    def backwards(function, jobs, *_):
        return map(function, reversed(pickle.loads(pickle.dumps(jobs))))  # as to processes and back

    source = write_covid_ct_seg(tmp_path / "in", coronacases=3, radiopaedia=("7_85703_0", "10_85902_1"))
    (source / "Lung_Mask" / "coronacases_002.nii.gz").write_bytes(b"")
    alone = prepare_covid_ct_seg(source, tmp_path / "alone")
    monkeypatch.setattr("custom.data.covid_volumes.work_through", backwards)
    together = prepare_covid_ct_seg(source, tmp_path / "together", num_workers=2)
    assert (together.cases, together.left_out) == (alone.cases, alone.left_out)
    assert [one.what for one in together.failed] == ["coronacases_002"]
    assert together.datalist.read_text() == alone.datalist.read_text()


class TestChecks:
    ARRAYS = {
        "phantom": (lambda image: image, HU),
        "padding": (lambda image: np.where(image < -900, -3024, image), HU),
        "metal": (lambda image: np.where(image > 300, 8000, image), HU),
        "windowed": (lambda image: np.clip((image + 1250) / 1500 * 255, 0, 255), GREY),
        "unit": (lambda image: np.clip((image + 1250) / 1500, 0, 1), None),
        "z-score": (lambda image: (image - image.mean()) / image.std(), None),
        "no intercept": (lambda image: image + 1024, None),
        "no tissue": (lambda image: np.full(image.shape, -950) + (image > 0), None),
        "constant": (lambda image: image * 0, None),
        "NaN": (lambda image: np.where(image > 200, np.nan, image), None),
    }

    @pytest.mark.parametrize("name", ARRAYS)
    def test_kinds_of_values(self, name):
        change, kind = self.ARRAYS[name]
        voxels = change(patient().image.astype(np.float32))
        if kind is None:
            with pytest.raises(ValueError, match="ct.nii.gz"):
                find_value_kind(scan(voxels))
        else:
            assert find_value_kind(scan(voxels)) == kind
        try:
            ValidateHU()(np.asarray(voxels, np.float32)[None])
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == (kind == HU)  # training takes what is listed

    def test_grids(self):
        affine = np.array([[-0.7, 0, 0, 180], [0, 0.7, 0, -170], [0, 0, 8, -900], [0, 0, 0, 1]], float)
        image = scan(np.zeros((64, 64, 8)), affine, "ct.nii")

        def differ(change, shape=(64, 64, 8)):
            other = affine.copy()
            change(other)
            with pytest.raises(ValueError, match="ct.nii and the mask mask.nii") as error:
                check_same_grid(image, scan(np.zeros(shape), other, "mask.nii"))
            return str(error.value)

        def put(rows, columns, values):
            return lambda other: other.__setitem__((rows, columns), values)

        assert "their axes run LAS and LPS" in differ(put(1, [1, 3], [-0.7, 0]))
        assert "their origins differ by (0, 0.1, -3) mm" in differ(put([1, 2], 3, [-169.9, -903]))
        assert "measure 0.7 x 0.7 x 8 and 0.7 x 0.7 x 5 mm" in differ(put(2, 2, 5))
        tilt = np.array([[1, 0, 0], [0, np.cos(0.1), -np.sin(0.1)], [0, np.sin(0.1), np.cos(0.1)]])
        assert "tilted" in differ(put(slice(3), slice(3), tilt @ affine[:3, :3]))
        assert "differ in size: (64, 64, 8) and (64, 64, 9) voxels" in differ(lambda other: None, (64, 64, 9))
        # 0.001 mm a voxel is nothing in the affine and 0.063 mm at the last of 64
        assert "mm apart" in differ(put(0, 0, -0.701))
        near = affine.copy()
        near[:3, 3] += 0.02
        check_same_grid(image, scan(np.zeros((64, 64, 8)), near, "mask.nii"))

    def test_labels(self):
        stored = np.array([[[0, 1], [2, 3]]])
        labels, unchanged = LabelRule((1, 2, 3), merge=False).read(scan(stored))
        assert labels.dtype == np.uint8 and np.array_equal(labels, stored) and unchanged
        labels, unchanged = LabelRule((1, 2, 3), drop=(3,)).read(scan(stored))
        assert np.array_equal(labels, [[[0, 1], [1, 0]]]) and not unchanged
        labels, unchanged = LabelRule().read(scan(stored > 0))
        assert np.array_equal(labels, stored > 0) and unchanged
        for bad, shown in ((stored, "2, 3"), (stored * 0.5, "0.5, 1.5"), (-stored, "-3, -2, -1")):
            with pytest.raises(ValueError, match=f"has values {shown} besides 0, 1$"):
                LabelRule().read(scan(bad))
        with pytest.raises(ValueError, match="has values nan besides"):
            LabelRule().read(scan(np.where(stored == 3, np.nan, stored > 0)))
        with pytest.raises(ValueError, match=r"has values 2, 3, 4, 5, 6, \.\.\. besides"):
            LabelRule().read(scan(np.arange(12).reshape(2, 2, 3)))

    def test_sides(self):
        lungs, affine = patient().lungs, patient().affine
        assert sides_agree(lungs, affine)
        assert not sides_agree(lungs[::-1], affine)
        assert not sides_agree(np.minimum(lungs, 1), affine)
        turned = affine.copy()
        turned[:, [0, 1]] = affine[:, [1, 0]]
        assert sides_agree(lungs.transpose(1, 0, 2), turned)
