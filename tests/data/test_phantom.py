# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from custom.data import files
from custom.data.phantom import LESION_CLASSES, Lesion, Phantom, make_phantom
from custom.data.phantom_cohort import write_cohort

SMALL = {"shape": (64, 64, 26), "spacing": (5.6, 5.6, 12.0)}
TINY = {"shape": (24, 24, 10), "spacing": (15.0, 15.0, 31.0)}


def volume_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def centroid_ras(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]


@pytest.fixture(scope="module")
def chest() -> Phantom:
    return make_phantom(**SMALL, seed=0)


@pytest.fixture(scope="module")
def healthy() -> Phantom:
    return make_phantom((96, 96, 44), (3.7, 3.7, 7.1), seed=4, lesions=())


def test_same_seed_same_arrays(chest):
    again, other = make_phantom(**SMALL, seed=0), make_phantom(**SMALL, seed=1)
    for name in ("image", "label", "lungs", "affine"):
        np.testing.assert_array_equal(getattr(chest, name), getattr(again, name))
    assert (chest.image != other.image).any() and (chest.lungs != other.lungs).any()
    assert chest.lesions == again.lesions != other.lesions


def test_types_and_affine(chest):
    assert (chest.image.dtype, chest.label.dtype, chest.lungs.dtype) == (np.int16, np.uint8, np.uint8)
    assert nib.aff2axcodes(chest.affine) == ("L", "P", "S")
    np.testing.assert_allclose(np.diag(chest.affine), [-5.6, -5.6, 12, 1])
    # The middle of the grid is the middle of the thorax.
    np.testing.assert_allclose(chest.affine @ [31.5, 31.5, 12.5, 1], [0, 0, 0, 1], atol=1e-9)


def test_the_grid_does_not_change_the_patient(chest):
    other = make_phantom((97, 80, 35), (3.7, 4.5, 9.0), seed=0)
    assert [one.kind for one in other.lesions] == [one.kind for one in chest.lesions]
    np.testing.assert_allclose(
        [one.centre + one.radii for one in other.lesions], [one.centre + one.radii for one in chest.lesions]
    )
    for value in (1, 2):
        expected = volume_ml(chest.lungs == value, chest.affine)
        assert volume_ml(other.lungs == value, other.affine) == pytest.approx(expected, rel=0.02)
        np.testing.assert_allclose(
            centroid_ras(other.lungs == value, other.affine),
            centroid_ras(chest.lungs == value, chest.affine),
            atol=2.0,
        )
    expected = volume_ml(chest.label > 0, chest.affine)
    assert volume_ml(other.label > 0, other.affine) == pytest.approx(expected, rel=0.06)


def test_lungs_are_those_of_an_adult(healthy):
    left, right = (volume_ml(healthy.lungs == value, healthy.affine) for value in (1, 2))
    assert 1500 < left < right < 3500
    assert centroid_ras(healthy.lungs == 1, healthy.affine)[0] < -30  # RAS: left is negative
    assert centroid_ras(healthy.lungs == 2, healthy.affine)[0] > 30
    assert (
        healthy.lungs[[0, -1]].max()
        == healthy.lungs[:, [0, -1]].max()
        == healthy.lungs[:, :, [0, -1]].max()
        == 0
    )
    for value in (1, 2):
        assert ndimage.label(healthy.lungs == value)[1] == 1
    assert not healthy.label.any() and healthy.lesions == ()


def test_air_of_the_lungs_meets_the_trachea_but_not_the_room(healthy):
    air, _ = ndimage.label(healthy.image < -600)
    lung = np.bincount(air[healthy.lungs > 0])
    lung[0] = 0
    inner = int(lung.argmax())
    assert lung[inner] > 0.85 * (healthy.lungs > 0).sum()  # both lungs but for vessels and edges
    assert inner not in air[[0, -1]] and inner not in air[:, [0, -1]]
    assert inner not in air[:, :, 0]
    # The trachea leaves through the top, in the midline, as part of the same air.
    top = np.argwhere(air[:, :, -1] == inner) - 47.5
    assert len(top) > 0 and np.abs(top[:, 0]).max() * 3.7 < 15
    trachea = (air == inner) & (healthy.lungs == 0)
    assert volume_ml(trachea, healthy.affine) > 15


