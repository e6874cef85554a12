# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import shutil
import subprocess

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.pixels import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from custom.data.dicom import find_studies
from custom.data.dicom_series import choose_series, read_series
from custom.data.dicom_writer import write_dicom_series
from tests import lossless_jpeg

SHAPE, SPACING = (5, 4, 3), (0.7, 0.9, 2.5)
AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1]])


def make_hu(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1024, 3072, shape).astype(np.int16)


def read_back(folder):
    (study,) = find_studies(folder)
    (series,) = study.series
    return read_series(series)


def axis_orders():
    """All 48 ways to lay voxel axes along the axes of the body."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            directions = np.zeros((3, 3))
            directions[list(order), range(3)] = signs
            yield pytest.param(
                directions, id="".join("RAS"[o] + "-+"[s > 0] for o, s in zip(order, signs, strict=True))
            )


def check_same_scan(hu, affine, volume):
    """Every voxel of the one lies at the centre of a voxel of the other, and has its value."""
    assert volume.hu.size == hu.size
    index = np.indices(hu.shape).reshape(3, -1)
    place = np.linalg.inv(volume.affine) @ affine @ np.vstack([index, np.ones(index.shape[1])])
    np.testing.assert_allclose(place[:3], np.rint(place[:3]), atol=1e-4)
    i, j, k = np.rint(place[:3]).astype(int)
    assert min(i.min(), j.min(), k.min()) == 0
    np.testing.assert_array_equal(volume.hu[i, j, k], hu[tuple(index)])


@pytest.mark.parametrize("directions", axis_orders())
def test_round_trip_in_every_axis_order(tmp_path, directions):
    affine = np.eye(4)
    affine[:3, :3] = directions * SPACING
    affine[:3, 3] = (12.25, -34.5, 56.125)
    hu = make_hu()
    write_dicom_series(tmp_path, hu, affine, shuffle=True)
    volume = read_back(tmp_path)
    check_same_scan(hu, affine, volume)
    np.testing.assert_allclose(volume.spacing, SPACING)
    if np.linalg.det(directions) > 0:  # DICOM stacks are read right-handed, so these are read as written
        np.testing.assert_allclose(volume.affine, affine, atol=1e-9)
        np.testing.assert_array_equal(volume.hu, hu)
    else:
        np.testing.assert_array_equal(volume.hu, hu[:, :, ::-1])


def test_round_trip_oblique(tmp_path):
    a, b = np.deg2rad(12), np.deg2rad(-7)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = AFFINE.copy()
    affine[:3, :3] = about_x @ about_z @ AFFINE[:3, :3]
    hu = make_hu()
    write_dicom_series(tmp_path, hu, affine)
    volume = read_back(tmp_path)
    check_same_scan(hu, affine, volume)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.series.orientation == "axial"


def test_round_trip_of_one_slice(tmp_path):
    hu = make_hu((5, 4, 1))
    write_dicom_series(tmp_path, hu, AFFINE)
    volume = read_back(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.affine, AFFINE)


def test_tags_worked_out_by_hand(tmp_path):
    hu = make_hu()
    files = write_dicom_series(
        tmp_path, hu, AFFINE, patient_position="FFS", study_date="20210405", series_number=7, kernel="B40f"
    )
    assert len(files) == 3
    image = dcmread(files[1])
    # RAS (90, 120, -300) is LPS (-90, -120, -300); slice 1 is 2.5 mm further up.
    assert [float(v) for v in image.ImagePositionPatient] == [-90, -120, -297.5]
    assert [float(v) for v in image.ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
    assert [float(v) for v in image.PixelSpacing] == [0.9, 0.7]  # between rows, between columns
    assert (image.Rows, image.Columns) == (4, 5)
    assert float(image.SliceThickness) == 2.5 and float(image.SliceLocation) == -297.5
    assert image.InstanceNumber == 2 and image.SeriesNumber == 7
    assert image.StudyDate == "20210405" and image.PatientPosition == "FFS"
    assert image.ConvolutionKernel == "B40f" and image.Modality == "CT"
    np.testing.assert_array_equal(image.pixel_array.astype(int) - 1024, hu[:, :, 1].T)


def test_uids_follow_from_seed_and_series(tmp_path):
    def uids(folder, **options):
        headers = [
            dcmread(f) for f in write_dicom_series(tmp_path / folder, make_hu((2, 2, 30)), AFFINE, **options)
        ]
        return [
            [str(h[keyword].value) for h in headers]
            for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")
        ]

    first, again, second, other = uids("a"), uids("b"), uids("c", series_number=12), uids("d", seed=1)
    assert first == again
    assert first[0] == second[0] and first[2] == second[2]  # one study, one frame of reference
    assert first[1] != second[1] and len(set(first[1])) == 1
    assert first[0] != other[0]
    images = first[3] + second[3] + other[3]
    assert len(set(images)) == 90
    assert all(len(uid) <= 64 for uid in images)


def test_shuffled_names_do_not_follow_the_slices(tmp_path):
    hu = make_hu((2, 2, 8))
    files = write_dicom_series(tmp_path, hu, AFFINE, shuffle=True)
    assert files != sorted(files)
    assert [dcmread(f).InstanceNumber for f in files] == list(range(1, 9))
    np.testing.assert_array_equal(read_back(tmp_path).hu, hu)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless],
    ids=["implicit", "deflated", "rle", "jpeg2000", "jpegls"],
)
def test_round_trip_in_other_transfer_syntaxes(tmp_path, syntax, signed):
    if syntax == JPEGLSLossless:
        pytest.importorskip("jpeg_ls", reason="pyjpegls, which encodes JPEG-LS, is not installed")
    hu = make_hu((40, 36, 2))
    files = write_dicom_series(tmp_path, hu, AFFINE, transfer_syntax=syntax, signed=signed)
    assert dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_back(tmp_path).hu, hu)


@pytest.mark.parametrize("signed", [False, True])
def test_lossless_jpeg_is_read(tmp_path, signed):
    hu = make_hu((40, 36, 2))
    hu[3:5, 7] = [[-1024], [30_000]]  # steps of all sizes
    for file in write_dicom_series(tmp_path, hu, AFFINE, signed=signed):
        lossless_jpeg.compress_slice(file)
        assert dcmread(file).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    np.testing.assert_array_equal(read_back(tmp_path).hu, hu)


def test_jpeg_ls_is_read_by_the_decoder_that_is_always_installed(tmp_path):
    """pyjpegls, which the test above encodes with, comes with highdicom, which is optional."""
    pytest.importorskip("jpeg_ls", reason="pyjpegls, which encodes JPEG-LS, is not installed")
    hu = make_hu((40, 36, 2))
    files = write_dicom_series(tmp_path, hu, AFFINE, transfer_syntax=JPEGLSLossless)
    stored = [pixel_array(file, decoding_plugin="pylibjpeg").astype(int).T - 1024 for file in files]
    np.testing.assert_array_equal(np.stack(stored, axis=-1), hu)


@pytest.mark.parametrize("options", [{"signed": True}, {"rescale_intercept": -4096}, {"rescale_slope": 2}])
def test_round_trip_of_other_rescaling(tmp_path, options):
    hu = make_hu() // 2 * 2  # even, so that a slope of 2 loses nothing
    write_dicom_series(tmp_path, hu, AFFINE, **options)
    np.testing.assert_array_equal(read_back(tmp_path).hu, hu)


def test_refuses_what_dicom_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="3 dimensions"):
        write_dicom_series(tmp_path, np.zeros((4, 4), np.int16), AFFINE)
    sheared = AFFINE.copy()
    sheared[1, 2] = 0.5
    with pytest.raises(ValueError, match="not orthogonal"):
        write_dicom_series(tmp_path, make_hu(), sheared)
    with pytest.raises(ValueError, match="without length"):
        write_dicom_series(tmp_path, make_hu(), np.diag([1.0, 0, 1, 1]))
    with pytest.raises(ValueError, match="-1024 to .* do not fit uint16"):
        write_dicom_series(tmp_path, make_hu() * 0 - 2048, AFFINE)
    with pytest.raises(ValueError, match="rescale_slope"):
        write_dicom_series(tmp_path, make_hu(), AFFINE, rescale_slope=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dciodvfy (Debian's dicom3tools) is not installed"
)
@pytest.mark.parametrize("options", [{}, {"signed": True, "transfer_syntax": RLELossless}])
def test_passes_a_validator(tmp_path, options):
    for file in write_dicom_series(tmp_path, make_hu(), AFFINE, **options):
        done = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
        report = done.stdout + done.stderr
        assert "CTImage" in report
        assert "Error" not in report and "Warning" not in report


def test_written_series_is_chosen(tmp_path):
    write_dicom_series(tmp_path, make_hu(), AFFINE)
    (study,) = find_studies(tmp_path)
    series, reason = choose_series(study)
    assert series.uid in reason and "3 slices" in reason
