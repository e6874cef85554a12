# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from custom.data.dicom import find_studies
from custom.data.dicom_writer import write_dicom_series
from custom.data.scans import list_scans, read_scan
from tests import dicom_faults as faults

AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1]])
real_data = pytest.mark.skipif(
    "CT_DATA" not in os.environ, reason="CT_DATA does not name a folder of real scans"
)


def make_hu(shape=(5, 4, 3)):
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def save_nifti(path, voxels=None, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(make_hu() if voxels is None else voxels, affine), path)
    return path


class TestListing:
    def test_nifti_and_dicom_in_a_fixed_order(self, tmp_path):
        save_nifti(tmp_path / "b.nii.gz")
        save_nifti(tmp_path / "a" / "x.nii")
        write_dicom_series(tmp_path / "a" / "study", make_hu(), AFFINE)
        (tmp_path / "notes.txt").write_text("nothing")
        save_nifti(tmp_path / ".hidden.nii.gz")
        items = list_scans(tmp_path)
        assert items == list_scans(str(tmp_path))
        (study,) = find_studies(tmp_path)
        assert [item["name"] for item in items] == [study.name, "a_x", "b"]
        assert items[0]["image"] == list(study.series[0].files)
        assert items[1]["image"] == str(tmp_path / "a" / "x.nii")
        assert "only axial CT series" in items[0]["series_choice"] and items[1]["series_choice"] == ""
        json.dumps(items)

    def test_names_are_distinct(self, tmp_path):
        for path in ("a/ct.nii.gz", "b/ct.nii.gz", "a/b_c.nii", "a_b/c.nii", "x.nii", "x.nii.gz", "X.nii.gz"):
            save_nifti(tmp_path / path)
        names = {os.path.relpath(item["image"], tmp_path): item["name"] for item in list_scans(tmp_path)}
        assert names["a/ct.nii.gz"] == "a_ct" and names["b/ct.nii.gz"] == "b_ct"
        assert names["a/b_c.nii"].startswith("a_b_c_") and names["a_b/c.nii"].startswith("a_b_c_")
        assert len({name.lower() for name in names.values()}) == 7

    def test_names_are_safe(self, tmp_path):
        save_nifti(tmp_path / "Scan (1) ü" / ("long" * 40 + ".nii.gz"))
        (item,) = list_scans(tmp_path)
        assert item["name"].startswith("Scan_1_long") and len(item["name"]) < 120
        assert set(item["name"]) <= set("Scan_1longabcdef0123456789")

    def test_a_study_without_ct_does_not_vanish(self, tmp_path):
        save_nifti(tmp_path / "good.nii.gz")
        files = write_dicom_series(tmp_path / "mr", make_hu(), AFFINE)
        faults.set_tags(files, Modality="MR")
        items = list_scans(tmp_path)
        assert [item["name"][:5] for item in items] == ["good", "study"]
        assert "no axial CT series" in items[1]["series_choice"]
        with pytest.raises(ValueError, match="no axial CT series.*modality MR"):
            read_scan(items[1]["image"])

    def test_items_hold_the_chosen_series_and_what_spoils_it(self, tmp_path):
        files = write_dicom_series(tmp_path, make_hu(), AFFINE)
        small = write_dicom_series(tmp_path / "other", make_hu((5, 4, 2)), AFFINE, series_number=2)
        (item,) = list_scans(tmp_path)
        assert sorted(item["image"]) == sorted(map(str, files))
        (tmp_path / "lost.dcm").touch()
        (item,) = list_scans(tmp_path)
        assert str(tmp_path / "lost.dcm") in item["image"]
        with pytest.raises(ValueError, match="1 file beside it cannot be read"):
            read_scan(item["image"])
        (study,) = find_studies(tmp_path)
        (item,) = list_scans(tmp_path, study.series[1].uid)
        assert sorted(item["image"]) == sorted(map(str, small)) and "asked for" in item["series_choice"]
        with pytest.raises(ValueError, match=r"no series 1\.2"):
            list_scans(tmp_path, "1.2")

    def test_nothing_to_find(self, tmp_path):
        (tmp_path / "readme.txt").write_text("nothing")
        with pytest.raises(FileNotFoundError, match="no NIfTI file .* and no DICOM study in"):
            list_scans(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            list_scans(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="this is a file, give the folder that holds it"):
            list_scans(tmp_path / "readme.txt")


class TestReadingDicom:
    def test_folder_and_files_give_the_same(self, tmp_path):
        hu = make_hu()
        files = write_dicom_series(tmp_path, hu, AFFINE, patient_name="Doe^Jane", patient_id="ID4711")
        for paths in (tmp_path, str(tmp_path), files, [str(f) for f in reversed(files)]):
            scan = read_scan(paths)
            np.testing.assert_array_equal(scan.voxels, hu)
            np.testing.assert_allclose(scan.affine, AFFINE)
        study = scan.study
        assert study["source"] == "dicom" and study["files"] == [str(f) for f in files]
        assert study["study_date"] == "20200301" and study["kernel"] == "STANDARD"
        assert study["slice_thickness"] == 2.5 and study["contrast_agent"] is None
        text = json.dumps({k: v for k, v in study.items() if k != "files"})
        assert "Doe" not in text and "4711" not in text

    def test_one_file_is_one_slice(self, tmp_path):
        hu = make_hu()
        files = write_dicom_series(tmp_path, hu, AFFINE)
        scan = read_scan(files[1])
        np.testing.assert_array_equal(scan.voxels, hu[:, :, 1:2])
        np.testing.assert_allclose(scan.affine[:3, 3], [90, 120, -297.5])

    def test_several_studies_need_a_choice(self, tmp_path):
        write_dicom_series(tmp_path / "a", make_hu(), AFFINE)
        write_dicom_series(tmp_path / "b", make_hu((5, 4, 2)), AFFINE, study_date="20200401")
        with pytest.raises(ValueError, match="2 DICOM studies in"):
            read_scan(tmp_path)
        uid = find_studies(tmp_path)[1].series[0].uid
        assert read_scan(tmp_path, uid).voxels.shape == (5, 4, 2)

    def test_neither_dicom_nor_nifti(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG")
        for paths in (tmp_path, tmp_path / "a.png"):
            with pytest.raises(ValueError, match="neither a NIfTI file"):
                read_scan(paths)
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_scan(tmp_path / "b.dcm")


class TestReadingNifti:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
    def test_values_and_affine(self, tmp_path, suffix, kind):
        path = tmp_path / f"scan{suffix}"
        nib.save(kind(make_hu(), AFFINE), path)
        scan = read_scan(path)
        np.testing.assert_array_equal(scan.voxels, make_hu())
        assert scan.voxels.dtype == np.float32
        np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5)
        assert scan.study["name"] == "scan" and scan.study["source"] == "nifti"
        assert scan.study["files"] == [str(path)] and scan.study["notes"] == []

    def test_same_keys_as_for_dicom(self, tmp_path):
        write_dicom_series(tmp_path, make_hu(), AFFINE)
        nifti = read_scan(save_nifti(tmp_path / "a.nii")).study
        dicom = read_scan(sorted(tmp_path.glob("*.dcm"))).study
        assert list(nifti) == list(dicom)

    def test_scaling_in_the_header(self, tmp_path):
        image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), AFFINE)
        image.header.set_slope_inter(2, -1024)
        path = tmp_path / "scaled.nii.gz"
        nib.save(image, path)
        stored = np.asarray(nib.load(path).dataobj.get_unscaled())
        slope, inter = nib.load(path).dataobj.slope, nib.load(path).dataobj.inter
        np.testing.assert_allclose(read_scan(path).voxels, stored * slope + inter, rtol=1e-6)
        assert (slope, inter) == (2, -1024)

    def test_big_endian_and_one_slice(self, tmp_path):
        path = tmp_path / "big.nii"
        image = nib.Nifti1Image(make_hu((5, 4, 1)), AFFINE, nib.Nifti1Header(endianness=">"))
        nib.save(image, path)
        assert nib.load(path).header.endianness == ">"
        np.testing.assert_array_equal(read_scan(path).voxels, make_hu((5, 4, 1)))

    def test_header_without_orientation_is_mentioned(self, tmp_path):
        image = nib.Nifti1Image(make_hu(), None)
        image.header.set_zooms((0.7, 0.9, 2.5))
        path = tmp_path / "plain.nii.gz"
        nib.save(image, path)
        scan = read_scan(path)
        assert nib.aff2axcodes(scan.affine) == ("L", "A", "S")
        assert "which side is left" in scan.study["notes"][0]

    @pytest.mark.parametrize(
        "voxels, pattern",
        [
            (np.zeros((4, 4, 4, 2), np.int16), "4 dimensions"),
            (np.zeros((4, 4, 4, 1), np.int16), "4 dimensions"),
            (np.zeros((4, 4), np.int16), "2 dimensions"),
            (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour or complex"),
            (np.zeros((4, 4, 4), np.complex64), "colour or complex"),
        ],
        ids=["4-D", "one volume in 4-D", "2-D", "RGB", "complex"],
    )
    def test_refuses_what_is_no_volume(self, tmp_path, voxels, pattern):
        path = save_nifti(tmp_path / "odd.nii.gz", voxels)
        with pytest.raises(ValueError, match=pattern + r".*odd\.nii\.gz"):
            read_scan(path)

    def damaged(self, path):
        with pytest.raises(ValueError) as caught:
            read_scan(path)
        text = str(caught.value)
        assert "\n" not in text and str(path) in text
        return text

    def test_damaged_files(self, tmp_path):
        path = save_nifti(tmp_path / "a.nii.gz", make_hu((20, 20, 20)))
        whole = path.read_bytes()
        path.write_bytes(b"")
        assert "empty file" in self.damaged(path)
        path.write_bytes(b"hello, world")
        assert "not a NIfTI file" in self.damaged(path)
        path.write_bytes(gzip.compress(b"hello, world"))
        assert "not a NIfTI file" in self.damaged(path)
        for keep in (10, len(whole) // 2, len(whole) - 4):
            path.write_bytes(whole[:keep])
            assert "cut off" in self.damaged(path)
        path.write_bytes(gzip.compress(gzip.decompress(whole)[:-100]))
        self.damaged(path)
        path.write_bytes(gzip.decompress(whole)[:300])
        self.damaged(path)
        path.write_bytes(whole[:-6] + b"\0\0\0\0\0\0")
        assert "damaged" in self.damaged(path)

    def test_damage_that_only_the_checksum_shows(self, tmp_path):
        path = save_nifti(tmp_path / "a.nii.gz")
        packed = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
        packed[-20] ^= 1  # stored, not packed: one voxel changes and everything still unpacks
        path.write_bytes(bytes(packed))
        assert "CRC" in self.damaged(path)

    def test_bad_geometry(self, tmp_path):
        path = tmp_path / "flat.nii"
        image = nib.Nifti1Image(make_hu(), AFFINE)
        image.set_sform(np.diag([1.0, 1, 0, 1]), code=1)
        nib.save(image, path)
        assert "affine is not invertible" in self.damaged(path)
        image = nib.Nifti1Image(make_hu(), AFFINE)
        image.header.set_xyzt_units("micron")
        nib.save(image, path)
        assert "micron" in self.damaged(path)

    def test_several_files_and_missing_ones(self, tmp_path):
        path = save_nifti(tmp_path / "a.nii")
        with pytest.raises(ValueError, match="one NIfTI file is one scan, got 2"):
            read_scan([path, path])
        with pytest.raises(FileNotFoundError):
            read_scan(tmp_path / "b.nii.gz")
        (tmp_path / "folder.nii").mkdir()
        with pytest.raises(ValueError, match="folder"):
            read_scan(tmp_path / "folder.nii")


@real_data
def test_real_folder_is_listed_whole():
    items = list_scans(Path(os.environ["CT_DATA"]) / "lidc")
    assert sorted(len(item["image"]) for item in items) == [133, 140]  # and not the readers' XML
    items = list_scans(Path(os.environ["CT_DATA"]) / "nifti_small")
    assert [item["name"] for item in items] == ["chest_crop", "lung_bases_3mm"]
    assert read_scan(items[0]["image"]).voxels.shape == (122, 102, 112)