def test_hounsfield_units(healthy):
    image, lungs = healthy.image.astype(float), healthy.lungs > 0
    core = ndimage.binary_erosion(lungs, iterations=2)
    assert -890 < np.median(image[core]) < -820
    assert -1010 < np.median(image[:, :5]) < -990
    x = healthy.affine[0, 3] + healthy.affine[0, 0] * np.arange(96)
    z = healthy.affine[2, 3] + healthy.affine[2, 2] * np.arange(44)
    liver = image[(x > 50) & (x < 80)][:, 35:60][:, :, (z < -110) & (z > -140)]
    assert 50 < np.median(liver) < 70 and liver.std() < 25  # noise of 15 HU and texture
    assert (image > 350).sum() > 1000  # bone
    assert image.max() < 1000


def test_lungs_are_denser_at_the_back(healthy):
    core = ndimage.binary_erosion(healthy.lungs > 0, iterations=2)
    j = np.broadcast_to(np.arange(96)[None, :, None], core.shape)
    front, back = np.quantile(j[core], [0.2, 0.8])
    difference = np.median(healthy.image[core & (j > back)]) - np.median(healthy.image[core & (j < front)])
    assert 25 < difference < 100


def test_lesions_lie_in_the_lungs_and_have_their_density():
    chest = make_phantom((96, 96, 44), (3.7, 3.7, 7.1), seed=2, burden=0.8)
    assert set(np.unique(chest.label)) == {0, 1, 2, 3}
    assert (chest.lungs[chest.label > 0] > 0).all()
    core = {
        value: chest.image[ndimage.binary_erosion(chest.label == value, np.ones((3, 3, 1)))]
        for value in (1, 2)
    }
    assert -600 < np.median(core[1]) < -300
    assert -50 < np.median(core[2]) < 60
    assert np.median(chest.image[chest.label == 3]) > -100


@pytest.mark.parametrize(
    ("kind", "side"), [("ground_glass", "left"), ("consolidation", "right"), ("nodule", "left")]
)
def test_exact_lesion_has_the_volume_and_centroid_of_its_ellipsoid(kind, side):
    lesion = Lesion(kind, (0.5, 0.62, 0.7), (12.0, 16.0, 20.0), side=side)
    chest = make_phantom((140, 120, 60), (2.5, 2.9, 5.0), seed=5, lesions=[lesion], noise_hu=0)
    mask = chest.label == LESION_CLASSES[kind]
    assert mask.sum() == (chest.label > 0).sum()
    assert lesion.volume_ml == pytest.approx(4 / 3 * np.pi * 12 * 16 * 20 / 1000)
    assert volume_ml(mask, chest.affine) == pytest.approx(lesion.volume_ml, rel=0.02)
    placed = chest.lesions[0]
    np.testing.assert_allclose(
        centroid_ras(mask, chest.affine), placed.centre, atol=0.5
    )  # a tenth of a slice
    assert placed.centre[0] < 0 if side == "left" else placed.centre[0] > 0
    assert (chest.lungs[mask] == (1 if side == "left" else 2)).all()
    spread = [np.ptp(axis) * step for axis, step in zip(np.nonzero(mask), (2.5, 2.9, 5.0), strict=True)]
    np.testing.assert_allclose(spread, [24, 32, 40], atol=6)


def test_lesion_at_a_given_point_keeps_its_place_and_density():
    lesion = Lesion("nodule", (70.0, 10.0, 40.0), (9.0, 9.0, 9.0), hu=80.0)  # RAS: the right lung
    chest = make_phantom((180, 180, 30), (2.0, 2.0, 3.0), seed=0, lesions=[lesion], noise_hu=0, scale=1)
    i, j, k = np.rint(np.linalg.solve(chest.affine, [70, 10, 40, 1])[:3]).astype(int)
    assert chest.label[i, j, k] == 3 and chest.lungs[i, j, k] == 2
    assert chest.image[i, j, k] == pytest.approx(80, abs=3)


