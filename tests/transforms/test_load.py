# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import pickle
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch, list_data_collate
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    Spacingd,
)

from custom.data.dicom import find_studies
from custom.data.dicom_writer import write_dicom_series
from custom.data.scans import list_scans
from custom.transforms.load import LoadCTd, LoadCTDict, format_output_name, study_info
from tests import dicom_faults as faults

AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1]])


def make_hu(shape=(6, 5, 4)):
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


@pytest.fixture
def dicom_folder(tmp_path):
    folder = tmp_path / "dicom"
    write_dicom_series(folder, make_hu(), AFFINE, shuffle=True, patient_name="Doe^Jane")
    return folder


@pytest.fixture
def nifti_file(tmp_path):
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(make_hu(), AFFINE), path)
    return path


@pytest.mark.parametrize("kind", ["folder", "files", "nifti"])
def test_values_geometry_and_meta_data(dicom_folder, nifti_file, kind):
    paths = {
        "folder": str(dicom_folder),
        "files": sorted(map(str, dicom_folder.iterdir())),
        "nifti": nifti_file,
    }
    image = LoadCTd("image")({"image": paths[kind]})["image"]
    assert isinstance(image, MetaTensor) and image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), make_hu())
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(image.meta["original_affine"], AFFINE, atol=1e-5)
    assert list(image.meta["spatial_shape"]) == [6, 5, 4]
    first = paths[kind][0] if kind == "files" else paths[kind]
    assert image.meta["filename_or_obj"] == str(first)


def test_same_as_monai_for_nifti(nifti_file):
    ours = LoadCTd("image", ensure_channel_first=True)({"image": nifti_file})["image"]
    theirs = LoadImaged("image", reader="NibabelReader", ensure_channel_first=True)({"image": nifti_file})[
        "image"
    ]
    assert ours.shape == theirs.shape == (1, 6, 5, 4)
    assert torch.equal(ours.as_tensor(), theirs.as_tensor())
    assert torch.equal(ours.affine, theirs.affine)
    for key in ("space", "original_channel_dim", "filename_or_obj"):
        assert str(ours.meta[key]) == str(theirs.meta[key])


def test_channel_is_added_by_monai_as_well(dicom_folder):
    load = Compose([LoadCTd("image"), EnsureChannelFirstd("image")])
    assert load({"image": dicom_folder})["image"].shape == (1, 6, 5, 4)


def test_image_and_label(dicom_folder, tmp_path):
    mask = (make_hu() > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(mask, AFFINE), tmp_path / "mask.nii")
    load = LoadCTd(["image", "label"], ensure_channel_first=True)
    item = load(
        {"image": dicom_folder, "label": tmp_path / "mask.nii", "name": "case", "series_choice": "why"}
    )
    np.testing.assert_array_equal(item["label"][0].numpy(), mask)
    np.testing.assert_allclose(item["image"].affine, item["label"].affine, atol=1e-5)
    assert study_info(item["image"])["series_choice"] == "why"
    assert study_info(item["label"])["series_choice"] == ""
    assert item["name"] == "case"


def test_is_a_load_imaged_that_can_be_pickled(dicom_folder):
    load = LoadCTd("image")
    assert isinstance(load, LoadImaged) and LoadCTDict is LoadCTd
    assert pickle.loads(pickle.dumps(load))({"image": dicom_folder})["image"].shape == (6, 5, 4)


def test_refused_series_is_not_loaded_by_another_reader(dicom_folder, tmp_path):
    sorted(dicom_folder.iterdir())[0].unlink()
    faults.copy_slice(sorted(dicom_folder.iterdir())[0], dicom_folder / "again.dcm")
    with pytest.raises(ValueError, match="share their position"):
        LoadCTd("image")({"image": dicom_folder})
    # MONAI's own loader takes it, which is why the reader must be handed over at call time.
    loaded = LoadImaged("image", reader="PydicomReader")({"image": dicom_folder})["image"]
    assert loaded.shape[:2] == (6, 5)


def test_refused_nifti_is_not_loaded_by_another_reader(tmp_path):
    path = tmp_path / "movie.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), AFFINE), path)
    with pytest.raises(ValueError, match="4 dimensions"):
        LoadCTd("image")({"image": path})


def test_series_by_uid(dicom_folder):
    write_dicom_series(dicom_folder / "b", make_hu((6, 5, 3)), AFFINE, series_number=2)
    (study,) = find_studies(dicom_folder)
    uid = study.series[1].uid
    image = LoadCTd("image", series_uid=uid)({"image": dicom_folder})["image"]
    assert image.shape == (6, 5, 3) and study_info(image)["series_uid"] == uid
    with pytest.raises(ValueError, match=r"no series 1\.2"):
        LoadCTd("image", series_uid="1.2")({"image": dicom_folder})


def test_missing_keys_and_files(tmp_path):
    assert LoadCTd("image", allow_missing_keys=True)({}) == {}
    with pytest.raises(KeyError):
        LoadCTd("image")({})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LoadCTd("image")({"image": tmp_path / "nowhere"})