def test_half_amplitude_is_the_edge_of_the_mask():
    """Along a line through a soft lesion the HU crosses the mean of lung and lesion where the mask ends."""
    lesion = Lesion("ground_glass", (-88.0, -25.0, 0.0), (14.0, 14.0, 14.0), hu=-400.0)
    grid = {"shape": (350, 350, 1), "spacing": (1.0, 1.0, 1.0), "seed": 3, "noise_hu": 0, "scale": 1.0}
    with_lesion, without = make_phantom(**grid, lesions=[lesion]), make_phantom(**grid, lesions=())
    mask, share = with_lesion.label[:, :, 0] > 0, np.zeros((350, 350))
    lung = without.image[:, :, 0].astype(float)
    parenchyma = ndimage.binary_erosion(without.lungs[:, :, 0] > 0, iterations=4) & (lung < -780)
    change = with_lesion.image[:, :, 0] - lung
    share[parenchyma] = change[parenchyma] / (-400 - lung[parenchyma])
    assert share[mask & parenchyma].min() > 0.45
    assert share[~mask & parenchyma].max() < 0.55
    assert ((share > 0.1) & (share < 0.9)).sum() > 200  # soft


def test_one_slice_is_the_middle_slice_of_a_stack():
    grid = {"spacing": (5.0, 4.0, 7.0), "seed": 7, "scale": 1.0, "noise_hu": 0}
    one, three = make_phantom((70, 88, 1), **grid), make_phantom((70, 88, 3), **grid)
    assert one.image.shape == (70, 88, 1)
    np.testing.assert_array_equal(one.lungs[:, :, 0], three.lungs[:, :, 1])
    np.testing.assert_array_equal(one.label[:, :, 0], three.label[:, :, 1])
    np.testing.assert_array_equal(one.image[:, :, 0], three.image[:, :, 1])
    assert one.lungs.max() == 2


def test_small_field_of_view_shrinks_or_crops():
    small = make_phantom((40, 40, 20), (1.0, 1.0, 2.0), seed=0)
    assert set(np.unique(small.lungs)) == {0, 1, 2}
    assert not small.lungs[[0, -1]].any() and not small.lungs[:, [0, -1]].any()
    crop = make_phantom((40, 40, 20), (1.0, 1.0, 2.0), seed=0, scale=1.0, lesions=())
    assert (crop.image < -600).mean() < (small.image < -600).mean()  # the middle of the mediastinum


def test_padding_outside_the_circle():
    padded, square = (make_phantom(**TINY, seed=0, padding_value=value) for value in (-2048, None))
    x = (np.arange(24) - 11.5) * 15
    outside = (x[:, None] ** 2 + x[None] ** 2) > 180**2
    assert (padded.image[outside] == -2048).all() and (padded.image[~outside] >= -1024).all()
    np.testing.assert_array_equal(padded.image[~outside], square.image[~outside])
    assert square.image.min() >= -1024


def test_noise_has_the_asked_deviation():
    noisy, clean = (make_phantom(**SMALL, seed=0, noise_hu=value) for value in (20, 0))
    inner = clean.image > -900  # air is cut off at -1024
    assert (noisy.image.astype(float) - clean.image)[inner].std() == pytest.approx(20, rel=0.03)