def test_listed_items_load_with_their_names(dicom_folder, nifti_file, tmp_path):
    items = list_scans(tmp_path)
    loaded = [LoadCTd("image")(item) for item in items]
    names = [study_info(item["image"])["name"] for item in loaded]
    assert names == [item["name"] for item in items] == [find_studies(tmp_path)[0].name, "scan"]
    assert "only axial CT series" in study_info(loaded[0]["image"])["series_choice"]
    # A name given with the item comes before the one that the scan suggests.
    item = LoadCTd("image")({"image": nifti_file, "name": "a_scan"})
    assert study_info(item["image"])["name"] == "a_scan"


def test_study_survives_transforms_and_batches(dicom_folder, nifti_file, tmp_path):
    chain = Compose(
        [LoadCTd("image", ensure_channel_first=True), Orientationd("image", axcodes="PLS", labels=None)]
    )
    items = list_scans(tmp_path)
    batch = next(iter(DataLoader(Dataset(items, chain), batch_size=2, collate_fn=list_data_collate)))
    assert batch["image"].shape == (2, 1, 5, 6, 4)
    sources = [study_info(item["image"])["source"] for item in decollate_batch(batch)]
    assert sources == ["dicom", "nifti"]
    first = study_info(decollate_batch(batch)[0]["image"])
    assert len(first["files"]) == 4 and first["contrast_agent"] is None
    assert "Doe" not in json.dumps(first)


def test_study_info_of_a_foreign_image():
    for image in (MetaTensor(torch.zeros(1, 2, 2, 2)), torch.zeros(1, 2, 2, 2)):
        with pytest.raises(ValueError, match="load it with LoadCTd"):
            study_info(image)


@pytest.mark.parametrize("source", ["dicom", "nifti"])
def test_inverted_and_saved_in_the_grid_of_the_scan(dicom_folder, nifti_file, tmp_path, source):
    chain = Compose(
        [
            LoadCTd("image", ensure_channel_first=True),
            Orientationd("image", axcodes="PLS", labels=None),
            Spacingd("image", pixdim=(0.8, 0.8, 2.0)),
        ]
    )
    item = chain({"image": dicom_folder if source == "dicom" else nifti_file, "name": "case 7"})
    item["pred"] = MetaTensor((item["image"].as_tensor() > 0).float(), meta=item["image"].meta)
    back = Invertd("pred", chain, orig_keys="image", nearest_interp=True, to_tensor=True)(item)
    save = SaveImaged(
        "pred",
        output_dir=tmp_path / "out",
        output_postfix="pred",
        output_dtype=np.uint8,
        output_name_formatter=format_output_name,
        separate_folder=False,
        print_log=False,
    )
    save(back)
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "case 7_pred.nii.gz"
    saved = nib.load(file)
    assert saved.shape == (6, 5, 4)
    np.testing.assert_allclose(saved.affine, AFFINE, atol=1e-5)


def test_logs_the_choice_and_the_notes_but_no_patient(dicom_folder, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")  # MONAI's warnings about a missing library are not for our users
        load = LoadCTd("image")
        faults.set_tags(dicom_folder.iterdir(), SliceThickness="1")
        load({"image": dicom_folder})
    ours = [record for record in caplog.records if record.name.startswith("custom")]
    assert [record.levelname for record in ours] == ["INFO", "WARNING"]
    assert "the only axial CT series, 4 slices" in ours[0].message and "every 2.5 mm" in ours[1].message
    assert "Doe" not in caplog.text and str(dicom_folder) not in caplog.text
    assert "nvImageCodec" not in caplog.text


@pytest.mark.parametrize(
    ("voxels", "dtype"),
    [
        (np.arange(-30, 30).reshape(3, 4, 5).astype(np.int16), torch.int16),
        (np.arange(-30, 30).reshape(3, 4, 5).astype(np.float32), torch.int16),
        (np.arange(60).reshape(3, 4, 5).astype(np.float32) + 0.5, torch.float32),
        (np.arange(60).reshape(3, 4, 5).astype(np.float32) * 1000, torch.float32),  # beyond int16
        (np.where(np.arange(60).reshape(3, 4, 5) == 7, np.nan, 1.0).astype(np.float32), torch.float32),
    ],
)
def test_whole_numbers_can_be_held_in_half_the_memory(tmp_path, voxels, dtype):
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    plain = LoadCTd("image", ensure_channel_first=True)({"image": tmp_path / "a.nii"})["image"]
    compact = LoadCTd("image", ensure_channel_first=True, compact=True)({"image": tmp_path / "a.nii"})[
        "image"
    ]
    assert plain.dtype == torch.float32 and compact.dtype == dtype
    assert np.array_equal(compact.float().numpy(), plain.numpy(), equal_nan=True)
    assert compact.shape == plain.shape and torch.equal(compact.affine, plain.affine)