def test_burden_and_cohort_vary():
    extents = [(make_phantom(**TINY, seed=0, burden=burden).label > 0).sum() for burden in (0.0, 1.0)]
    assert extents[1] > 4 * max(extents[0], 1)
    drawn = [len(make_phantom((8, 8, 1), (40.0, 40.0, 5.0), seed=seed).lesions) for seed in range(5)]
    assert len(set(drawn)) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8, 8)}, "shape must be 3 positive"),
        ({"shape": (8, 0, 8)}, "shape must be 3 positive"),
        ({"spacing": (1, -1, 1)}, "spacing must be 3 positive"),
        ({"spacing": (1, float("nan"), 1)}, "spacing must be 3 positive"),
        ({"scale": 0}, "scale must be positive"),
        ({"burden": 2}, "burden must lie between"),
        ({"lesions": ["tumour"]}, "'tumour' is not one of"),
        ({"lesions": [Lesion("nodule", (0, 0, 0), (5, 5, 5))]}, "reaches out of the lungs"),
        ({"lesions": [Lesion("nodule", (1, 0.5, 0.5), (9, 9, 9), side="left")]}, "reaches out of the lungs"),
    ],
)
def test_user_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_phantom(**{**TINY, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [("mass", (0, 0, 0), (5, 5, 5)), ("nodule", (0, 0), (5, 5, 5)), ("nodule", (0, 0, 0), (5, 0, 5))],
)
def test_lesion_errors(arguments):
    with pytest.raises(ValueError, match="Lesion: "):
        Lesion(*arguments)


def test_save_round_trip(chest, tmp_path):
    paths = chest.save(tmp_path / "new", "p")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"p_{name}.nii.gz" for name in ("classes", "ct", "lungs", "opacity")
    ]
    arrays = {"ct": chest.image, "opacity": chest.label > 0, "classes": chest.label, "lungs": chest.lungs}
    assert paths.keys() == arrays.keys()
    for name, array in arrays.items():
        image = nib.load(paths[name])
        np.testing.assert_array_equal(np.asarray(image.dataobj), array)
        assert image.get_data_dtype() == (np.int16 if name == "ct" else np.uint8)
        np.testing.assert_allclose(image.affine, chest.affine, atol=1e-4)
        np.testing.assert_allclose(image.get_qform(), chest.affine, atol=1e-3)
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
        assert image.header.get_xyzt_units()[0] == "mm"


def test_interrupted_save_leaves_no_scan(chest, tmp_path, monkeypatch):
    save = nib.save

    def broken(image, path):
        save(image, path)
        if image.get_data_dtype() == np.int16:
            raise OSError("disk full")

    monkeypatch.setattr(files.nib, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        chest.save(tmp_path, "p")
    assert not list(tmp_path.glob("*_ct*")) and len(list(tmp_path.iterdir())) == 3  # the masks alone, whole


def test_cohort_is_listed_and_not_redone(tmp_path):
    arguments = {"folder": tmp_path, "n_cases": 3, "seed": 2, **TINY, "n_folds": 2}
    path = write_cohort(**arguments)
    datalist = json.loads(path.read_text())
    assert datalist["modality"] == {"0": "CT"} and datalist["labels"] == {"0": "background", "1": "opacity"}
    assert [entry["fold"] for entry in datalist["training"]] == [0, 1, 0]
    assert len({entry["patient_id"] for entry in datalist["training"]}) == 3
    scans = [np.asarray(nib.load(tmp_path / entry["image"]).dataobj) for entry in datalist["training"]]
    for entry, scan in zip(datalist["training"], scans, strict=True):
        opacity = np.asarray(nib.load(tmp_path / entry["label"]).dataobj)
        assert opacity.shape == scan.shape == TINY["shape"] and set(np.unique(opacity)) <= {0, 1}
    assert (scans[0] != scans[1]).any()

    (tmp_path / "case_001_lungs.nii.gz").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("case_*")}
    write_cohort(**arguments)
    after = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("case_*")}
    assert {name for name in after if after[name] != before.get(name)} == {
        f"case_001_{name}.nii.gz" for name in ("ct", "opacity", "classes", "lungs")
    }
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "case_001_ct.nii.gz").dataobj), scans[1])


@pytest.mark.parametrize("change", [{"seed": 3}, {"shape": (24, 24, 9)}, {"spacing": (15.0, 15.0, 30.0)}])
def test_cohort_refuses_a_folder_with_other_cases(tmp_path, change):
    arguments = {"folder": tmp_path, "n_cases": 1, "seed": 2, **TINY}
    write_cohort(**arguments)
    with pytest.raises(ValueError, match="case_000_ct.nii.gz was made with other settings"):
        write_cohort(**{**arguments, **change})


def test_command(tmp_path, capsys):
    path = Path(__file__).parents[2] / "scripts" / "make_phantoms.py"
    spec = importlib.util.spec_from_file_location("make_phantoms", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = ["--output-dir", str(tmp_path), "--shape", "16", "16", "8", "--spacing", "22", "22", "39"]
    assert script.main([*options, "--cases", "2", "--folds", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "datalist.json")
    assert script.main([*options, "--cases", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: write_cohort: n_cases") and error.count("\n") == 1
